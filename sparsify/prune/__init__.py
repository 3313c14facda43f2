"""Weight passes over a program: which weights, in which order, measured on what, and checked."""
