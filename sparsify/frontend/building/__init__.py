"""What building the model of a config needs: its bounds, its class, its widths, what is computed and not stored."""
