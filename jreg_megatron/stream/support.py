"""What JREG does not support is refused here by name, before any time is spent on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.runtime.errors import UserError

# The last layer's input and the final norm's output must be on one rank to be compared.
NO_LAYER_FOR_POST_NORM = (
    "JREG does not support final_state 'post_norm' with no layer on the last pipeline stage; use 'pre_norm', "
    "or put a layer there"
)

LAYER_NOT_SEEN = (
    "JREG saw no state of some layer in an iteration that it measures, so that layer is not regularized "
    "either. Known causes: the model was not in training mode, metrics were asked for before the backward "
    "pass, or full recompute did not run a frozen layer again. The run is stopped; correct that, or leave "
    "JREG out"
)


def refuse_unsupported(model_config: Any, config: JRegConfig) -> None:
    """Refuse by name what would give wrong numbers, or has not been shown to give right ones.

    Args:
        model_config: Megatron's ``TransformerConfig``, or parsed arguments, which use the same names.
        config: the settings.

    Raises:
        UserError: naming the setting that JREG does not support, and what to do.
    """

    def value(name: str) -> Any:
        return getattr(model_config, name, None)

    unsupported = {
        "overlap_moe_expert_parallel_comm": value("overlap_moe_expert_parallel_comm"),
        "enable_hyper_connections": value("enable_hyper_connections"),
        "enable_mhc_connections": value("enable_mhc_connections"),  # its name on main
        # It adds the residual within attention and MLP, in evaluation before 0.18 and in inference.
        "inference_fuse_tp_communication": value("inference_fuse_tp_communication"),
        "fine_grained_activation_offloading": value("fine_grained_activation_offloading"),
        "hybrid_context_parallel": value("hybrid_context_parallel"),
        # It takes away the tensor by which a recomputed layer's micro-batch is recognized.
        "distribute_saved_activations": value("distribute_saved_activations"),
        "use_megatron_fsdp": value("use_megatron_fsdp"),
        "use_torch_fsdp2": value("use_torch_fsdp2"),
        "heterogeneous layers": (
            value("heterogeneous_block_specs")
            or value("heterogeneous_layers_config_path")
            or value("heterogeneous_layers_config_encoded_json")
        ),
        # A graph replays the choice of whether to regularize and to measure that it was captured with.
        f"cuda_graph_impl '{value('cuda_graph_impl')}'": value("cuda_graph_impl") not in (None, "none"),
        "enable_cuda_graph": value("enable_cuda_graph"),  # its name before 0.17
        "external_cuda_graph": value("external_cuda_graph"),
    }
    for name, is_used in unsupported.items():
        if is_used:
            raise UserError(f"JREG does not support {name} yet; turn it off")
    if config.final_state == "post_norm" and not _last_stage_has_a_layer(value):
        raise UserError(NO_LAYER_FOR_POST_NORM)


def _last_stage_has_a_layer(value: Callable[[str], Any]) -> bool:
    """Whether the final norm's stage holds the last layer; ``value`` gives Megatron's settings by name."""
    if value("mtp_num_layers"):
        return True  # then Megatron puts the final norm behind the last layer, wherever that is
    if layout := value("pipeline_model_parallel_layout"):
        return any(getattr(kind, "name", kind) == "decoder" for kind in _stages_of(layout)[-1])
    if value("account_for_loss_in_pipeline_split"):
        counted = value("num_layers") + 1 + bool(value("account_for_embedding_in_pipeline_split"))
        stages = value("pipeline_model_parallel_size") * (value("virtual_pipeline_model_parallel_size") or 1)
        return bool(counted // stages > 1)
    return True


def _stages_of(layout: Any) -> list[list[Any]]:
    """What each stage of a pipeline layout holds, by the names of Megatron's ``LayerType``."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    given = getattr(layout, "input_data", layout)
    stages: list[list[Any]] = given
    if isinstance(given, str):
        stages = PipelineParallelLayerLayout.parse_str_to_list(given)
    return stages


def refuse_fsdp(chunk: nn.Module) -> None:
    """Refuse a model chunk that Megatron's or torch's FSDP wraps; its settings do not say so.

    Raises:
        UserError: naming the wrapper.
    """
    wrapper: Any = chunk
    while isinstance(wrapper, nn.Module):
        if "FullyShard" in type(wrapper).__name__:
            raise UserError(
                f"JREG does not support a model in {type(wrapper).__name__} yet; use Megatron's "
                "DistributedDataParallel with the distributed optimizer"
            )
        wrapper = getattr(wrapper, "module", None)
