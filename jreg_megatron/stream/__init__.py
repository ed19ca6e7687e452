"""The residual stream of a built model, without any method: where it is, how to read and change it."""
