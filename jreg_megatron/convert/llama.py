"""Models that both Megatron's ``GPTModel`` and Hugging Face's Llama, Qwen2 or Qwen3 can express."""

from __future__ import annotations

from typing import Any

from jreg_megatron.decoder.checkpoint.folder import bridge_as
from jreg_megatron.runtime.errors import UserError

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The numbers of Megatron's ``--use-rope-scaling``; its training loop has no others."""

# Features of Megatron's GPTModel that a Llama and a Qwen lack: argument, their values, the feature, and a
# model of Megatron-Bridge with this feature.
_ONLY_IN_MEGATRON: tuple[tuple[str, tuple[Any, ...], str, str | None], ...] = (
    ("num_experts", (None,), "is a mixture of experts (--num-experts)", "Qwen3-MoE"),
    ("multi_latent_attention", (False,), "has multi-latent attention", "DeepSeek-V3"),
    ("normalization", ("RMSNorm",), "has another norm than RMSNorm (--normalization)", "Nemotron"),
    ("squared_relu", (False,), "has --squared-relu", "Nemotron"),
    ("quick_geglu", (False,), "has --quick-geglu", "gpt-oss"),
    ("swiglu", (True,), "has another activation than SwiGLU (no --swiglu)", None),
    ("glu_linear_offset", (0, None), "has --glu-linear-offset", "gpt-oss"),
    ("activation_func_clamp_value", (None,), "has --activation-func-clamp-value", "gpt-oss"),
    ("qk_l2_norm", (False,), "has norms of queries and keys (--qk-l2-norm)", None),
    ("position_embedding_type", ("rope",), "has no rotary positions (--position-embedding-type)", None),
    ("rotary_percent", (1, None), "turns only a part of each head (--rotary-percent)", "Nemotron"),
    ("rotary_interleaved", (False,), "has --rotary-interleaved", "ERNIE 4.5"),
    ("no_rope_freq", (None, 0), "has layers without positions (--no-rope-freq)", "EXAONE 4.5"),
    ("window_size", (None,), "has a sliding window (--window-size)", "gpt-oss"),
    ("softmax_type", ("vanilla", None), "has another softmax (--softmax-type)", "gpt-oss"),
    ("attention_output_gate", (False,), "has --attention-output-gate", "Qwen3-Next"),
    ("apply_residual_connection_post_layernorm", (False,), "takes the residual behind the norm", None),
    ("experimental_attention_variant", (None,), "has --experimental-attention-variant", "Qwen3-Next"),
    ("linear_attention_freq", (None,), "has linear attention", "Qwen3-Next"),
    ("use_mup", (False,), "is scaled by MuP (--use-mup)", None),
)

_AS_IT_IS = "it cannot be exported, but jreg-megatron measure and evaluate can read the checkpoint"

KINDS = ("llama", "qwen2", "qwen3")
"""Hugging Face's ``model_type``. A Qwen2 is a Llama with biases in queries, keys and values; a Qwen3 one with
norms of queries and keys."""


_SAME = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
}
"""Hugging Face's names of settings, and Megatron's."""


def from_megatron(args: Any, vocab_size: int, what: str) -> Any:
    """Hugging Face's config of the model that Megatron's arguments describe, without ids of a tokenizer.

    ``vocab_size`` is the number of rows without padding; ``what`` names the checkpoint in messages.

    Raises:
        UserError: naming the feature that none of ``KINDS`` has.
    """
    from transformers import AutoConfig

    def refuse(has: str, example: str | None) -> UserError:
        instead = bridge_as(example) if example else _AS_IT_IS
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
    UserError: naming a feature in the config that Megatron's ``GPTModel`` lacks, or a type not in ``KINDS``.
    """

    if config.model_type not in KINDS:
        raise UserError(f"{what} is of type {config.model_type}, and only {', '.join(KINDS)} can be imported")
    rope = config.rope_parameters
    scaling, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor", 1)

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
    """Of a query, a key and a value."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def megatron_flags(config: Any) -> list[str]:
    """Megatron's flags for a Hugging Face config, each followed by its value."""
    rope = config.rope_parameters
    flags: list[str | float] = ["--kv-channels", head_width(config), "--rotary-base", int(rope["rope_theta"])]
    for theirs, ours in _SAME.items():
        name = "norm_epsilon" if ours == "layernorm_epsilon" else ours
        flags += [f"--{name.replace('_', '-')}", getattr(config, theirs)]
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
