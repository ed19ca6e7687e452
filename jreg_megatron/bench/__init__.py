"""What JREG costs: kernels by themselves, Megatron's training step, and how the cost grows with the model."""
