"""``jreg_megatron.pretrain`` with one accident during the run. The first arguments say which, and when."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
from typing import Any

import torch


def killed(argv: list[str]) -> None:
    """``RANK ITERATION ...``: that rank is killed in the second micro-batch of that iteration."""
    from jreg_megatron import gpt_pretraining, pretrain

    rank, iteration = map(int, argv[:2])
    step = gpt_pretraining.forward_step
    calls: list[int] = []

    def forward_step(*args: Any) -> Any:
        calls.append(_iteration())
        if torch.distributed.get_rank() == rank and calls.count(iteration) == 2:
            _kill()
        return step(*args)

    gpt_pretraining.forward_step = forward_step
    pretrain.main(argv[2:])


def killed_while_saving(argv: list[str]) -> None:
    """``ITERATION ...``: every rank is killed in the middle of writing that iteration's checkpoint."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from jreg_megatron import pretrain

    write = filesystem_async._write_item
    written: list[int] = []

    @functools.wraps(write)
    def write_item(*args: Any, **named: Any) -> Any:
        if _iteration() == int(argv[0]) and written.count(_iteration()) == 5:
            next(each for each in args if hasattr(each, "flush")).flush()
            _kill(*multiprocessing.active_children())
        written.append(_iteration())
        return write(*args, **named)

    filesystem_async._write_item = write_item
    pretrain.main(argv[1:])


def not_finite(argv: list[str]) -> None:
    """``RANK ITERATION LAYER VALUE ...``: one number of one token of that layer's output becomes VALUE.

    In the first micro-batch of that iteration (and of its reruns) on that rank.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from jreg_megatron import gpt_pretraining, pretrain
    from jreg_megatron.stream.anatomy import residual_layers, unwrap

    rank, iteration, layer = map(int, argv[:3])
    value = float(argv[3])
    step = gpt_pretraining.forward_step
    calls: list[int] = []

    def spoil(_: Any, __: Any, output: tuple[torch.Tensor, Any]) -> Any:
        spoilt = output[0].clone()
        spoilt[20, 1, 7] = value
        return spoilt, output[1]

    def forward_step(iterator: Any, model: Any) -> Any:
        is_first = calls.count(_iteration()) % get_num_microbatches() == 0
        calls.append(_iteration())
        if torch.distributed.get_rank() != rank or _iteration() != iteration or not is_first:
            return step(iterator, model)
        layers = {each.number: each.last for each in residual_layers(unwrap(model))}
        hook = layers[layer].mlp.register_forward_hook(spoil)
        try:
            return step(iterator, model)
        finally:
            hook.remove()

    gpt_pretraining.forward_step = forward_step
    pretrain.main(argv[4:])


def _kill(*helpers: multiprocessing.process.BaseProcess) -> None:
    for helper in helpers:
        helper.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _iteration() -> int:
    from megatron.training import get_args

    return int(get_args().curr_iteration) + 1


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2:])
