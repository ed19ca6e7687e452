"""The samples that a training's last validation saw, from Megatron's own dataset."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.decoder.megatron_model import all_arguments, single_process
from jreg_megatron.decoder.megatron_tokenizer import megatron_tokenizer
from jreg_megatron.decoder.megatron_weights import Checkpoint
from jreg_megatron.runtime.errors import UserError

_OTHER_SAMPLES = (
    *("full_validation", "multiple_validation_sets", "mock_data", "sft", "fim_data"),
    # Their positions begin anew within a sample, or their tokens do not see the document before.
    *("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"),
)


@dataclass(frozen=True)
class Samples:
    """What a validation saw, ``[n, seq_length]`` each."""

    tokens: Tensor
    labels: Tensor
    """The token behind each."""
    loss_mask: Tensor
    """1.0 where a token's loss counts, else 0.0."""


def last_validation_samples(checkpoint: Checkpoint) -> Samples:
    """The last validation's samples; see :func:`jreg_megatron.decoder.megatron.last_validation`.

    Raises:
        UserError: if there was none, or it cannot be repeated.
    """
    args = all_arguments(checkpoint.arguments)
    if "consumed_valid_samples" not in checkpoint.arguments:
        raise UserError(
            f"{checkpoint.folder} does not tell consumed_valid_samples, so its last validation is not known; "
            "give --text"
        )
    consumed = int(checkpoint.arguments["consumed_valid_samples"])
    iteration = int(checkpoint.common["iteration"])
    first, count = _last_samples(args, iteration, consumed, str(checkpoint.folder))
    with tempfile.TemporaryDirectory() as cache:  # else Megatron writes beside the data
        dataset = _dataset(args, cache)
        if first + count > len(dataset):
            raise UserError(
                f"the last validation read samples {first} to {first + count}, but the data holds "
                f"{len(dataset)}; it is not the data of this training"
            )
        rows = [dataset[index] for index in range(first, first + count)]
    return Samples(*(torch.stack([row[key] for row in rows]) for key in ("tokens", "labels", "loss_mask")))


def _last_samples(args: Namespace, iteration: int, consumed: int, what: str) -> tuple[int, int]:
    """Number of the first sample, and how many there were."""
    if not args.train_iters:
        raise UserError(f"{what} comes from no training; give texts")
    if not args.eval_iters or isinstance(args.eval_iters, list):
        raise UserError(f"{what} was trained without validation (--eval-iters {args.eval_iters})")
    for flag in _OTHER_SAMPLES:
        if getattr(args, flag, None):
            raise UserError(
                f"{what} was trained with --{flag.replace('_', '-')}, whose samples are not known here"
            )
    if args.dataloader_type != "single":
        raise UserError(
            f"{what} was trained with --dataloader-type {args.dataloader_type}; only single is known"
        )
    count = args.eval_iters * _batch(args)
    if iteration >= args.train_iters:
        # The evaluation behind the last iteration comes after its checkpoint.
        return consumed, count
    if consumed < count:
        raise UserError(
            f"{what} was saved before the first validation (--eval-interval {args.eval_interval})"
        )
    return consumed - count, count


def _dataset(args: Namespace, cache: str) -> Any:
    """The validation set as the training built it: in the same order, from as many samples."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.training.utils import get_blend_and_blend_per_split

    from jreg_megatron.mcore.dataset_helper import use_built_helper

    single_process()
    use_built_helper()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend_per_split:
        blend_per_split = [None, blend_per_split[1], None]
    _require_data([blend, *(blend_per_split or [])])
    tokenizer = megatron_tokenizer(args)
    if tokenizer is None:
        raise UserError(
            f"the training's tokenizer {args.tokenizer_model} cannot be loaded; put it back in its place"
        )
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=cache,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )
    if blend:
        # The order of the training set alone may take an hour to build.
        config.split_matrix = [None, config.split_matrix[1], None]
    return BlendedMegatronDatasetBuilder(GPTDataset, _sizes(args), lambda: True, config).build()[1]


def _sizes(args: Namespace) -> list[int]:
    """Samples of training, validation and test set that Megatron asks for; they decide the order."""
    train = args.train_samples or args.train_iters * args.global_batch_size
    evaluations = args.train_iters // args.eval_interval + 1
    if args.start_eval_at_iter is not None:
        evaluations = max(0, evaluations - args.start_eval_at_iter // args.eval_interval)
    per_evaluation = args.eval_iters * _batch(args)
    return [train, evaluations * per_evaluation, per_evaluation]


def _batch(args: Namespace) -> int:
    return int(args.eval_global_batch_size or args.global_batch_size)


def _require_data(blends: list[tuple[list[str], Any] | None]) -> None:
    for blend in blends:
        for prefix in blend[0] if blend else ():
            if "://" not in prefix and not Path(f"{prefix}.idx").is_file():
                raise UserError(f"the training's data {prefix}.bin is not there; put it back in its place")
