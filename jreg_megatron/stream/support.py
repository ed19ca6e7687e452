"""Refuse unsupported features by name, at start-up."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream import local_graph, overlap
from jreg_megatron.stream.anatomy import residual_layers, unwrap
from jreg_megatron.stream.settings import Settings

LAYER_NOT_SEEN = (
    "jreg_megatron saw no state of some layer in an iteration that it measures, so it gets no added "
    "gradient either. Check: the model is in training mode; metrics are read after the backward pass; with "
    "full recompute, frozen layers run again too; FSDP2's MixedPrecisionPolicy does not cast the input of "
    "recomputed layers. Correct this, or train without jreg_megatron"
)

_NOT_COMPARED = "no run of it has been compared with the reference"

_OF_GRAPHS = ("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl")
"""Megatron's settings that turn on CUDA graphs. The first two are from older versions."""

REFUSED = {
    overlap.SETTING: "layers then run on two CUDA streams, and no GPU run has been compared",
    "enable_hyper_connections": "a layer then has several residual streams",
    "enable_mhc_connections": "a layer then has several residual streams",  # its name on main
    "inference_fuse_tp_communication": "attention and MLP then add the residual themselves",
    "hybrid_context_parallel": "each sequence is then split over its own number of ranks",
    "distribute_saved_activations": "it splits a layer's saved input, which identifies its micro-batch",
    "use_torch_fsdp2 with calculate_per_token_loss": "Megatron then does not divide gradients by the tokens",
    **dict.fromkeys(
        (
            "heterogeneous_block_specs",
            "heterogeneous_layers_config_path",
            "heterogeneous_layers_config_encoded_json",
        ),
        "a layer may then lack attention or MLP",
    ),
    **dict.fromkeys(
        _OF_GRAPHS,
        "a graph repeats captured work in memory that other graphs reuse, and no GPU run has been compared",
    ),
}
"""Megatron's settings that give wrong numbers, or that no comparison has shown to be right, and why."""


_REFUSED_IN_FULL_GRAPHS = {
    "fp16": "Megatron's loss scale is another tensor after each change, which a graph does not see",
    "step_batch_size_schedule": "a graph has the micro-batches of its capture",
    "use_torch_fsdp2": _NOT_COMPARED,
    "use_megatron_fsdp": _NOT_COMPARED,
}
"""Megatron's settings that are not supported together with ``cuda_graph_impl full_iteration``."""

LOST_IN_LOCAL_GRAPHS = ("layernorm", "mla_up_proj", "gdn_norm_out")
"""``recompute_modules`` with parameters, whose output Megatron frees. Before 0.20, the backward pass of a
local graph writes their gradients to a place that nothing reads."""

_REFUSED_BESIDE_OVERLAP = {
    **dict.fromkeys(("is_hybrid_model", "hybrid_layer_pattern"), "Megatron has no such schedule of it"),
    "use_megatron_fsdp": _NOT_COMPARED,
}
"""Megatron's settings that are not supported together with ``overlap_moe_expert_parallel_comm``."""

_TAKES_GRAPHS, _TAKES_OVERLAP = "untested_cuda_graphs", "untested_overlap"
"""Settings of a method with which a user allows features that no GPU run has compared yet."""


def refuse_unsupported(model_config: Any, *settings: Settings) -> None:
    """Refuse by name the settings in ``REFUSED``, and those that a method does not support.

    Args:
        model_config: Megatron's ``TransformerConfig``, or parsed arguments, which use the same names.
        settings: the methods' settings.

    Raises:
        UserError: naming the setting that is not supported, why, and what to do.
    """
    refused = dict(REFUSED)
    model_config = _InTodaysNames(model_config)
    graphs = model_config.cuda_graph_impl
    overlaps = getattr(model_config, overlap.SETTING, False)
    are_both = bool(overlaps) and graphs == "full_iteration"
    if graphs != "none" and _takes(_TAKES_GRAPHS, settings):
        for name in _OF_GRAPHS:
            del refused[name]
        _refuse_graphs(model_config)
        if graphs == "local":
            _refuse_local_graphs(model_config)
        if graphs == "full_iteration":
            _refuse_full_graphs(model_config, settings)
    if overlaps and _takes(_TAKES_OVERLAP, settings):
        del refused[overlap.SETTING]
        _refuse_beside_overlap(model_config, settings)
    _refuse_freed_inputs(model_config)
    for name, reason in refused.items():
        values = [getattr(model_config, part, None) for part in name.split(" with ")]
        if all(value and value != "none" for value in values):
            shown = "".join(f" {value!r:.40}" for value in values if isinstance(value, str))
            fix = "turn it off"
            if name in _OF_GRAPHS:
                selftest = f"--cuda-graph {graphs}{' --overlap' * are_both} on your GPU"
                fix += _how_to_take(_TAKES_GRAPHS, selftest, settings)
            elif name == overlap.SETTING:
                selftest = f"--overlap{' --cuda-graph full_iteration' * are_both} on your GPUs"
                fix += _how_to_take(_TAKES_OVERLAP, selftest, settings)
            raise UserError(f"jreg_megatron does not support {name}{shown} yet, since {reason}; {fix}")
    for of_one in settings:
        of_one.refuse(model_config)


