"""Find common mistakes in Megatron's arguments before the start.

Megatron 0.19 finds many of them too, but with a bare assertion, or after the start-up of every rank. It does
not find others: without data it trains on random tokens, and under tensor parallelism a token id beyond the
vocabulary silently becomes zeros. Here each mistake gives one line with the flag, the value and the fix. The
checks read only arguments and local files, so every rank gets the same result. They leave remote data and
other model types to Megatron, and also mistakes for which Megatron has a clear message, such as those in
uneven and virtual pipeline stages.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from jreg_megatron.mcore import initialization
from jreg_megatron.mcore.preflight import data, optimizer, sizes


def check_arguments(args: Namespace) -> None:
    """Check the result of ``megatron.training.arguments.parse_args``, without a change of ``args``.

    With ``--use-checkpoint-args``, ``--yaml-cfg`` or a configuration of heterogeneous layers only the
    optimizer's package is checked, because the other settings come from other places.

    Raises:
        UserError: for the first mistake, sizes before data.
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
    sizes.required,
    sizes.length_and_rate,
    optimizer.combination,
    initialization.check,
    sizes.evaluation_and_saving,
    optimizer.resuming,
    sizes.world_size,
    sizes.model,
    sizes.pipeline,
    sizes.sequence_length,
    sizes.batch_sizes,
)
"""Checks that read only arguments. Each may rely on the earlier ones."""

DATA_CHECKS: tuple[Callable[[Namespace], None], ...] = (
    data.data_source,
    data.tokenizer,
    data.vocabulary_sizes,
    data.data_files,
    data.token_ids,
)
"""Checks that read files, cheap ones first. They rely on :data:`SIZE_CHECKS`."""
