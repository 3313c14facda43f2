"""``sparsify verify``: what a folder really holds, ours or not."""
