"""Checks of how the model and the batch are divided over the ranks."""

from __future__ import annotations

import math
from argparse import Namespace
from itertools import product

from jreg_megatron.mcore.preflight.asked import (
    divisible,
    flag_of,
    num_layers,
    only_one,
    other_layer_plan,
    tensor_parallel,
    virtual_stages,
    weight_replicas,
)
from jreg_megatron.runtime.errors import UserError, check_least, one_line

_TP, _LAYOUT = "tensor_model_parallel_size", "pipeline_model_parallel_layout"

_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_COUNTED = {
    "embedding": "account_for_embedding_in_pipeline_split",
    "loss": "account_for_loss_in_pipeline_split",
}
_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")


def world_size(args: Namespace) -> None:
    tp, pp, cp = tensor_parallel(args), args.pipeline_model_parallel_size, args.context_parallel_size
    check_least(args, tensor_parallel_num_weight_shards=1)
    divisible(args, "tensor_parallel_num_weight_shards", _TP)
    size = tp * pp * cp * weight_replicas(args)
    if args.world_size % size:
        extra = f" x {weight_replicas(args)} weight shards" if weight_replicas(args) > 1 else ""
        raise UserError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x "
            f"--context-parallel-size {cp}{extra} is {size}, which does not divide the {args.world_size} "
            f"started processes (WORLD_SIZE); start a multiple of {size} or lower one of them"
        )


def heads(args: Namespace) -> None:
    if args.kv_channels is None:
        divisible(args, "hidden_size", "num_attention_heads", "change one of them or give --kv-channels")
    divisible(args, "num_attention_heads", _TP)
    groups, tp = args.num_query_groups, tensor_parallel(args)
    if args.group_query_attention and not args.multi_latent_attention:
        check_least(args, num_query_groups=1)
        divisible(args, "num_attention_heads", "num_query_groups")
        if groups % tp and tp % groups:
            raise UserError(
                f"--num-query-groups is {groups}; it must be a multiple or a divisor of "
                f"--tensor-model-parallel-size {tp}"
            )


def experts(args: Namespace) -> None:
    number, chosen = args.num_experts, args.moe_router_topk
    if number is not None and chosen > number:
        raise UserError(f"--moe-router-topk is {chosen}; it must be at most --num-experts {number}")
    tensor = args.tensor_model_parallel_size
    if number is not None and tensor > 1 and not args.sequence_parallel and not args.skip_train:
        raise UserError(
            f"--num-experts is {number} with --tensor-model-parallel-size {tensor}, and Megatron trains this "
            "only with --sequence-parallel; give it too"
        )


def feed_forward(args: Namespace) -> None:
    divisible(args, "ffn_hidden_size", _TP)


def pipeline(args: Namespace) -> None:
    if other_layer_plan(args):
        return
    only_one(args, *_VIRTUAL, _LAYOUT)
    counted = tuple(_COUNTED.values())
    for one, other in (*product((_LAYOUT,), (*_ENDS, *counted)), *product(_ENDS, counted)):
        only_one(args, one, other)
    for end in _ENDS:
        only_one(args, end, _VIRTUAL[0], fix="give --num-virtual-stages-per-pipeline-rank instead")
    if isinstance(args.pipeline_model_parallel_layout, str):
        _pipeline_layout(args, args.pipeline_model_parallel_layout)
    ends = {name: getattr(args, name) for name in _ENDS if getattr(args, name) is not None}
    if ends:
        _uneven_pipeline(args, ends)
    elif args.pipeline_model_parallel_layout is None:
        _even_pipeline(args)
    stages, least = args.pipeline_model_parallel_size, 2 if args.overlap_p2p_comm else 3
    if virtual_stages(args) > 1 and stages < least:
        raise UserError(
            f"--pipeline-model-parallel-size is {stages}; with {virtual_stages(args)} virtual stages each "
            f"it must be >= {least}"
        )


