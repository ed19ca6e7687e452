"""Imported once by the fork server: Megatron on the CPU, ready for every rank that is forked from it."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

from jreg_megatron import cpu  # noqa: E402

cpu.enable()

if cpu.has_training_loop():
    # What every rank would import by its first step: tokenizers bring transformers, optimizers bring dynamo.
    import torch._dynamo

    from jreg_megatron import gpt_pretraining, pretrain, training_loop  # noqa: F401

gc.freeze()  # a collection in a rank would touch, and so copy, all of this
