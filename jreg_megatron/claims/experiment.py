"""What ``claims`` and ``compare`` share: their arguments, output folder, evaluations and result."""

from __future__ import annotations

import os
import platform
import shlex
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jreg_megatron.runtime import output
from jreg_megatron.runtime.documents import checked, read_json
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import Parser, count
from jreg_megatron.runtime.imports import need
from jreg_megatron.runtime.lock import lock
from jreg_megatron.runtime.programs import each, progress, run_logged

if TYPE_CHECKING:  # they import torch, and --help must not
    from jreg_megatron.claims.evidence import Trained
    from jreg_megatron.report.inputs import Evaluated

DATA = Path("runs/data")
INTERRUPTED = "finished runs are kept; to resume, start the same command again"
_LOCK, _WORDS = ".lock", "evaluations/words.json"
"""The file of the words of the evaluations."""


def parser(name: str, steps: int, fewest_steps: int, seeds: int, **about: Any) -> Parser:
    """A parser with the common arguments. Those of the toys are None if they are not given.

    Args:
        name: of the command, of its folder, page and file of numbers.
        steps, seeds: the defaults, for the help.
        about: usage, description and epilog.
    """
    made = Parser(prog=f"jreg-megatron {name}", formatter_class=RawDescriptionHelpFormatter, **about)
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    place = f"folder of runs, evaluations, {name}.html and {name}.json (default: %(default)s)"
    made.add_argument("--output", help=place, default=Path("runs", name), **folder)
    jobs = "processes at a time (default: %(default)s)"
    made.add_argument("--jobs", help=jobs, default=2, type=count("--jobs"), metavar="N")
    made.add_argument("--quiet", action="store_true", help="no progress bar, no table, no notes")
    toys = made.add_argument_group("toys")
    length = f"training steps (default: {steps})"
    toys.add_argument("--steps", help=length, type=count("--steps", fewest_steps), metavar="N")
    some = f"train seeds 1 to N (default: {seeds})"
    toys.add_argument("--seeds", help=some, type=count("--seeds"), metavar="N")
    toys.add_argument("--data", help=f"folder of the text (default: {DATA})", **folder)
    return made


@contextmanager
def filling(args: Namespace, name: str) -> Iterator[None]:
    """Make and lock the output folder of the command ``name``.

    Raises:
        UserError: if a package is missing, the folder cannot be written, or another process fills it.
    """
    for package in ("jinja2", "vl_convert", "lm_eval", "scipy"):
        need(package, name, "analysis")
    for file in (f"{name}.html", f"{name}.json", _LOCK, _WORDS):
        if (args.output / file).is_dir():
            raise UserError(f"--output is {args.output}, where {file} is a folder; name another")
        output.check_outputs(True, output=str(args.output / file))
    with lock(args.output / _LOCK, f"{args.output} is being filled", "name another --output"):
        yield


def evaluate_all(args: Namespace, runs: Sequence[Trained], words: Sequence[str]) -> dict[Path, Evaluated]:
    """Evaluate the runs that are not evaluated yet; returns all evaluations, by run folder.

    ``words`` are for ``jreg-megatron evaluate``. The evaluation of a toy is in its folder, so that it goes
    when the toy is trained again; the others are in the output folder.

    Raises:
        UserError: if earlier evaluations had other words, a file is of another model, or one fails.
    """
    from jreg_megatron.claims.evidence import evaluation, evaluation_name

    asked = args.output / _WORDS
    files = {
        run.folder: run.folder / "evaluation.json"
        if run.folder.is_relative_to(args.output)
        else asked.with_name(evaluation_name(run.folder))
        for run in runs
    }
    done = {run.folder: evaluation(run, files[run.folder]) for run in runs if files[run.folder].exists()}
    if asked.exists() and done:
        before = checked(asked, list[str], read_json(asked))
        if before != list(words):
            raise UserError(
                f"--output is {args.output}, where evaluations were made with the options "
                f"'{shlex.join(before)}', not '{shlex.join(words)}'; name another --output, or delete them"
            )
    output.write_json(str(asked), list(words))

    async def evaluate(run: Trained) -> None:
        file = files[run.folder]
        # A file that is cut off by a failure does not count.
        part = file.with_name(f".{file.name}")
        command = ["-m", "jreg_megatron.evaluate", f"model={run.checkpoints}", "--lens", "--quiet"]
        command += [*words, "--json", str(part)]
        await run_logged(f"evaluating {run.folder}", command, file.with_suffix(".log"), lambda _: None)
        os.replace(part, file)
        done[run.folder] = evaluation(run, file)
        bar.update()

    left = [run for run in runs if run.folder not in done]
    with progress("evaluating", "models", len(runs), len(left), args.quiet) as bar:
        each(left, evaluate, args.jobs)
    return done


def about(name: str, how: Mapping[str, str]) -> dict[str, Any]:
    """The head of a command's JSON document: format, versions, and how it was made, on which machine."""
    machine = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores"
    machine += f", Python {platform.python_version()}"
    how = {**how, "finished": date.today().isoformat(), "machine": machine}
    return output.document(name, "megatron-core", "torch", "lm_eval", "scipy", how=how)


def put_out(
    args: Namespace,
    name: str,
    document: Mapping[str, Any],
    page: str,
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> None:
    """Write a command's document and page; print the document's notes and a table."""
    numbers, shown = (str(args.output / f"{name}.{ending}") for ending in ("json", "html"))
    output.write_json(numbers, document)
    output.write_text(shown, page)
    if not args.quiet:
        for text in document["notes"]:
            output.note(text)
        output.print_table(title, columns, rows, words=columns)
        print(f"Page: {shown}\nNumbers: {numbers}")
