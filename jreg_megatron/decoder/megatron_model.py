"""Megatron's ``GPTModel`` in one process, as the arguments of a checkpoint describe it."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jreg_megatron.decoder.megatron_folder import bridge_as
from jreg_megatron.decoder.megatron_hybrid import as_gpt, pattern_of, refuse_other_hybrids
from jreg_megatron.runtime.errors import UserError

# Argument, what it is, and a model of Megatron-Bridge's that has the same.
_NOT_A_MODEL_OF_OURS = (
    ("spec", "has layers of its own (--spec)", None),
    (
        "heterogeneous_layers_config_path",
        "has layers that differ (--heterogeneous-layers-config-path)",
        "Llama-Nemotron",
    ),
    ("yaml_cfg", "was configured by --yaml-cfg", None),
    ("use_megatron_fsdp", "was trained with Megatron-FSDP", None),
    ("use_torch_fsdp2", "was trained with FSDP2", None),
    ("enable_hyper_connections", "has hyper-connections, several residual streams", "DeepSeek-V4"),
    ("enable_mhc_connections", "has hyper-connections, several residual streams", "DeepSeek-V4"),
    ("multi_latent_attention", "has multi-latent attention", "DeepSeek-V3"),
    ("experimental_attention_variant", "has --experimental-attention-variant", "Qwen3-Next"),
    ("kitchen_config_file", "was trained with Kitchen's layers", None),
    ("moe_mlp_glu_interleave_size", "has --moe-mlp-glu-interleave-size", None),
    ("moe_shared_expert_glu_interleave_size", "has --moe-shared-expert-glu-interleave-size", None),
)

# What has no bearing on what the trained model computes: how it was cut, stored, moved, sped up.
_RUNTIME = re.compile(
    r"(tensor|pipeline|context|expert|virtual|sequence|hierarchical|hybrid_context|transformer_pipeline)_.*parallel"
    r"|virtual_pipeline|sequence_parallel|pipeline_model_parallel|decoder_(first|last)_pipeline|num_.*virtual"
    r"|account_for_|.*_gtp_|gtp_|tensor_parallel_num|expert_tensor_parallel"
    r"|tp_comm|overlap|fp8|fp4|first_last_layers_bf16|cuda_graph|enable_cuda_graph|external_cuda_graph|recompute"
    r"|distribute_saved|cpu_offload|offload|fine_grained|activation_offload|min_offloaded|delay_|delta_"
    r"|moe_(paged|flex|deepep|enable_deepep|hybridep|ncclep|permute_fusion|router_fusion|grouped_gemm"
    r"|single_grouped|use_legacy|shared_expert_overlap|layer_recompute|pad_experts|expert_rank|aux_loss|z_loss"
    r"|token_dispatcher|apply_probs_fusion|routing_trace|input_jitter|use_upcycling|per_layer_logging)"
    r"|use_grouped_gemm|use_te|te_|use_transformer_engine|transformer_impl|inference|flash|kitchen|mtp_"
    r"|use_cpu_init|perform_init|init_model|config_logger|symmetric_ar|nccl|batch_invariant|deterministic"
    r"|bf16|fp16|params_dtype|apply_query_key_layer_scaling|attention_backend|.*_fusion$|no_persist"
    r"|fused_residual|use_fused|disable_bf16|rank$|local_rank|world_size|load$|save$|lazy|cpu$|calculate_per_token"
    r"|hidden_dropout|attention_dropout|qk_clip|wgrad|defer_embedding|quant|modelopt"
)
# What a Megatron may know that the one in use does not, and has no bearing either.
_NOT_OF_THE_MODEL = re.compile(
    r"async_tensor|ckpt_|consumed_|curr_iteration|data_parallel|disable_(chunked|mamba_mem)|do_(train|valid|test)"
    r"|enable_gloo|encoder_(tensor|pipeline)|export_|finetune_|(first|last)_pipeline|grpo_|iteration|jreg_"
    r"|gdp_|keep_fp8|langrl|legacy_tokenizer|load_model_opt|megatron_fsdp|mhc_|moe_(combine|dispatch|extended)"
    r"|muon_|num_floating|otel_|renormalize_blend|retriever_|retro_(?!add_retriever)|rl_|s3_|save_"
    r"|scatter_gather|skipped_|standalone_embedding|teacher_|tiktoken_|tokenizer_|use_(custom_fsdp|dist_ckpt|gigatoken|layer_wise)|variable_seq"
)
_SINCE_0_18, _SINCE_0_19 = "null_tokenizer_eod_id", "stream_ckpt_dequant"
"""Arguments that every checkpoint of that version or later has, and none before."""
_EMBEDDING = "embedding.word_embeddings.weight"


def refuse_other_models(arguments: dict[str, Any], what: str) -> None:
    """Refuse a checkpoint whose model is no plain ``GPTModel``, and no hybrid one of the same layers.

    Raises:
        UserError: naming what it is, and the tool that can export it.
    """
    refuse_other_hybrids(arguments, what)
    arguments = as_gpt(arguments)
    for name, is_one, example in _NOT_A_MODEL_OF_OURS:
        if arguments.get(name):
            instead = bridge_as(example) if example else "export it with the tool that trained it"
            raise UserError(
                f"{what} {is_one}, which Megatron's torch-only layers cannot run; {instead}, and name the "
                "Hugging Face folder"
            )
    if arguments.get("qk_l2_norm") and not arguments.get("num_experts"):
        raise UserError(
            f"{what} has norms of queries and keys (--qk-l2-norm), which Megatron's torch-only layers leave "
            "out; export it with the tool that trained it, and name the Hugging Face folder"
        )


def import_megatron(device: torch.device) -> None:
    """Import Megatron's training package, and on a CPU redirect to it what Megatron asks of CUDA.

    Raises:
        UserError: if it is not installed, or too old.
    """
    from jreg_megatron import cpu

    with without_noise():
        if device.type == "cpu":
            cpu.enable()
        else:
            from jreg_megatron.cpu.megatron import make_local_layers_torchs

            make_local_layers_torchs()
            if device.index is not None:
                torch.cuda.set_device(device)
    if not cpu.has_training_loop():
        raise UserError("Megatron's checkpoints need megatron-core 0.19 or later; upgrade it")


@contextmanager
def without_noise() -> Iterator[None]:
    """Keep what Megatron and torch log and warn about their own ways from the user."""
    loggers = [logging.getLogger(name) for name in ("megatron", "torch.utils.cpp_extension", "nvidia")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def single_process() -> None:
    """Be the one rank of a job of one, unless that is so already.

    Raises:
        UserError: inside a job of several ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if dist.get_world_size() > 1:
        raise UserError("a checkpoint is loaded in one process; start this without torchrun")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)


