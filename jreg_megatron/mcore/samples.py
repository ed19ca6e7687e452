"""The samples of a training and their order, from Megatron's arguments."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def dataset_config(args: Namespace, tokenizer: Any, blend: Any, blend_per_split: Any, **where: Any) -> Any:
    """Megatron's ``GPTDatasetConfig``, for training and to read a training's samples again.

    ``blend`` and ``blend_per_split`` are from ``get_blend_and_blend_per_split``. ``where`` has other fields,
    which change no sample.
    """
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        **where,
    )
