"""Packed folders: their format, writing them, reading them as if they were dense."""