class _InTodaysNames:
    """A configuration whose ``cuda_graph_impl`` includes Megatron's older settings for CUDA graphs.

    Megatron still accepts these, and translates them later.
    """

    def __init__(self, given: Any) -> None:
        self._given = given
        self.cuda_graph_impl = getattr(given, "cuda_graph_impl", None) or "none"
        for older, name in (("enable_cuda_graph", "local"), ("external_cuda_graph", "transformer_engine")):
            if getattr(given, older, False):
                self.cuda_graph_impl = name
        for older in ("cuda_graph_modules", "cuda_graph_scope"):
            parts = getattr(given, older, None) or ()
            parts = parts.split(",") if isinstance(parts, str) else parts
            parts = parts if isinstance(parts, list | tuple) else [parts]
            is_whole = "full_iteration" in (getattr(part, "name", part) for part in parts)
            if is_whole and (self.cuda_graph_impl != "none" or is_since_0_19()):
                self.cuda_graph_impl = "full_iteration"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)


def _refuse_freed_inputs(model_config: Any) -> None:
    """Refuse the part of activation offloading that frees a layer's input before the layer ends. The other
    parts free no state of the residual stream that is read later."""
    if _offloads(model_config, "attn_norm"):
        raise UserError(
            "jreg_megatron does not support offload_modules attn_norm, which frees a layer's input before "
            "the layer ends; leave attn_norm out of offload_modules"
        )


def _offloads(model_config: Any, module: str) -> bool:
    modules = getattr(model_config, "offload_modules", None) or ()
    return getattr(model_config, "fine_grained_activation_offloading", False) and module in modules


def refuse_built(chunk: Any) -> None:
    """Refuse features that only a built, unwrapped chunk shows.

    Raises:
        UserError: naming the setting.
    """
    config = chunk.config
    if getattr(config, "cuda_graph_impl", "none") == "local" and is_since_0_19():
        local_graph.refuse_recorded()
    if getattr(config, overlap.SETTING, False) and not hasattr(chunk, "build_schedule_plan"):
        raise UserError(
            f"jreg_megatron does not support {overlap.SETTING} in a {type(chunk).__name__}, of which "
            "Megatron has no such schedule; turn it off"
        )
    if _offloads(config, "mlp_norm"):
        for layer in residual_layers(chunk):
            if layer.adds[0][1] == "mlp_bda":
                raise UserError(
                    "jreg_megatron does not support offload_modules mlp_norm where a layer begins with an "
                    f"MLP or experts, as layer {layer.number} does, since it frees that layer's input before "
                    "the layer ends; leave mlp_norm out of offload_modules"
                )


def _takes(option: str, settings: tuple[Settings, ...]) -> bool:
    return any(getattr(of_one, option, False) for of_one in settings)


def _how_to_take(option: str, selftest: str, settings: tuple[Settings, ...]) -> str:
    if not is_since_0_19():
        return ""
    ways = [
        f"{of_one.flag(option)}, in code {type(of_one).__name__}({option}=True)"
        for of_one in settings
        if hasattr(of_one, option)
    ]
    return "".join(f", or run the self-test with {selftest}, then give {way}" for way in ways)


def _refuse_beside_overlap(model_config: Any, settings: tuple[Settings, ...]) -> None:
    """Refuse features that the overlapped schedule cannot have, or that were not compared in it."""
    _refuse_before_0_19(overlap.SETTING)
    found = {of_one.name: "it has not been compared" for of_one in settings if not of_one.in_overlap}
    for name, reason in _REFUSED_BESIDE_OVERLAP.items():
        if getattr(model_config, name, None):
            found[name] = reason
    if model_config.cuda_graph_impl == "local":
        found["cuda_graph_impl local"] = _NOT_COMPARED
    _refuse_first(found, overlap.SETTING)


def is_since_0_19() -> bool:
    """Whether Megatron-Core is new enough for its graphs, overlapped experts and Megatron-FSDP."""
    return _is_since(19)


def _is_since(minor: int) -> bool:
    from megatron.core.package_info import MAJOR, MINOR

    return (0, minor) <= (MAJOR, MINOR)


