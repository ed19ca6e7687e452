"""The residual stream of a built model: where it is, what is read and added, what is refused."""
