"""What the compiler sees in a model, for people."""
