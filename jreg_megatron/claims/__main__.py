"""``jreg-megatron claims``: judge the paper's six claims on toys that it trains, or on your own runs."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jreg_megatron.claims import experiment, toy
from jreg_megatron.demo.training import train_all
from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.flags import split_at

if TYPE_CHECKING:
    from jreg_megatron.claims.evidence import Evidence

NAME = "claims"
_EPILOG = """\
Without --runs it trains toys on this machine's CPU: baselines and JREG at the paper's lambda 1 and alpha 1
with ten seeds, other alphas and batches with three. After a kill, start the same command again: it resumes.
With --runs it judges finished runs of any size by the same rules. Words after -- go to jreg-megatron
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
    with user_errors_exit(experiment.INTERRUPTED):
        _claims(_arguments(sys.argv[1:] if argv is None else argv))


def _arguments(argv: Sequence[str]) -> Namespace:
    parser = experiment.parser(
        NAME,
        toy.STEPS,
        toy.FEWEST_STEPS,
        toy.SEEDS,
        usage="%(prog)s [OPTIONS] [--runs FOLDER... [-- WORDS FOR EVALUATE]]",
        description="Judge the six claims of JREG's paper. Writes one page and one JSON file.",
        epilog=_EPILOG,
    )
    runs = "judge these finished runs, train none: run folders, or folders of runs such as a sweep's"
    parser.add_argument("--runs", help=runs, nargs="+", type=Path, metavar="FOLDER")
    words, evaluate = split_at("--", argv)
    args = parser.parse_args(words, Namespace(evaluate=evaluate))
    _check(args)
    return args


def _check(args: Namespace) -> None:
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
            raise UserError(f"{words} after -- names {what}, which claims sets; leave it out")
    elif args.evaluate:
        raise UserError(
            f"{words} after -- needs --runs, since all toys are evaluated in one way; add --runs, or leave "
            "it out"
        )


def _claims(args: Namespace) -> None:
    with experiment.filling(args, NAME):
        if args.runs:
            from jreg_megatron.claims.evidence import find, gather

            evidence, words = gather(find(args.runs)), args.evaluate
            how = {"runs": ", ".join(map(str, args.runs)), "words for evaluate": shlex.join(words) or "none"}
        else:
            evidence, how = _toys(args, args.steps or toy.STEPS, args.seeds or toy.SEEDS)
            words = toy.TASKS
        pairs = [pair for pair in evidence.pairs.values() if all(run.checkpoints.is_dir() for run in pair)]
        done = experiment.evaluate_all(args, [run for pair in pairs for run in pair], words)
        runs = tuple(replace(run, evaluated=done.get(run.folder)) for run in evidence.runs)
        _judge(args, replace(evidence, runs=runs), how)


def _toys(args: Namespace, steps: int, seeds: int) -> tuple[Evidence, dict[str, str]]:
    """The trained toys, and how they were trained."""
    from jreg_megatron.claims.evidence import gather
    from jreg_megatron.claims.rules import FEWEST_SEEDS
    from jreg_megatron.demo.data import prepare

    if seeds < FEWEST_SEEDS and not args.quiet:
        output.note(f'with fewer than {FEWEST_SEEDS} seeds each verdict is "cannot tell"')
    runs = toy.runs(args.output / "runs", steps, seeds)
    data = prepare(args.data or experiment.DATA, vocab_size=toy.VOCABULARY, progress=not args.quiet)
    train_all(runs, data, args.jobs, args.quiet)
    few = f"1 to {seeds}; 1 to {min(toy.FEW_SEEDS, seeds)} for other batches and alphas"
    return gather([run.folder for run in runs]), toy.described(steps) | {"seeds": few}


def _judge(args: Namespace, evidence: Evidence, how: dict[str, str]) -> None:
    from jreg_megatron.claims.page import document, page
    from jreg_megatron.claims.rules import claims

    judged = claims(evidence)
    found = document(evidence, judged, experiment.about(NAME, how))
    rows = [(key, claim.text, claim.verdict) for key, claim in judged.items()]
    shown = page(found, evidence)
    columns = ("", "claim", "verdict")
    experiment.put_out(args, NAME, found, shown, title="The paper's claims", columns=columns, rows=rows)


if __name__ == "__main__":
    main()
