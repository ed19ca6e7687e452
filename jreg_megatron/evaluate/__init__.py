"""Evaluate a model and its layers, and compare two models."""
