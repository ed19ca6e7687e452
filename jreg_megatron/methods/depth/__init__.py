"""How a model uses its depth, per layer: voids, contributions of attention and MLP, entropy, curvature."""
