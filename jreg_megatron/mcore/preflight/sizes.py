"""Checks of sizes, training length, learning rate, evaluation and saving, and of the division over ranks.

Megatron has its own messages for uneven and virtual pipeline stages and for custom layouts.
"""

from __future__ import annotations

import math
from argparse import Namespace

from jreg_megatron.mcore.preflight.asked import Refusals, divisible, given, refuse
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import check_least, flag_of

_TRAINING: Refusals = {
    "--train-iters is {train_iters} and --train-samples is {train_samples}; give only one": lambda args: (
        args.train_iters is not None and args.train_samples is not None
    ),
    "--train-iters is missing; give the number of iterations (or --train-samples)": lambda args: (
        args.train_iters is None and args.train_samples is None
    ),
    "--lr is missing; give the learning rate, for example --lr 3e-4": lambda args: args.lr is None,
    "--lr is {lr}; it must be a finite number >= 0": lambda args: not 0 <= args.lr < math.inf,
    "--min-lr is {min_lr}; it must be from 0 to --lr {lr}": lambda args: not 0 <= args.min_lr <= args.lr,
    "--lr-warmup-fraction is {lr_warmup_fraction}; it must be >= 0 and < 1": lambda args: (
        not 0 <= (args.lr_warmup_fraction or 0) < 1
    ),
}
_EVALUATION: Refusals = {
    "--full-validation ends in an error at the first evaluation (Megatron 0.19) without "
    "--multiple-validation-sets; give it too, or --eval-iters instead": lambda args: (
        args.full_validation and not args.multiple_validation_sets
    ),
    "--multiple-validation-sets needs --full-validation (Megatron 0.19); give it too, or one such set": (
        lambda args: args.multiple_validation_sets and not args.full_validation
    ),
    # Megatron divides by it even without evaluation.
    "--eval-interval is {eval_interval}; give a number of iterations >= 1 (--eval-iters 0 switches "
    "evaluation off)": lambda args: not args.full_validation and (args.eval_interval or 0) < 1,
}
_SAVING: Refusals = {
    "--save is {save}, but --save-interval is {save_interval}; give a number of iterations >= 1": (
        lambda args: args.save is not None and (args.save_interval or 0) < 1
    ),
    "--wandb-project is {wandb_project}, which needs a folder; give --wandb-save-dir or --save": (
        lambda args: args.wandb_project and not (args.save or args.wandb_save_dir)
    ),
}
_TP = "tensor_model_parallel_size"
_EXPERTS: Refusals = {
    "--moe-router-topk is {moe_router_topk}; it must be at most --num-experts {num_experts}": lambda args: (
        args.moe_router_topk > args.num_experts
    ),
    "--num-experts is {num_experts} with --tensor-model-parallel-size {tensor_model_parallel_size}, and "
    "Megatron trains this only with --sequence-parallel; give it too": lambda args: (
        args.tensor_model_parallel_size > 1 and not args.sequence_parallel and not args.skip_train
    ),
}


def required(args: Namespace) -> None:
    names = ["hidden_size", "num_attention_heads", "max_position_embeddings", "micro_batch_size"]
    if args.encoder_num_layers is None and not _other_layer_plan(args):
        names.insert(0, "num_layers")
    if args.encoder_seq_length is None:
        names.append("seq_length")
    for name in names:
        if getattr(args, name) is None:
            raise UserError(f"{flag_of(name)} is missing; give a whole number >= 1")
    ranks = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    others = ("kv_channels", "log_interval", "tensorboard_log_interval")
    check_least(args, **dict.fromkeys((*names, *ranks, *others), 1))


def length_and_rate(args: Namespace) -> None:
    if args.skip_train:
        return
    check_least(args, train_iters=1, train_samples=1)
    refuse(args, _TRAINING)
    unit, other = ("iters", "samples") if args.train_iters is not None else ("samples", "iters")
    for name, unset in ((f"lr_decay_{other}", None), (f"lr_warmup_{other}", 0)):
        if getattr(args, name) != unset:
            raise UserError(
                f"{flag_of(name)} is {getattr(args, name)}, but --train-{unit} counts in {unit}; "
                f"use {flag_of(name.replace(other, unit))}"
            )
    warmup, end = getattr(args, f"lr_warmup_{unit}"), f"lr_decay_{unit}"
    end = f"train_{unit}" if getattr(args, end) is None else end
    if args.lr_warmup_fraction is None and warmup >= getattr(args, end):
        below = f"{flag_of(end)} {getattr(args, end)}"
        raise UserError(f"--lr-warmup-{unit} is {warmup}; it must be below {below}")


