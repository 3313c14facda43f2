"""What compressed-tensors wrote (llm-compressor, Red Hat AI): quantized weights, those stored without their zeros, and
both at once in the order that a kernel took them in.
"""
