"""What is known of Megatron's loop: its arguments, its data and its initial weights."""
