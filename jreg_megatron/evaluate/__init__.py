"""Evaluates a model and its layers, and compares two models."""
