"""What an author of a pruning method needs, and nothing else: patterns, masks, statistics, bases, specs, registry."""
