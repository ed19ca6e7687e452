"""LET: an early layer learns from the last state of a small teacher (arXiv 2602.05393)."""
