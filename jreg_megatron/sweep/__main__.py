"""Train a recipe over a grid of lambda, alpha and seeds, and draw the result.

Each seed also trains a baseline (lambda 0). Each run is the recipe itself, in a folder of its own. After a
crash, start the same command again: it resumes. Without a RECIPE, the sweep in --output resumes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from jreg_megatron.recipe.request import SMOKE_ITERATIONS
from jreg_megatron.recipe.supervise import UNFINISHED
from jreg_megatron.runtime.errors import EXIT_CODE, UserError, user_errors_exit
from jreg_megatron.runtime.flags import Parser, count, split_at
from jreg_megatron.runtime.imports import need
from jreg_megatron.sweep import grid, queue
from jreg_megatron.sweep.grid import Sweep, node_rank

_TASK = -1


def main(argv: list[str] | None = None) -> None:
    """Run the command line ``argv``."""
    with user_errors_exit():
        sys.exit(_main(_options(sys.argv[1:] if argv is None else argv)))


def _main(options: argparse.Namespace) -> int:
    for package in ("scipy", "vl_convert"):
        need(package, "a sweep", "analysis")
    sweep = _sweep(options)
    if options.report:
        _report(sweep)
        return 0
    if options.slurm:
        return _submit(sweep, options)
    runs, nodes = sweep.runs, os.environ.get("NODES", "1")
    if options.only is not None:
        number = queue.task_number() if options.only == _TASK else options.only
        if number >= len(runs):
            raise UserError(f"--only is {number}; {sweep.output} has runs 0 to {len(runs) - 1}")
        runs = (runs[number],)
    elif nodes != "1":
        raise UserError(f"NODES is {nodes}, but this command trains on one node; use --slurm, or unset NODES")
    if options.dry_run:
        for run in runs:
            print(f"# finished: {run.name}" if sweep.is_finished(run) else _as_line(sweep, run))
        return 0
    is_first_node = node_rank() == 0
    if options.recipe is not None and is_first_node:
        sweep.save()
    statuses = queue.train(sweep, runs)
    has_results = len(sweep.unfinished) < len(sweep.runs)
    if UNFINISHED in statuses:
        print("The sweep has stopped. To resume, start the same command again")
        return UNFINISHED
    if statuses == [EXIT_CODE] and not has_results and options.only is None:
        print("The recipe refuses the first run, so no other run was started")
        return EXIT_CODE
    if failed := sum(status != 0 for status in statuses):
        print(f"{failed} of {len(runs)} runs failed. To try them again, start the same command again")
    if has_results and is_first_node:
        _report(sweep)
    return sum(statuses) if options.only is not None else int(failed > 0)


def _submit(sweep: Sweep, options: argparse.Namespace) -> int:
    if not sweep.unfinished:
        print(f"All {len(sweep.runs)} runs of the sweep are finished: nothing to submit")
        _report(sweep)
        return 0
    words = queue.array(sweep, options.slurm_options)
    if options.dry_run:
        print(shlex.join(words))
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("--slurm needs sbatch, which is not on PATH; run this on a login node of the cluster")
    sweep.save()
    print(queue.submit(words))
    print(
        f"{len(sweep.unfinished)} runs, one per task. Each task draws the result again when it ends. "
        f"To draw it now: python -m jreg_megatron.sweep --output {shlex.quote(str(sweep.output))} --report"
    )
    return 0


def _report(sweep: Sweep) -> None:
    from jreg_megatron.sweep.report import report  # imported late, because it imports the plotting library

    report(sweep)


def _as_line(sweep: Sweep, run: grid.SweepRun) -> str:
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in sweep.settings(run).items())
    return f"{settings} {shlex.join(sweep.command(run))}"


def _sweep(options: argparse.Namespace) -> Sweep:
    """A new sweep, the sweep in the output folder with more runs, or that sweep as it is."""
    if options.recipe is None:
        given = [
            f"--{name} is" for name in ("coeff", "alpha", "seeds", "smoke") if vars(options)[name] is not None
        ]
        given += ["Megatron flags are"] if options.flags else []
        if given:
            raise UserError(f"{given[0]} given without a RECIPE; name one such as recipes/llama_170m.sh")
        if options.output is None:
            raise UserError(
                "RECIPE is missing; name one such as recipes/llama_170m.sh, or name an --output to resume"
            )
        sweep = Sweep.load(options.output)
        if not options.report:
            sweep.check()
        return sweep
    if options.coeff is None:
        raise UserError("--coeff is missing; name the lambdas to try, as in --coeff 0.01 0.03 0.1 0.3 1")
    name = options.recipe.stem + ("" if options.smoke is None else "_smoke")
    return grid.make(options, options.output or Path("runs") / f"sweep_{name}")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="jreg-megatron sweep",
        usage="%(prog)s RECIPE --coeff LAMBDA... [--alpha ALPHA...] [--seeds SEED...] [--output FOLDER]\n"
        "           [--smoke [N]] [--slurm] [--dry-run] [-- MORE MEGATRON FLAGS]\n"
        "       %(prog)s --output FOLDER [--slurm | --only N | --report]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    numbers: dict[str, Any] = {"nargs": "+"}
    number: dict[str, Any] = {"nargs": "?", "metavar": "N"}
    switch: dict[str, Any] = {"action": "store_true"}
    alphas = f"the alphas to try with each lambda (default: {grid.ALPHA:g})"
    seeds = f"the seeds to train each setting with (default: {grid.SEED})"
    smoke = f"train toys on this machine's CPU, for N iterations each (default {SMOKE_ITERATIONS})"
    only = "train one run: its number in sweep.json, from 0 (default: the number of this Slurm array task)"
    output = "folder of the runs and the result (default: runs/sweep_ and the recipe's name); another grid "
    output += "of the same recipe adds its runs there"
    slurm = "more options for sbatch, such as '--nodes 2 --time 1-0'; SBATCH_* variables also apply"
    for flag, meaning, more in (
        (
            "recipe",
            "the recipe, such as recipes/llama_170m.sh",
            {"type": Path, "nargs": "?", "metavar": "RECIPE"},
        ),
        ("--coeff", "the lambdas to try, each > 0", numbers | {"type": float, "metavar": "LAMBDA"}),
        ("--alpha", alphas, numbers | {"type": float, "metavar": "ALPHA"}),
        ("--seeds", seeds, numbers | {"type": count("--seeds"), "metavar": "SEED"}),
        ("--smoke", smoke, number | {"type": count("--smoke"), "const": SMOKE_ITERATIONS}),
        ("--only", only, number | {"type": count("--only", 0), "const": _TASK}),
        ("--output", output, {"type": Path, "metavar": "FOLDER"}),
        ("--slurm-options", slurm, {"default": "", "metavar": "WORDS"}),
        ("--slurm", "submit a Slurm array with one task per run, and train nothing here", switch),
        ("--report", "draw the finished runs, and train nothing", switch),
        ("--dry-run", "print the commands, and start nothing", switch),
    ):
        parser.add_argument(flag, help=meaning, **more)
    words, flags = split_at("--", argv)
    return parser.parse_args(words, argparse.Namespace(flags=flags))


if __name__ == "__main__":
    main()
