"""Values on a grid of few bits: rounded to it (``fitting``), and found there again (``finding``)."""
