"""``jreg-megatron evaluate``: tasks, the read-out of each layer, and the comparison of two models."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jreg_megatron.data.texts import (
    Text,
    TextFiles,
    add_text_arguments,
    describe,
    texts_of,
    training_speeches,
)
from jreg_megatron.decoder.load import add_model_arguments, check_model_arguments, load
from jreg_megatron.decoder.reference import Reference, find_models
from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.flags import check_least
from jreg_megatron.runtime.imports import need

if TYPE_CHECKING:
    from jreg_megatron.evaluate.evaluation import Evaluation

USUAL_PARTS = ("tasks", "read-out", "layer-drop")
PARTS = (*USUAL_PARTS, "depth")

_EXAMPLES = """examples:
  jreg-megatron evaluate Qwen/Qwen3-0.6B --tasks paper --device cuda --dtype bfloat16
  jreg-megatron evaluate baseline=runs/a jreg=runs/b --json evaluation.json
  jreg-megatron evaluate runs/a runs/b --parts read-out --text held_out.jsonl --max-tokens 2048
  jreg-megatron evaluate --seeds seed1.json seed2.json seed3.json
  jreg-megatron evaluate baseline=runs/a jreg=runs/b --parts read-out,layer-drop --lens
  jreg-megatron evaluate runs/a --parts depth --max-tokens 128 --json depth.json
  jreg-megatron evaluate runs/a --tasks my_task --include-path my_tasks/ --limit 100

Two models are compared on the same samples and texts: bootstrap intervals, McNemar's exact test for
accuracies, a permutation test for other figures. p-values are adjusted for several tasks or layers (Benjamini
and Hochberg). Fewer than 6 samples or texts get no interval and no test. jreg-megatron report draws the
--json file.
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2 and one line for a user's mistake, 130 for Ctrl-C.
    """
    args = parser().parse_args(argv)
    with user_errors_exit("finished parts are in --json and --csv, if they were given"):
        _run(args)


def _run(args: Namespace) -> None:
    if args.seeds:
        output.check_outputs(json=args.json, csv=args.csv)
        need("scipy", "comparing over seeds", "analysis")
        from jreg_megatron.evaluate.seeds import compare_seeds, csv_rows, print_tables

        found = output.document("evaluation over seeds", "scipy", **compare_seeds(args.models))
        _put_out(args, found, csv_rows, print_tables)
        return
    references = _checked(args)
    texts = [] if args.parts == ["tasks"] and args.lens is None else texts_of(args)
    lens_texts: Iterable[Text] = TextFiles.find(args.lens, args.key) if args.lens else []
    if args.lens == []:
        lens_texts = [text for text in training_speeches() if text.name not in (args.speeches or ())]
    check_model_arguments(args)
    done: list[Evaluation] = []
    with TemporaryDirectory(prefix="jreg_megatron-tasks-") as folder:
        tasks: dict[str, Any] = {}
        if "tasks" in args.parts:
            from jreg_megatron.evaluate.tasks import load_tasks

            tasks = load_tasks(args.tasks, args.include_path, Path(folder))
        from jreg_megatron.evaluate.evaluation import evaluate

        try:
            for number, reference in enumerate(references):
                decoder = load(reference, args)
                for so_far in evaluate(decoder, args, tasks=tasks, texts=texts, lens_texts=lens_texts):
                    done[number:] = [so_far]
        finally:
            if done:  # even if a later model or part fails: it may have taken hours
                _write(args, done)


def _checked(args: Namespace) -> list[Reference]:
    output.check_outputs(json=args.json, csv=args.csv)
    if not args.parts:
        raise UserError(f"--parts is empty; the parts are {', '.join(PARTS)}")
    if not args.tasks:
        raise UserError("--tasks is empty; give speeches, paper or a task of the harness")
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise UserError(f"--parts names {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if args.max_tokens < 0 or args.max_tokens == 1:
        raise UserError(f"--max-tokens is {args.max_tokens}; it must be at least 2, or 0 for whole texts")
    if args.lens == [] and args.text:
        raise UserError("--lens has no texts, and those of --text are for the test; give others: --lens FILE")
    check_least(args, limit=1)
    return find_models(args.models)


def _write(args: Namespace, done: list[Evaluation]) -> None:
    from jreg_megatron.evaluate.evaluation import document
    from jreg_megatron.evaluate.table import csv_rows, print_tables

    packages = ("torch", "transformers", "megatron-core", "lm_eval", "scipy")
    limits = {"limit": args.limit, "max_tokens": args.max_tokens or None}
    found = output.document("evaluation", *packages, **limits, **document(done, describe(args)))
    _put_out(args, found, csv_rows, print_tables)


def _put_out(args: Namespace, found: dict[str, Any], csv_rows: Any, show: Any) -> None:
    rows = list(csv_rows(found))
    output.put_out(args, found, rows)
    output.put_out(args, found, rows, lambda console: show(console, found))


def parser() -> ArgumentParser:
    """The command's parser."""
    parser = ArgumentParser(
        prog="jreg-megatron evaluate",
        description="Evaluate models: zero-shot tasks, the loss of each layer read out through final norm "
        "and head, and the loss without each layer. Two models are compared.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    seeds = (
        "compare over training seeds. Then each MODEL is a --json file of one seed, with its baseline and "
        "its JREG on the paper's tasks. Prints their difference over seeds, the paper's one-sided t-test, "
        "a 95%% interval and the test's power, with and without BoolQ"
    )
    parser.add_argument("--seeds", action="store_true", help=seeds)
    names: dict[str, Any] = {"type": lambda text: [name.strip() for name in text.split(",") if name.strip()]}
    parts = (
        f"run these parts: {', '.join(PARTS)} (default: {', '.join(USUAL_PARTS)}). layer-drop runs the model "
        "once for each layer, and depth runs it twice for each. depth measures the distance of each layer's "
        "read-out from the output, the effect of a skipped layer on later layers and on the output, and "
        "whether a state points to its own token or to the next one"
    )
    parser.add_argument("--parts", **names, default=list(USUAL_PARTS), metavar="PART,...", help=parts)
    group = parser.add_argument_group("tasks, by lm-evaluation-harness")
    tasks = (
        "speeches (default): small tasks made of held-out speeches; they need no network and are not a "
        "public benchmark. paper: the nine tasks of JREG's paper, zero-shot, from the Hugging Face hub: "
        "ARC-easy, BoolQ, HellaSwag, LAMBADA (lambada_openai), PIQA, RACE, SocialIQA, SciQ and SWAG, with "
        "their mean, and the mean without BoolQ. Or any task or group of the harness"
    )
    group.add_argument("--tasks", **names, default=["speeches"], metavar="TASK,...", help=tasks)
    limit = "run the first N samples of each task (default: all)"
    group.add_argument("--limit", type=int, metavar="N", help=limit)
    own: dict[str, Any] = {"action": "append", "default": [], "metavar": "FOLDER"}
    group.add_argument("--include-path", **own, help="a folder of your own task files; can be repeated")
    text, _ = add_text_arguments(parser)
    lens = (
        "also read each layer out through a lens: an affine map of its states to the last layer's states, "
        "fitted by least squares on these texts (default: the other speeches)"
    )
    text.add_argument("--lens", nargs="*", metavar="FILE", help=lens)
    add_model_arguments(parser, "+")
    output.add_output_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
