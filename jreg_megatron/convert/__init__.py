"""A model between Megatron's ``torch_dist`` checkpoints and Hugging Face's Llama folders, both ways."""
