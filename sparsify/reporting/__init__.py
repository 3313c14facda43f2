"""A folder of ours told to people: one page of HTML by its ``sparsify.json``, which holds all that it shows."""
