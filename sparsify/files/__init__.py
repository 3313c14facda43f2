"""Model folders as files: safetensors read and patched in place, outputs that appear whole, the manifest."""
