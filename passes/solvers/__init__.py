"""How the kept weights of a matrix are moved: a damped Gram matrix, a sweep, an exact solution."""
