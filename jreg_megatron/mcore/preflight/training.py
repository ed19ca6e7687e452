"""Checks of required sizes, training length, learning rate, evaluation and saving."""

from __future__ import annotations

import math
from argparse import Namespace

from jreg_megatron.mcore.preflight.asked import flag_of, only_one, other_layer_plan
from jreg_megatron.runtime.errors import UserError, check_least


def sizes(args: Namespace) -> None:
    required = ["hidden_size", "num_attention_heads", "max_position_embeddings", "micro_batch_size"]
    if args.encoder_num_layers is None and not other_layer_plan(args):
        required.insert(0, "num_layers")
    if args.encoder_seq_length is None:
        required.append("seq_length")
    for name in required:
        if getattr(args, name) is None:
            raise UserError(f"{flag_of(name)} is missing; give a whole number >= 1")
    ranks = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    others = ("kv_channels", "log_interval", "tensorboard_log_interval")
    check_least(args, **dict.fromkeys((*required, *ranks, *others), 1))


def training_length(args: Namespace) -> None:
    if args.skip_train:
        return
    only_one(args, "train_iters", "train_samples")
    if args.train_iters is None and args.train_samples is None:
        raise UserError("--train-iters is missing; give the number of iterations (or --train-samples)")
    check_least(args, train_iters=1, train_samples=1)


def learning_rate(args: Namespace) -> None:
    if args.skip_train:
        return
    if args.lr is None:
        raise UserError("--lr is missing; give the learning rate, for example --lr 3e-4")
    if not (math.isfinite(args.lr) and args.lr >= 0):
        raise UserError(f"--lr is {args.lr}; it must be a finite number >= 0")
    if not 0 <= args.min_lr <= args.lr:
        raise UserError(f"--min-lr is {args.min_lr}; it must be from 0 to --lr {args.lr}")


def learning_rate_schedule(args: Namespace) -> None:
    if args.skip_train:
        return
    unit, other = ("iters", "samples") if args.train_iters is not None else ("samples", "iters")
    for name, unset in ((f"lr_decay_{other}", None), (f"lr_warmup_{other}", 0)):
        if getattr(args, name) != unset:
            raise UserError(
                f"{flag_of(name)} is {getattr(args, name)}, but --train-{unit} counts in {unit}; "
                f"use {flag_of(name.replace(other, unit))}"
            )
    warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}")
    length = getattr(args, f"train_{unit}") if decay is None else decay
    end = f"--train-{unit}" if decay is None else f"--lr-decay-{unit}"
    if args.lr_warmup_fraction is not None:
        if warmup:
            only_one(args, "lr_warmup_fraction", f"lr_warmup_{unit}")
        if not 0 <= args.lr_warmup_fraction < 1:
            raise UserError(f"--lr-warmup-fraction is {args.lr_warmup_fraction}; it must be >= 0 and < 1")
    elif warmup >= length:
        raise UserError(f"--lr-warmup-{unit} is {warmup}; it must be below {end} {length}")


def evaluation(args: Namespace) -> None:
    if args.skip_train or args.perform_rl_step:
        return
    if args.full_validation and not args.multiple_validation_sets:
        raise UserError(
            "--full-validation ends in an error at the first evaluation (Megatron 0.19) without "
            "--multiple-validation-sets; give it too, or --eval-iters instead"
        )
    if args.full_validation:
        return
    if args.multiple_validation_sets:
        raise UserError(
            "--multiple-validation-sets needs --full-validation (Megatron 0.19); give it too, or one "
            "validation set"
        )
    # Megatron divides by it even without evaluation.
    if not args.eval_interval or args.eval_interval < 0:
        found = "is missing" if args.eval_interval is None else f"is {args.eval_interval}"
        raise UserError(
            f"--eval-interval {found}; give a number of iterations >= 1 (--eval-iters 0 switches evaluation "
            "off)"
        )


def saving(args: Namespace) -> None:
    if args.save is not None and (args.save_interval is None or args.save_interval < 1):
        found = "is missing" if args.save_interval is None else f"is {args.save_interval}"
        raise UserError(
            f"--save is {args.save}, but --save-interval {found}; give a number of iterations >= 1"
        )
    if args.wandb_project and not (args.save or args.wandb_save_dir):
        raise UserError(
            f"--wandb-project is {args.wandb_project}, which needs a folder; give --wandb-save-dir or --save"
        )
