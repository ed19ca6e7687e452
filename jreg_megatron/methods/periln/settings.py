"""Settings of Peri-LN, and what it does to a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jreg_megatron.stream.settings import OTHER_LAYERS, Settings, is_finite, setting

if TYPE_CHECKING:
    from torch import nn

_NORMS = {"self_attn_bda": "post_attention_norm", "mlp_bda": "post_mlp_norm"}
"""By what adds a module's output to the residual stream: the norm of it, by its name in checkpoints."""


@dataclass(frozen=True, kw_only=True)
class PeriLNConfig(Settings):
    """Settings of Peri-LN (arXiv 2502.02732): ``h + Norm(Module(Norm(h)))`` for attention and MLP.

    The norms after the modules are of the model's kind; their gains are learned. With ``embedding`` there is
    a norm on the embedding's output too, as in the paper. This changes the model.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "Peri-LN"
    prefix: ClassVar[str] = "periln"
    title: ClassVar[str] = "Peri-LN"
    about: ClassVar[str] = (
        "a norm after attention and MLP too, h + Norm(Module(Norm(h))) (arXiv 2502.02732). It changes the "
        "model: give the same flag whenever you run it."
    )
    in_full_graphs: ClassVar[bool] = True
    in_overlap: ClassVar[bool] = True

    refused: ClassVar[Mapping[str, str]] = OTHER_LAYERS

    gain: float = setting(1.0, "where the gains of these norms start, above 0. The paper uses 1.", float, "G")
    embedding: bool = setting(False, "also put such a norm on the embedding's output.", bool)

    def __post_init__(self) -> None:
        self.require("gain", self.gain, is_finite(self.gain) and self.gain > 0, "a finite number above 0")

    @property
    def added_parameters(self) -> frozenset[str]:
        """The norms, by name."""
        return frozenset([*_NORMS.values(), *["embedding.norm"] * self.embedding])

    def prepare(self, chunk: nn.Module) -> None:
        """Put norms after attention and MLP of every layer, and with ``embedding`` after the embedding."""
        from jreg_megatron.stream.support import plain_layers

        layers = [layer for _, layer in plain_layers(chunk, self.name)]
        for layer in layers:
            for add, name in _NORMS.items():
                norm = _norm_like(chunk.config, layer, self.gain)
                layer.add_module(name, norm)
                # Not a hook on the module: some of Megatron's schedules and graphs call only parts of it.
                setattr(layer, add, functools.partial(_normed, norm, getattr(layer, add)))
        embedding: Any = getattr(chunk, "embedding", None)
        if self.embedding and embedding is not None:
            norm = _norm_like(chunk.config, [*layers, embedding][0], self.gain)
            embedding.add_module("norm", norm)
            # With a residual stream in float32 the norm's own output is still of the weights' type.
            embedding.register_forward_hook(lambda _, __, output: norm(output).to(output.dtype))


def _norm_like(config: Any, neighbour: nn.Module, gain: float) -> nn.Module:
    from megatron.core.models.backends import LocalSpecProvider

    # The configuration's word for it is "transformer_engine" also where a spec of local modules was built.
    if any("transformer_engine" in type(module).__module__ for module in neighbour.modules()):
        from megatron.core.extensions.transformer_engine import TENorm as build
    else:
        build = LocalSpecProvider().layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=False)
    norm: nn.Module = build(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
    norm.to(next(neighbour.parameters()).device)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    norm.weight.data.fill_(gain - 1 if config.layernorm_zero_centered_gamma else gain)  # type: ignore[operator]
    return norm


def _normed(norm: nn.Module, factory: Callable[..., Any], *options: Any, **named: Any) -> Callable[..., Any]:
    """For a factory ``name(training, fused) -> add``, one whose ``add`` norms before it adds."""
    return functools.partial(_add_normed, norm, factory(*options, **named))


def _add_normed(
    norm: nn.Module, add: Callable[..., Any], output: tuple[Any, Any], residual: Any, *rest: Any
) -> Any:
    added, bias = output
    return add((norm(added if bias is None else added + bias), None), residual, *rest)
