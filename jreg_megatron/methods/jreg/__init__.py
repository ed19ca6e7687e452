"""JREG itself: its formulas, its settings, its kernels and its gradient (arXiv 2601.18302)."""