def _refuse_before_0_19(name: str) -> None:
    if not is_since_0_19():
        raise UserError(
            f"jreg_megatron needs Megatron-Core 0.19 or later for {name}; upgrade it, or turn {name} off"
        )


def _refuse_graphs(model_config: Any) -> None:
    """Refuse CUDA graphs if the first step could not be checked."""
    _refuse_before_0_19(f"cuda_graph_impl {model_config.cuda_graph_impl}")
    if getattr(model_config, "fine_grained_activation_offloading", False):
        raise UserError(
            "jreg_megatron does not support fine_grained_activation_offloading with cuda_graph_impl "
            f"{model_config.cuda_graph_impl} yet, since it has not been compared; turn one of the two off"
        )
    if model_config.cuda_graph_impl != "local" and model_config.cuda_graph_warmup_steps < 1:
        raise UserError(
            f"cuda_graph_warmup_steps is {model_config.cuda_graph_warmup_steps}, so no step runs "
            "without graphs, in which the layers could be checked; give 1 or more"
        )


def _refuse_local_graphs(model_config: Any) -> None:
    """Refuse features with which Megatron's own graphs are wrong, or that were not compared in them.

    Only Megatron's arguments have the batch sizes.
    """

    def value(name: str) -> Any:
        return getattr(model_config, name, None)

    found = {}
    if value("perform_rl_step"):
        found["perform_rl_step"] = "Megatron then removes the layers' graphs and puts them back"
    if (value("gtp_weight_remat_size") or 1) > 1:
        found["gtp_weight_remat_size"] = _NOT_COMPARED
    for name in ("hidden_dropout", "attention_dropout"):
        if value(name):
            found[f"{name} {value(name):g}"] = "evaluation then replays a training pass, with dropout"
    recomputed = value("recompute_modules") if value("recompute_granularity") == "selective" else None
    for module in LOST_IN_LOCAL_GRAPHS:
        if module in (recomputed or ()) and not _is_since(20):
            found[f"recompute_modules {module}"] = "Megatron-Core 0.19 loses the gradients of its parameters"
    trained, evaluated = (
        [value(f"{part}{name}_batch_size") for name in ("micro", "global")] for part in ("", "eval_")
    )
    if evaluated[0] and evaluated[0] != trained[0]:
        found[f"eval_micro_batch_size {evaluated[0]}"] = f"the graphs are of {trained[0]} sequences"
    if (value("pipeline_model_parallel_size") or 1) > 1:
        in_order = "in a pipeline graphs share memory in the order of the step that was captured"
        if value("step_batch_size_schedule"):
            found["step_batch_size_schedule"] = in_order
        elif evaluated[1] and evaluated[1] != trained[1]:
            found[f"eval_global_batch_size {evaluated[1]}"] = f"it is not {trained[1]}, and {in_order}"
    _refuse_first(found, "cuda_graph_impl local")


def _refuse_full_graphs(model_config: Any, settings: tuple[Settings, ...]) -> None:
    """Refuse features that a graph of the whole iteration cannot have, or that were not compared in it."""
    found = {of_one.name: "it has not been compared" for of_one in settings if not of_one.in_full_graphs}
    for name, reason in _REFUSED_IN_FULL_GRAPHS.items():
        if getattr(model_config, name, None):
            found[name] = reason
    is_fixed = getattr(model_config, "moe_expert_rank_capacity_factor", None) is not None
    if getattr(model_config, "moe_token_dispatcher_type", "allgather") != "allgather":
        is_fixed = is_fixed or getattr(model_config, "moe_pad_expert_input_to_capacity", False)
    if getattr(model_config, "num_moe_experts", None) and not is_fixed:
        found["num_moe_experts"] = (
            "in Megatron the host waits for the number of each expert's tokens, unless that is fixed by "
            "moe_expert_rank_capacity_factor, or by moe_pad_expert_input_to_capacity in a dispatcher that is "
            "not allgather"
        )
    _refuse_first(found, "cuda_graph_impl full_iteration")


def _refuse_first(found: dict[str, str], beside: str) -> None:
    """Refuse the first entry of ``found``, if there is one, by name and reason."""
    for name, reason in found.items():
        raise UserError(
            f"jreg_megatron does not support {name} with {beside} yet, since {reason}; leave one of the two "
            "out"
        )


