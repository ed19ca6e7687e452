"""Imported once by the fork server: Megatron on the CPU, ready for every rank that is forked from it."""

import argparse
import functools
import gc
import inspect
import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

from jreg_megatron import cpu  # noqa: E402
from jreg_megatron.mcore.installed import has_training_loop  # noqa: E402

cpu.enable()

if has_training_loop():
    # Every rank needs these by its first step: tokenizers import transformers, optimizers import dynamo.
    import torch._dynamo
    from megatron.training.arguments import add_megatron_arguments

    from jreg_megatron import gpt_pretraining, pretrain, training_loop  # noqa: F401

    # Megatron makes its parser three times a run, each time from the sources of its dataclasses.
    inspect.getsource = functools.cache(inspect.getsource)
    add_megatron_arguments(argparse.ArgumentParser())

gc.freeze()  # a collection in a rank would touch, and so copy, all of this
