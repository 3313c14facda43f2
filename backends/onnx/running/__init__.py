"""Exported folders in onnxruntime: sessions, generation over the cache in the graph, text in and out."""
