"""The Triton kernels in Triton's interpreter, in a separate process.

``TRITON_INTERPRET`` is read when Triton is first imported and holds for the whole process, so what the
tests import must not see it: other tests compile these kernels.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from jreg_megatron.methods.jreg.kernels.handed import Gradients

GUARD = 64
"""Number of elements on either side of a kernel's output."""


@dataclass(frozen=True)
class InterpretedKernels:
    """``TritonKernels`` with the methods of the real one, which run in the interpreter's process.

    Args:
        tile: rows and columns of a program's tile, in place of those for the width.
    """

    tile: tuple[int, int] | None = None
    name: str = "triton, interpreted"

    def displacement(self, *given: Any) -> Tensor:
        psi: Tensor = in_interpreter(_call, self.tile, "displacement", given, {})
        return psi

    def gradients(self, *given: Any, **named: Any) -> Gradients:
        found: Gradients = in_interpreter(_call, self.tile, "gradients", given, named)
        return found


def in_interpreter(function: Callable[..., Any], *given: Any) -> Any:
    """Run an importable function there. Tensors keep their strides and storages on the way."""
    # Plain pickle: multiprocessing's own would put every storage into shared memory.
    return pickle.loads(_process().submit(_unpickled, pickle.dumps((function, given))).result(timeout=240))


def call_guarded(
    tile: tuple[int, int] | None, method: str, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[list[bool], list[bool]]:
    """Call a method whose results lie between guards, all filled with NaN before.

    Returns:
        For each allocated tensor, whether its guards are as they were, and whether all of it was written.
    """
    allocated: list[tuple[Tensor, Tensor]] = []
    empty = torch.empty

    def guarded_empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        whole = empty(math.prod(shape) + 2 * GUARD, dtype=dtype, device=device).fill_(torch.nan)
        inner = whole[GUARD:-GUARD].view(shape)
        allocated.append((whole, inner))
        return inner

    with mock.patch.object(torch, "empty", guarded_empty):
        _call(tile, method, given, named)
    return (
        [bool(torch.cat([whole[:GUARD], whole[-GUARD:]]).isnan().all()) for whole, _ in allocated],
        [not bool(inner.isnan().any()) for _, inner in allocated],
    )


def chosen(kind: str, width: int, dtype: torch.dtype) -> str:
    """The name of the kernels that are chosen there."""
    from jreg_megatron.methods.jreg.kernels import choose

    return choose(kind, torch.device("cpu"), width, dtype).name


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter(
        "ignore", RuntimeWarning
    )  # numpy's, on 1 / 0 in rows that the kernels mask after it


def _unpickled(task: bytes) -> bytes:
    function, given = pickle.loads(task)
    return pickle.dumps(function(*given))


def _call(tile: tuple[int, int] | None, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    from jreg_megatron.methods.jreg.kernels import fused

    assert fused.IS_INTERPRETED
    kernels = fused.KERNELS
    if tile is not None:
        kernels = fused.TritonKernels(tile=fused.Tile(*tile, num_warps=1))
    return getattr(kernels, method)(*given, **named)
