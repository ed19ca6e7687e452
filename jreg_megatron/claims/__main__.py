"""``jreg-megatron claims``: the paper's six claims, judged on toys trained here or on your own runs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jreg_megatron import output
from jreg_megatron.claims.evidence import Evidence, find, gather, with_evaluations
from jreg_megatron.claims.toy import SEEDS, STEPS, TASKS, VOCABULARY, Plan, described
from jreg_megatron.errors import UserError, user_errors_exit
from jreg_megatron.extras import need
from jreg_megatron.lock import lock

FORMAT = "jreg_megatron claims"

_EPILOG = """\
Without --runs it trains toys on this machine's CPU: baselines and JREG at the paper's lambda 1 and alpha 1
over ten seeds, further alphas and batches over three. The same command goes on after a kill. With --runs it
judges finished trainings of any size by the same rules; words behind -- go to jreg-megatron evaluate:

  jreg-megatron claims
  jreg-megatron claims --steps 200 --seeds 3 --output runs/try
  jreg-megatron claims --runs runs/sweep_llama_170m --output runs/claims_170m -- --tasks paper --device cuda

Runs are folders with tensorboard/ and checkpoints/ in them, of one model and schedule, trained with
--jreg-log-per-layer. A baseline and a JREG run of one seed are a pair. Exit status: 0 judged, whatever the
verdicts; 2 a mistake in the command, or a run that failed.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, and judge."""
    with user_errors_exit("what is finished is kept; the same command goes on"):
        _claims(_arguments(argv))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jreg-megatron claims",
        usage="%(prog)s [options] [--runs FOLDER... [-- WORDS FOR EVALUATE]]",
        description="Judge the six claims of JREG's paper: one page, one JSON file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/claims"),
        metavar="FOLDER",
        help="where runs, evaluations, claims.html and claims.json go (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="judge these finished trainings instead: run folders, or folders of them such as a sweep's",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="processes side by side (default: %(default)s)"
    )
    toy = parser.add_argument_group("toys")
    toy.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help="of training (default: %(default)s)"
    )
    toy.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help="train seeds 1 to N (default: %(default)s)"
    )
    toy.add_argument(
        "--data",
        type=Path,
        default=Path("runs/data"),
        metavar="FOLDER",
        help="where the text is kept (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    words = sys.argv[1:] if argv is None else list(argv)
    at = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:at], argparse.Namespace(evaluate=words[at + 1 :]))


def _claims(args: argparse.Namespace) -> None:
    _check(args)
    for package in ("altair", "jinja2", "vl_convert", "lm_eval", "scipy", "rich"):
        need(package, "claims", "analysis")
    args.output.mkdir(parents=True, exist_ok=True)
    with lock(args.output / ".lock", f"{args.output} is being filled", "name another --output"):
        if args.runs:
            evidence, words = gather(find(args.runs)), args.evaluate
            how = [
                ("runs", ", ".join(map(str, args.runs))),
                ("evaluated with", shlex.join(words) or "defaults"),
            ]
        else:
            evidence, words = _toys(args), TASKS
            how = described(Plan(args.steps, args.seeds))
        evidence = _evaluated(args, evidence, words)
        _write(args, evidence, [*how, ("finished", date.today().isoformat()), ("machine", _machine())])


def _check(args: argparse.Namespace) -> None:
    for flag, least in (("jobs", 1), ("steps", 8), ("seeds", 1)):
        if (value := getattr(args, flag)) < least:
            raise UserError(f"--{flag} is {value}; it must be at least {least}")
    if args.evaluate and not args.runs:
        raise UserError(
            f"{shlex.join(args.evaluate)} is for evaluate, but toys are evaluated in one way; give --runs, "
            "or leave it out"
        )
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output is {args.output}, which is a file; name a folder")


def _toys(args: argparse.Namespace) -> Evidence:
    from jreg_megatron.claims.queue import train_all
    from jreg_megatron.demo.data import prepare

    runs = Plan(args.steps, args.seeds).runs(args.output / "runs")
    data = prepare(args.data, vocab_size=VOCABULARY, progress=not args.quiet)
    train_all(runs, data, args.jobs, args.quiet)
    return gather([run.folder for run in runs])


def _evaluated(args: argparse.Namespace, evidence: Evidence, words: Sequence[str]) -> Evidence:
    """With the evaluations of all pairs of a baseline and JREG; those that there are are read again."""
    from jreg_megatron.claims.queue import evaluate_all

    folder = args.output / "evaluations"
    folder.mkdir(exist_ok=True)
    asked = folder / "words.json"
    if asked.exists() and json.loads(asked.read_text(encoding="utf-8")) != list(words):
        raise UserError(f"{folder} was evaluated with other words ({asked}); name another --output")
    output.write_json(str(asked), list(words))
    models = [run for pair in evidence.pairs.values() for run in pair if run.checkpoints.is_dir()]
    files = {run.name: folder / f"{run.name}.json" for run in models}
    evaluate_all([(run, files[run.name]) for run in models], words, args.jobs, args.quiet)
    return with_evaluations(evidence, files)


def _write(args: argparse.Namespace, evidence: Evidence, how: Sequence[tuple[str, str]]) -> None:
    from jreg_megatron.claims.page import document, page
    from jreg_megatron.claims.rules import claims

    judged = claims(evidence)
    about: dict[str, Any] = {"format": FORMAT, "version": 1}
    about |= {"versions": output.versions("megatron-core", "torch", "lm_eval", "scipy"), "how": dict(how)}
    json_file, html_file = args.output / "claims.json", args.output / "claims.html"
    output.write_json(str(json_file), document(evidence, judged, about))
    output.write_text(str(html_file), page(evidence, judged, [*how, ("versions", _pairs(about["versions"]))]))
    if args.quiet:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="The paper's claims", title_justify="left")
    for column in ("", "claim", "verdict"):
        table.add_column(column)
    for key, claim in judged.items():
        table.add_row(key, claim.text, claim.verdict)
    Console(markup=False).print(table)
    print(f"Page: {html_file}\nNumbers: {json_file}")


def _pairs(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _machine() -> str:
    python = platform.python_version()
    return f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores, Python {python}"


if __name__ == "__main__":
    main()
