"""``sparsify eval``: the command, and its table of scores."""
