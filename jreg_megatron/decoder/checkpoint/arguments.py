"""Decide which checkpoints can be run here, and make Megatron's arguments for their models.

In a ``HybridModel``, attention ('*', latent '+'), MLP ('-') and experts ('E') are separate modules. A pair
computes the same as one layer of a ``GPTModel``. So a checkpoint that consists of such pairs is read as a
``GPTModel``, under other names.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from jreg_megatron.cpu.flags import FLAGS, HYBRID_SPECS
from jreg_megatron.decoder.checkpoint.folder import bridge_as
from jreg_megatron.methods import known
from jreg_megatron.methods.attenuation.settings import AttenuationConfig
from jreg_megatron.methods.lns.settings import LayerNormScalingConfig
from jreg_megatron.methods.periln.settings import PeriLNConfig
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import flag_of
from jreg_megatron.runtime.output import note
from jreg_megatron.stream.anatomy import layers_of, sublayers_of
from jreg_megatron.stream.settings import LAYER_RULES, Settings, flags_of

_OTHER_MODELS = {
    "spec": ("has layers of its own (--spec)", None),
    "heterogeneous_layers_config_path": (
        "has layers that differ (--heterogeneous-layers-config-path)",
        "Llama-Nemotron",
    ),
    "yaml_cfg": ("was configured by --yaml-cfg", None),
    "use_megatron_fsdp": ("was trained with Megatron-FSDP", None),
    "use_torch_fsdp2": ("was trained with FSDP2", None),
    "enable_hyper_connections": ("has hyper-connections, several residual streams", "DeepSeek-V4"),
    "enable_mhc_connections": ("has hyper-connections, several residual streams", "DeepSeek-V4"),
    "experimental_attention_variant": ("has --experimental-attention-variant", "Qwen3-Next"),
    "kitchen_config_file": ("was trained with Kitchen's layers", None),
    "moe_mlp_glu_interleave_size": ("has --moe-mlp-glu-interleave-size", None),
    "moe_shared_expert_glu_interleave_size": ("has --moe-shared-expert-glu-interleave-size", None),
    "retro_add_retriever": ("has a retriever (--retro-add-retriever)", None),
}
"""By argument: the reason why the checkpoint cannot be run, and a Megatron-Bridge model with this feature."""

_CHANGES = (AttenuationConfig, LayerNormScalingConfig, PeriLNConfig)
"""The methods that change a model and can be run here."""

_PAIRS = {False: ("*-", "*E"), True: ("+-", "+E")}
"""The pairs of a hybrid model that equal a layer of a ``GPTModel``, by whether attention is latent."""

_BY_NUMBER = ("no_rope_freq", "window_attn_skip_freq")
"""Arguments that count layers. In a hybrid model they count sub-layers."""

_WORDS = tuple(
    "parallel pipeline virtual overlap offload recompute cuda_graph inference fused fusion fp8 fp4 bf16 "
    "fp16 gtp_".split()
)
_BEGINNINGS = (
    *(f"{method.prefix}_" for method in known.METHODS),  # known_changes checks these
    *"""
    account_for_ apply_query_key_layer_scaling attention_backend attention_dropout batch_invariant
    calculate_per_token ckpt_ config_logger consumed_ curr_iteration defer_embedding delay_ delta_
    deterministic disable_chunked disable_mamba_mem distribute_saved do_test do_train do_valid enable_gloo
    export_ fine_grained finetune_ flash gdp_ grpo_ hidden_dropout init_model iteration kitchen langrl
    lazy legacy_tokenizer load_model_opt local_rank megatron_fsdp mhc_ min_offloaded modelopt
    moe_apply_probs_fusion moe_aux_loss moe_combine moe_deepep moe_dispatch moe_enable_deepep
    moe_expert_rank moe_extended moe_flex moe_grouped_gemm moe_hybridep moe_input_jitter moe_layer_recompute
    moe_ncclep moe_pad_experts moe_paged moe_per_layer_logging moe_permute_fusion moe_router_fusion
    moe_routing_trace moe_single_grouped moe_token_dispatcher moe_use_legacy moe_use_upcycling moe_z_loss
    mtp_ muon_ nccl no_persist num_floating otel_ params_dtype perform_init qk_clip quant
    renormalize_blend retriever_ retro_ rl_ s3_ save_ scatter_gather skipped_ standalone_embedding
    symmetric_ar te_ teacher_ tiktoken_ tokenizer_ tp_comm transformer_impl use_cpu_init use_custom_fsdp
    use_dist_ckpt use_gigatoken use_grouped_gemm use_layer_wise use_te use_transformer_engine variable_seq
    wgrad world_size
    """.split(),
)
_NAMES = ("cpu", "load", "rank", "save")

_SINCE_0_18, _SINCE_0_19 = "null_tokenizer_eod_id", "stream_ckpt_dequant"
"""Arguments that every checkpoint has from that version on, and no older one."""


def has_a_bearing(name: str) -> bool:
    """Whether an argument may change what the trained model computes.

    The other arguments set how the model was split, stored, run or trained. The methods' settings count as
    such; they are checked separately.
    """
    return not (name in _NAMES or name.startswith(_BEGINNINGS) or any(word in name for word in _WORDS))


def pattern_of(arguments: dict[str, Any]) -> str | None:
    """A hybrid model's sub-layers, without stage marks and multi-token prediction; None for other models."""
    pattern = sublayers_of(Namespace(**arguments))
    return "" if pattern is None and arguments.get("is_hybrid_model") else pattern


