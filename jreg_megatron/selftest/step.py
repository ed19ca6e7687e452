"""One training step of the toy model with the installed Megatron-Core, at a layout."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jreg_megatron.selftest import reference
from jreg_megatron.selftest.layouts import BATCH, LENGTH, PIPELINE_LAYOUTS, UNEVEN, Layout
from jreg_megatron.selftest.reference import EPS, MLP_NORM, ROPE_BASE, Shape
from jreg_megatron.selftest.toy import (
    AUXILIARY_COEFF,
    ITERATION,
    MTP_LOSS_SCALING_FACTOR,
    Batch,
    Place,
    Step,
    settings_of,
    shape_of,
)
from jreg_megatron.stream.anatomy import unwrap
from jreg_megatron.stream.attachment import attach
from jreg_megatron.stream.method import Metrics
from jreg_megatron.stream.preparation import prepare
from jreg_megatron.stream.settings import Settings

_RECOMPUTED = {
    "pairs": 2,
    "latent attention": 2,
    "experts": 2,
    "Mamba": 1,
    "lone sub-layers": 5,
    "sub-layers as layers": 1,
}
"""Number of sub-layers of a HybridModel that are recomputed together. It splits no layer."""

LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": reference.Q_RANK,
    "kv_lora_rank": reference.KV_RANK,
    "qk_head_dim": reference.OWN,
    "qk_pos_emb_head_dim": reference.SHARED,
    "v_head_dim": reference.VALUE,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "qk_layernorm": True,
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_step(
    layout: Layout,
    weights: dict[str, Tensor],
    batch: Batch,
    transformer_impl: str,
    timeout: timedelta,
) -> Step:
    """Build the model at the layout, run forward and backward with JREG, finish the gradients.

    The default process group must have ``layout.world_size`` ranks. Megatron's parallel state is set up for
    the step and destroyed after it. A collective call. A rank that waits for the others longer than
    ``timeout`` raises an error.
    """
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=_expert_tensor_size(layout),
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
        get_embedding_ranks=functools.partial(_embedding_ranks, layout),
    )
    try:
        step = _run_step(layout, weights, batch, transformer_impl)
        gc.collect()  # frees the model, and graphs, which must end before their groups
        # Groups that are kept make every later step slower. After the barrier no rank needs them.
        dist.barrier()
        for group in parallel_state._global_process_group_list or ():
            if group not in (None, dist.GroupMember.NON_GROUP_MEMBER):
                dist.destroy_process_group(group)
        return step
    finally:
        if layout.local_graphs:
            from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

            delete_cuda_graphs()
        parallel_state.destroy_model_parallel()


def _run_step(layout: Layout, weights: dict[str, Tensor], batch: Batch, transformer_impl: str) -> Step:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1, **_generators(layout, transformer_impl))
    settings = settings_of(layout)
    config, chunks, parts = build(layout, weights, transformer_impl, settings)
    wrapped = wrap(layout, config, chunks)
    now = [ITERATION]
    handle = attach(wrapped, *settings, num_microbatches=layout.num_microbatches, iteration=lambda: now[0])
    if layout.precision == "fp16":
        config.grad_scale_func = lambda loss: loss * _loss_scale(layout)
    config.finalize_model_grads_func = finalize_model_grads
    schedule = _schedule(layout)

    def run(iteration: int) -> list[Any]:
        now[0] = iteration
        return _passes(layout, wrapped, batch, schedule)

    if layout.graphs != "none":
        _make_graphs(layout, config, wrapped, run)
        if layout.graphs != "iteration":
            handle.reset_training_metrics()
    reports = run(ITERATION)
    total = torch.stack([*reports, torch.zeros(2, dtype=torch.float64).to(batch.tokens.device)]).sum(0)
    dist.all_reduce(total)
    metrics = handle.reduce_training_metrics()
    assert metrics is not None, "JREG saw no state of some layer"
    gradients = gathered_gradients(wrapped)
    scale = _loss_scale(layout)
    if layout.graphs == "iteration":
        handle.detach()  # destroys the graph, which must end before its process groups
    return Step(
        lm_loss=float(total[0] / total[1]),
        displacement=metrics.displacement,
        jreg_loss=metrics.jreg_loss,
        jump_rate=metrics.jump_rate,
        norms=_norms(metrics) if layout.methods == "all" else torch.empty(0, 4, dtype=torch.float64),
        captured=handle.captured,
        gradients=[
            (name, where, gradient / scale)
            for name, where, gradient in pieces_of(parts, lambda name, _: gradients[name])
        ],
    )


def _generators(layout: Layout, transformer_impl: str) -> dict[str, bool]:
    """The kind of random generators that the layout's graphs can contain."""
    generators = {}
    if layout.graphs != "none" and transformer_impl == "transformer_engine":
        generators["te_rng_tracker"] = True
    if layout.graphs == "iteration" or layout.local_graphs:
        generators["use_cudagraphable_rng"] = True
    return generators


