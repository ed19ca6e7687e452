"""Displacement and its gradients by one Triton kernel each; see ``programs.py``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
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

_ALIGNED = 16
"""Bytes. Triton compiles a kernel for pointers that are multiples of it, and another one for others."""
_MOST_LAUNCHES = 1024
"""A job has some ten. With many sequence lengths they are sometimes all made again."""


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

_IS_KNOWN = re.match(r"3\.[3-9](?!\d)", triton.__version__) is not None
"""Whether we know what this Triton's choice of a compiled kernel depends on, and how one is launched."""


@dataclass(frozen=True)
class TritonKernels:
    """See :class:`jreg_megatron.methods.jreg.kernels.Kernels`."""

    tile: Tile | None = None
    """Used instead of :func:`tile_for`'s, if given; for tests."""
    _launches: dict[tuple[Any, ...], Callable[..., Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def kind(self) -> str:
        return f"triton {triton.__version__}"

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.tile}" if self.tile else self.kind

    @torch.no_grad()
    def displacement(self, h_in: Tensor, h_out: Tensor) -> Tensor:
        """Psi of every token."""
        psi = torch.empty(h_in.shape[:-1], dtype=computed_in(h_in, h_out), device=h_in.device)
        a, b = _as_sbh(h_in), _as_sbh(h_out)
        self._launch(displacement_kernel, (a, b), (a, b, psi))
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
        # A missing tensor gets a pointer too. The kernel does not touch it.
        weights = a[..., 0] if token_weights is None else token_weights.reshape(a.shape[:2])
        c, (of_c,) = (b, (numbers,)) if above is None else (_as_sbh(above.h_out), above.numbers)
        written = (total if grad_in is None else grad_in, total, numbers)
        self._launch(
            gradients_kernel,
            (a, b, g, weights, c),
            (a, b, g, coefficient, weights, *written, c, of_c),
            float(factor),
            rows.first if rows else 0,
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
        states: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        *numbers: float,
        **options: int,
    ) -> None:
        """Run a kernel on the rows of ``states``, of which a layer's input and output are the first two.

        The kernel gets ``tensors``, ``numbers``, sizes and ``options``.

        Triton chooses the compiled kernel in each call, which takes most of a launch's time. Here it is
        chosen once per key. The key has all properties of the arguments on which the choice depends: integers
        too, but no floating number, which the first of ``numbers`` is. Triton's own settings (its debug mode,
        instrumentation) count as they are at the first launch.
        """
        like = states[0]
        if like.numel() == 0:
            return
        device, addresses = like.get_device(), 0
        if like.is_cuda and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(kernel, states, tensors, *numbers, **options)
            return
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        # Triton looks at each address. Nearly always all are aligned.
        odd = addresses % _ALIGNED and tuple(tensor.data_ptr() % _ALIGNED == 0 for tensor in tensors)
        key = (
            *(kernel, device, odd, like.shape, numbers[1:], *options.values()),
            *[tensor.dtype for tensor in tensors],
            *[state.stride() for state in states],
        )
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) >= _MOST_LAUNCHES:
                self._launches.clear()
            launch = self._prepared(kernel, states, tensors, numbers, options)
            self._launches[key] = launch
        launch(*tensors, *numbers)

    def _prepared(
        self,
        kernel: Any,
        states: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        options: dict[str, int],
    ) -> Callable[..., Any]:
        """What launches the kernel on tensors and numbers of this key."""
        length, batch, width = states[0].shape
        tile = self.tile or tile_for(width)
        grid = (triton.cdiv(length * batch, tile.rows), 1, 1)
        sizes = (length * batch, batch, *(step for state in states for step in state.stride()[:2]))
        compute = _TYPES[computed_in(*states[:2])]
        constants = {
            "WIDTH": width,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "COMPUTE": compute,
            **options,
        }
        # A GPU rounds as the interpreter does, whatever Triton's default.
        compiler = {"num_warps": tile.num_warps, "enable_fp_fusion": False}

        def launch(*given: Any) -> None:
            kernel[grid](*given, *sizes, **constants, **compiler)

        if IS_INTERPRETED or not _IS_KNOWN or driver.active.get_current_target().backend != "cuda":
            # Triton's choice: on an AMD GPU it also depends on how much memory a state is a part of.
            return launch
        compiled = kernel.warmup(*tensors, *numbers, *sizes, grid=grid, **constants, **compiler)
        if not isinstance(compiled, CompiledKernel):  # a hook has stopped the compilation, or it still runs
            return launch
        run, last = compiled[grid], (*sizes, *(constants[x] for x in kernel.arg_names if x in constants))
        return lambda *given: run(*given, *last)


KERNELS = TritonKernels()


def _as_sbh(h: Tensor) -> Tensor:
    """A state as ``[s, b, h]`` whose hidden axis is contiguous; a view wherever it can be one."""
    if h.dim() != 3:
        h = h.reshape(-1, 1, h.shape[-1])
    return h if h.stride(-1) == 1 else h.contiguous()
