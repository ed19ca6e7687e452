"""Megatron's training loop without JREG. A run with `coeff = 0` must be bit-identical to it."""

from __future__ import annotations

import sys


def main(argv: list[str]) -> None:
    """Train as ``jreg_megatron.pretrain`` does, on the CPU, without attaching or wrapping anything."""
    from jreg_megatron import cpu

    cpu.enable()
    sys.argv = [sys.argv[0], *cpu.with_cpu_flags(argv)]

    from megatron.core.enums import ModelType
    from megatron.training import arguments, get_tensorboard_writer, pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from jreg_megatron import gpt_pretraining

    args = arguments.parse_and_validate_args()
    config = hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    pretrain(
        pretrain_cfg_container_from_args(args, config(args)),
        gpt_pretraining.datasets,
        ModelType.encoder_or_decoder,
        gpt_pretraining.forward_step,
        get_embedding_ranks=gpt_pretraining.embedding_ranks,
    )
    if (writer := get_tensorboard_writer()) is not None:
        writer.flush()  # Megatron does so before the last evaluation


if __name__ == "__main__":
    main(sys.argv[1:])
