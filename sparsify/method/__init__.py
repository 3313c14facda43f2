"""What an author of a pruning method needs, and nothing else: patterns, masks, statistics, the bases, specs, the registry."""
