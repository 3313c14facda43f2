"""Models whose weights were published quantized, read as if they were dense: one format a file.

A format finds its weights among a file's tensors and says how each is made dense; the library that wrote the format
does it where that runs on a CPU and one tensor at a time, plain mathematics where not.
"""
