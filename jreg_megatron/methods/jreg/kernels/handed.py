"""Results of the kernels: a layer's gradients, and what they hand down to the layer below."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Every stride-th row of a state ``[s, ...]``, along its first axis."""

    stride: int
    first: int
    """The first of them, in 0..stride - 1."""


class Above(NamedTuple):
    """What a layer leaves for the one below it, which adds both layers' gradients to their common state.

    Only kernels of the same object may read it.
    """

    h_out: Tensor
    """The output of the layer above, ``[..., h]``."""
    numbers: tuple[Tensor, ...]
    """Numbers per token, whose meaning only the kernels know."""


class Gradients(NamedTuple):
    """The result of :meth:`Kernels.gradients`."""

    grad_in: Tensor | None
    """The gradient for the layer's input, in its type."""
    total: Tensor
    """The incoming gradient of the layer's output plus the added one, in the output's type."""
    psi: Tensor | None
    """Psi of every token, ``[...]``."""
    handed: Above | None
    """What the layer below needs instead of ``grad_in``."""
