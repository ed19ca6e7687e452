"""Peri-LN: a norm behind each module of a layer too (arXiv 2502.02732)."""
