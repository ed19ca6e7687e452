"""Models that both Megatron's ``GPTModel`` and Hugging Face's Llama, Qwen2 or Qwen3 can express.

The conversion renames weights and changes no number. Megatron stores queries, keys and values in one matrix,
group by group: the queries of a group, its key, its value. It stores the MLP's gate projection above the up
projection in one matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jreg_megatron.decoder.checkpoint.folder import bridge_as
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import flag_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The constants of Megatron's ``--use-rope-scaling``. Its training loop cannot set others."""

# Features of Megatron's GPTModel that Llama and Qwen lack: argument, allowed values, feature, and a model of
# Megatron-Bridge with this feature. Features that the tools cannot measure either are refused earlier.
_ONLY_IN_MEGATRON: tuple[tuple[str, tuple[Any, ...], str, str | None], ...] = (
    ("num_experts", (None,), "is a mixture of experts (--num-experts)", "Qwen3-MoE"),
    ("multi_latent_attention", (False,), "has multi-latent attention", "DeepSeek-V3"),
    ("normalization", ("RMSNorm",), "has another norm than RMSNorm (--normalization)", "Nemotron"),
    ("squared_relu", (False,), "has --squared-relu", "Nemotron"),
    ("quick_geglu", (False,), "has --quick-geglu", "gpt-oss"),
    ("swiglu", (True,), "has another activation than SwiGLU (no --swiglu)", None),
    ("glu_linear_offset", (0, None), "has --glu-linear-offset", "gpt-oss"),
    ("activation_func_clamp_value", (None,), "has --activation-func-clamp-value", "gpt-oss"),
    ("position_embedding_type", ("rope",), "has no rotary positions (--position-embedding-type)", None),
    ("rotary_percent", (1, None), "turns only a part of each head (--rotary-percent)", "Nemotron"),
    ("rotary_interleaved", (False,), "has --rotary-interleaved", "ERNIE 4.5"),
    ("no_rope_freq", (None, 0), "has layers without positions (--no-rope-freq)", "EXAONE 4.5"),
    ("window_size", (None,), "has a sliding window (--window-size)", "gpt-oss"),
    ("softmax_type", ("vanilla", None), "has another softmax (--softmax-type)", "gpt-oss"),
    ("attention_output_gate", (False,), "has --attention-output-gate", "Qwen3-Next"),
    ("apply_residual_connection_post_layernorm", (False,), "takes the residual after the norm", None),
    ("linear_attention_freq", (None,), "has linear attention", "Qwen3-Next"),
    ("use_mup", (False,), "is scaled by MuP (--use-mup)", None),
)

AS_IT_IS = "it cannot be exported, but jreg-megatron measure and evaluate can read the checkpoint"

KINDS = ("llama", "qwen2", "qwen3")
"""Hugging Face's ``model_type``. A Qwen2 is a Llama with biases in queries, keys and values. A Qwen3 is a
Llama with norms of queries and keys."""


_SAME = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
}
"""Hugging Face's names of settings, and Megatron's."""