def evaluation_and_saving(args: Namespace) -> None:
    if not (args.skip_train or args.perform_rl_step):
        refuse(args, _EVALUATION)
    refuse(args, _SAVING)


def world_size(args: Namespace) -> None:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp = args.context_parallel_size
    shards = int(args.tensor_parallel_num_weight_shards or tp)
    size = max(tp, shards) * pp * cp
    if args.world_size % size and shards % tp == 0:
        extra = f" x {shards // tp} weight shards" if shards > tp else ""
        raise UserError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x "
            f"--context-parallel-size {cp}{extra} is {size}, which does not divide the {args.world_size} "
            f"started processes (WORLD_SIZE); start a multiple of {size} or lower one of them"
        )


def model(args: Namespace) -> None:
    if args.kv_channels is None:
        divisible(args, "hidden_size", "num_attention_heads", "change one of them or give --kv-channels")
    divisible(args, "num_attention_heads", _TP)
    divisible(args, "ffn_hidden_size", _TP)
    if args.group_query_attention and not args.multi_latent_attention:
        check_least(args, num_query_groups=1)
        divisible(args, "num_attention_heads", "num_query_groups")
    if args.num_experts is not None:
        refuse(args, _EXPERTS)


def pipeline(args: Namespace) -> None:
    """Check that pipeline stages have equal sizes, virtual stages too."""
    ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    stages = args.pipeline_model_parallel_size
    layers = args.encoder_num_layers if args.num_layers is None else args.num_layers
    check_least(args, num_layers_per_virtual_pipeline_stage=1, num_virtual_stages_per_pipeline_rank=1)
    if _other_layer_plan(args) or given(args, "pipeline_model_parallel_layout"):
        return
    if numbers := {name: getattr(args, name) for name in ends if getattr(args, name) is not None}:
        # Megatron silently builds wrong stages from these.
        rest, middle = layers - sum(numbers.values()), stages - len(numbers)
        if rest < 0 or middle < 0:
            shown = " ".join(f"{flag_of(name)} {number}" for name, number in numbers.items())
            raise UserError(
                f"{shown} leave {rest} of {layers} layers for {middle} other pipeline stages; change one of "
                "them, or --pipeline-model-parallel-size"
            )
        return
    parts = ("embedding", "loss")
    counted = [part for part in parts if getattr(args, f"account_for_{part}_in_pipeline_split")]
    total, what = layers + len(counted), " plus ".join([f"--num-layers {layers}", *counted])
    if total % stages:
        raise UserError(
            f"{what} is not divisible by --pipeline-model-parallel-size {stages}; change one of them or give "
            "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers"
        )
    for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        number = getattr(args, name)
        if number is not None and (total // stages) % number:
            raise UserError(
                f"{flag_of(name)} is {number}; it must divide the {total // stages} layers of a pipeline "
                f"stage ({what}, --pipeline-model-parallel-size {stages})"
            )


def sequence_length(args: Namespace) -> None:
    length = args.seq_length if args.seq_length is not None else args.encoder_seq_length
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    multiple, why = 1, []
    if cp > 1:
        multiple, why = 2 * cp, [f"2 x --context-parallel-size {cp}"]
    if args.sequence_parallel and tp > 1:
        multiple = math.lcm(multiple, cp * tp)
        why.append(f"--sequence-parallel over --tensor-model-parallel-size {tp}")
    if length % multiple:
        raise UserError(f"--seq-length is {length}; it must be a multiple of {multiple} ({', '.join(why)})")


def batch_sizes(args: Namespace) -> None:
    micro, total = args.micro_batch_size, args.global_batch_size
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    replicas = args.world_size // (tp * pp * args.context_parallel_size)
    step = micro * replicas
    # --decrease-batch-size-if-needed allows a remainder, but each replica needs at least one micro-batch.
    if total is not None and (total < step or (total % step and not args.decrease_batch_size_if_needed)):
        raise UserError(
            f"--global-batch-size is {total}; it must be a multiple of --micro-batch-size {micro} x "
            f"{replicas} data-parallel replicas = {step}"
        )


def _other_layer_plan(args: Namespace) -> bool:
    """Whether a pattern defines the layers. Only Megatron can count them."""
    return bool(given(args, "hybrid_layer_pattern", "hybrid_override_pattern"))
