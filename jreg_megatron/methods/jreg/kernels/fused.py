"""Displacement and its gradients by one Triton kernel each; see ``programs.py``."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from jreg_megatron.methods.jreg.kernels.eager import computed_in
from jreg_megatron.methods.jreg.kernels.handed import Above, Gradients, Rows
from jreg_megatron.methods.jreg.kernels.programs import displacement_kernel, gradients_kernel

WIDEST = 8192
"""Elements of a row that are held in registers."""

_LOOPED_BLOCK = 2048
_SMALLEST_TILE = 1024
_PER_THREAD = 16
"""Elements of each state per thread: two 16-byte loads in half precision."""


@dataclass(frozen=True)
class Tile:
    """How a kernel is split: rows and columns of a program's tile, and its warps."""

    rows: int
    columns: int
    num_warps: int


@functools.cache
def tile_for(width: int) -> Tile:
    """The tile for states of a hidden size; the columns are a power of two."""
    columns = triton.next_power_of_2(width) if width <= WIDEST else _LOOPED_BLOCK
    rows = max(1, _SMALLEST_TILE // columns)
    return Tile(rows, columns, max(1, rows * columns // (32 * _PER_THREAD)))


IS_INTERPRETED = isinstance(gradients_kernel, InterpretedFunction)
"""Whether ``TRITON_INTERPRET=1`` was set: then the kernels run on a CPU, slowly, for tests."""


_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class TritonKernels:
    """See :class:`jreg_megatron.methods.jreg.kernels.Kernels`."""

    tile: Tile | None = None
    """Used instead of :func:`tile_for`'s, if given; for tests."""

    @property
    def kind(self) -> str:
        return f"triton {triton.__version__}"

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.tile}" if self.tile else self.kind

    @torch.no_grad()
    def displacement(self, h_in: Tensor, h_out: Tensor) -> Tensor:
        """Psi of every token."""
        compute = computed_in(h_in, h_out)
        psi = torch.empty(h_in.shape[:-1], dtype=compute, device=h_in.device)
        a, b = _as_sbh(h_in), _as_sbh(h_out)
        self._launch(displacement_kernel, a, compute, a, b, psi, strides=(a, b))
        return psi

    def gradients(
        self,
        h_in: Tensor,
        h_out: Tensor,
        grad_out: Tensor,
        coefficient: Tensor,
        factor: float,
        token_weights: Tensor | None = None,
        needs_grad_in: bool = True,
        needs_psi: bool = True,
        above: Above | None = None,
        hands_down: bool = False,
        rows: Rows | None = None,
    ) -> Gradients:
        """The gradients for both states, Psi, which costs nothing here, and what is handed down.

        What is handed down is one tensor with three numbers per token; see the program.
        """
        compute = computed_in(h_in, h_out)
        device = h_in.device
        numbers = torch.empty((3 if hands_down else 1, *h_in.shape[:-1]), dtype=compute, device=device)
        total = torch.empty(h_out.shape, dtype=h_out.dtype, device=device)
        grad_in = None
        if needs_grad_in and not hands_down:
            grad_in = torch.empty(h_in.shape, dtype=h_in.dtype, device=device)
        a, b, g = _as_sbh(h_in), _as_sbh(h_out), _as_sbh(grad_out)
        # What is not there gets a pointer all the same, which the kernel does not touch.
        weights = a[..., 0] if token_weights is None else token_weights.reshape(a.shape[:2])
        c, (of_c,) = (b, (numbers,)) if above is None else (_as_sbh(above.h_out), above.numbers)
        written = (total if grad_in is None else grad_in, total, numbers)
        self._launch(
            gradients_kernel,
            a,
            compute,
            *(a, b, g, coefficient, weights, *written, c, of_c, factor, rows.first if rows else 0),
            strides=(a, b, g, weights, c),
            HAS_WEIGHTS=token_weights is not None,
            NEEDS_GRAD_IN=grad_in is not None,
            HAS_ABOVE=above is not None,
            HANDS_DOWN=hands_down,
            STRIDE=rows.stride if rows else 1,
        )
        psi = numbers[0] if needs_psi and rows is None else None
        return Gradients(grad_in, total, psi, Above(h_out, (numbers,)) if hands_down else None)

    def _launch(
        self,
        kernel: Any,
        like: Tensor,
        compute: torch.dtype,
        *operands: Any,
        strides: tuple[Tensor, ...],
        **options: int,
    ) -> None:
        length, batch, width = like.shape
        num_rows = length * batch
        if num_rows == 0:
            return
        tile = self.tile or tile_for(width)
        steps = (step for tensor in strides for step in tensor.stride()[:2])
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            kernel[(triton.cdiv(num_rows, tile.rows),)](
                *operands,
                num_rows,
                batch,
                *steps,
                WIDTH=width,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                COMPUTE=_TYPES[compute],
                num_warps=tile.num_warps,
                enable_fp_fusion=False,  # a GPU rounds as the interpreter does, whatever Triton's default
                **options,
            )


KERNELS = TritonKernels()


def _as_sbh(h: Tensor) -> Tensor:
    """A state as ``[s, b, h]`` whose hidden axis is contiguous; a view wherever it can be one."""
    if h.dim() != 3:
        h = h.reshape(-1, 1, h.shape[-1])
    return h if h.stride(-1) == 1 else h.contiguous()
