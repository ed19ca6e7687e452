"""What is not supported is refused here by name, before any time is spent on it."""

from __future__ import annotations

from typing import Any

from torch import nn

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.settings import Settings

LAYER_NOT_SEEN = (
    "jreg_megatron saw no state of some layer in an iteration that it measures, so that layer is not "
    "regularized either. Known causes: the model was not in training mode, metrics were asked for before the "
    "backward pass, full recompute did not run a frozen layer again, or FSDP2's MixedPrecisionPolicy casts "
    "the input of recomputed layers. The run is stopped; correct that, or train without jreg_megatron"
)


def refuse_unsupported(model_config: Any, *settings: Settings) -> None:
    """Refuse by name what would give wrong numbers, or has not been shown to give right ones.

    Args:
        model_config: Megatron's ``TransformerConfig``, or parsed arguments, which use the same names.
        settings: of the methods.

    Raises:
        UserError: naming the setting that is not supported, and what to do.
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
        # Megatron divides no gradient of FSDP2's by the number of tokens.
        "use_torch_fsdp2 with calculate_per_token_loss": value("use_torch_fsdp2")
        and value("calculate_per_token_loss"),
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
            raise UserError(f"jreg_megatron does not support {name} yet; turn it off")
    for of_one in settings:
        of_one.refuse(model_config)


def refuse_fsdp(chunk: nn.Module, config: Any) -> None:
    """Refuse a model chunk in Megatron-FSDP, and one in torch's FSDP2 whose gradients nothing scales; the
    model's config does not say how it is wrapped.

    Raises:
        UserError: naming the wrapper.
    """
    wrapper: Any = chunk
    while isinstance(wrapper, nn.Module):
        name = type(wrapper).__name__
        is_torchs = name == "TorchFullyShardedDataParallel"
        if is_torchs and getattr(config, "calculate_per_token_loss", False):
            raise UserError(
                f"jreg_megatron does not support calculate_per_token_loss with {name}, whose gradients "
                "Megatron does not divide by the number of tokens; turn it off"
            )
        if not is_torchs and ("FullyShard" in name or name == "MegatronFSDP"):
            raise UserError(
                f"jreg_megatron does not support a model in {name} yet; use Megatron's "
                "DistributedDataParallel with the distributed optimizer, or torch's FSDP2"
            )
        wrapper = getattr(wrapper, "module", None)