def padded_vocab_size(shapes: dict[str, torch.Size]) -> int:
    """Rows of the embedding, of which those above the real vocabulary are padding.

    Raises:
        UserError: if there is no embedding.
    """
    if _EMBEDDING not in shapes:
        raise UserError(f"the checkpoint has no {_EMBEDDING}; it holds no GPTModel of Megatron's")
    return int(shapes[_EMBEDDING][0])


def model_arguments(saved: dict[str, Any], dtype: torch.dtype, vocab_size: int) -> Namespace:
    """Megatron's arguments for the model alone, in one process, in torch-only layers."""
    args = all_arguments({name: value for name, value in saved.items() if not _RUNTIME.match(name)})
    # Where Megatron or Transformer Engine fuse GELU with something, it is the approximation by tanh.
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
            "depend on --batch-size and on the texts beside it"
        )
    args.moe_router_load_balancing_type = _routing(saved.get("moe_router_load_balancing_type"))
    return args


def all_arguments(saved: dict[str, Any]) -> Namespace:
    """The saved ones, with the defaults of the Megatron in use for those that the saving one did not know.

    Those of a hybrid model become those of the ``GPTModel`` that computes the same. The user is told of
    arguments that the Megatron in use does not know.
    """
    from jreg_megatron.cpu import FLAGS
    from jreg_megatron.mcore.arguments import parse

    saved = as_gpt(_by_todays_names(saved))
    args = parse(list(FLAGS), world_size=1)
    unknown = {name: value for name, value in saved.items() if not hasattr(args, name)}
    _tell_of_unknown(unknown)
    for name in saved.keys() - unknown.keys():
        setattr(args, name, saved[name])
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    return args


def _tell_of_unknown(arguments: dict[str, Any]) -> None:
    from megatron.core import __version__ as core

    told = [
        f"--{name.replace('_', '-')} {value!r:.40}"
        for name, value in sorted(arguments.items())
        if value and not _RUNTIME.match(name) and not _NOT_OF_THE_MODEL.match(name)
    ]
    if told:
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        tell_once(
            f"the training had {', '.join(told[:3])}{more}, which Megatron-Core {core} does not know; if it "
            "changes what the model computes, the figures are not this model's"
        )


@cache
def tell_once(note: str) -> None:
    """Print a note for the user, on standard error."""
    print(f"Note: {note}", file=sys.stderr, flush=True)


def _by_todays_names(saved: dict[str, Any]) -> dict[str, Any]:
    saved = dict(saved)
    for old, new in (
        ("norm_epsilon", "layernorm_epsilon"),
        ("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
    ):
        if old in saved:
            saved.setdefault(new, saved.pop(old))
    if "disable_bias_linear" in saved:
        saved.setdefault("add_bias_linear", not saved.pop("disable_bias_linear"))
    # The scripts of older versions had this flag and did not give it to the model.
    if (_SINCE_0_19 if pattern_of(saved) is None else _SINCE_0_18) not in saved:
        saved["rotary_seq_len_interpolation_factor"] = None
    return saved


def _routing(kind: Any) -> Any:
    # Losses that balance the experts play no part here; these two choose them.
    kinds = kind if isinstance(kind, list) else [kind]
    return kind if {"sinkhorn", "quantile_balancing"} & {*kinds} else "none"


def build(args: Namespace) -> nn.Module:
    """The whole model on the CPU, its weights not yet set.

    Raises:
        UserError: with Megatron's words, for what its torch-only layers cannot do.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        config = gpt_config_from_args(args)
        if args.gelu_by_tanh:
            config.transformer.activation_func = partial(nn.functional.gelu, approximate="tanh")
        model: nn.Module = GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    except (AssertionError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"Megatron cannot build the checkpoint's model from torch-only layers: {said}"
        ) from error
    return model


def center_norms_at_one(model: nn.Module) -> None:
    """Add the one that ``--apply-layernorm-1p`` leaves out of the weights of all norms."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
                module.weight.add_(1)
