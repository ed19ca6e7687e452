"""``jreg-megatron report``: one page of measurements, evaluations and training runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jreg_megatron.errors import UserError, user_errors_exit
from jreg_megatron.extras import need
from jreg_megatron.output import check_outputs, write_text
from jreg_megatron.report.check import printable

if TYPE_CHECKING:
    from jreg_megatron.report.figures import Figure

_EPILOG = """\
An INPUT is one of these, in any number and mixture:
  FILE.json      what measure --json or evaluate --json wrote
  summary.json   what the demo or a sweep wrote
  a folder       TensorBoard files of a training run, or a folder with tensorboard/ or summary.json in it

Entries of one name that differ in their step are shown over training. The page opens in any browser, needs
no network and can be printed. Exit status: 0 written, 2 a mistake in the command or the input.
"""


def main() -> None:
    """Write the page."""
    with user_errors_exit():
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
    parser.add_argument("--title", default="The last-layer jump", help="heading (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no notes, only errors")
    return parser.parse_args()


def _report(args: argparse.Namespace) -> None:
    check_outputs(output=args.output)
    folder = _made(args.figures) if args.figures else None
    for package in ("altair", "jinja2", "vl_convert"):
        need(package, "report", "analysis")
    from jreg_megatron.report.compose import compose
    from jreg_megatron.report.page import render
    from jreg_megatron.report.reading import read

    report = compose(read([Path(text) for text in args.inputs]))
    write_text(args.output, render(printable(args.title), report.subtitle, report.sections))
    pictures = _write_pictures(report.figures, folder) if folder else 0
    if not args.quiet:
        print(f"Page: {printable(args.output)}")
        if pictures:
            print(f"Pictures: {pictures}, each as SVG and PNG, in {printable(args.figures)}")


def _made(text: str) -> Path:
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--figures is {printable(text)}, which cannot be made: {error.strerror}") from error
    return folder


def _write_pictures(figures: Sequence[Figure], folder: Path) -> int:
    """Write each figure, one for each choice of the last layer; returns how many."""
    count = 0
    for figure in figures:
        states = next((choice.options for choice in figure.choices if choice.field == "state"), None)
        for state, words in (states or {"": ""}).items():
            name = f"{figure.name}_{state}" if states else figure.name
            title = f"{figure.title} ({words})" if states else figure.title
            svg, png = figure.chart.pictures(title, **({"state": state} if states else {}))
            write_text(str(folder / f"{name}.svg"), svg)
            temporary = folder / f".{name}.png-{os.getpid()}"
            temporary.write_bytes(png)
            temporary.replace(folder / f"{name}.png")
            count += 1
    return count


if __name__ == "__main__":
    main()
