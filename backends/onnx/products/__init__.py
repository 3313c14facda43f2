"""Products with packed weights as operators of the domain ``sparsify``, and the library that runs them."""
