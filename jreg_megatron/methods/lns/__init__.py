"""LayerNorm scaling: the norms of layer l are multiplied by ``1 / sqrt(l)`` (arXiv 2502.05795)."""
