"""Checks of required sizes, training length, learning rate, evaluation and saving."""

from __future__ import annotations

import math
from argparse import Namespace

from jreg_megatron.mcore.preflight.asked import Refusals, flag_of, other_layer_plan, refuse
from jreg_megatron.runtime.errors import UserError, check_least

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
