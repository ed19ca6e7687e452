"""The example of a custom loop, on a Megatron-LM tree's core and the toy dataset (see ways_in.py)."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import numpy as np
import torch.distributed as dist


def main(tree: str, data: str, result: str) -> None:
    from conftest import ITERATIONS, read_steps

    from jreg_megatron import JRegConfig
    from jreg_megatron.examples import custom_loop

    custom_loop.initialize(tensor=2, pipeline=2)
    import megatron.core

    assert Path(megatron.core.__file__).is_relative_to(tree)
    steps = read_steps(Path(data), eod_mask_loss=False)
    batches = (dict(zip(("tokens", "labels", "loss_mask"), part, strict=True)) for part in chain(*steps))
    values = list(custom_loop.train(batches, ITERATIONS, JRegConfig(coeff=0.5, alpha=0.5)))
    if dist.get_rank() == dist.get_world_size() - 1:
        np.savez(
            result,
            lm_loss=[lm_loss for lm_loss, _ in values],
            jreg_loss=[metrics.jreg_loss for _, metrics in values],
            jump_rate=[metrics.jump_rate for _, metrics in values],
        )


if __name__ == "__main__":
    main(*sys.argv[1:4])
