"""What kernels give: the gradients of a layer, and what they hand to the layer below."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Each stride-th row of a state ``[s, ...]``, along its first axis."""

    stride: int
    first: int
    """In 0..stride - 1."""


class Above(NamedTuple):
    """What a layer leaves for the one below it, which adds both layers' gradients to their common state.

    Only kernels of the same object may read it.
    """

    h_out: Tensor
    """The output of the layer above, ``[..., h]``."""
    numbers: tuple[Tensor, ...]
    """Numbers of each token; the kernels alone know which."""


class Gradients(NamedTuple):
    """What :meth:`Kernels.gradients` gives."""

    grad_in: Tensor | None
    """The gradient for the layer's input, in its type."""
    total: Tensor
    """The gradient that came to the layer's output plus what is added to it, in the output's type."""
    psi: Tensor | None
    """Psi of every token, ``[...]``."""
    handed: Above | None
    """What the layer below needs in place of ``grad_in``."""
