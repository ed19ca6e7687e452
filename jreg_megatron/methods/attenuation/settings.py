"""Settings of residual attenuation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.settings import Settings, is_finite, is_integer, layer_setting, setting

if TYPE_CHECKING:
    from jreg_megatron.methods.attenuation.attenuation import Attenuation
    from jreg_megatron.stream.method import Place


def _layers_from_text(text: str) -> str | tuple[int, ...]:
    """``last`` stays a name, ``23,24`` becomes numbers; anything else is left for the checks."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        return text


@dataclass(frozen=True, kw_only=True)
class AttenuationConfig(Settings):
    """Settings of residual attenuation, ``h_l = factor * h_{l-1} + F_l(h_{l-1})`` at chosen layers.

    ``F_l(h)`` is what layer l adds to ``h`` without it: ``layer(h) - h``. The paper (arXiv 2602.14760) takes
    one late layer and tells no factor that we have found; the defaults are our choice. The model is another
    one by it: training, evaluation and generation must all have it, with the same settings.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "attenuation"
    prefix: ClassVar[str] = "attenuation"
    title: ClassVar[str] = "residual attenuation"
    about: ClassVar[str] = (
        "h_l = factor * h_(l-1) + F_l(h_(l-1)) at chosen layers (arXiv 2602.14760). It changes the model: "
        "give the same flags in every run of it. One flag turns it on."
    )

    factor: float = setting(
        0.5,
        "the part of a layer's input that is kept, 0 to 1. At 1 nothing changes. Our choice; the paper's "
        "number is not known to us.",
        float,
        "FACTOR",
    )
    layers: str | tuple[int, ...] = setting(
        "last",
        "the layers: 'last', or their numbers, 1-based, as in 23,24.",
        _layers_from_text,
        "LAYERS",
    )
    layer: str = layer_setting()

    def __post_init__(self) -> None:
        self.require_layer()
        factor = self.factor
        self.require("factor", factor, is_finite(factor) and 0 <= factor <= 1, "a number from 0 to 1")
        if not isinstance(self.layers, str):
            is_list = isinstance(self.layers, list | tuple)
            self.require("layers", self.layers, is_list, "'last', or a list of layers' numbers")
            numbers = tuple(self.layers)
            allowed = bool(numbers) and all(is_integer(n) and n >= 1 for n in numbers)
            allowed = allowed and len(set(numbers)) == len(numbers)
            shown = ",".join(map(str, numbers))
            self.require("layers", shown, allowed, "'last', or layers' numbers from 1 on, each once")
            object.__setattr__(self, "layers", numbers)
        else:
            is_known = self.layers == "last"
            self.require("layers", self.layers, is_known, "'last', or layers' numbers, as in 23,24")

    @property
    def changes_model(self) -> bool:
        """It does, unless all of a layer's input is kept: a trained model needs it in every run."""
        return self.factor != 1

    def numbers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that are attenuated, 1-based."""
        return (num_layers,) if isinstance(self.layers, str) else self.layers

    def refuse_layers(self, num_layers: int) -> None:
        """Refuse numbers of layers that the model does not have."""
        for number in self.numbers(num_layers):
            if number > num_layers:
                raise UserError(
                    f"{self.flag('layers')} names layer {number}, and the model has {num_layers} layers; "
                    f"take numbers from 1 to {num_layers}"
                )

    def make(self, place: Place) -> Attenuation:
        """The attenuation of a built model."""
        from jreg_megatron.methods.attenuation.attenuation import Attenuation

        return Attenuation(self, place)
