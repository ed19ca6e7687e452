"""A training run that counts its collectives and host synchronisations, in and between training steps."""

from __future__ import annotations

import functools
import importlib
import json
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all_single"),
    *("barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "reduce"),
    *("reduce_scatter", "reduce_scatter_tensor"),
)


def main(argv: list[str]) -> None:
    """``MODULE:FUNCTION ...``: run the function, and print the counts in and after each training step."""
    from megatron.training import training

    counts = {"collectives": 0, "synchronisations": 0}
    marks: list[dict[str, int]] = []

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            counts["collectives"] += 1
            return function(*args, **named)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(getattr(dist, name)))

    class Synchronisations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts["synchronisations"] += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    step = training.train_step

    @functools.wraps(step)
    def train_step(*args: Any, **named: Any) -> Any:
        marks.append(dict(counts))
        with Synchronisations():
            result = step(*args, **named)
        marks.append(dict(counts))
        return result

    training.train_step = train_step
    module, function = argv[0].split(":")
    getattr(importlib.import_module(module), function)(argv[1:])
    changes = [{name: after[name] - before[name] for name in after} for before, after in pairwise(marks)]
    print("COUNTED", json.dumps({"in_step": changes[::2], "after_step": changes[1::2]}), flush=True)