def _schedule(layout: Layout) -> Callable[..., Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    schedule: Callable[..., Any] = get_forward_backward_func()
    if layout.graphs == "iteration":
        from megatron.core.full_cuda_graph import FullCudaGraphWrapper

        schedule = FullCudaGraphWrapper(schedule, cuda_graph_warmup_steps=1)
    return schedule


def _passes(layout: Layout, wrapped: list[Any], batch: Batch, schedule: Callable[..., Any]) -> list[Any]:
    """Forward and backward passes of all micro-batches. Returns the reports of :func:`_forward_step`."""
    from megatron.core import parallel_state

    def batches() -> Iterator[dict[str, Tensor]]:
        data_rank = parallel_state.get_data_parallel_rank()
        context_rank = parallel_state.get_context_parallel_rank()
        device = next(wrapped[0].parameters()).device
        for number in range(layout.num_microbatches):
            yield vars(batch.part(layout, data_rank, number, context_rank).to(device))

    iterators = [batches() for _ in wrapped]
    reports: list[Any] = schedule(
        forward_step_func=functools.partial(_forward_step, layout),
        data_iterator=iterators if layout.virtual > 1 else iterators[0],
        model=wrapped if layout.virtual > 1 else wrapped[0],
        num_microbatches=layout.num_microbatches,
        seq_length=LENGTH * layout.micro_batch_size if layout.packed else LENGTH,
        micro_batch_size=1 if layout.packed else layout.micro_batch_size,
        forward_only=False,
    )
    return reports


def _make_graphs(layout: Layout, config: Any, wrapped: list[Any], run: Callable[[int], Any]) -> None:
    """Run the steps after which the next one replays graphs, and set the gradients to 0.

    Args:
        run: runs a step of this iteration.
    """
    # One to warm up; with a graph of the iteration another one, which captures it and runs it too.
    for iteration in range(1, ITERATION if layout.graphs == "iteration" else 2):
        run(iteration)
        if layout.graphs == "iteration" or layout.local_graphs:  # the schedule captures
            for model in wrapped:
                model.zero_grad_buffer()
        else:
            capture_graphs(wrapped, config, layout)


def capture_graphs(models: list[Any], config: Any, layout: Layout) -> None:
    """Capture CUDA graphs of the layers like Megatron's loop, and set the gradients to 0. Needs a GPU."""
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

    calculator.init_num_microbatches_calculator(
        dist.get_rank(),
        global_batch_size=BATCH,
        micro_batch_size=layout.micro_batch_size,
        data_parallel_size=layout.data,
    )
    try:
        graphs = TECudaGraphHelper(models, config, LENGTH, layout.micro_batch_size)
        graphs.create_cudagraphs()
        graphs.cuda_graph_set_manual_hooks()
    finally:
        calculator.destroy_num_microbatches_calculator()


def _norms(metrics: Metrics) -> Tensor:
    """As :attr:`Step.norms`."""
    ratio = F.pad(metrics.update_ratio, (1, 0))
    return torch.stack((metrics.norm_mean, metrics.norm_rms, metrics.norm_largest, ratio), dim=1)


def _expert_tensor_size(layout: Layout) -> int:
    """Without expert parallelism experts are split like the rest. Megatron before 0.19 needs that."""
    return layout.tensor if layout.expert == 1 else 1


def _loss_scale(layout: Layout) -> float:
    """Near the largest that float16 can hold. It is smaller for per-token loss, which is divided later."""
    return 1.0 if layout.precision != "fp16" else 4.0 if layout.per_token_loss else 1024.0


def build(
    layout: Layout, weights: dict[str, Tensor], transformer_impl: str, settings: Sequence[Settings] = ()
) -> tuple[Any, list[nn.Module], list[Part]]:
    """This rank's model at the layout, with these weights and what the methods change.

    Returns:
        Megatron's configuration, the chunks, and what this rank has of each parameter.
    """
    config = config_of(layout, transformer_impl)
    chunks = [build_chunk(layout, config, index, transformer_impl) for index in range(layout.virtual)]
    prepare(chunks, settings)
    parts = parts_of(chunks, shape_of(layout))  # before FSDP splits the parameters
    with torch.no_grad():
        for name, where, data in pieces_of(parts, lambda _, parameter: parameter):
            data.copy_(weights[name][where])
    return config, chunks, parts


def config_of(layout: Layout, transformer_impl: str) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    shape = shape_of(layout)
    dtype = DTYPES[layout.precision]
    is_hybrid = layout.model == "hybrid"
    is_latent = any("+" in kinds for kinds in shape.layers)
    options = (
        _split_options(layout, shape)
        | _recompute_options(layout, shape, transformer_impl)
        | _graph_options(layout)
        | (LATENT if is_latent else {})
        | (_expert_options(layout, shape) if shape.num_experts else {})
    )
    if shape.mtp_num_layers:
        options |= {"mtp_num_layers": shape.mtp_num_layers}
        options |= {"mtp_loss_scaling_factor": MTP_LOSS_SCALING_FACTOR}
    config = (MLATransformerConfig if is_latent else TransformerConfig)(
        num_layers=len("".join(shape.layers)) if is_hybrid else shape.num_layers,
        transformer_impl=transformer_impl,
        is_hybrid_model=is_hybrid,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=EPS,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        # Batched exchange would confuse messages if the previous and the next stage are one rank.
        overlap_p2p_comm=layout.virtual > 1,
        batch_p2p_comm=layout.virtual == 1,
        deallocate_pipeline_outputs=True,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=layout.per_token_loss,
        bf16=layout.precision == "bf16",
        fp16=layout.precision == "fp16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **options,
    )
    config.overlap_moe_expert_parallel_comm = layout.overlap  # its check requires 16 bits
    return config


def _split_options(layout: Layout, shape: Shape) -> dict[str, Any]:
    """How the layers are split over pipeline stages."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    if layout.split == "uneven" and layout.model != "hybrid":
        return {"num_layers_in_first_pipeline_stage": UNEVEN[0]}
    if layout.split == "embedding and loss":
        return {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        }
    if layout.split == "layout":
        stages = PIPELINE_LAYOUTS[layout.stages]
        stages = stages.replace("L", "mL") if shape.mtp_num_layers else stages
        return {"pipeline_model_parallel_layout": PipelineParallelLayerLayout(stages, layout.pipeline)}
    return {}


def _recompute_options(layout: Layout, shape: Shape, transformer_impl: str) -> dict[str, Any]:
    if layout.recompute == "none":
        return {}
    if layout.recompute == "selective":
        modules = ["core_attn", "mlp" if layout.overlap or not shape.num_experts else "moe"]
        if transformer_impl == "transformer_engine" and not layout.local_graphs:
            modules.append("layernorm")
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {
        "recompute_granularity": "full",
        "recompute_method": layout.recompute,
        "recompute_num_layers": _RECOMPUTED[layout.layers] if layout.model == "hybrid" else 1,
    }


def _graph_options(layout: Layout) -> dict[str, Any]:
    if layout.graphs == "none":
        return {}
    if layout.graphs == "iteration":
        return {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []}
    return {
        "cuda_graph_impl": "local" if layout.local_graphs else "transformer_engine",
        "cuda_graph_modules": [] if layout.graphs == "layers" else layout.graphs.split(),
    }


def _expert_options(layout: Layout, shape: Shape) -> dict[str, Any]:
    return {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.top_k,
        "moe_router_load_balancing_type": "aux_loss" if layout.balanced else "none",
        "moe_aux_loss_coeff": AUXILIARY_COEFF if layout.balanced else 0.0,
        "moe_token_dispatcher_type": "alltoall" if layout.capacity or layout.overlap else "allgather",
        "moe_expert_capacity_factor": layout.capacity * shape.num_experts / shape.top_k or None,
        "moe_pad_expert_input_to_capacity": layout.capacity > 0,
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "expert_tensor_parallel_size": _expert_tensor_size(layout),
    }


def _embedding_ranks(layout: Layout, pipeline_ranks: list[int], *_: Any) -> list[int]:
    """The ranks of a pipeline that hold a word embedding: the first, and the last if tied or with MTP."""
    ends = {pipeline_ranks[0]} | ({pipeline_ranks[-1]} if layout.tied or layout.model == "mtp" else set())
    return sorted(ends)


def build_chunk(layout: Layout, config: Any, index: int, transformer_impl: str) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.models.gpt.gpt_model import GPTModel

    chunk = index if layout.virtual > 1 else None
    options: dict[str, Any] = {
        "vocab_size": shape_of(layout).vocab_size,
        "max_sequence_length": LENGTH,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        "share_embeddings_and_output_weights": layout.tied,
        "position_embedding_type": "rope",
        "rotary_base": int(ROPE_BASE),
        "vp_stage": chunk,
    }
    te = transformer_impl == "transformer_engine"
    if layout.model == "hybrid":
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        from jreg_megatron.selftest import mixer

        stack_spec = mixer.transformer_engine_spec() if te else mixer.stack_spec
        ends = itertools.accumulate(layout.stage_sizes, initial=0)
        stages = ["".join(layout.sublayers[begin:end]) for begin, end in itertools.pairwise(ends)]
        return HybridModel(config, stack_spec, hybrid_layer_pattern="|".join(stages), **options)
    experts = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": False}
    if te:
        layer = specs.get_gpt_layer_with_transformer_engine_spec(**experts)
    else:
        layer = specs.get_gpt_layer_local_spec(**experts, normalization="RMSNorm")
    if config.mtp_num_layers:
        options["mtp_block_spec"] = specs.get_gpt_mtp_block_spec(
            config, layer, use_transformer_engine=te, vp_stage=chunk
        )
    return GPTModel(config, layer, **options)


def wrap(layout: Layout, config: Any, chunks: list[nn.Module]) -> list[nn.Module]:
    """Wrap like Megatron's loop: the number type, then data parallelism."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    if torch.cuda.is_available():
        for chunk in chunks:
            chunk.cuda()
    if layout.precision != "fp32":
        halved: list[nn.Module] = [Float16Module(config, chunk) for chunk in chunks]
    else:
        halved = chunks
    if layout.fsdp:
        from megatron.core.distributed import TorchFullyShardedDataParallel

        return [
            TorchFullyShardedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in halved
        ]
    if layout.megatron_fsdp != "none":
        from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

        shards = DistributedDataParallelConfig(
            use_megatron_fsdp=True,
            use_distributed_optimizer=True,
            data_parallel_sharding_strategy=layout.megatron_fsdp,
            gradient_reduce_div_fusion=dist.get_backend() == "nccl",  # not in gloo
        )
        return [FullyShardedDataParallel(config, shards, chunk) for chunk in halved]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed_optimizer
    )
    return [DistributedDataParallel(config, ddp_config, chunk) for chunk in halved]


