"""Convert between Megatron's ``torch_dist`` checkpoints and Hugging Face folders of a Llama or Qwen."""
