"""A decoder-only language model as layers, final norm and head, from Hugging Face, GGUF or Megatron."""
