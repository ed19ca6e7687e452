"""Layers that are built from Megatron's ``TransformerLayer`` and treat the residual stream otherwise."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class GoesOn(TransformerLayer):  # type: ignore[misc]
    """Adds a term after its base class, as Gemma's per-layer embeddings do."""

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


class ScalesUnseen(TransformerLayer):  # type: ignore[misc]
    """Scales its output in place, which autograd does not count."""

    def forward(self, *args: Any, **named: Any) -> Any:
        out, context = super().forward(*args, **named)
        out.data.mul_(0.5)
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


class AttendsTwice(TransformerLayer):  # type: ignore[misc]
    """Runs its attention twice, and adds both times."""

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        once, _ = super()._forward_attention(hidden_states, *args, **named)
        return super()._forward_attention(once, *args, **named)


class TwoFeedForwards(TransformerLayer):  # type: ignore[misc]
    """Runs its MLP twice, and adds both times."""

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        once = super()._forward_mlp(hidden_states, *args, **named)
        return super()._forward_mlp(once, *args, **named)


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
    "goes on": (GoesOn, "returns another state"),
    "gate at zero": (GateAtZero, "returns another state"),
    "gate at zero, in place": (GateInPlace, "returns another state"),
    "scales in place": (Scales, "returns another state"),
    "scales unseen": (ScalesUnseen, "returns another state"),
    "turns its input": (TurnsItsInput, "adds to another state"),
    "adds by itself": (AddsByItself, "does not add its residual by self_attn_bda and mlp_bda"),
    "attends twice": (AttendsTwice, "calls self_attn_bda more than once"),
    "two feed-forwards": (TwoFeedForwards, "calls mlp_bda more than once"),
    "runs twice": (RunsTwice, "runs more than once"),
    "left out": (LeftOut, "has not run"),
    "recomputes itself": (RecomputesItself, "recomputes itself"),
    "wide": (Wide, "has a residual stream of width 128, and the model's hidden size is 64"),
}
"""Kinds of layers, and the finding for each; the hidden size is the example's."""


def spec_of(kind: str) -> Any:
    """Megatron's layer spec without Transformer Engine, of layers of a kind."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.module = UNKNOWN[kind][0]
    return spec


def goes_on_spec(config: Any) -> Any:
    """For Megatron's ``--spec``."""
    return spec_of("goes on")


class MambaGoesOn(MambaLayer):  # type: ignore[misc]
    """Adds a term after its base class."""

    def forward(self, *args: Any, **named: Any) -> Any:
        out = super().forward(*args, **named)
        return out + out.sin()


class MambaAddsToTheNormed(MambaLayer):  # type: ignore[misc]
    """Post-norm: the residual is the norm's output."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return super().forward(self.norm(hidden_states), *args, **named)


class TwoMambas(MambaLayer):  # type: ignore[misc]
    """Runs its mixer twice, and adds both times."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return super().forward(super().forward(hidden_states, *args, **named), *args, **named)


class MambaByItself(MambaLayer):  # type: ignore[misc]
    """Adds the residual without ``mamba_bda``."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return hidden_states + self.mixer(self.norm(hidden_states))[0]


class HandsOn(MLPLayer):  # type: ignore[misc]
    """An MLP that does not run."""

    def __call__(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return hidden_states, None


UNKNOWN_SUBLAYERS: dict[str, tuple[type[Any], str]] = {
    "mamba_layer that goes on": (MambaGoesOn, "returns another state"),
    "mamba_layer that adds to the normed": (MambaAddsToTheNormed, "adds to another state"),
    "mamba_layer twice": (TwoMambas, "calls mamba_bda more than once"),
    "mamba_layer by itself": (MambaByItself, "does not add its residual by mamba_bda"),
    "attention_layer that goes on": (GoesOn, "returns another state"),
    "attention_layer twice": (AttendsTwice, "calls self_attn_bda more than once"),
    "mlp_layer twice": (TwoFeedForwards, "calls mlp_bda more than once"),
    "mlp_layer that does not run": (HandsOn, "began and did not end"),
}
"""Sub-layers of a hybrid model. The name begins with their slot's name."""
