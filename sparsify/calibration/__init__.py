"""Token batches, the interpreter that runs them region by region, and what is recorded on the way."""
