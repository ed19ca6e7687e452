"""What both Megatron's ``GPTModel`` and Hugging Face's ``LlamaForCausalLM`` can express: sizes, switches."""

from __future__ import annotations

from dataclasses import dataclass
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
"""What Megatron's ``--use-rope-scaling`` does; its training loop knows no other numbers."""

# What a GPTModel of Megatron's may have and a Llama has not: argument, values that a Llama has, what it is,
# and a model of Megatron-Bridge's that has it too.
_ONLY_IN_MEGATRON: tuple[tuple[str, tuple[Any, ...], str, str | None], ...] = (
    ("num_experts", (None,), "is a mixture of experts (--num-experts)", "Qwen3-MoE"),
    ("multi_latent_attention", (False,), "has multi-latent attention", "DeepSeek-V3"),
    ("normalization", ("RMSNorm",), "has another norm than RMSNorm (--normalization)", "Nemotron"),
    ("squared_relu", (False,), "has --squared-relu", "Nemotron"),
    ("quick_geglu", (False,), "has --quick-geglu", "gpt-oss"),
    ("swiglu", (True,), "has another activation than SwiGLU (no --swiglu)", None),
    ("glu_linear_offset", (0, None), "has --glu-linear-offset", "gpt-oss"),
    ("activation_func_clamp_value", (None,), "has --activation-func-clamp-value", "gpt-oss"),
    ("qk_layernorm", (False,), "has norms of queries and keys (--qk-layernorm)", "Qwen3"),
    ("qk_l2_norm", (False,), "has norms of queries and keys (--qk-l2-norm)", None),
    (
        "position_embedding_type",
        ("rope",),
        "has other positions than rotary ones (--position-embedding-type)",
        None,
    ),
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


_AS_IT_IS = "it cannot be exported, but jreg-megatron measure and evaluate read it as it is"


@dataclass(frozen=True)
class Llama:
    """A Llama's sizes and switches."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding and the head, without padding."""
    max_length: int
    norm_epsilon: float
    rope_base: float
    is_llama3_rope: bool
    """Whether the base frequencies are scaled as in Llama 3.1, by :data:`LLAMA3_ROPE`."""
    position_interpolation: float | None
    """Positions are divided by it."""
    tied: bool
    """Whether the head is the embedding."""
    has_bias: bool
    """Whether all linear layers but the head have biases."""

    @classmethod
    def from_megatron(cls, args: Any, vocab_size: int, what: str) -> Llama:
        """The Llama that Megatron's arguments describe.

        Args:
            args: the checkpoint's, with defaults for what it did not know.
            vocab_size: real vocabulary.
            what: the checkpoint, for messages.

        Raises:
            UserError: naming what a ``LlamaForCausalLM`` cannot express.
        """

        def refuse(has: str, example: str | None) -> UserError:
            instead = bridge_as(example) if example else _AS_IT_IS
            return UserError(f"{what} {has}, which a Llama of Hugging Face has not; {instead}")

        for name, allowed, is_other, example in _ONLY_IN_MEGATRON:
            if getattr(args, name, allowed[0]) not in allowed:
                raise refuse(is_other, example)
        if getattr(args, "add_qkv_bias", False) and not args.add_bias_linear:
            raise refuse("has biases in queries, keys and values alone (--add-qkv-bias)", "Qwen2")
        if args.hidden_size % args.num_attention_heads:
            raise UserError(
                f"{what} has {args.num_attention_heads} heads at a hidden size of {args.hidden_size}; a "
                f"Llama of Hugging Face wants a multiple; {_AS_IT_IS}"
            )
        return cls(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups
            if args.group_query_attention
            else args.num_attention_heads,
            head_dim=args.kv_channels or args.hidden_size // args.num_attention_heads,
            vocab_size=vocab_size,
            max_length=args.max_position_embeddings,
            norm_epsilon=args.layernorm_epsilon,
            rope_base=float(args.rotary_base),
            is_llama3_rope=bool(args.use_rope_scaling),
            position_interpolation=args.rotary_seq_len_interpolation_factor,
            tied=not args.untie_embeddings_and_output_weights,
            has_bias=bool(args.add_bias_linear),
        )

    @classmethod
    def from_hugging_face(cls, config: Any, what: str) -> Llama:
        """The Llama that a ``LlamaConfig`` describes.

        Raises:
            UserError: naming what Megatron cannot express, or if it is no Llama.
        """

        def refuse(has: str) -> UserError:
            return UserError(f"{what} {has}, which Megatron's GPTModel has not; it cannot be imported")

        if config.model_type != "llama":
            raise UserError(f"{what} is of type {config.model_type}, and only llama can be imported")
        if config.hidden_act != "silu":
            raise refuse(f"has the activation {config.hidden_act}")
        if config.attention_bias != config.mlp_bias:
            raise refuse("has biases in attention or MLP alone")
        rope = _rope_of(config)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise refuse(f"has rotary positions scaled by {kind}")
        if kind == "llama3":
            for name, value in LLAMA3_ROPE.items():
                if name != "rope_type" and rope.get(name) != value:
                    raise refuse(f"has {name} {rope.get(name)} for its rotary positions, not {value}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise refuse("turns only a part of each head (partial_rotary_factor)")
        base = float(rope["rope_theta"])
        if base != int(base):
            raise refuse(f"has a rope_theta of {base}, no whole number")
        if kind == "linear" and rope["factor"] != int(rope["factor"]):
            raise refuse(f"divides positions by {rope['factor']}, no whole number")
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_length=config.max_position_embeddings,
            norm_epsilon=config.rms_norm_eps,
            rope_base=base,
            is_llama3_rope=kind == "llama3",
            position_interpolation=rope["factor"] if kind == "linear" else None,
            tied=config.tie_word_embeddings,
            has_bias=config.attention_bias,
        )

    def hugging_face_config(self, dtype: str, bos: int | None, eos: int | None) -> Any:
        """A ``LlamaConfig``; ``bos`` and ``eos`` are the ids that begin and end a document."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.ffn_hidden_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_query_groups,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_length,
            rms_norm_eps=self.norm_epsilon,
            tie_word_embeddings=self.tied,
            attention_bias=self.has_bias,
            mlp_bias=self.has_bias,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=None,
            dtype=dtype,
            **self.rope_settings(),
        )

    def rope_settings(self) -> dict[str, Any]:
        """``rope_theta`` and ``rope_scaling`` as transformers before 5, vLLM and others read them."""
        scaling: dict[str, Any] | None = None
        if self.is_llama3_rope:
            scaling = dict(LLAMA3_ROPE)
        elif self.position_interpolation:
            scaling = {"rope_type": "linear", "factor": float(self.position_interpolation)}
        return {"rope_theta": self.rope_base, "rope_scaling": scaling}

    def megatron_flags(self) -> list[str]:
        """The flags that describe the model to Megatron's training loop, values behind them."""
        flags: list[str | float] = [
            *("--num-layers", self.num_layers, "--hidden-size", self.hidden_size),
            *("--ffn-hidden-size", self.ffn_hidden_size, "--num-attention-heads", self.num_heads),
            *("--kv-channels", self.head_dim),
        ]
        if self.num_query_groups != self.num_heads:
            flags += ["--group-query-attention", "--num-query-groups", self.num_query_groups]
        flags += [
            *("--max-position-embeddings", self.max_length, "--position-embedding-type", "rope"),
            *("--rotary-base", int(self.rope_base)),
        ]
        if self.is_llama3_rope:
            flags.append("--use-rope-scaling")
        if self.position_interpolation:
            flags += ["--rotary-seq-len-interpolation-factor", int(self.position_interpolation)]
        flags += ["--normalization", "RMSNorm", "--norm-epsilon", self.norm_epsilon, "--swiglu"]
        if not self.has_bias:
            flags.append("--disable-bias-linear")
        if not self.tied:
            flags.append("--untie-embeddings-and-output-weights")
        flags += ["--attention-dropout", 0, "--hidden-dropout", 0]
        return list(map(str, flags))


def _rope_of(config: Any) -> dict[str, Any]:
    """Rotary settings with their base, of transformers 5 or before."""
    rope = getattr(config, "rope_parameters", None)
    if rope:
        return dict(rope)
    return dict(getattr(config, "rope_scaling", None) or {}) | {"rope_theta": config.rope_theta}
