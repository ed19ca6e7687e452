"""``jreg-megatron report``: one page of measurements, evaluations and training runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jreg_megatron.paper import SIZES
from jreg_megatron.report.check import printable
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.extras import need
from jreg_megatron.runtime.output import STDOUT, check_outputs, write_text

if TYPE_CHECKING:
    from jreg_megatron.report.figures import Figure

_EPILOG = """\
An INPUT is one of these, in any number and mixture:
  FILE.json      what measure --json or evaluate --json wrote
  summary.json   what the demo or a sweep wrote
  a folder       TensorBoard files of a training run, or a folder with tensorboard/ or summary.json in it

Entries of one name that differ in their step are shown over training, if they were measured alike. A
training run joins the model of its name whose checkpoints lie in its folder or are its --save. The page
opens in any browser, needs no network and can be printed. Exit status: 0 written, 2 a mistake in the
command or the input.
"""


def main() -> None:
    """Write the page."""
    with user_errors_exit("nothing was written"):
        _report(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jreg-megatron report",
        description="One self-contained HTML page of measurements, evaluations and training runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a JSON file or a folder, see below")
    parser.add_argument(
        "--output", metavar="FILE", default="report.html", help="the page (default: %(default)s)"
    )
    parser.add_argument("--figures", metavar="DIR", help="write each figure there as SVG and as PNG too")
    parser.add_argument(
        "--paper",
        type=str.lower,
        choices=SIZES,
        help="lay the paper's displacement per layer of this model, its baseline's and alpha 1's, under the "
        "measured ones",
    )
    parser.add_argument("--title", default="The last-layer jump", help="heading (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no notes, only errors")
    return parser.parse_args()


def _report(args: argparse.Namespace) -> None:
    for package in ("altair", "jinja2", "vl_convert"):
        need(package, "report", "analysis")
    from jreg_megatron.report.reading import files_read, read

    paths = [Path(text) for text in args.inputs]
    with _named(f"--output is {printable(args.output)}"):
        check_outputs(output=args.output)
    inputs = files_read(paths)
    if args.output != STDOUT and os.path.realpath(args.output) in inputs:
        raise UserError(f"--output is {printable(args.output)}, which is an input; name another file")
    folder = _made(args.figures) if args.figures else None
    from jreg_megatron.report.compose import compose
    from jreg_megatron.report.page import render
    from jreg_megatron.report.paper_profiles import PaperProfiles

    report = compose(read(paths), PaperProfiles(args.paper) if args.paper else None)
    pictures = {} if folder is None else {folder / name: data for name, data in _drawn(report.figures)}
    for path in pictures:
        if os.path.isdir(path) or os.path.realpath(path) in inputs:
            what = "a folder" if os.path.isdir(path) else "an input"
            raise UserError(
                f"--figures is {printable(args.figures)}, where {path.name} is {what}; name another folder"
            )
    page = render(printable(args.title), report.subtitle, report.sections)
    with _named(f"--output is {printable(args.output)}"):
        write_text(args.output, page)
    for path, data in pictures.items():
        with _named(f"--figures is {printable(args.figures)}"):
            _write(path, data)
    if not args.quiet and args.output != STDOUT:
        print(f"Page: {printable(args.output)}")
        if pictures:
            print(f"Pictures: {len(pictures) // 2}, each as SVG and PNG, in {printable(args.figures)}")


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Name the setting whose file the system refused."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{setting}, which cannot be written: {error.strerror}; name another") from error


def _made(text: str) -> Path:
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--figures is {printable(text)}, which cannot be made: {error.strerror}") from error
    return folder


def _drawn(figures: Sequence[Figure]) -> Iterator[tuple[str, bytes]]:
    """Each figure, one for each choice of the last layer, as files with their names."""
    for figure in figures:
        states = next((choice.options for choice in figure.choices if choice.field == "state"), None)
        for state, words in (states or {"": ""}).items():
            name = f"{figure.name}_{state}" if states else figure.name
            title = f"{figure.title} ({words})" if states else figure.title
            svg, png = figure.chart.pictures(title, figure.convention, **({"state": state} if states else {}))
            yield f"{name}.svg", svg.encode()
            yield f"{name}.png", png


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
