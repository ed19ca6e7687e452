"""Your own method: a loss that keeps the states short.

It is ``coeff * sum over layers of |h|^2 / (2 * width)``, the mean over tokens of it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from jreg_megatron.stream.method import Call, Method, Place
from jreg_megatron.stream.scaling import AddedLoss
from jreg_megatron.stream.settings import Settings, is_finite, setting


@dataclass(frozen=True, kw_only=True)
class ShortConfig(Settings):
    """Settings: from Python, YAML and, with ``METHODS.append(ShortConfig)``, the command line."""

    name: ClassVar[str] = "short states"
    prefix: ClassVar[str] = "short"
    title: ClassVar[str] = "short states"
    about: ClassVar[str] = "loss = cross-entropy + coeff * sum over layers of |h|^2 / (2 * width)"

    coeff: float = setting(1e-3, "the strength, > 0.", float, "COEFF")

    def __post_init__(self) -> None:
        self.require("coeff", self.coeff, is_finite(self.coeff) and self.coeff > 0, "a finite number > 0")

    def make(self, place: Place) -> Method:
        return Short(self, place)


class Short(Method):
    """The method on a built model."""

    def __init__(self, settings: ShortConfig, place: Place) -> None:
        super().__init__(settings, place)
        self.added_loss = AddedLoss(settings.coeff)
        self._scaling = place.scaling
        self._coefficient = torch.zeros(1, device=place.device)

    def begin_microbatch(self, call: Call) -> Any:
        if not call.training:
            return None
        self._scaling.fill(self._coefficient, self.settings.coeff)
        return call

    def layer(self, microbatch: Any, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        if layer_output.requires_grad:
            state = layer_output.detach()  # the pipeline frees an output that it has sent
            factor = self._scaling.of_all_tokens(state) / state.shape[-1]

            def add(gradient: Tensor) -> Tensor:
                return gradient.add((self._coefficient * factor * state).to(gradient.dtype))

            layer_output.register_hook(add)  # type: ignore[no-untyped-call]
        return layer_output
