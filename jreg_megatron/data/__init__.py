"""Text into Megatron's token files, and a look into them: ``python -m jreg_megatron.data``."""