def known_changes(arguments: dict[str, Any], what: str) -> tuple[Settings, ...]:
    """The methods that have changed a checkpoint's model.

    Raises:
        UserError: if the model is neither a ``GPTModel`` nor a hybrid model of the same layers, or if an
            unknown method changed it. It names the reason, and the tool that can export the model.
    """
    changes = known.changes_in(Namespace(**arguments))
    if unknown := [of_one for of_one in changes if type(of_one) not in _CHANGES]:
        raise UserError(
            f"{what} was trained with {flags_of(unknown, '')}, so "
            f"{' and '.join(of_one.name for of_one in unknown)} changed the model; measure, evaluate and "
            f"export know only {', '.join(kind.name for kind in _CHANGES)}; the training's own validation "
            "logs its figures"
        )
    for is_one, example in _hindrances(arguments):
        # Megatron-Bridge does not know of the methods.
        bridge = bridge_as(example) if example and not changes else None
        instead = bridge or "export it with the tool that trained it"
        raise UserError(
            f"{what} {is_one}, which Megatron's torch-only layers cannot run; {instead}, and name the "
            "Hugging Face folder"
        )
    return changes


def refuse_other_layers(arguments: dict[str, Any], what: str) -> None:
    """Refuse a checkpoint whose training counted its layers in another way than the tools.

    Raises:
        UserError: naming the setting.
    """
    for of_one in known.settings_in(Namespace(**arguments)):
        if of_one.layer_rule not in (None, LAYER_RULES[0]):
            raise UserError(
                f"{what} was trained with {of_one.flag('layer')} {of_one.layer_rule}, but measure and "
                "evaluate count attention with the MLP or experts after it as one layer, so their figures "
                "would be of other layers; the training's own validation logs the figures of its layers"
            )


