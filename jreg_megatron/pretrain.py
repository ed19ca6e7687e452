"""Entry point: ``torchrun ... -m jreg_megatron.pretrain <Megatron's arguments> --jreg-coeff 1``.

Runs ``pretrain`` of the installed ``megatron.training`` on a ``GPTModel`` with JREG. Arguments, optimizer,
schedules, checkpoints and logs are Megatron's. Without a CUDA device, or with ``--cpu``, the same command
runs on the CPU with gloo.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec

from jreg_megatron.mcore.arguments import CPU_FLAG, add_arguments
from jreg_megatron.mcore.dataset_helper import compile_helper, use_built_helper
from jreg_megatron.methods import known
from jreg_megatron.runtime.errors import UserError, megatrons_refusals, user_errors_exit
from jreg_megatron.runtime.fork import end_with_the_parent

APEX_FUSION = "fused_weight_gradient_mlp_cuda"
"""Apex's module for fused gradient accumulation in Megatron's own linear layers."""


def main(argv: list[str] | None = None) -> None:
    """Train; ``argv`` is the command line after the program's name, by default the process's own."""
    started = time.time()
    with user_errors_exit():
        _run(sys.argv[1:] if argv is None else argv, started)


def _require_training_loop() -> None:
    """Refuse a Megatron-Core without the training loop, or with an older one."""
    from megatron.core import __version__ as core

    from jreg_megatron.cpu import has_training_loop

    if not has_training_loop() or tuple(map(int, core.split(".")[:2])) < (0, 19):
        raise UserError(
            f"Megatron-Core {core.partition('+')[0]} is installed, and jreg_megatron.pretrain needs the "
            "training loop of 0.19 or later; upgrade it, or use jreg_megatron.attach, which works since 0.16"
        )


def _refuse_without_nvidias_packages(asked: argparse.Namespace) -> None:
    """Refuse a missing package that Megatron needs on a GPU when it builds the model."""
    layers_are_its = asked.transformer_impl == "transformer_engine" and asked.spec is None
    if layers_are_its and find_spec("transformer_engine") is None:
        raise UserError(
            "--transformer-impl is transformer_engine, and Transformer Engine is not installed; install "
            "jreg_megatron[te], or give --transformer-impl local"
        )
    if asked.gradient_accumulation_fusion and find_spec(APEX_FUSION) is None:
        raise UserError(
            f"Megatron's output layer fuses gradient accumulation by Apex's {APEX_FUSION}, which is not "
            "installed; install NVIDIA's Apex, or give --no-gradient-accumulation-fusion"
        )


def _run(argv: list[str], started: float) -> None:
    import torch

    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A rank that outlives a killed torchrun would write into the folder of the next run.
        end_with_the_parent()
    compile_helper()
    on_cpu = CPU_FLAG in argv or not torch.cuda.is_available()
    if on_cpu:
        from jreg_megatron import cpu

        cpu.enable()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(cpu.announcement(argv), flush=True)
        argv = cpu.with_cpu_flags(argv)
    _require_training_loop()
    # Megatron reads its arguments from here.
    sys.argv = [sys.argv[0], *known.with_a_flag(argv)]

    from megatron.core.enums import ModelType
    from megatron.training import (
        arguments,
        get_tensorboard_writer,
        pretrain,
        set_startup_timestamps,
    )
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from jreg_megatron import gpt_pretraining, training_loop
    from jreg_megatron.mcore import preflight
    from jreg_megatron.stream.support import refuse_unsupported

    use_built_helper()
    training_loop.install()
    with megatrons_refusals():
        asked = arguments.parse_args(add_arguments)
    if not on_cpu:
        _refuse_without_nvidias_packages(asked)
    settings = known.settings_in(asked)
    gpt_pretraining.refuse_other_tasks(asked)
    refuse_unsupported(asked, *settings)
    preflight.check_arguments(asked)
    if not (asked.use_checkpoint_args or asked.yaml_cfg):
        for of_one in settings:
            of_one.refuse_layers(asked.num_layers)
    with megatrons_refusals():
        args = arguments.parse_and_validate_args(extra_args_provider=add_arguments)
        model_config = gpt_pretraining.model_config(args)

    set_startup_timestamps(program_start=started, main_entry=time.time())
    with megatrons_refusals(training_loop.is_attached, is_building=True):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            gpt_pretraining.datasets,
            ModelType.encoder_or_decoder,
            gpt_pretraining.forward_step,
            get_embedding_ranks=gpt_pretraining.embedding_ranks,
        )
    if (writer := get_tensorboard_writer()) is not None:
        # Megatron flushes before the last evaluation.
        writer.flush()


if __name__ == "__main__":
    main()
