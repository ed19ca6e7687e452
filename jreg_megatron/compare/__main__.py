"""``jreg-megatron compare``: train toys in each way, with paired seeds, and compare them on one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jreg_megatron.claims import toy
from jreg_megatron.compare.ways import FEWEST_STEPS, SEEDS, STEPS, WAYS, Plan
from jreg_megatron.demo.training import train_all
from jreg_megatron.runtime.errors import check_least, user_errors_exit
from jreg_megatron.runtime.extras import need
from jreg_megatron.runtime.lock import lock

_DATA = Path("runs/data")
_LOCK = ".lock"


def main(argv: Sequence[str] | None = None) -> None:
    """Train the missing runs, and compare all."""
    with user_errors_exit("finished runs are kept; to resume, start the same command again"):
        _compare(_arguments(argv))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jreg-megatron compare", description=__doc__)
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--output", default=Path("runs/compare"), **folder)
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", default=list(WAYS))
    parser.add_argument("--steps", default=STEPS, **number)
    parser.add_argument("--seeds", default=SEEDS, **number)
    parser.add_argument("--jobs", default=2, **number)
    parser.add_argument("--data", default=_DATA, **folder)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args(argv)


def _compare(args: argparse.Namespace) -> None:
    check_least(args, jobs=1, seeds=1, steps=FEWEST_STEPS)
    for package in ("jinja2", "vl_convert", "lm_eval", "scipy", "rich"):
        need(package, "compare", "analysis")
    args.output.mkdir(parents=True, exist_ok=True)
    with lock(args.output / _LOCK, f"{args.output} is being filled", "name another --output"):
        plan = Plan(args.output / "runs", args.steps, args.seeds, args.ways)
        _train(args, plan)


def _train(args: argparse.Namespace, plan: Plan) -> None:
    from jreg_megatron.demo.data import prepare

    data = prepare(args.data, vocab_size=toy.VOCABULARY, progress=not args.quiet)
    if "let" in plan.names:
        train_all([plan.teacher], data, 1, args.quiet)
    train_all(plan.runs, data, args.jobs, args.quiet)


if __name__ == "__main__":
    main()
