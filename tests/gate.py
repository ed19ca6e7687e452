"""A method that adds a parameter: a learnable residual gate for each layer, for the tests of ``prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jreg_megatron.methods.known import METHODS
from jreg_megatron.stream.anatomy import residual_layers
from jreg_megatron.stream.method import Method, Place
from jreg_megatron.stream.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class GateConfig(Settings):
    """``h_l = sigmoid(gate_l) * h_{l-1} + F_l(h_{l-1})``."""

    name: ClassVar[str] = "gate"
    prefix: ClassVar[str] = "gate"
    title: ClassVar[str] = "gate"
    about: ClassVar[str] = "a learnable gate"

    start: float = setting(2.0, "where gates start.", float, "START")

    @property
    def changes_model(self) -> bool:
        return True

    def prepare(self, chunk: nn.Module) -> None:
        for layer in residual_layers(chunk):
            gate = nn.Parameter(torch.full((1,), self.start))
            gate.sequence_parallel = chunk.config.sequence_parallel  # type: ignore[attr-defined,union-attr]
            layer.last.register_parameter("residual_gate", gate)

    def make(self, place: Place) -> Method:
        return Gate(self, place)


class Gate(Method):
    def __init__(self, settings: GateConfig, place: Place) -> None:
        super().__init__(settings, place)
        layers = (layer for chunk in place.chunks for layer in residual_layers(chunk))
        self._holders: dict[int, Any] = {layer.number: layer.last for layer in layers}

    def gate(self, layer_number: int) -> Tensor:
        """Of now: FSDP2 has the whole parameter in its place only while its module runs."""
        gate: Tensor = self._holders[layer_number].residual_gate
        return gate

    def change(self, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        return layer_output - (1 - torch.sigmoid(self.gate(layer_number))) * layer_input


def train(argv: list[str]) -> None:
    """``jreg_megatron.pretrain`` with the method among the others; the gates of this rank are printed
    last."""
    from jreg_megatron import pretrain, training_loop

    METHODS.append(GateConfig)
    try:
        pretrain.main(argv)
    finally:  # Megatron ends the process by itself where --exit-interval says so
        if attached := training_loop._loop.attached:
            (method,) = (method for method in attached.handle.methods if isinstance(method, Gate))
            gates: dict[int, Any] = {number: method.gate(number) for number in method._holders}
            whole = {n: getattr(gate, "full_tensor", lambda gate=gate: gate)() for n, gate in gates.items()}
            print("\ngates", {number: gate.item() for number, gate in whole.items()}, flush=True)
