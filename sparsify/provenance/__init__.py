"""Where a model comes from: its history in ``sparsify.json``, and the card that tells people of it."""
