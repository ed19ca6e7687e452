"""Rename weights between Megatron's ``GPTModel`` and Hugging Face's ``LlamaForCausalLM``; no number changes.

Megatron has queries, keys and values in one matrix, group by group (the queries of a group, its key, its
value), and gate above up projection in another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaConfig

Weights = dict[str, Tensor]

_ENDS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
_HEAD = ("output_layer.weight", "lm_head.weight")
_OF_A_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
}
_QKV, _GATE_UP = "self_attention.linear_qkv", "mlp.linear_fc1"
_SEPARATE_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_SEPARATE_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def to_hugging_face(weights: Weights, config: LlamaConfig) -> Weights:
    """Megatron's weights without rows of padding, under Hugging Face's names."""
    out = {theirs: weights[ours] for ours, theirs in _names(config)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in out:
            out[name] = out[name][: config.vocab_size]
    for ours, theirs, kind in _layers(config):
        joint = weights[f"{ours}{_QKV}.{kind}"]
        for name, part in zip(_SEPARATE_QKV, _split_qkv(joint, config), strict=True):
            out[f"{theirs}{name}.{kind}"] = part
        for name, part in zip(_SEPARATE_GATE_UP, weights[f"{ours}{_GATE_UP}.{kind}"].chunk(2), strict=True):
            out[f"{theirs}{name}.{kind}"] = part
    return {name: _on_its_own(weight) for name, weight in out.items()}


def to_megatron(weights: Weights, config: LlamaConfig) -> Weights:
    """Hugging Face's weights under Megatron's names, without rows of padding."""
    out = {ours: weights[theirs] for ours, theirs in _names(config)}
    for ours, theirs, kind in _layers(config):
        separate = [weights[f"{theirs}{name}.{kind}"] for name in _SEPARATE_QKV]
        out[f"{ours}{_QKV}.{kind}"] = _join_qkv(separate, config)
        out[f"{ours}{_GATE_UP}.{kind}"] = torch.cat(
            [weights[f"{theirs}{name}.{kind}"] for name in _SEPARATE_GATE_UP]
        )
    return out


def _on_its_own(weight: Tensor) -> Tensor:
    """The tensor in its own memory, as safetensors needs it."""
    whole = weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
    return weight if whole else weight.clone(memory_format=torch.contiguous_format)


def _layers(config: LlamaConfig) -> list[tuple[str, str, str]]:
    """The beginning of the names of each layer's weights and biases, in Megatron and in Hugging Face."""
    return [
        (f"decoder.layers.{number}.", f"model.layers.{number}.", kind)
        for number in range(config.num_hidden_layers)
        for kind in (("weight", "bias") if config.attention_bias else ("weight",))
    ]


def _names(config: LlamaConfig) -> list[tuple[str, str]]:
    """Megatron's and Hugging Face's names of the weights that are alike in both."""
    names = list(_ENDS.items())
    if not config.tie_word_embeddings:
        names.append(_HEAD)
    for ours, theirs, kind in _layers(config):
        names += [(ours + a, theirs + b) for a, b in _OF_A_LAYER.items() if a.endswith(kind)]
    return names


def _split_qkv(joint: Tensor, config: LlamaConfig) -> list[Tensor]:
    per_group = joint.reshape(config.num_key_value_heads, -1, config.head_dim, *joint.shape[1:])
    parts = per_group[:, :-2], per_group[:, -2], per_group[:, -1]
    return [part.reshape(-1, *joint.shape[1:]) for part in parts]


def _join_qkv(separate: list[Tensor], config: LlamaConfig) -> Tensor:
    rest = separate[0].shape[1:]
    parts = [part.reshape(config.num_key_value_heads, -1, config.head_dim, *rest) for part in separate]
    return torch.cat(parts, dim=1).reshape(-1, *rest)
