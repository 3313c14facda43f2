"""A tiny model of every type that transformers has, through all of sparsify; see ``python tools/breadth --help``."""
