"""Norms and update ratios of a built model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from jreg_megatron.methods.norms.formulas import norms, update_ratios
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.stream.meter import LayerValues, Meter
from jreg_megatron.stream.method import Method, Place, Readings, by_layer, not_finite

LAST_NAME = "last residual norm"
LARGEST_NAME = "largest residual norm"


@dataclass(frozen=True)
class NormsMetrics(Readings):
    """Norms of the whole model's states over the measured tokens; all tensors float64 on the CPU."""

    norm_mean: Tensor
    """Mean over tokens of ``|h_l|`` for l = 0..L, ``[L + 1]``."""
    norm_rms: Tensor
    """``sqrt(mean |h_l|^2)``, ``[L + 1]``."""
    norm_largest: Tensor
    """The largest ``|h_l|`` of a token, ``[L + 1]``."""
    update_ratio: Tensor
    """Mean over tokens of ``|h_l - h_{l-1}| / |h_{l-1}|`` for layers 1..L, ``[L]``."""

    def headline(self) -> dict[str, float]:
        """The mean norm of the last state, before the final norm, and the largest norm of any state."""
        return {LAST_NAME: float(self.norm_mean[-1]), LARGEST_NAME: float(self.norm_largest.max())}

    def per_layer(self) -> dict[str, float]:
        """All values; 0 is the embedding's output."""
        rows = {"mean": self.norm_mean, "rms": self.norm_rms, "largest": self.norm_largest}
        named: dict[str, float] = {}
        for what, values in rows.items():
            named |= by_layer(f"norms/{what}", values, first_layer=0)
        return named | by_layer("norms/update_ratio", self.update_ratio)

    def remarks(self) -> list[str]:
        """The layers whose values are not numbers."""
        return not_finite("norm", self.norm_rms, first_layer=0) + not_finite(
            "update ratio", self.update_ratio
        )


def _place(state: Tensor) -> tuple[Any, ...]:
    """Where a state is in its memory, and how often it was written to."""
    writes = 0 if state.is_inference() else state._version
    return state.shape, state.stride(), state.storage_offset(), writes


class Norms(Method):
    """Measures norms and update ratios; changes nothing."""

    def __init__(self, settings: NormsConfig, place: Place) -> None:
        super().__init__(settings, place)
        self.training_meter, self.validation_meter = (
            Meter(place.num_layers, place.device, num_values=3, num_largest=1, first_row=0) for _ in range(2)
        )
        # The output of the layer that ran last, and its norms. The reference does not keep its memory alive.
        self._last: tuple[StorageWeakRef, tuple[Any, ...], Tensor] | None = None

    @torch.no_grad()
    def layer(
        self, microbatch: Meter, layer_number: int, layer_input: Tensor, layer_output: Tensor
    ) -> Tensor:
        """Measure the layer's output, and the first layer's input too."""
        norm_in, norm = self._norms_of_input(layer_input), norms(layer_output)
        storage = StorageWeakRef(layer_output.untyped_storage())  # type: ignore[no-untyped-call]
        self._last = storage, _place(layer_output), norm
        if layer_number == 1:
            nothing = torch.zeros_like(norm_in)  # nothing was added to the embedding's output
            microbatch.add(0, norm_in, norm_in.square(), nothing)
        ratio = update_ratios(layer_input, layer_output, norm_in)
        microbatch.add(layer_number, norm, norm.square(), ratio)
        return layer_output

    def _norms_of_input(self, state: Tensor) -> Tensor:
        """Those of the layer below, if its output is this input."""
        if self._last is not None:
            storage, place, norm = self._last
            if storage.cdata == state.untyped_storage()._cdata and place == _place(state):
                return norm
        return norms(state)

    def read(self, values: LayerValues) -> NormsMetrics:
        """The values by name."""
        mean, square, ratio = values.means.unbind(dim=1)
        return NormsMetrics(mean, square.sqrt(), values.largest[:, 0], ratio[1:])
