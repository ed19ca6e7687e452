"""The demonstration run: real text, its tokenizer and a small model, made on the spot."""
