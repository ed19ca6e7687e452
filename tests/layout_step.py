"""Runs one training step of a layout on real ranks and compares it with the reference."""

from __future__ import annotations

import torch
from harness import run_function

from jreg_megatron.selftest.compare import Comparison, Difference, compare_step
from jreg_megatron.selftest.layouts import Layout


def on_ranks(layout: Layout) -> tuple[Difference, Difference]:
    """How far a step at the layout is from the reference, and how far it may be."""
    comparison = run_function(_compare, layout.world_size, layout, timeout=120)[0]
    return comparison.found, comparison.limit


def _compare(layout: Layout) -> Comparison:
    torch.set_num_threads(1)
    return compare_step(layout)
