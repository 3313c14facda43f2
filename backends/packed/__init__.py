"""Packed folders: what ``--to packed`` writes, and the modules with which transformers runs them.

``backend`` writes, ``quantizer`` loads (through transformers' own registration), ``modules`` compute, ``unpack`` goes
back, ``bench`` measures. ``docs/format.md`` is the format.
"""
