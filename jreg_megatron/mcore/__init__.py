"""What is known of Megatron: what is installed, arguments, data, initial weights, torch-only layers."""
