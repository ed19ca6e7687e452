"""Residual attenuation of a built model."""

from __future__ import annotations

import torch
from torch import Tensor

from jreg_megatron.methods.attenuation.settings import AttenuationConfig
from jreg_megatron.stream.method import Method, Place


class Attenuation(Method):
    """Takes ``(1 - factor) * h_{l-1}`` from the output of chosen layers, in every run of them."""

    def __init__(self, settings: AttenuationConfig, place: Place) -> None:
        super().__init__(settings, place)
        self._numbers = settings.numbers(place.num_layers)

    def describe(self) -> str:
        """One line that says what was attached."""
        layers = ", ".join(map(str, self._numbers))
        return f"> attenuation attached: factor {self.settings.factor:g} at layers {layers}"

    def changes(self, layer_number: int) -> bool:
        """At the chosen layers alone."""
        return layer_number in self._numbers and self.settings.factor != 1

    def change(self, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """``layer_output - (1 - factor) * layer_input``."""
        # Megatron-Core 0.16 rounds a float32 residual stream to the type of what is added to it.
        kept = layer_input.to(layer_output.dtype)
        return torch.add(layer_output, kept, alpha=self.settings.factor - 1)
