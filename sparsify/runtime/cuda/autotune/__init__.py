"""Measure every kernel on one shape, on the GPU at hand, and keep what was measured."""