def _forward_step(
    layout: Layout, batches: Iterator[dict[str, Tensor]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    part, chunk = Batch(**next(batches)), unwrap(model)
    position_ids = torch.arange(part.tokens.shape[1], device=part.tokens.device).expand_as(part.tokens)
    options: dict[str, Any] = {"loss_mask": part.loss_mask}
    if layout.padded:
        options = {"loss_mask": part.loss_mask if chunk.post_process else None}
        options["padding_mask"] = _padding_mask(layout, part, chunk)
    if layout.packed:
        options["packed_seq_params"] = _packed_parameters(layout, part.tokens)
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(part.tokens, position_ids, None, labels=part.labels, **options)

    def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = (losses.float() * part.loss_mask).sum()
        count = part.loss_mask.sum()
        return total, count.int(), torch.stack((total.detach(), count)).double()

    return output, loss


def _padding_mask(layout: Layout, part: Batch, chunk: Any) -> Tensor:
    """The padding mask. Whole if the model splits it for sequence parallelism, like a GPTModel on the first
    stage. Else split, because the experts need it so."""
    from megatron.core import parallel_state

    if not layout.sequence_parallel or (chunk.pre_process and layout.model != "hybrid"):
        return part.padding_mask
    rank = parallel_state.get_tensor_model_parallel_rank()
    cut: Tensor = part.padding_mask.chunk(layout.tensor, dim=1)[rank]
    return cut


def _packed_parameters(layout: Layout, tokens: Tensor) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.arange(0, tokens.numel() + 1, LENGTH, dtype=torch.int32, device=tokens.device)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH
    )


def gathered_gradients(wrapped: list[nn.Module]) -> dict[str, Tensor]:
    """The gradient of every parameter, by the number of its chunk and its name. Shards of optimizers, FSDP2
    and Megatron-FSDP are gathered."""
    for model in wrapped:
        ddp: Any = model
        if ddp.ddp_config.use_megatron_fsdp or not ddp.ddp_config.use_distributed_optimizer:
            continue
        for buffer in ddp.buffers + ddp.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)

    def gradient(parameter: Any) -> Tensor:
        if hasattr(parameter, "megatron_fsdp_dist_index"):
            return _whole(parameter)
        whole: Tensor = (
            parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad.full_tensor()
        )
        return whole

    return {
        f"{number} {name}": gradient(parameter)
        for number, model in enumerate(wrapped)
        for name, parameter in unwrap(model).named_parameters()
    }