def _pipeline_layout(args: Namespace, layout: str) -> None:
    """Check a layout that is text. A list, from Python, is left to Megatron."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    name, stages = "--pipeline-model-parallel-layout", args.pipeline_model_parallel_size
    try:
        rows = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError as error:
        raise UserError(f"{name} is {layout}; {one_line(error)}") from error
    if len(rows) % stages:
        raise UserError(
            f"{name} {layout} has {len(rows)} stages; it must be a multiple of "
            f"--pipeline-model-parallel-size {stages}"
        )
    flat = [layer for row in rows for layer in row]
    layers = flat.count(LayerType.decoder)
    if layers != num_layers(args):
        raise UserError(f"{name} {layout} places {layers} layers (t), but --num-layers is {num_layers(args)}")
    if flat.count(LayerType.embedding) != 1 or flat[0] != LayerType.embedding:
        raise UserError(f"{name} is {layout}; it must begin with the only E (embedding)")
    if flat.count(LayerType.loss) != 1 or flat[-1] != LayerType.loss:
        raise UserError(f"{name} is {layout}; it must end with the only L (loss)")


def _uneven_pipeline(args: Namespace, ends: dict[str, int]) -> None:
    """Check the middle stages, if the first or the last stage has its own number of layers (``ends``)."""
    stages, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank or 1
    for name, number in ends.items():
        if number < 1 or number % virtual:
            multiple = f" and a multiple of {virtual} virtual stages" if virtual > 1 else ""
            raise UserError(f"{flag_of(name)} is {number}; it must be >= 1{multiple}")
    middle, middle_stages = num_layers(args) - sum(ends.values()), stages - len(ends)
    fits = middle == 0 if middle_stages == 0 else middle > 0 and middle % (middle_stages * virtual) == 0
    if not fits or middle_stages < 0:
        of_ends = " and ".join(f"{flag_of(name)} {number}" for name, number in ends.items())
        of_virtual = f" of {virtual} virtual stages" if virtual > 1 else ""
        raise UserError(
            f"--num-layers {num_layers(args)} with {of_ends} leaves {middle} layers for "
            f"{max(middle_stages, 0)} middle stages{of_virtual} (--pipeline-model-parallel-size {stages}); "
            "choose numbers that leave the same for each"
        )


def _even_pipeline(args: Namespace) -> None:
    stages = args.pipeline_model_parallel_size
    counted = [word for word, name in _COUNTED.items() if getattr(args, name)]
    total = num_layers(args) + len(counted)
    what = " plus ".join([f"--num-layers {num_layers(args)}", *counted])
    if total % stages:
        raise UserError(
            f"{what} is not divisible by --pipeline-model-parallel-size {stages}; change one of them or give "
            "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers"
        )
    for name in _VIRTUAL:
        number = getattr(args, name)
        if number is not None and (number < 1 or (total // stages) % number):
            raise UserError(
                f"{flag_of(name)} is {number}; it must divide the {total // stages} layers of a pipeline "
                f"stage ({what}, --pipeline-model-parallel-size {stages})"
            )


def sequence_length(args: Namespace) -> None:
    length = args.seq_length if args.seq_length is not None else args.encoder_seq_length
    cp, tp = args.context_parallel_size, tensor_parallel(args)
    multiple, why = 1, []
    if cp > 1:
        multiple, why = 2 * cp, [f"2 x --context-parallel-size {cp}"]
    if args.sequence_parallel and tp > 1:
        multiple = math.lcm(multiple, cp * tp)
        why.append(f"--sequence-parallel over --tensor-model-parallel-size {tp}")
    if length % multiple:
        raise UserError(f"--seq-length is {length}; it must be a multiple of {multiple} ({', '.join(why)})")
    if args.max_position_embeddings < length:
        raise UserError(
            f"--max-position-embeddings is {args.max_position_embeddings}; "
            f"it must be >= --seq-length {length}"
        )


def batch_sizes(args: Namespace) -> None:
    micro = args.micro_batch_size
    replicas = args.world_size // (
        tensor_parallel(args) * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    only_one(args, "step_batch_size_schedule", "global_batch_size")
    if args.step_batch_size_schedule is not None:
        return
    total = args.global_batch_size if args.global_batch_size is not None else micro * replicas
    step = micro * replicas
    named = f"--micro-batch-size {micro} x {replicas} data-parallel replicas = {step}"
    # --decrease-batch-size-if-needed allows a remainder, but each replica needs one micro-batch.
    if total < step or (total % step and not args.decrease_batch_size_if_needed):
        raise UserError(f"--global-batch-size is {total}; it must be a multiple of {named}")
    eval_micro, eval_total = args.eval_micro_batch_size or micro, args.eval_global_batch_size or total
    eval_replicas = replicas // weight_replicas(args)
    if eval_total % (eval_micro * eval_replicas):
        raise UserError(
            f"--eval-global-batch-size is {eval_total}; it must be a multiple of --eval-micro-batch-size "
            f"{eval_micro} x {eval_replicas} data-parallel replicas = {eval_micro * eval_replicas}"
        )
