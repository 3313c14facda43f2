"""Other runtimes that a model is measured in beside ours, where they are installed."""
