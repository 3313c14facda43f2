"""Two folders held against each other: which weights are zero in both, how far others moved, what else differs."""
