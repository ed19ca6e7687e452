"""Entry point: ``torchrun ... -m jreg_megatron.pretrain <Megatron's arguments> --jreg-coeff 1``.

Runs ``pretrain`` of the installed ``megatron.training`` on a ``GPTModel`` with JREG. Arguments, optimizer,
schedules, checkpoints and logs are Megatron's. Without a CUDA device, or with ``--cpu``, the same command
runs on the CPU with gloo.
"""

from __future__ import annotations

import os
import sys
import time

from jreg_megatron.mcore.arguments import CPU_FLAG
from jreg_megatron.mcore.dataset_helper import compile_helper, use_built_helper
from jreg_megatron.mcore.installed import need_training_loop
from jreg_megatron.runtime.errors import megatrons_refusals, user_errors_exit
from jreg_megatron.runtime.fork import be_alone_unless_started, end_with_the_parent


def main(argv: list[str] | None = None) -> None:
    """Train; ``argv`` is the command line after the program's name, by default the process's own."""
    started = time.time()
    with user_errors_exit():
        _run(sys.argv[1:] if argv is None else argv, started)


def _run(argv: list[str], started: float) -> None:
    import torch

    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A rank that outlives a killed torchrun would write into the folder of the next run.
        end_with_the_parent()
    be_alone_unless_started()
    compile_helper()
    on_cpu = CPU_FLAG in argv or not torch.cuda.is_available()
    if on_cpu:
        from jreg_megatron import cpu

        cpu.enable()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(cpu.announcement(argv), flush=True)
        argv = cpu.with_cpu_flags(argv)
    need_training_loop("jreg_megatron.pretrain", ", or use jreg_megatron.attach, which works since 0.16")
    # Megatron reads its arguments from here.
    sys.argv = [sys.argv[0], *argv]

    from megatron.training import get_tensorboard_writer, set_startup_timestamps

    from jreg_megatron import gpt_pretraining, training_loop

    use_built_helper()
    training_loop.install()
    config = gpt_pretraining.read_arguments()
    set_startup_timestamps(program_start=started, main_entry=time.time())
    with megatrons_refusals(training_loop.is_attached, is_building=True):
        gpt_pretraining.train(config)
    if (writer := get_tensorboard_writer()) is not None:
        # Megatron flushes before the last evaluation.
        writer.flush()


if __name__ == "__main__":
    main()
