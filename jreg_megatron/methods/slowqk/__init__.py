"""Queries and keys of the upper layers learn more slowly at first (arXiv 2605.10504)."""
