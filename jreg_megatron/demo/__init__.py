"""The demonstration run: it makes its tokenizer from real text, and trains small models."""