def _whole(parameter: Any) -> Tensor:
    """The whole gradient of a parameter in Megatron-FSDP. A rank has some of its rows, or all, or none."""
    rows: Tensor | None = None if parameter.grad is None else parameter.grad.to_local()
    if parameter.placements[0].is_replicate():
        assert rows is not None
        return rows
    group = parameter.device_mesh.get_group(0)
    pieces: list[Tensor | None] = [None] * group.size()
    dist.all_gather_object(pieces, None if rows is None else rows.cpu(), group=group)
    return torch.cat([piece for piece in pieces if piece is not None]).to(parameter.device)


@dataclasses.dataclass(frozen=True)
class Part:
    """This rank's part of a parameter."""

    name: str
    """The number of the chunk, and the name in it."""
    entry: Any
    """The parameter's entry in Megatron's sharded state dict."""
    shape: Shape | None
    """The model's shape, if it is a hybrid one."""


def parts_of(chunks: list[nn.Module], shape: Shape) -> list[Part]:
    from megatron.core import parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return [
        Part(
            f"{number} {names[entry.data]}", entry, shape if hasattr(chunk, "hybrid_layer_pattern") else None
        )
        for number, chunk in enumerate(chunks)
        for names in [{parameter: name for name, parameter in chunk.named_parameters()}]
        for entry in chunk.sharded_state_dict(metadata=metadata).values()  # type: ignore[operator]
        if isinstance(getattr(entry, "data", None), nn.Parameter)  # else extra state of Transformer Engine
    ]


