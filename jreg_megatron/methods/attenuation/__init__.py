"""Residual attenuation: a layer keeps only a part of its input (arXiv 2602.14760)."""
