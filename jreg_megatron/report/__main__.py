"""``jreg-megatron report``: one page of measurements, evaluations and training runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jreg_megatron.paper import SIZES
from jreg_megatron.runtime.documents import printable
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.imports import need
from jreg_megatron.runtime.output import STDOUT, check_outputs, write_bytes, write_text

if TYPE_CHECKING:
    from jreg_megatron.report.page import Section

_EPILOG = """\
INPUT is one or more of:
  FILE.json      a file of measure --json or evaluate --json
  summary.json   a file of the demo or of a sweep
  a folder       TensorBoard files of a training run, or a folder with tensorboard/ or summary.json

Several steps of one model are drawn over training if they were measured in the same way. A training run
and a model are one entry if they have the same name and the model's checkpoints are in the run's folder
or in its --save. The page opens in any browser without a network, and it can be printed. Exit status: 0 if
the page was written; 2 for a mistake in the command or the input.
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
    parser.add_argument("--figures", metavar="DIR", help="folder for each figure as SVG and as PNG")
    parser.add_argument(
        "--paper",
        type=str.lower,
        choices=SIZES,
        help="also draw the paper's displacement per layer of this model, for the baseline and alpha 1",
    )
    parser.add_argument("--title", default="The last-layer jump", help="heading (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no notes, only errors")
    return parser.parse_args()


def _report(args: argparse.Namespace) -> None:
    for package in ("jinja2", "vl_convert"):
        need(package, "report", "analysis")
    from jreg_megatron.report.compose import compose
    from jreg_megatron.report.page import render
    from jreg_megatron.report.paper_profiles import PaperProfiles
    from jreg_megatron.report.reading import files_read, read

    paths = [Path(text) for text in args.inputs]
    output, figures = printable(args.output), printable(args.figures or "")
    check_outputs(output=args.output)
    inputs = files_read(paths)
    if args.output != STDOUT and os.path.realpath(args.output) in inputs:
        raise UserError(f"--output is {output}, which is an input; name another file")
    try:
        if args.figures:
            Path(args.figures).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--figures is {figures}, which cannot be made: {error.strerror}") from error
    subtitle, sections = compose(read(paths), PaperProfiles(args.paper) if args.paper else None)
    pictures = {Path(args.figures) / name: data for name, data in _drawn(sections)} if args.figures else {}
    page = render(printable(args.title), subtitle, sections)
    for path, data in pictures.items():
        write_bytes(str(path), data)
    write_text(args.output, page)
    if not args.quiet and args.output != STDOUT:
        print(f"Page: {output}")
        if pictures:
            print(f"Pictures: {len(pictures) // 2}, each as SVG and PNG, in {figures}")


def _drawn(sections: Sequence[Section]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the picture files: one per figure and choice of last layer's state or part."""
    from jreg_megatron.report.charts import pictures

    for figure in (figure for section in sections for figure in section.figures):
        of = next((choice for choice in figure.choices if choice.field in ("state", "part")), None)
        for value, words in (of.options if of else {"": ""}).items():
            name = f"{figure.name}_{value.lower().replace(' ', '_')}" if of else figure.name
            title = f"{figure.title} ({words})" if of else figure.title
            chosen = {of.field: value} if of else {}
            svg, png = pictures(title, [[("", figure.chart)]], figure.convention, chosen=chosen)
            yield f"{name}.svg", svg.encode()
            yield f"{name}.png", png


if __name__ == "__main__":
    main()
