"""The step of ``layout_step`` with layers of other kinds, beside a reference.

Where the kind computes something else than the self-test's model, the reference is written out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from harness import run_function
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import transformer_config
from torch import Tensor

from jreg_megatron.selftest import compare, reference, step, toy
from jreg_megatron.selftest.compare import Comparison, Difference
from jreg_megatron.selftest.layouts import Layout

WINDOW = 5
"""Tokens that a query looks back."""

PREFIX = "self_attention."


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
    "latent": (reference.ReferenceLlama, step.LATENT),
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
    is_latent = kind == "latent"
    transformer_config.TransformerConfig = lambda **given: _CONFIGS[is_latent](**{**given, **options})
    gpt_layer_specs.get_gpt_layer_local_spec = partial(
        _local_spec, **dict.fromkeys(("multi_latent_attention", "qk_layernorm"), is_latent)
    )
    toy.ReferenceLlama = model  # type: ignore[misc]
    for module in (toy, step, compare):
        module.shape_of = _latent_shape_of if is_latent else _shape_of  # type: ignore[assignment]
    return compare.compare_step(layout)


def _latent_shape_of(layout: Layout) -> reference.Shape:
    shape = _shape_of(layout)
    return replace(shape, layers=("+-",) * shape.num_layers)
