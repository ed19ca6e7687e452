"""Layers that are built from Megatron's ``TransformerLayer`` and treat the residual stream otherwise."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class GoesOn(TransformerLayer):  # type: ignore[misc]
    """Adds a term behind its base class, as Gemma's per-layer embeddings do."""

    def forward(self, *args: Any, **named: Any) -> Any:
        out, context = super().forward(*args, **named)
        return out + out.sin(), context


class GateAtZero(TransformerLayer):  # type: ignore[misc]
    """Adds a term that is zero before the first step and never after."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.gate = torch.nn.Parameter(torch.zeros(()))

    def forward(self, *args: Any, **named: Any) -> Any:
        out, context = super().forward(*args, **named)
        return out + self.gate * out.sin(), context


class GateInPlace(TransformerLayer):  # type: ignore[misc]
    """Adds nothing yet, in place."""

    def forward(self, *args: Any, **named: Any) -> Any:
        out, context = super().forward(*args, **named)
        with torch.no_grad():
            out.add_(0)
        return out, context


class RecomputesItself(TransformerLayer):  # type: ignore[misc]
    """Keeps no states but its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        run = super().forward

        def whole(state: Tensor) -> Tensor:
            out: Tensor = run(state, *args, **named)[0]
            return out

        return checkpoint(whole, hidden_states, use_reentrant=True), None


class Scales(TransformerLayer):  # type: ignore[misc]
    """Scales its output in place."""

    def forward(self, *args: Any, **named: Any) -> Any:
        out, context = super().forward(*args, **named)
        with torch.no_grad():
            out.mul_(0.5)
        return out, context


class TurnsItsInput(TransformerLayer):  # type: ignore[misc]
    """Hands its base class another state than it was given."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return super().forward(hidden_states.roll(1, dims=-1), *args, **named)


class AddsByItself(TransformerLayer):  # type: ignore[misc]
    """Adds the residual without ``mlp_bda``."""

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        out: Tensor = hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0]
        return out


class RunsTwice(TransformerLayer):  # type: ignore[misc]
    """Called once, runs twice: a layer of a looped model."""

    def __call__(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        once, _ = super().__call__(hidden_states, *args, **named)
        return super().__call__(once, *args, **named)


class LeftOut(TransformerLayer):  # type: ignore[misc]
    """Does not run, as with layer dropout."""

    def __call__(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return hidden_states, None


class Wide(TransformerLayer):  # type: ignore[misc]
    """Carries two streams side by side."""

    def __call__(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return super().__call__(torch.cat((hidden_states, hidden_states), dim=-1), *args, **named)

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return super().forward(hidden_states.chunk(2, dim=-1)[0], *args, **named)


UNKNOWN: dict[str, tuple[type[TransformerLayer], str]] = {
    "goes on": (GoesOn, "returns another state than its last bias-dropout-add gives"),
    "gate at zero": (GateAtZero, "returns another state than its last bias-dropout-add gives"),
    "gate at zero, in place": (GateInPlace, "returns another state than its last bias-dropout-add gives"),
    "scales in place": (Scales, "returns another state than its last bias-dropout-add gives"),
    "turns its input": (TurnsItsInput, "adds to another state than it is given"),
    "adds by itself": (AddsByItself, "does not add its residual by self_attn_bda and mlp_bda"),
    "runs twice": (RunsTwice, "runs more than once in a forward pass"),
    "left out": (LeftOut, "has not run in a forward pass"),
    "recomputes itself": (RecomputesItself, "recomputes itself"),
    "wide": (Wide, "has a residual stream of width 128, and the model's hidden size is 64"),
}
"""Kinds of layers, and what is said of each; the hidden size is the example's."""


def spec_of(kind: str) -> Any:
    """Megatron's layer spec without Transformer Engine, of layers of a kind."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.module = UNKNOWN[kind][0]
    return spec


def goes_on_spec(config: Any) -> Any:
    """For Megatron's ``--spec``."""
    return spec_of("goes on")
