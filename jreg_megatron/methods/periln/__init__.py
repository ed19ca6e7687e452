"""Peri-LN: a norm after each module of a layer too (arXiv 2502.02732)."""
