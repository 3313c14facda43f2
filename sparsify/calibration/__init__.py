"""The interpreter that runs a program region by region, and what is recorded on the way."""
