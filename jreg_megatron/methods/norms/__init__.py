"""Norms of the residual stream and update ratios, per layer: the figures by which a training's health is
watched."""