def _hindrances(arguments: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Reasons why the model cannot be run, each with a Megatron-Bridge model that has the feature."""
    pattern, spec = pattern_of(arguments), arguments.get("spec")
    if pattern is not None:
        allowed = _PAIRS[bool(arguments.get("multi_latent_attention"))]
        if not pattern or not {*layers_of(pattern)} <= {*allowed}:
            pairs = " or ".join(f"'{pair}'" for pair in allowed)
            layers = f"the layers {pattern or '?'}, not of pairs of attention with MLP or experts ({pairs})"
            yield f"is a hybrid model of {layers}", "Nemotron-H"
        if spec and tuple(spec) not in HYBRID_SPECS:
            yield f"has layers of its own (--spec {' '.join(spec)})", None
        for name in _BY_NUMBER:
            if arguments.get(name):
                yield f"is a hybrid model with {flag_of(name)} {arguments[name]}", None
    for name, hindrance in _OTHER_MODELS.items():
        if arguments.get(name) and (name != "spec" or pattern is None):
            yield hindrance
    if arguments.get("qk_l2_norm") and not arguments.get("num_experts"):
        yield "has norms of queries and keys (--qk-l2-norm)", None


def all_arguments(saved: dict[str, Any]) -> Namespace:
    """The saved arguments under the names of the installed Megatron, with its defaults for missing ones.

    A hybrid model's arguments become those of the equivalent ``GPTModel``. A note to the user lists arguments
    that the installed Megatron does not know.
    """
    from jreg_megatron.mcore.arguments import parse

    saved = _by_todays_names(saved)
    args = parse(list(FLAGS), world_size=1)
    unknown = {name: value for name, value in saved.items() if not hasattr(args, name)}
    _tell_of_unknown(unknown)
    for name in saved.keys() - unknown.keys():
        setattr(args, name, saved[name])
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    return args


def model_arguments(saved: dict[str, Any], dtype: torch.dtype, vocab_size: int) -> Namespace:
    """Megatron's arguments for the model alone, in one process, in torch-only layers."""
    args = all_arguments({name: value for name, value in saved.items() if has_a_bearing(name)})
    # Fused GELU, in Megatron and in Transformer Engine, is the tanh approximation.
    fuses = saved.get("bias_gelu_fusion") or saved.get("use_te_activation_func")
    args.gelu_by_tanh = bool(fuses) and not (args.swiglu or args.squared_relu or args.quick_geglu)
    args.padded_vocab_size = vocab_size
    args.params_dtype = dtype
    args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    args.mtp_num_layers = None
    args.hidden_dropout = args.attention_dropout = 0.0
    args.use_cpu_initialization, args.perform_initialization = True, False
    args.layernorm_zero_centered_gamma = False  # added to the weights instead
    if factor := args.moe_expert_capacity_factor:
        tell_once(
            f"the experts drop tokens (--moe-expert-capacity-factor {factor}), so the figures of a text "
            "depend on --batch-size and on the other texts of its batch"
        )
    # Load-balancing losses have no effect here, but these two types also choose the experts.
    balancing = saved.get("moe_router_load_balancing_type")
    kinds = balancing if isinstance(balancing, list) else [balancing]
    chooses = {"sinkhorn", "quantile_balancing"} & {*kinds}
    args.moe_router_load_balancing_type = balancing if chooses else "none"
    return args


def _by_todays_names(saved: dict[str, Any]) -> dict[str, Any]:
    """The arguments under the installed Megatron's names, for a hybrid model those of a ``GPTModel``."""
    saved, pattern = dict(saved), pattern_of(saved)
    for old, new in (
        ("norm_epsilon", "layernorm_epsilon"),
        ("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
    ):
        if old in saved:
            saved.setdefault(new, saved.pop(old))
    if "disable_bias_linear" in saved:
        saved.setdefault("add_bias_linear", not saved.pop("disable_bias_linear"))
    # Scripts of older versions had this flag, but did not pass it to the model.
    if (_SINCE_0_19 if pattern is None else _SINCE_0_18) not in saved:
        saved["rotary_seq_len_interpolation_factor"] = None
    if pattern is not None:
        saved |= dict.fromkeys(("hybrid_layer_pattern", "hybrid_override_pattern", "spec"))
        # Megatron never passes --use-rope-scaling to HybridModel.
        layers = layers_of(pattern)
        saved |= {"num_layers": len(layers), "use_rope_scaling": False}
        saved |= {"moe_layer_freq": [int(kinds[1] == "E") for kinds in layers]} if "E" in pattern else {}
    return saved


def hybrid_name(name: str) -> str:
    """The hybrid model's name for a weight of the ``GPTModel`` (layers not stacked).

    A method's own parameters are in the second sub-layer of a pair.
    """
    if found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
        number = 2 * int(found[1]) + (not found[2].startswith(("self_attention.", "input_layernorm.")))
        return f"decoder.layers.{number}.{found[2]}"
    return name.replace("decoder.final_layernorm.", "decoder.final_norm.")


def _tell_of_unknown(arguments: dict[str, Any]) -> None:
    from megatron.core import __version__ as core

    told = [
        f"{flag_of(name)} {value!r:.40}"
        for name, value in sorted(arguments.items())
        if value and has_a_bearing(name)
    ]
    if told:
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        tell_once(
            f"the training had {', '.join(told[:3])}{more}, which Megatron-Core {core} does not know; if "
            "this changes the model's computation, the figures are wrong for this model"
        )


tell_once = cache(note)
"""Print a note once per process, for any number of checkpoints."""
