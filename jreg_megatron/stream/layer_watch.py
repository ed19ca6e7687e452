"""Check that a tap sees the same input and output as the layer itself.

A subclass of Megatron's layer may change the state before it calls its base class, or after the last
bias-dropout-add. Then the tap sees another state than the next layer. A forward pass shows this: both tensors
must be the same memory with the same values, and nothing may write into it in between. Equal values are not
enough: a layer may add zero in the first step, as with a gate that starts at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.stream.anatomy import ResidualLayer

_FIX = (
    "jreg_megatron cannot see this layer's states; use Megatron's own layers as they are, or train without it"
)

_MOST_BETWEEN = 3
"""Autograd nodes allowed between the tapped and the returned state: a view, a type conversion, a copy."""

Report = Callable[[str, bool], None]
"""Gets a finding, and whether every rank with this layer has the same finding."""


class LayerWatch:
    """Compares a layer's own argument and return value with the tap's states, in each forward pass."""

    def __init__(self, layer: ResidualLayer, config: Any, report: Report) -> None:
        classes = dict.fromkeys(type(module).__name__ for module in (layer.first, layer.last))
        self._name = f"layer {layer.number} ({' and '.join(classes)})"
        self._adds = [name for _, name in layer.adds]
        self._hidden_size = config.hidden_size
        # Transformer Engine's fused norm also returns the residual, perhaps as a copy.
        self._may_copy = getattr(config, "fused_residual_rmsnorm", False)
        self._report = report
        self._has_run = self._is_running = False
        self._given: _Kept | None = None
        self._tapped: _Kept | None = None

    def begin(self) -> None:
        """The model's forward pass begins. The previous one may have been aborted."""
        self._has_run = self._is_running = False
        self._given = self._tapped = None

    def given(self, state: Tensor) -> None:
        """The layer is called with ``state``."""
        if self._has_run:
            self._report(
                f"{self._name} runs more than once in a forward pass, so its input and output are not the "
                "model's state before and after it; jreg_megatron does not support this; train without it",
                True,
            )
        if state.shape[-1] != self._hidden_size:
            self._report(
                f"{self._name} has a residual stream of width {state.shape[-1]}, and the model's hidden "
                f"size is {self._hidden_size}; jreg_megatron does not support a wider stream, such as that "
                "of hyper-connections; turn the wider stream off, or train without it",
                True,
            )
        self._has_run = self._is_running = True
        self._given, self._tapped = _Kept(state), None

    def adds_to(self, residual: Tensor) -> None:
        """The layer's first bias-dropout-add gets ``residual``, which the tap takes as the layer's input."""
        if self._given is None:
            self._report(f"{self._name} calls {self._adds[0]} more than once; {_FIX}", True)
        elif not self._given.is_same(residual, self._may_copy):
            self._report(f"{self._name} adds to another state than it is given; {_FIX}", True)
        self._given = None

    def tapped(self, state: Tensor) -> None:
        """The layer's last bias-dropout-add returns ``state``, after the observer's changes."""
        if self._tapped is not None:
            self._report(f"{self._name} calls {self._adds[-1]} more than once; {_FIX}", True)
        self._tapped = _Kept(state)

    def handed_on(self, output: Tensor, state: Tensor) -> None:
        """The layer continues with ``state`` instead of ``output``, which its last part has returned."""
        if self._tapped is not None and self._tapped.is_same(output):
            self._tapped = _Kept(state)

    def returned(self, output: Any) -> None:
        """The layer returns ``output``: the state, or a tuple that begins with it."""
        state = output[0] if isinstance(output, tuple) else output
        if self._given is not None or self._tapped is None:
            adds = " and ".join(self._adds)
            self._report(f"{self._name} does not add its residual by {adds}; {_FIX}", True)
        elif not self._tapped.is_same(state):
            found = "returns another state than its last bias-dropout-add gives"
            self._report(f"{self._name} {found}; {_FIX}", True)
        elif torch.is_grad_enabled() and not self._tapped.is_behind(state):
            self._report(
                f"{self._name} recomputes itself, by a checkpoint inside of it, so its states "
                "are not those of the backward pass; use Megatron's --recompute-granularity, or train "
                "without jreg_megatron",
                True,
            )
        self._is_running, self._given, self._tapped = False, None, None

    def ended(self) -> None:
        """The model's forward pass has completed."""
        if not self._has_run:
            self._report(
                f"{self._name} has not run in a forward pass; jreg_megatron does not support layers that are "
                "left out; train without it",
                False,  # each rank may leave out other layers
            )
        elif self._is_running:
            self._report(f"{self._name} began and did not end in a forward pass; {_FIX}", False)


class _Kept:
    """A state, and a copy of its values, because a layer may change it in place."""

    def __init__(self, state: Tensor) -> None:
        self._grad_fn = state.grad_fn
        self._state = state.detach()  # keeps the memory, so that no other tensor gets it
        self._values = self._state.clone()
        self._version = _version(state)

    def is_same(self, other: Tensor, may_be_copy: bool = False) -> bool:
        """Whether ``other`` is the state with the same values, or holds them in another type."""
        if other.shape != self._values.shape:
            return False
        if _version(self._state) != self._version:
            return False
        is_moved = other.data_ptr() != self._state.data_ptr()
        if is_moved and other.dtype == self._values.dtype and not may_be_copy:
            return False
        narrow = min(other.dtype, self._values.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        return torch.allclose(other.to(narrow), self._values.to(narrow), rtol=0.0, atol=0.0, equal_nan=True)

    def is_behind(self, other: Tensor) -> bool:
        """Whether a backward pass from ``other`` reaches the state, through a view or a type conversion."""
        function = other.grad_fn
        for _ in range(_MOST_BETWEEN):
            if function is None or function is self._grad_fn:
                break
            function = next((before for before, _ in function.next_functions), None)
        return function is self._grad_fn


def _version(state: Tensor) -> int:
    """The number of in-place writes to a tensor; 0 for an inference tensor, which does not count them."""
    return 0 if state.is_inference() else state._version
