"""``sparsify bench``: a packed model against the dense one."""
