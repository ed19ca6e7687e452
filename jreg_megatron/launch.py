"""JREG in an existing Megatron job, without a change of its code.

``torchrun ... -m jreg_megatron.launch path/to/pretrain_gpt.py ARGS... --jreg-coeff 1`` runs the script with
its own Megatron. Megatron's parser gets the ``--jreg-...`` flags, its model gets JREG, and its log gets the
values. Without a CUDA device, or with ``--cpu``, the script runs on the CPU. On the CPU, ``python -m
jreg_megatron.launch --nproc N SCRIPT.py ARGS...`` starts the ranks faster than torchrun.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

import torch

from jreg_megatron.cpu import script
from jreg_megatron.cpu.flags import value_of
from jreg_megatron.mcore.dataset_helper import compile_helper, use_built_helper
from jreg_megatron.mcore.preflight import optimizer
from jreg_megatron.methods import known
from jreg_megatron.runtime.errors import UserError, user_errors_exit


def main(argv: list[str] | None = None) -> None:
    """Run a script with JREG in its training loop; ``argv`` is ``sys.argv[1:]`` by default."""
    parser = argparse.ArgumentParser(
        prog="python -m jreg_megatron.launch",
        usage="python -m jreg_megatron.launch [-h] [--cpu] [--nproc N] [-m] SCRIPT ARGS... [--jreg-... ...]",
        description="Run a Megatron training script with JREG. Put the --jreg-... flags after SCRIPT, among "
        "its ARGS. If you give no flag of a method, displacement is only measured.",
        allow_abbrev=False,
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU (the default without CUDA)")
    known.add_arguments(script.add_arguments(parser))
    options = parser.parse_args(argv)
    with user_errors_exit():
        for method in known.METHODS:
            if method.is_in(options):
                given = next(name for name in vars(options) if name.startswith(f"{method.prefix}_"))
                raise UserError(
                    f"{method.flag(given.removeprefix(f'{method.prefix}_'))} comes before {options.script}; "
                    "put it after the script, among its arguments"
                )
        known.check_flags(options.arguments)
        trains = not {"-h", "--help"} & set(options.arguments)
        script.run(
            options,
            on_cpu=options.cpu or not torch.cuda.is_available(),
            before_import=_refuse_early if trains else lambda: None,
            make_ready=_make_ready,
            check_at_end=_refuse_to_end_unattached if trains else lambda: None,
        )


def _refuse_early() -> None:
    optimizer.package(value_of(sys.argv, "--optimizer"))
    compile_helper()


def _make_ready() -> None:
    from jreg_megatron import training_loop

    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.training") is None:
        raise UserError(
            "there is no megatron.training beside the script or on Python's path; run a script of a "
            "Megatron-LM tree, put the tree on PYTHONPATH, or install megatron-core 0.19 or later"
        )
    training_loop.install()
    use_built_helper()


def _refuse_to_end_unattached() -> None:
    from jreg_megatron import training_loop

    if not training_loop.is_attached():
        raise UserError(
            "the script has ended and JREG was never attached: the script did not call "
            "megatron.training.training.setup_model_and_optimizer; use jreg_megatron.attach in its code"
        )


if __name__ == "__main__":
    main()
