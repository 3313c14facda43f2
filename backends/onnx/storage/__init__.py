"""The weights of an ONNX file: linked, beside it, or packed; written and read one at a time."""
