"""Supervised fine-tuning of an exported model, as the paper does it."""
