"""Parts of Megatron that we need: installed packages, arguments, data, initial weights, torch-only layers."""
