"""``compile``: from a model and passes to an output."""
