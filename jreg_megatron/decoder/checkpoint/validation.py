"""The samples of a training's last validation, from Megatron's own dataset."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.decoder.checkpoint.arguments import all_arguments
from jreg_megatron.decoder.checkpoint.weights import Checkpoint
from jreg_megatron.mcore.one_process import single_process
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import flag_of

_OTHER_SAMPLES = (
    *("full_validation", "multiple_validation_sets", "mock_data", "sft", "fim_data"),
    # Positions restart within a sample, or tokens do not attend to the previous document.
    *("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"),
)


def last_validation_samples(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The samples of the last validation, from the training's data, as in :attr:`Decoder.last_validation`.

    After the last iteration Megatron saves and then validates once more. A checkpoint of the last iteration
    gives this validation. Other checkpoints give the last validation before them.

    Raises:
        UserError: if data or tokenizer are missing, if there was no validation, or if it cannot be repeated.
    """
    args, what = all_arguments(checkpoint.arguments), str(checkpoint.folder)
    consumed = checkpoint.arguments.get("consumed_valid_samples")
    if consumed is None:
        raise UserError(
            f"{what} has no consumed_valid_samples, so its last validation is not known; give --text"
        )
    first, count = last_samples(args, int(checkpoint.common["iteration"]), int(consumed), what)
    with tempfile.TemporaryDirectory() as cache:  # else Megatron writes beside the data
        dataset = _dataset(args, cache)
        if first + count > len(dataset):
            raise UserError(
                f"the last validation read samples {first} to {first + count}, but the data holds "
                f"{len(dataset)}; put the training's data back"
            )
        rows = [dataset[index] for index in range(first, first + count)]
    return {key: torch.stack([row[key] for row in rows]) for key in ("tokens", "labels", "loss_mask")}


def last_samples(args: Namespace, iteration: int, consumed: int, what: str) -> tuple[int, int]:
    """The first sample's index (from 0) and the number of samples of the last validation at ``iteration``.

    ``consumed`` is the number of validation samples read until then. ``what`` names the checkpoint in
    messages.

    Raises:
        UserError: if there was no validation, or its samples are not known here.
    """
    if not args.train_iters:
        raise UserError(f"{what} was not made by a training; give --text")
    if not args.eval_iters or isinstance(args.eval_iters, list):
        raise UserError(
            f"{what} was trained without validation (--eval-iters {args.eval_iters}); give --text"
        )
    others = [flag_of(name) for name in _OTHER_SAMPLES if getattr(args, name, None)]
    if args.dataloader_type != "single":
        others.append(f"--dataloader-type {args.dataloader_type}")
    if others:
        raise UserError(f"{what} was trained with {others[0]}, whose samples are not known here; give --text")
    count = args.eval_iters * int(args.eval_global_batch_size or args.global_batch_size)
    if iteration >= args.train_iters:
        return consumed, count  # the last validation runs after the last checkpoint
    if consumed < count:
        raise UserError(
            f"{what} was saved before the first validation (--eval-interval {args.eval_interval}); give "
            "--text"
        )
    return consumed - count, count


def _dataset(args: Namespace, cache: str) -> Any:
    """The validation set as the training built it, with the same order and number of samples."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    from jreg_megatron.mcore.dataset_helper import use_built_helper
    from jreg_megatron.mcore.samples import dataset_config

    single_process()
    use_built_helper()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend_per_split:
        blend_per_split = [None, blend_per_split[1], None]
    for prefixes, _ in filter(None, [blend, *(blend_per_split or [])]):
        for prefix in prefixes:
            if "://" not in prefix and not Path(f"{prefix}.idx").is_file():
                raise UserError(f"the training's data {prefix}.bin does not exist; put it back")
    try:
        tokenizer = build_tokenizer(args)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the training's tokenizer {args.tokenizer_model} cannot be loaded; put it back"
        ) from error
    config = dataset_config(
        args, tokenizer, blend, blend_per_split, path_to_cache=cache, create_attention_mask=False
    )
    if blend:
        # Leave out the training set: its order may take an hour to build.
        config.split_matrix = [None, config.split_matrix[1], None]
    # The order depends on the numbers of samples of the training, validation and test sets, as in Megatron.
    evaluations = args.train_iters // args.eval_interval + 1
    if args.start_eval_at_iter is not None:
        evaluations = max(0, evaluations - args.start_eval_at_iter // args.eval_interval)
    train = args.train_samples or args.train_iters * args.global_batch_size
    count = args.eval_iters * int(args.eval_global_batch_size or args.global_batch_size)
    sizes = [train, evaluations * count, count]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[1]
