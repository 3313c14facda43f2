"""Region passes over a program: both streams, one region's training, the guard."""
