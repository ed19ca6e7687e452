"""Measure how far each layer of a decoder turns the residual stream."""
