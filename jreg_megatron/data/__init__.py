"""Encode text into Megatron's token files, and inspect such files: ``python -m jreg_megatron.data``."""
