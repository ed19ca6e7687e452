"""``jreg-megatron claims``: judge the paper's six claims on toys that it trains, or on your own runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jreg_megatron.claims import toy
from jreg_megatron.claims.evaluating import LOCK, about, evaluate_all, make_output
from jreg_megatron.claims.evidence import Evidence, evaluation_name, find, gather
from jreg_megatron.claims.rules import FEWEST_SEEDS
from jreg_megatron.demo.training import train_all
from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import UserError, check_least, user_errors_exit
from jreg_megatron.runtime.extras import need
from jreg_megatron.runtime.flags import split_at
from jreg_megatron.runtime.lock import lock

FORMAT = "jreg_megatron claims"

_DATA = Path("runs/data")
_PAGE, _NUMBERS = "claims.html", "claims.json"
_EPILOG = """\
Without --runs it trains toys on this machine's CPU: baselines and JREG at the paper's lambda 1 and alpha 1
with ten seeds, other alphas and batches with three. After a kill, start the same command again: it resumes.
With --runs it judges finished runs of any size by the same rules. Words behind -- go to jreg-megatron
evaluate:

  jreg-megatron claims
  jreg-megatron claims --steps 200 --seeds 3 --output runs/try
  jreg-megatron claims --runs runs/sweep_llama_170m --output runs/claims_170m -- --tasks paper --device cuda

A run is a folder with tensorboard/ and checkpoints/, trained with --jreg-log-per-layer. All runs must be of
one experiment. A baseline and a JREG run of one seed are a pair. A verdict needs three seeds. Claim 3 needs
baselines with several batch sizes on equal tokens. Claim 4 needs runs with alpha 0.5, 1 and 3. Exit status:
0 the claims are judged; 2 a mistake in the command, or a run that failed.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Train the missing runs, and judge the claims."""
    with user_errors_exit("finished runs are kept; to resume, start the same command again"):
        _claims(_arguments(argv))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jreg-megatron claims",
        usage="%(prog)s [OPTIONS] [--runs FOLDER... [-- WORDS FOR EVALUATE]]",
        description="Judge the six claims of JREG's paper. Writes one page and one JSON file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runs = "judge these finished runs, train none: run folders, or folders of runs such as a sweep's"
    output = "folder of runs, evaluations, claims.html and claims.json (default: %(default)s)"
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--output", help=output, default=Path("runs/claims"), **folder)
    parser.add_argument("--runs", help=runs, nargs="+", **folder)
    parser.add_argument("--jobs", help="processes at a time (default: %(default)s)", default=2, **number)
    toys = parser.add_argument_group("toys")
    toys.add_argument("--steps", help=f"training steps (default: {toy.STEPS})", **number)
    toys.add_argument("--seeds", help=f"train seeds 1 to N (default: {toy.SEEDS})", **number)
    toys.add_argument("--data", help=f"folder of the text (default: {_DATA})", **folder)
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table, no notes")
    words, evaluate = split_at("--", sys.argv[1:] if argv is None else argv)
    return parser.parse_args(words, argparse.Namespace(evaluate=evaluate))


def _claims(args: argparse.Namespace) -> None:
    _check(args)
    for package in ("jinja2", "vl_convert", "lm_eval", "scipy", "rich"):
        need(package, "claims", "analysis")
    make_output(args.output, _PAGE, _NUMBERS)
    with lock(args.output / LOCK, f"{args.output} is being filled", "name another --output"):
        if args.runs:
            evidence, words = gather(find(args.runs)), args.evaluate
            folder = args.output / "evaluations"
            files = {run.folder: folder / evaluation_name(run.folder) for run in evidence.runs}
            how = {"runs": ", ".join(map(str, args.runs)), "words for evaluate": shlex.join(words) or "none"}
        else:
            plan = toy.Plan(args.steps or toy.STEPS, args.seeds or toy.SEEDS)
            evidence, words = _toys(args, plan), toy.TASKS
            files = {run.folder: run.folder / "evaluation.json" for run in evidence.runs}
            seeds = f"1 to {plan.seeds}; 1 to {min(toy.FEW_SEEDS, plan.seeds)} for other batches and alphas"
            how = toy.described(plan.steps) | {"seeds": seeds}
        evidence = _evaluated(args, evidence, files, words)
        _write(args, evidence, how)


def _check(args: argparse.Namespace) -> None:
    check_least(args, jobs=1, seeds=1, steps=toy.FEWEST_STEPS)
    if (args.steps or 0) % toy.STEPS_BY:
        raise UserError(
            f"--steps is {args.steps}; it must be a multiple of {toy.STEPS_BY}, so that all batches see the "
            "same number of tokens"
        )
    words = shlex.join(args.evaluate)
    if args.runs:
        for flag in ("steps", "seeds", "data"):
            if (value := getattr(args, flag)) is not None:
                raise UserError(
                    f"--{flag} is {value}, but --runs trains nothing; leave out --{flag} or --runs"
                )
        # evaluate refuses unknown words. Words that change its output are refused here.
        from jreg_megatron.evaluate.__main__ import parser

        given = vars(parser().parse_args(["MODEL", *args.evaluate]))
        usual = {"models": ["MODEL"], "json": None, "csv": None, "seeds": False}
        for name in (name for name, value in usual.items() if given[name] != value):
            what = "a MODEL" if name == "models" else f"--{name}"
            raise UserError(f"{words} behind -- names {what}, which claims sets; leave it out")
    elif args.evaluate:
        raise UserError(
            f"{words} behind -- needs --runs, since all toys are evaluated alike; add it, or leave them out"
        )


def _toys(args: argparse.Namespace, plan: toy.Plan) -> Evidence:
    from jreg_megatron.demo.data import prepare

    if plan.seeds < FEWEST_SEEDS and not args.quiet:
        output.note(f'with fewer than {FEWEST_SEEDS} seeds each verdict is "cannot tell"')
    runs = plan.runs(args.output / "runs")
    data = prepare(args.data or _DATA, vocab_size=toy.VOCABULARY, progress=not args.quiet)
    train_all(runs, data, args.jobs, args.quiet)
    return gather([run.folder for run in runs])


def _evaluated(
    args: argparse.Namespace, evidence: Evidence, files: dict[Path, Path], words: Sequence[str]
) -> Evidence:
    """The evidence with evaluations of all pairs of a baseline and JREG; existing files are reused."""
    pairs = [pair for pair in evidence.pairs.values() if all(run.checkpoints.is_dir() for run in pair)]
    runs = [run for pair in pairs for run in pair]
    done = evaluate_all(runs, files, args.output, words, args.jobs, args.quiet)
    return replace(
        evidence, runs=tuple(replace(run, evaluated=done.get(run.folder)) for run in evidence.runs)
    )


def _write(args: argparse.Namespace, evidence: Evidence, how: dict[str, str]) -> None:
    from jreg_megatron.claims.page import document, page
    from jreg_megatron.claims.rules import claims

    judged = claims(evidence)
    found = document(evidence, judged, about(FORMAT, how))
    output.write_json(str(args.output / _NUMBERS), found)
    output.write_text(str(args.output / _PAGE), page(found, evidence))
    if args.quiet:
        return
    for text in evidence.notes:
        output.note(text)
    rows = [(key, claim.text, claim.verdict) for key, claim in judged.items()]
    columns = ("", "claim", "verdict")
    output.print_table("The paper's claims", columns, rows, words=columns)
    print(f"Page: {args.output / _PAGE}\nNumbers: {args.output / _NUMBERS}")


if __name__ == "__main__":
    main()
