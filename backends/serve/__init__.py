"""``sparsify serve``: a folder of any kind that torch runs, behind transformers' OpenAI-compatible handlers."""
