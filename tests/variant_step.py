"""The step of ``layout_step`` with layers of other kinds, beside a reference.

Where the kind computes something else than the self-test's model, the reference is written out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import run_function
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import transformer_config
from torch import Tensor

from jreg_megatron.selftest import compare, reference, step, toy
from jreg_megatron.selftest.compare import Comparison, Difference
from jreg_megatron.selftest.layouts import Layout

Q_RANK, KV_RANK, OWN, SHARED, VALUE = 12, 20, 10, 6, 14
"""Latent attention: ranks of queries and of keys and values; widths of a head's own and shared part of a key,
and of its value. No two are equal, and none is the width of a head without it."""
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": Q_RANK,
    "kv_lora_rank": KV_RANK,
    "qk_head_dim": OWN,
    "qk_pos_emb_head_dim": SHARED,
    "v_head_dim": VALUE,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "qk_layernorm": True,
}
WINDOW = 5
"""Tokens that a query looks back."""

PREFIX = "self_attention."


@dataclass(frozen=True, kw_only=True)
class LatentShape(reference.Shape):
    """Sizes of a model with latent attention."""

    def _layer_parameters(self) -> dict[str, tuple[int, ...]]:
        h, heads = self.hidden_size, self.num_attention_heads
        shapes = super()._layer_parameters()
        del shapes[reference.ATTENTION_NORM], shapes[f"{PREFIX}linear_qkv.weight"]
        return shapes | {
            "input_layernorm.weight": (h,),
            f"{PREFIX}linear_q_down_proj.weight": (Q_RANK, h),
            f"{PREFIX}q_layernorm.weight": (Q_RANK,),
            f"{PREFIX}linear_q_up_proj.weight": (heads * (OWN + SHARED), Q_RANK),
            f"{PREFIX}linear_kv_down_proj.weight": (KV_RANK + SHARED, h),
            f"{PREFIX}kv_layernorm.weight": (KV_RANK,),
            f"{PREFIX}linear_kv_up_proj.weight": (heads * (OWN + VALUE), KV_RANK),
            f"{PREFIX}linear_proj.weight": (h, heads * VALUE),
        }


class LatentLlama(reference.ReferenceLlama):
    """Latent attention as DeepSeek-V2 has it (arXiv:2405.04434, section 2.1)."""

    def _transform(self, layer: Mapping[str, Tensor], h: Tensor) -> Tensor:
        return super()._transform({**layer, reference.ATTENTION_NORM: layer["input_layernorm.weight"]}, h)

    def _attention(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        batch, length, _ = normed.shape
        heads = self.shape.num_attention_heads

        def project(x: Tensor, name: str) -> Tensor:
            return x @ layer[f"{PREFIX}linear_{name}.weight"].T

        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x, x.shape[-1:], layer[f"{PREFIX}{name}_layernorm.weight"], reference.EPS)

        query = project(norm(project(normed, "q_down_proj"), "q"), "q_up_proj").view(batch, length, heads, -1)
        latent, shared = project(normed, "kv_down_proj").split((KV_RANK, SHARED), -1)
        both = project(norm(latent, "kv"), "kv_up_proj").view(batch, length, heads, -1)
        key, value = both.split((OWN, VALUE), -1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query[..., :OWN], key)
        scores = scores + torch.einsum("bqhd,bkd->bhqk", turned(query[..., OWN:]), turned(shared))
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        share = (scores / math.sqrt(OWN + SHARED)).masked_fill(future, -math.inf).softmax(-1)
        return project(torch.einsum("bhqk,bkhd->bqhd", share, value).flatten(2), "proj")


def turned(x: Tensor) -> Tensor:
    """Rotary positions on ``[b, s, ..., d]``, each pair of neighbours a complex number."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    frequency = reference.ROPE_BASE ** (-torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
    angle = torch.arange(x.shape[1])[:, None] * frequency
    angle = angle.view(x.shape[1], *(1,) * (x.ndim - 3), -1)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


class WindowLlama(reference.ReferenceLlama):
    """Attention that sees its own token and the ``WINDOW`` before it."""

    def _attention(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        batch, length, width = normed.shape
        heads = self.shape.num_attention_heads
        qkv = (normed @ layer[f"{PREFIX}linear_qkv.weight"].T).view(batch, length, heads, 3, -1)
        query, key, value = (qkv[:, :, :, part].transpose(1, 2) for part in range(3))
        rows = []
        for at in range(length):
            seen = slice(max(0, at - WINDOW), at + 1)
            scores = reference._rotate(query)[:, :, at : at + 1] @ reference._rotate(key)[:, :, seen].mT
            rows.append((scores / math.sqrt(width // heads)).softmax(-1) @ value[:, :, seen])
        joined = torch.cat(rows, dim=2).transpose(1, 2).reshape(batch, length, width)
        return joined @ layer[f"{PREFIX}linear_proj.weight"].T


KINDS: dict[str, tuple[type[reference.ReferenceLlama], dict[str, Any]]] = {
    "latent": (LatentLlama, LATENT),
    "window": (WindowLlama, {"window_size": (WINDOW, 0)}),
    # Transformer Engine lets a causal window look ahead nowhere either.
    "window that would look ahead": (WindowLlama, {"window_size": (WINDOW, 2)}),
    "window without an end": (reference.ReferenceLlama, {"window_size": (-1, 0)}),
    "fp32 residual": (reference.ReferenceLlama, {"fp32_residual_connection": True}),
    "tokens exchanged": (reference.ReferenceLlama, {"moe_token_dispatcher_type": "alltoall"}),
    "norms recomputed": (
        reference.ReferenceLlama,
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    ),
}


def on_ranks(layout: Layout, kinds: tuple[str, ...]) -> dict[str, tuple[Difference, Difference]]:
    """For each kind how far a step at the layout is from the reference, and how far it may be."""
    found = run_function(_compare, layout.world_size, layout, kinds, timeout=120)[0]
    return {kind: (comparison.found, comparison.limit) for kind, comparison in found.items()}


def _compare(layout: Layout, kinds: tuple[str, ...]) -> dict[str, Comparison]:
    torch.set_num_threads(1)
    return {kind: _compare_kind(layout, kind) for kind in kinds}


_CONFIGS = transformer_config.TransformerConfig, transformer_config.MLATransformerConfig
_local_spec, _shape_of = gpt_layer_specs.get_gpt_layer_local_spec, toy.shape_of


def _compare_kind(layout: Layout, kind: str) -> Comparison:
    model, options = KINDS[kind]
    is_latent = model is LatentLlama
    transformer_config.TransformerConfig = lambda **given: _CONFIGS[is_latent](**{**given, **options})
    gpt_layer_specs.get_gpt_layer_local_spec = partial(
        _local_spec, **dict.fromkeys(("multi_latent_attention", "qk_layernorm"), is_latent)
    )
    toy.ReferenceLlama = model  # type: ignore[misc]
    for module in (toy, step, compare):
        module.shape_of = _latent_shape_of if is_latent else _shape_of  # type: ignore[assignment]
    return compare.compare_step(layout)


def _latent_shape_of(layout: Layout) -> reference.Shape:
    return LatentShape(**vars(_shape_of(layout)))
