"""Structural passes over a model: which channels go, the graph without them, the smaller folder."""
