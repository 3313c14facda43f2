"""Which settings are tried, and in which order: numbers alone, and a loss that somebody else measures."""
