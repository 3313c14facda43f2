"""Calibration and evaluation data as batches that a program can run."""
