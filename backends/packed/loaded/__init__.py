"""A packed folder loaded by transformers: its layers, and the layouts of the device that they lie on."""
