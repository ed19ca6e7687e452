"""Any decoder-only language model as layers, final norm and head: Hugging Face, GGUF or Megatron."""
