"""Residual attenuation of a built model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jreg_megatron.methods.attenuation.settings import GATE, AttenuationConfig
from jreg_megatron.stream.anatomy import residual_layers
from jreg_megatron.stream.meter import LayerValues, Meter
from jreg_megatron.stream.method import Method, Place, Readings, by_layer, not_finite

LEAST_NAME = "least residual kept"


@dataclass(frozen=True)
class AttenuationMetrics(Readings):
    """The part of their input that layers keep, if they learn it."""

    residual_kept: Tensor
    """``a_l`` of layers 1..L, ``[L]`` float64 on the CPU, each in (0, 1)."""

    def headline(self) -> dict[str, float]:
        """The smallest of these parts."""
        return {LEAST_NAME: float(self.residual_kept.min())}

    def per_layer(self) -> dict[str, float]:
        """Each layer's part."""
        return by_layer("attenuation/kept", self.residual_kept)

    def remarks(self) -> list[str]:
        """The layers whose gate is not a number."""
        return not_finite("gate", self.residual_kept)


class Gate(nn.Module):
    """What a layer keeps of its input, ``[1]`` float32, in (0, 1): the sigmoid of its weight.

    A module of its own, since where layers run in parts, Megatron waits for the gathered parameters of the
    modules that are called.
    """

    def __init__(self, start: float, device: torch.device) -> None:
        super().__init__()
        logit = math.log(start) - math.log1p(-start)
        self.weight = nn.Parameter(torch.full((1,), logit, device=device))

    def forward(self) -> Tensor:
        """What it keeps now."""
        return torch.sigmoid(self.weight.float())


class Attenuation(Method):
    """Takes ``(1 - a_l) * h_{l-1}`` from the output of chosen layers, in every run of them."""

    def __init__(self, settings: AttenuationConfig, place: Place) -> None:
        super().__init__(settings, place)
        self._numbers = settings.numbers(place.num_layers)
        self._modules: dict[int, Any] = {
            layer.number: layer.last for chunk in place.chunks for layer in residual_layers(chunk)
        }
        if settings.learned is not None:
            self.training_meter, self.validation_meter = (
                Meter(place.num_layers, place.device) for _ in range(2)
            )

    def describe(self) -> str:
        """One line that says what was attached."""
        settings, layers = self.settings, ", ".join(map(str, self._numbers))
        if settings.learned is not None:
            return f"> attenuation attached: a learned factor in every layer, from {settings.learned:g} on"
        return f"> attenuation attached: factor {settings.factor:g} at layers {layers}"

    def changes(self, layer_number: int) -> bool:
        """Only at the chosen layers."""
        return layer_number in self._numbers and self.settings.changes_model

    def change(self, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """``layer_output - (1 - a_l) * layer_input``."""
        # Megatron-Core 0.16 rounds a float32 residual stream to the type of what is added to it.
        kept = layer_input.to(layer_output.dtype)
        if self.settings.learned is None:
            return torch.add(layer_output, kept, alpha=self.settings.factor - 1)
        taken = (self._kept(layer_number) - 1).to(layer_output.dtype)
        return torch.addcmul(layer_output, kept, taken)

    def _kept(self, layer_number: int) -> Tensor:
        """The current ``a_l``, ``[1]``: FSDP2 holds the whole parameter only while the layer runs."""
        kept: Tensor = getattr(self._modules[layer_number], GATE)()
        return kept

    @torch.no_grad()
    def layer(
        self, microbatch: Meter, layer_number: int, layer_input: Tensor, layer_output: Tensor
    ) -> Tensor:
        """Record the part that the layer keeps."""
        microbatch.add(layer_number, self._kept(layer_number).expand(layer_output.shape[:2]))
        return layer_output

    def read(self, values: LayerValues) -> AttenuationMetrics:
        """What each layer keeps."""
        return AttenuationMetrics(values.means[:, 0])
