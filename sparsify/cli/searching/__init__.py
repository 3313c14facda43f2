"""``sparsify search`` and ``sparsify sensitivity``, and their tables."""