def pieces_of(
    parts: Sequence[Part], value: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Place, Tensor]]:
    """``value(name, parameter)`` of every parameter, in the pieces of Megatron's checkpoints.

    Yields:
        The parameter's name in a checkpoint, the place in it that this rank holds, and the value there.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    for part in parts:
        data = value(part.name, part.entry.data)
        changes: dict[str, Any] = {"data": data}
        if isinstance(part.entry, ShardedTensor):
            changes["dtype"] = data.dtype
        pieces: dict[str, Any] = {part.name: dataclasses.replace(part.entry, **changes)}
        apply_factories(pieces)
        for piece in nested_values(pieces):
            yield *_place(piece.key, _slice(piece), part.shape), piece.data


def _slice(piece: Any) -> Place:
    """The place of a checkpoint's piece in its parameter; axes that only number pieces come first."""
    numbers = piece.global_offset[: piece.prepend_axis_num]
    offsets = piece.global_offset[piece.prepend_axis_num :]
    lengths = piece.local_shape
    return (*numbers, *(slice(at, at + length) for at, length in zip(offsets, lengths, strict=True)))


_NUMBERED = re.compile(r"(decoder\.layers\.)(\d+)\.")


def _place(key: str, where: Place, hybrid: Shape | None) -> tuple[str, Place]:
    """The reference's name of a parameter, and the place in it.

    Args:
        key: its name in a checkpoint; of a hybrid model with the number of its sub-layer.
        where: the place in the checkpoint's entry of that name.
        hybrid: a hybrid model's shape.
    """
    key = key.replace("decoder.final_norm.", "decoder.final_layernorm.")
    key = key.replace(".mtp_model_layer.", ".transformer_layer.")
    key = key.replace(".pre_mlp_layernorm.weight", f".{MLP_NORM}")
    if numbered := _NUMBERED.match(key):
        number = int(numbered[2])
        if hybrid is not None:
            number = hybrid.place(key[numbered.end() :], number)
        key, where = _NUMBERED.sub(r"\1", key), (number, *where)
    return key, where
