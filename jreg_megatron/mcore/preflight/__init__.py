"""Look for the common mistakes in Megatron's arguments before any time is spent on them.

Megatron 0.19 finds most of them too, but by a bare assertion, after the start-up of every rank, or not at
all: without data it trains on made-up tokens, and a token id beyond the vocabulary is silently embedded
as zeros under tensor parallelism. Here each ends in one line that names the flag, the value and the fix.
The checks read arguments and local files only, so every rank comes to the same verdict on its own.
What they do not know, such as remote data and other model types, is left to Megatron.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from jreg_megatron.mcore import initialization
from jreg_megatron.mcore.preflight import data, division, optimizer, training, vocabulary


def check_arguments(args: Namespace) -> None:
    """Check the arguments as ``megatron.training.arguments.parse_args`` returns them, not yet validated.

    Nothing is changed in ``args``. With ``--use-checkpoint-args``, ``--yaml-cfg`` or a configuration of
    heterogeneous layers only the optimizer's package is looked for, since the rest that counts is then still
    to be read from elsewhere.

    Raises:
        UserError: for the first mistake found, sizes before data.
    """
    optimizer.package(args.optimizer)
    is_read_elsewhere = (
        getattr(args, "yaml_cfg", None) is not None
        or args.use_checkpoint_args
        or args.heterogeneous_layers_config_path
        or args.heterogeneous_layers_config_encoded_json
    )
    if is_read_elsewhere:
        return
    for check in (*SIZE_CHECKS, *DATA_CHECKS):
        check(args)


SIZE_CHECKS: tuple[Callable[[Namespace], None], ...] = (
    training.sizes,
    training.training_length,
    training.learning_rate,
    training.learning_rate_schedule,
    optimizer.combination,
    initialization.check,
    training.evaluation,
    training.saving,
    division.world_size,
    division.heads,
    division.experts,
    division.feed_forward,
    division.pipeline,
    division.sequence_length,
    division.batch_sizes,
)
"""The checks that need the arguments alone; each may rely on those before it."""

DATA_CHECKS: tuple[Callable[[Namespace], None], ...] = (
    data.data_source,
    vocabulary.tokenizer,
    vocabulary.vocabulary_sizes,
    data.data_files,
    vocabulary.token_ids,
)
"""The checks that look into files, the cheap ones first; they rely on :data:`SIZE_CHECKS`."""
