"""Settings of residual attenuation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.settings import Settings, is_finite, is_integer, layer_setting, setting

if TYPE_CHECKING:
    from torch import nn

    from jreg_megatron.stream.method import Method, Place

_FACTOR = 0.5
GATE = "attenuation_gate"
"""The module within a layer's last module that holds what is learned."""


def _layers_from_text(text: str) -> str | tuple[int, ...]:
    """``last`` stays a name, ``23,24`` becomes numbers; anything else is left for the checks."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        return text


@dataclass(frozen=True, kw_only=True)
class AttenuationConfig(Settings):
    """Settings of residual attenuation, ``h_l = factor * h_{l-1} + F_l(h_{l-1})`` at chosen layers.

    ``F_l(h)`` is what layer l adds to ``h`` without the method: ``layer(h) - h``. The paper (arXiv
    2602.14760) attenuates one late layer, or learns a gate for each layer; here ``factor_l = sigmoid(g_l)``,
    with one parameter ``g_l`` per layer. The defaults are our choice. The method changes the model: training,
    evaluation and generation need the same settings.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "attenuation"
    prefix: ClassVar[str] = "attenuation"
    title: ClassVar[str] = "residual attenuation"
    about: ClassVar[str] = (
        "h_l = factor * h_(l-1) + F_l(h_(l-1)) at chosen layers (arXiv 2602.14760). It changes the model: "
        "give the same flags whenever you run it. One flag turns it on."
    )
    in_full_graphs: ClassVar[bool] = True
    in_overlap: ClassVar[bool] = True

    factor: float = setting(
        _FACTOR,
        "the part of a layer's input that is kept, 0 to 1. At 1 nothing changes. The default is our choice; "
        "we do not know the paper's number.",
        float,
        "FACTOR",
    )
    learned: float | None = setting(
        None,
        "learn a factor for every layer; all start at this value, from 0.0001 to 0.9999. A layer's factor is "
        "the sigmoid of a parameter, which Megatron does not decay. Not together with a factor or layers.",
        float,
        "START",
    )
    layers: str | tuple[int, ...] = setting(
        "last",
        "the layers: 'last', or layer numbers, 1-based, such as 23,24.",
        _layers_from_text,
        "LAYERS",
    )
    layer: str = layer_setting()

    def __post_init__(self) -> None:
        self.require_layer()
        factor = self.factor
        self.require("factor", factor, is_finite(factor) and 0 <= factor <= 1, "a number from 0 to 1")
        numbers = tuple(self.layers) if isinstance(self.layers, list | tuple) else ()
        are_numbers = bool(numbers) and all(is_integer(n) and n >= 1 for n in numbers)
        allowed = self.layers == "last" or (are_numbers and len(set(numbers)) == len(numbers))
        shown = ",".join(map(str, numbers)) or self.layers
        what = "'last', or layers' numbers from 1 on, each once, as in 23,24"
        self.require("layers", shown, allowed, what)
        if numbers:
            object.__setattr__(self, "layers", numbers)
        if self.learned is not None:
            # Nearer to 0 or 1 the sigmoid's gradient is lost in float32.
            allowed = is_finite(self.learned) and 1e-4 <= self.learned <= 1 - 1e-4
            self.require("learned", self.learned, allowed, "a number from 0.0001 to 0.9999")
            alone = f"left out where {self.flag('learned')} is given"
            self.require("factor", factor, factor == _FACTOR, alone)
            # Megatron's checkpoints stack a parameter over all layers, and refuse one that some lack.
            self.require("layers", self.layers, self.layers == "last", f"{alone}: every layer learns")

    @property
    def changes_model(self) -> bool:
        """True, unless the whole input of a layer is kept."""
        return self.learned is not None or self.factor != 1

    def numbers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that are attenuated, 1-based."""
        if self.learned is not None:
            return tuple(range(1, num_layers + 1))
        return (num_layers,) if isinstance(self.layers, str) else self.layers

    def refuse_layers(self, num_layers: int) -> None:
        """Refuse numbers of layers that the model does not have."""
        for number in self.numbers(num_layers):
            if number > num_layers:
                raise UserError(
                    f"{self.flag('layers')} names layer {number}, and the model has {num_layers} layers; "
                    f"give numbers from 1 to {num_layers}"
                )

    @property
    def changes_modules(self) -> bool:
        """True if factors are learned."""
        return self.learned is not None

    @property
    def added_parameters(self) -> frozenset[str]:
        """The gate, if factors are learned."""
        return frozenset() if self.learned is None else frozenset([GATE])

    def prepare(self, chunk: nn.Module) -> None:
        """Give each layer of the chunk a gate."""
        from jreg_megatron.methods.attenuation.attenuation import Gate
        from jreg_megatron.stream.anatomy import residual_layers

        assert self.learned is not None
        for layer in residual_layers(chunk):
            gate = Gate(self.learned, next(layer.last.parameters()).device)
            gate.weight.sequence_parallel = chunk.config.sequence_parallel  # type: ignore[attr-defined,union-attr]
            layer.last.add_module(GATE, gate)

    def make(self, place: Place) -> Method:
        """The attenuation of a built model."""
        from jreg_megatron.methods.attenuation.attenuation import Attenuation

        return Attenuation(self, place)
