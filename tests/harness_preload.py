"""Imported once by the fork server: Megatron on the CPU, ready for every rank that is forked from it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

from jreg_megatron import cpu  # noqa: E402

cpu.enable()

if cpu.has_training_loop():
    import tensorboard.summary  # noqa: F401

    from jreg_megatron import gpt_pretraining, pretrain, training_loop  # noqa: F401
