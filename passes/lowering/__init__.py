"""Passes that prune nothing: graphs whose weights were pruned, rewritten for packed operators."""
