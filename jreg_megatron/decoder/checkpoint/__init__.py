"""Read Megatron's ``torch_dist`` checkpoints of any layout as decoders, in one process without a GPU.

``folder`` -> ``weights`` -> ``arguments`` -> ``model``; beside them ``tokenizer`` and ``validation``.
"""
