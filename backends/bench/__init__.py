"""``sparsify bench``: one folder against another, of any kind."""
