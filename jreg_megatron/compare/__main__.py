"""``jreg-megatron compare``: train small models in each way on paired seeds, and compare them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jreg_megatron.claims import toy
from jreg_megatron.claims.evaluating import LOCK, about, evaluate_all, make_output
from jreg_megatron.claims.rules import FEWEST_SEEDS
from jreg_megatron.compare.ways import FEWEST_STEPS, SEEDS, STEPS, WAYS, Plan
from jreg_megatron.demo.training import Run, each, run_logged, train_all
from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import check_least, user_errors_exit
from jreg_megatron.runtime.extras import need
from jreg_megatron.runtime.lock import lock

FORMAT = "jreg_megatron compare"

_DATA = Path("runs/data")
WORDS = (*toy.TASKS, "--parts", "tasks,read-out")
"""For ``evaluate``."""
_PAGE, _NUMBERS = "compare.html", "compare.json"
_EPILOG = """\
It trains on this machine's CPU, on the same text in the same order for each way. After a kill, start the
same command again: it resumes.

  jreg-megatron compare
  jreg-megatron compare --ways jreg slowqk --seeds 3 --output runs/try

Exit status: 0 the ways are compared; 2 a mistake in the command, or a run that failed.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Train the missing runs, and compare all."""
    with user_errors_exit("finished runs are kept; to resume, start the same command again"):
        _compare(_arguments(argv))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    ways = {name: way.text for name, way in WAYS.items() if way.against}
    width = max(map(len, ways))
    parser = argparse.ArgumentParser(
        prog="jreg-megatron compare",
        usage="%(prog)s [OPTIONS]",
        description="Train small models on real text: baselines, JREG and each other method. Writes one page "
        "and one JSON file.",
        epilog="ways:\n"
        + "".join(f"  {name:{width}}  {text}\n" for name, text in ways.items())
        + f"\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    place = f"folder of runs, evaluations, {_PAGE} and {_NUMBERS} (default: %(default)s)"
    some = "only these ways, and their baselines (default: all)"
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--output", help=place, default=Path("runs/compare"), **folder)
    parser.add_argument("--ways", help=some, nargs="+", choices=ways, metavar="WAY", default=list(ways))
    parser.add_argument("--steps", help="training steps (default: %(default)s)", default=STEPS, **number)
    parser.add_argument("--seeds", help="seeds 1 to N (default: %(default)s)", default=SEEDS, **number)
    parser.add_argument("--jobs", help="processes at a time (default: %(default)s)", default=2, **number)
    parser.add_argument("--data", help="folder of the text (default: %(default)s)", default=_DATA, **folder)
    parser.add_argument("--train-only", action="store_true", help="train the missing runs, and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table, no notes")
    return parser.parse_args(argv)


def _compare(args: argparse.Namespace) -> None:
    check_least(args, jobs=1, seeds=1, steps=FEWEST_STEPS)
    for package in ("jinja2", "vl_convert", "lm_eval", "scipy", "rich"):
        need(package, "compare", "analysis")
    make_output(args.output, _PAGE, _NUMBERS)
    with lock(args.output / LOCK, f"{args.output} is being filled", "name another --output"):
        plan = Plan(args.output / "runs", args.steps, args.seeds, args.ways)
        if args.seeds < FEWEST_SEEDS and not args.quiet:
            output.note(f"with fewer than {FEWEST_SEEDS} seeds a difference is hardly more than chance")
        _train(args, plan)
        if not args.train_only:
            _evaluate_and_write(args, plan)


def _train(args: argparse.Namespace, plan: Plan) -> None:
    from jreg_megatron.demo.data import prepare

    data = prepare(args.data, vocab_size=toy.VOCABULARY, progress=not args.quiet)
    if plan.needs_teacher:
        train_all([plan.teacher], data, 1, args.quiet)
        if not plan.exported_teacher.exists():
            each([plan.teacher], lambda run: _export(run, plan.exported_teacher), 1)
    train_all([run for _, _, run in plan.runs], data, args.jobs, args.quiet)


async def _export(teacher: Run, folder: Path) -> None:
    """The folder is there only if it is whole."""
    command = ["-m", "jreg_megatron.convert.export", str(teacher.checkpoints), str(folder), "--quiet"]
    await run_logged("exporting the teacher", command, folder.with_suffix(".log"), lambda _: None)


def _evaluate_and_write(args: argparse.Namespace, plan: Plan) -> None:
    from jreg_megatron.compare.page import document, page
    from jreg_megatron.compare.toys import read_toy, read_toys

    toys, notes = read_toys(plan)
    runs = [found.run for by_seed in toys.values() for found in by_seed.values()]
    files = {run.folder: run.folder / "evaluation.json" for run in runs}
    done = evaluate_all(runs, files, args.output, WORDS, args.jobs, args.quiet)
    toys = {
        way: {
            seed: replace(found, run=replace(found.run, evaluated=done[found.run.folder]))
            for seed, found in by_seed.items()
        }
        for way, by_seed in toys.items()
    }
    teacher = read_toy(plan.teacher) if plan.needs_teacher else None
    how = toy.described(plan.steps) | {"seeds": f"1 to {plan.seeds}", "jobs": f"{args.jobs} at a time"}
    found = document(plan, toys, teacher, notes, about(FORMAT, how))
    output.write_json(str(args.output / _NUMBERS), found)
    output.write_text(str(args.output / _PAGE), page(found, toys, plan.against))
    if args.quiet:
        return
    for text in notes:
        output.note(text)
    loss = found["families"]["loss"]["ways"]
    rows = [(way, f"{of['found']:+.4f}" if of["by_seed"] else "", of["verdict"]) for way, of in loss.items()]
    columns = ("way", "validation loss minus its baseline's", "verdict")
    output.print_table("The methods, side by side", columns, rows, words=columns)
    print(f"Page: {args.output / _PAGE}\nNumbers: {args.output / _NUMBERS}")


if __name__ == "__main__":
    main()