def plain_layers(chunk: nn.Module, name: str) -> list[tuple[int, Any]]:
    """Number and module of each layer of an unwrapped chunk, for a method that changes the layers' modules.

    Raises:
        UserError: naming the method ``name``, if a layer is not a ``GPTModel``'s, with attention and MLP.
    """
    layers = [(layer.number, layer.first) for layer in residual_layers(chunk)]
    for number, layer in layers:
        parts = [type(getattr(layer, part, None)).__name__ for part in ("self_attention", "mlp")]
        if any(part.startswith(("NoneType", "Identity", "TEFused")) for part in parts):
            raise UserError(
                f"{name} supports layers of attention and MLP, each a module of its own, and layer {number} "
                f"is a {type(layer).__name__} with {' and '.join(parts)}; leave the method out"
            )
    return layers


def refuse_fsdp(chunk: nn.Module, config: Any) -> None:
    """Refuse a model chunk in an unknown FSDP, and features that were not compared in torch's FSDP2 or in
    Megatron-FSDP. The model's config does not show its wrapper.

    Raises:
        UserError: naming the wrapper.
    """
    wrapper: Any = chunk
    if unwrap(chunk) is chunk and sharding_of(chunk) == _MEGATRON_FSDP:
        raise UserError("attach was given a model without its Megatron-FSDP; give it the wrapped model")
    while isinstance(wrapper, nn.Module):
        name = type(wrapper).__name__
        inner: Any = getattr(wrapper, "module", None)
        if name.endswith("TorchFullyShardedDataParallel") or isinstance(wrapper, FSDPModule):
            refused = _refused_in_fsdp2(config)
        elif type(inner).__name__ == "MegatronFSDP" and hasattr(wrapper, "megatron_fsdp_dist_index"):
            refused, inner = _refused_in_megatron_fsdp(wrapper, config), inner.module
        elif "FullyShard" in name or name == "MegatronFSDP":
            raise UserError(
                f"jreg_megatron does not support a model in {name} yet; use Megatron's own wrappers: "
                "DistributedDataParallel with the distributed optimizer, torch's FSDP2 or Megatron-FSDP"
            )
        else:
            refused = {}
        for what, (is_so, reason) in refused.items():
            if is_so:
                raise UserError(
                    f"jreg_megatron does not support {name} with {what} yet, since {reason}; leave one of "
                    "the two out"
                )
        wrapper = inner


_MEGATRON_FSDP = "Megatron-FSDP"


def sharding_of(chunk: nn.Module) -> str:
    """The FSDP that shards an unwrapped model chunk; empty if none does."""
    if any(isinstance(module, FSDPModule) for module in chunk.modules()):
        return "torch's FSDP2"
    return _MEGATRON_FSDP if any(hasattr(p, "__fsdp_param__") for p in chunk.parameters()) else ""


_Refused = dict[str, tuple[bool, str]]
"""By feature: whether the model has it, and why it is not supported."""


def _refused_in_fsdp2(config: Any) -> _Refused:
    name = "use_torch_fsdp2 with calculate_per_token_loss"
    graphs = getattr(config, "cuda_graph_impl", "none")
    return {
        "calculate_per_token_loss": (getattr(config, "calculate_per_token_loss", False), REFUSED[name]),
        f"cuda_graph_impl {graphs}": (graphs != "none", _NOT_COMPARED),
    }


def _refused_in_megatron_fsdp(wrapper: Any, config: Any) -> _Refused:
    if not is_since_0_19():
        return {"Megatron-Core before 0.19": (True, "it calls the model's forward without its hooks")}
    graphs = config.cuda_graph_impl
    ddp, index = wrapper.ddp_config, wrapper.megatron_fsdp_dist_index
    strategy = ddp.data_parallel_sharding_strategy
    ranks, of_experts = (
        1 if group is None else group.size()
        for group in (index.get_fsdp_group(), index.get_fsdp_group(is_expert_parallel=True))
    )
    is_scaled_often = (
        bool(config.num_moe_experts)
        and ranks > of_experts == 1
        and strategy in ("optim_grads", "optim_grads_params")
        and not config.calculate_per_token_loss
    )
    return {
        f"cuda_graph_impl {graphs}": (graphs != "none", _NOT_COMPARED),
        overlap.SETTING: (config.overlap_moe_expert_parallel_comm, _NOT_COMPARED),
        "moe_expert_rank_capacity_factor": (
            config.moe_expert_rank_capacity_factor is not None,
            _NOT_COMPARED,
        ),
        "num_distributed_optimizer_instances": (ddp.num_distributed_optimizer_instances > 1, _NOT_COMPARED),
        f"{strategy} and expert_model_parallel_size": (
            strategy == "no_shard" and config.expert_model_parallel_size > 1,
            "each rank then clips gradients by the norm of its own experts",
        ),
        f"{strategy} and experts that are not replicated": (
            is_scaled_often,
            "Megatron divides their gradients by the data-parallel size once too often in each micro-batch",
        ),
    }
