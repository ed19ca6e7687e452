"""Rename weights between Megatron's ``GPTModel`` and Hugging Face's Llama and Qwen; no number changes.

Megatron has queries, keys and values in one matrix, group by group (the queries of a group, its key, its
value), and gate above up projection in another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jreg_megatron.convert.llama import head_width

Weights = dict[str, Tensor]

_QKV, _GATE_UP = "self_attention.linear_qkv", "mlp.linear_fc1"
_SEPARATE_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_MODULES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "decoder.final_layernorm": ("model.norm",),
    "output_layer": ("lm_head",),
    "input_layernorm": ("input_layernorm",),
    _QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    _GATE_UP: _SEPARATE_GATE_UP,
    "mlp.linear_fc2": ("mlp.down_proj",),
}
"""Megatron's modules, those of a layer without its number, and what of Hugging Face's holds the same."""

_OURS, _THEIRS = "decoder.layers.", "model.layers."


def to_hugging_face(weights: Weights, config: Any) -> Weights:
    """Megatron's weights without rows of padding, under Hugging Face's names."""
    out: Weights = {}
    for name, weight in weights.items():
        if name.endswith("_extra_state"):
            continue
        number, module, kind = _cut(name, _OURS)
        names = _MODULES[module]
        parts = _split_qkv(weight, config) if module == _QKV else weight.chunk(len(names))
        out |= {
            _joined(_THEIRS, number, theirs, kind): part for theirs, part in zip(names, parts, strict=True)
        }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in out:
            out[name] = out[name][: config.vocab_size]
    return {name: _on_its_own(weight) for name, weight in out.items()}


def to_megatron(weights: Weights, config: Any) -> Weights:
    """Hugging Face's weights under Megatron's names, without rows of padding."""
    ours = {theirs[0]: module for module, theirs in _MODULES.items()}
    out: Weights = {}
    for name in weights:
        number, module, kind = _cut(name, _THEIRS)
        is_tied = module == "lm_head" and config.tie_word_embeddings
        if module not in ours or is_tied:
            continue  # it comes with the first part of its whole
        whole = ours[module]
        parts = [weights[_joined(_THEIRS, number, part, kind)] for part in _MODULES[whole]]
        joint = _join_qkv(parts, config) if whole == _QKV else torch.cat(parts)
        out[_joined(_OURS, number, whole, kind)] = joint
    return out


def _cut(name: str, layers: str) -> tuple[str, str, str]:
    """A weight's layer, empty for none, its module, and whether it is ``weight`` or ``bias``."""
    module, _, kind = name.rpartition(".")
    if not module.startswith(layers):
        return "", module, kind
    number, _, module = module.removeprefix(layers).partition(".")
    return number, module, kind


def _joined(layers: str, number: str, module: str, kind: str) -> str:
    return f"{layers}{number}.{module}.{kind}" if number else f"{module}.{kind}"


def _on_its_own(weight: Tensor) -> Tensor:
    """The tensor in its own memory, as safetensors needs it."""
    whole = weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
    return weight if whole else weight.clone(memory_format=torch.contiguous_format)


def _split_qkv(joint: Tensor, config: Any) -> list[Tensor]:
    per_group = joint.reshape(config.num_key_value_heads, -1, head_width(config), *joint.shape[1:])
    parts = per_group[:, :-2], per_group[:, -2], per_group[:, -1]
    return [part.reshape(-1, *joint.shape[1:]) for part in parts]


def _join_qkv(separate: list[Tensor], config: Any) -> Tensor:
    rest = separate[0].shape[1:]
    parts = [part.reshape(config.num_key_value_heads, -1, head_width(config), *rest) for part in separate]
    return torch.cat(parts, dim=1).reshape(-1, *rest)
