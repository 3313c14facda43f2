"""GGUF files: config and tokenizer as transformers reads them, tensors as its converter and gguf-py make them dense."""
