"""Which dimensions of a model's parameters must shrink together."""