def from_megatron(args: Any, vocab_size: int, what: str, is_changed: bool = False) -> Any:
    """Hugging Face's config for Megatron's arguments, without ids of a tokenizer.

    Args:
        args: Megatron's arguments.
        vocab_size: number of rows without padding.
        what: name of the checkpoint in messages.
        is_changed: whether a method has changed the model. Then Megatron-Bridge cannot export it.

    Raises:
        UserError: naming the feature that none of ``KINDS`` has.
    """
    from transformers import AutoConfig

    def refuse(has: str, example: str | None) -> UserError:
        instead = bridge_as(example) if example and not is_changed else AS_IT_IS
        return UserError(f"{what} {has}, which no Llama or Qwen of Hugging Face has; {instead}")

    for name, allowed, is_other, example in _ONLY_IN_MEGATRON:
        if getattr(args, name, allowed[0]) not in allowed:
            raise refuse(is_other, example)
    has_biases, is_normed = bool(args.add_bias_linear), getattr(args, "qk_layernorm", False)
    has_qkv_biases = getattr(args, "add_qkv_bias", False) and not has_biases
    if is_normed and (has_biases or has_qkv_biases):
        raise refuse(
            "has norms of queries and keys, and biases (--qk-layernorm without --disable-bias-linear)", None
        )
    own: dict[str, Any] = {"model_type": "qwen3" if is_normed else "qwen2" if has_qkv_biases else "llama"}
    if own["model_type"] == "llama":
        own |= {"attention_bias": has_biases, "mlp_bias": has_biases}
    heads, width = args.num_attention_heads, args.hidden_size
    if width % heads:
        raise refuse(f"has {heads} heads, which do not divide its hidden size {width}", None)
    scaling: dict[str, Any] | None = None
    if args.use_rope_scaling:
        scaling = dict(LLAMA3_ROPE)
    elif args.rotary_seq_len_interpolation_factor:
        scaling = {"rope_type": "linear", "factor": float(args.rotary_seq_len_interpolation_factor)}
    return AutoConfig.for_model(
        **own,
        **{theirs: getattr(args, ours) for theirs, ours in _SAME.items()},
        num_key_value_heads=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels or width // heads,
        vocab_size=vocab_size,
        rope_theta=float(args.rotary_base),
        rope_scaling=scaling,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def refuse_other(config: Any, what: str) -> None:
    """Raises:
    UserError: for a type not in ``KINDS``, or a feature that Megatron's ``GPTModel`` lacks; it is named.
    """

    if config.model_type not in KINDS:
        raise UserError(f"{what} is of type {config.model_type}, and only {', '.join(KINDS)} can be imported")
    rope = config.rope_parameters
    scaling, theta, factor = rope["rope_type"], rope.get("rope_theta", 1), rope.get("factor", 1)

    def own(name: str) -> Any:
        return getattr(config, name, False)

    wrong = [
        (own("hidden_act") != "silu", f"the activation {config.hidden_act}"),
        (own("attention_bias") != own("mlp_bias"), "biases in attention or MLP alone"),
        (own("use_sliding_window"), "a sliding window in some layers (use_sliding_window)"),
        (scaling not in ("default", "linear", "llama3"), f"rotary positions scaled by {scaling}"),
        (
            rope.get("partial_rotary_factor", 1) != 1,
            "positions for a part of each head (partial_rotary_factor)",
        ),
        (theta != int(theta), f"a rope_theta of {theta}, no whole number"),
        (scaling == "linear" and factor != int(factor), f"positions divided by {factor}, no whole number"),
    ]
    for name, value in LLAMA3_ROPE.items() if scaling == "llama3" else ():
        given = rope.get(name)
        wrong.append((given != value, f"{name} {given} for its rotary positions, not {value}"))
    for is_so, has in wrong:
        if is_so:
            raise UserError(
                f"{what} has {has}, which Megatron's GPTModel does not have; it cannot be imported"
            )


def older_rope_settings(config: Any) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, for transformers before 5, vLLM and others."""
    scaling = dict(config.rope_parameters)
    theta = scaling.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def head_width(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def megatron_flags(config: Any) -> list[str]:
    """Megatron's flags for a Hugging Face config, as separate words."""
    rope = config.rope_parameters
    flags: list[str | float] = ["--kv-channels", head_width(config), "--rotary-base", int(rope["rope_theta"])]
    for theirs, ours in _SAME.items():
        name = "norm_epsilon" if ours == "layernorm_epsilon" else ours
        flags += [flag_of(name), getattr(config, theirs)]
    if config.num_key_value_heads != config.num_attention_heads:
        flags += ["--group-query-attention", "--num-query-groups", config.num_key_value_heads]
    flags += ["--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"]
    if rope["rope_type"] == "llama3":
        flags.append("--use-rope-scaling")
    if rope["rope_type"] == "linear":
        flags += ["--rotary-seq-len-interpolation-factor", int(rope["factor"])]
    if not getattr(config, "attention_bias", False):
        flags.append("--disable-bias-linear")
    flags += {"qwen2": ["--add-qkv-bias"], "qwen3": ["--qk-layernorm"]}.get(config.model_type, [])
    if not config.tie_word_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    return [*map(str, flags), "--attention-dropout", "0", "--hidden-dropout", "0"]


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
"""Megatron's modules (a layer's without its number), and Hugging Face's modules with the same weights."""

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
            continue  # joined with the first part of its Megatron module
        whole = ours[module]
        parts = [weights[_joined(_THEIRS, number, part, kind)] for part in _MODULES[whole]]
        joint = _join_qkv(parts, config) if whole == _QKV else torch.cat(parts)
        out[_joined(_OURS, number, whole, kind)] = joint
    return out


def _cut(name: str, layers: str) -> tuple[str, str, str]:
    """Split a weight's name: its layer (empty outside the layers), its module, and ``weight`` or ``bias``."""
    module, _, kind = name.rpartition(".")
    if not module.startswith(layers):
        return "", module, kind
    number, _, module = module.removeprefix(layers).partition(".")
    return number, module, kind


def _joined(layers: str, number: str, module: str, kind: str) -> str:
    return f"{layers}{number}.{module}.{kind}" if number else f"{module}.{kind}"


def _on_its_own(weight: Tensor) -> Tensor:
    """The tensor in a storage of its own, as safetensors requires."""
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
