"""Imported once by the fork server: Megatron on the CPU, ready for every rank that is forked from it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

from jreg_megatron import cpu  # noqa: E402

cpu.enable()

import megatron.training.models.gpt  # noqa: E402, F401
import tensorboard.summary  # noqa: E402, F401

from jreg_megatron import gpt_pretraining, pretrain, training_loop  # noqa: E402, F401
