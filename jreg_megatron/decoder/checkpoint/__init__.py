"""Megatron's ``torch_dist`` checkpoints as decoders, saved at any layout, in one process without a GPU.

``folder`` -> ``weights`` -> ``arguments`` -> ``model``; beside them ``tokenizer`` and ``validation``.
"""
