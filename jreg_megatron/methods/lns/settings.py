"""Settings of LayerNorm scaling, and what it does to a model."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.settings import OTHER_LAYERS, Settings, is_finite, setting

if TYPE_CHECKING:
    from torch import Tensor, nn

_NORMS = re.compile(r"decoder\.layers\.(\d+)\.(?:input|pre_mlp)_layernorm\.(?:weight|bias)")
"""The weights of the norms of a layer, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class LayerNormScalingConfig(Settings):
    """Settings of LayerNorm scaling (arXiv 2502.05795, *The Curse of Depth*).

    The outputs of both norms of layer l are multiplied by ``1 / sqrt(l)``; the final norm's is not. This
    changes the model. The authors draw all initial weights in the same way, without a smaller scale for
    output projections. Some code under this name only starts the norms' gains at these values and lets them
    learn; that is another method.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "LayerNorm scaling"
    prefix: ClassVar[str] = "lns"
    title: ClassVar[str] = "LayerNorm scaling"
    about: ClassVar[str] = (
        "the outputs of both norms of layer l times 1 / sqrt(l) (arXiv 2502.05795). It changes the model: "
        "give the same flag whenever you run it."
    )
    in_full_graphs: ClassVar[bool] = True
    in_overlap: ClassVar[bool] = True

    refused: ClassVar[Mapping[str, str]] = {
        **OTHER_LAYERS,
        "fused_residual_rmsnorm": "a norm is then joined with the residual stream",
    }

    power: float = setting(
        0.5,
        "p, >= 0: the norms of layer l are multiplied by 1 / l^p. At 0 nothing changes. The paper uses 0.5.",
        float,
        "P",
    )

    def __post_init__(self) -> None:
        self.require("power", self.power, is_finite(self.power) and self.power >= 0, "a finite number >= 0")

    @property
    def changes_modules(self) -> bool:
        """It does, unless all factors are 1."""
        return self.power != 0

    def prepare(self, chunk: nn.Module) -> None:
        """Scale the norms' outputs in every layer of the chunk.

        Raises:
            UserError: if a norm cannot be scaled.
        """
        from jreg_megatron.stream.support import plain_layers

        for number, layer in plain_layers(chunk, self.name):
            for norm in self._norms_of(layer):
                norm.register_forward_hook(functools.partial(_scaled, self._scale(number)))

    def into_norms(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same model's weights without the method: what scales the norms' outputs is in their weights.

        It is exact, since a norm's output is linear in its weight and bias, and rounds them once more.

        Args:
            weights: of a whole ``GPTModel`` by their names, norms apart from linear layers.
        """
        found = {name: _NORMS.fullmatch(name) for name in weights}
        return {
            name: weight * self._scale(int(at[1]) + 1) if (at := found[name]) else weight
            for name, weight in weights.items()
        }

    def _scale(self, number: int) -> float:
        """The factor of the norms of layer ``number``, 1-based."""
        return float(number**-self.power)

    def _norms_of(self, layer: Any) -> Iterator[Any]:
        """The norms of a ``TransformerLayer``, or the linear layers that Transformer Engine joins with it."""
        for name, holder, linear_name in (
            ("input_layernorm", "self_attention", "linear_qkv"),
            ("pre_mlp_layernorm", "mlp", "linear_fc1"),
        ):
            norm = getattr(layer, name)
            if any(True for _ in norm.parameters()):
                yield norm
                continue
            linear = getattr(getattr(layer, holder), linear_name, None)
            if linear is None:
                raise UserError(
                    f"{self.flag('power')} does not support this layer: its {holder} has no norm; leave "
                    f"{self.flag('power')} out"
                )
            if any(name.endswith("bias") and "norm" not in name for name, _ in linear.named_parameters()):
                raise UserError(
                    f"{self.name} does not support a bias of {linear_name} where Transformer Engine joins it "
                    "with the norm; give --disable-bias-linear, and no --add-qkv-bias"
                )
            yield linear


def _scaled(scale: float, _: Any, given: Any, output: Any) -> Any:
    # With a second output: the residual stream, or a bias that is not added yet.
    return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale
