"""``jreg-megatron compare``: train small models in each way on paired seeds, and compare them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from jreg_megatron.claims import experiment, toy
from jreg_megatron.compare.ways import FEWEST_STEPS, SEEDS, STEPS, WAYS, Plan
from jreg_megatron.demo.training import teach, train_all
from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import user_errors_exit

NAME = "compare"
WORDS = (*toy.TASKS, "--parts", "tasks,read-out")
"""For ``evaluate``."""
_EPILOG = """
It trains on this machine's CPU, on the same text in the same order for each way. After a kill, start the
same command again: it resumes.

  jreg-megatron compare
  jreg-megatron compare --ways jreg slowqk --seeds 3 --output runs/try

Exit status: 0 the ways are compared; 2 a mistake in the command, or a run that failed.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Train the missing runs, and compare all."""
    with user_errors_exit(experiment.INTERRUPTED):
        args = _arguments(argv)
        with experiment.filling(args, NAME):
            _compare(args, Plan(args.output / "runs", args.steps or STEPS, args.seeds or SEEDS, args.ways))


def _arguments(argv: Sequence[str] | None) -> Namespace:
    ways = {name: way.text for name, way in WAYS.items() if way.against}
    width = max(map(len, ways))
    parser = experiment.parser(
        NAME,
        STEPS,
        FEWEST_STEPS,
        SEEDS,
        usage="%(prog)s [OPTIONS]",
        description="Train small models on real text: baselines, JREG and each other method. Writes one page "
        "and one JSON file.",
        epilog="ways:\n" + "".join(f"  {name:{width}}  {text}\n" for name, text in ways.items()) + _EPILOG,
    )
    some = "only these methods, and their baselines (default: all)"
    parser.add_argument("--ways", help=some, nargs="+", choices=ways, metavar="WAY", default=list(ways))
    return parser.parse_args(argv)


def _compare(args: Namespace, plan: Plan) -> None:
    from jreg_megatron.claims.rules import FEWEST_SEEDS
    from jreg_megatron.compare.page import document, page
    from jreg_megatron.compare.toys import read_toys

    if plan.seeds < FEWEST_SEEDS and not args.quiet:
        output.note(f"with fewer than {FEWEST_SEEDS} seeds a difference is hardly more than chance")
    _train(args, plan)
    toys, teacher, notes = read_toys(plan)
    runs = [run for by_seed in toys.values() for run in by_seed.values()]
    done = experiment.evaluate_all(args, runs, WORDS)
    toys = {
        way: {seed: replace(run, evaluated=done[run.folder]) for seed, run in by_seed.items()}
        for way, by_seed in toys.items()
    }
    how = toy.described(plan.steps) | {"seeds": f"1 to {plan.seeds}", "jobs": f"{args.jobs} at a time"}
    found = document(plan, toys, teacher, notes, experiment.about(NAME, how))
    loss = found["families"]["loss"]["ways"]
    rows = [(way, f"{of['found']:+.4f}" if of["by_seed"] else "", of["verdict"]) for way, of in loss.items()]
    columns = ("way", "validation loss minus its baseline's", "verdict")
    shown, title = page(found, toys, plan.against), "The methods, side by side"
    experiment.put_out(args, NAME, found, shown, title=title, columns=columns, rows=rows)


def _train(args: Namespace, plan: Plan) -> None:
    from jreg_megatron.demo.data import prepare

    data = prepare(args.data or experiment.DATA, vocab_size=toy.VOCABULARY, progress=not args.quiet)
    if plan.needs_teacher:
        teach(plan.teacher, data, args.quiet)
    train_all([run for _, _, run in plan.runs], data, args.jobs, args.quiet)


if __name__ == "__main__":
    main()
