"""Metrics of depth of a built model, in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jreg_megatron.methods.depth.formulas import (
    CONTRIBUTIONS,
    contributions,
    curvature,
    matrix_entropy,
    voids,
)
from jreg_megatron.methods.depth.settings import WHOLE_SEQUENCE, DepthConfig
from jreg_megatron.methods.norms.formulas import norms
from jreg_megatron.stream.meter import LayerValues, Meter
from jreg_megatron.stream.method import Call, Method, Place, Readings, by_layer, not_finite

VOIDS_NAME = "void layers"

_NAMES = {
    "voids": ("void_share",),
    "contributions": CONTRIBUTIONS,
    "entropy": ("matrix_entropy",),
    "curvature": ("curvature",),
}
_PACKED = (
    "--depth-metrics has {}, and the model is called with packed sequences, which have no state matrix of "
    "their own; give --depth-metrics voids,contributions"
)


@dataclass(frozen=True)
class DepthMetrics(Readings):
    """Metrics of depth over the measured tokens, equal on every rank."""

    depth: Mapping[str, Tensor]
    """By name, of layers 1..L, ``[L]`` float64 on the CPU: ``void_share``, those of ``CONTRIBUTIONS``,
    ``matrix_entropy`` and ``curvature``, as far as they were asked for. The last two are of a layer's output,
    each sequence weighing by its length."""

    def headline(self) -> dict[str, float]:
        """How many layers are void for a token, on average."""
        share = self.depth.get("void_share")
        return {} if share is None else {VOIDS_NAME: float(share.sum())}

    def per_layer(self) -> dict[str, float]:
        """Each layer's values, by the names under which they are logged."""
        return {
            key: value
            for name, values in self.depth.items()
            for key, value in by_layer(f"depth/{name}", values).items()
        }

    def remarks(self) -> list[str]:
        """The layers whose values are not numbers."""
        return [said for name, values in self.depth.items() for said in not_finite(name, values)]


@dataclass
class _Microbatch:
    meter: Meter
    contributions: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    norms: dict[int, Tensor] = field(default_factory=dict)


class Depth(Method):
    """Measures how layers are used; changes nothing."""

    def __init__(self, settings: DepthConfig, place: Place) -> None:
        super().__init__(settings, place)
        self._chosen = settings.chosen
        self._num_layers = place.num_layers
        self._columns = [name for chosen in self._chosen for name in _NAMES[chosen]]
        self.training_meter, self.validation_meter = (
            Meter(place.num_layers, place.device, len(self._columns)) for _ in range(2)
        )

    def begin_microbatch(self, call: Call) -> _Microbatch | None:
        """Values to keep until all layers have run, if this micro-batch is measured."""
        if (meter := super().begin_microbatch(call)) is None:
            return None
        if call.is_packed and (asked := [name for name in self._chosen if name in WHOLE_SEQUENCE]):
            self.refuse(_PACKED.format(" and ".join(asked)))
        return _Microbatch(meter)

    @torch.no_grad()
    def parts(
        self, microbatch: _Microbatch, layer_number: int, layer_input: Tensor, middle: Tensor, added: Tensor
    ) -> None:
        """Measure what attention and MLP add."""
        if "contributions" in self._chosen:
            microbatch.contributions[layer_number] = contributions(layer_input, middle, added)

    @torch.no_grad()
    def layer(
        self, microbatch: _Microbatch, layer_number: int, layer_input: Tensor, layer_output: Tensor
    ) -> Tensor:
        """Measure the layer's output. Voids wait for all layers: recompute runs them in another order."""
        values: list[Tensor] = []
        if "contributions" in self._chosen:
            values += microbatch.contributions.pop(layer_number).unbind()
        of_sequence = {"entropy": matrix_entropy, "curvature": curvature}
        for name in self._chosen:
            if name in of_sequence:
                of_rows = of_sequence[name](layer_output.transpose(0, 1))
                values.append(of_rows.expand(layer_output.shape[:2]))  # of each of its tokens
        if "voids" not in self._chosen:
            microbatch.meter.add(layer_number, *values)
            return layer_output
        microbatch.values[layer_number] = tuple(values)
        microbatch.norms[layer_number] = norms(layer_output)
        if layer_number == 1:
            microbatch.norms[0] = norms(layer_input)
        if len(microbatch.values) == self._num_layers:
            void = voids(torch.stack([microbatch.norms[at] for at in range(self._num_layers + 1)]))
            for number, of_layer in enumerate(void, start=1):
                microbatch.meter.add(number, of_layer, *microbatch.values[number])
        return layer_output

    def read(self, values: LayerValues) -> DepthMetrics:
        """The values by name."""
        return DepthMetrics(dict(zip(self._columns, values.means.unbind(dim=1), strict=True)))
