"""Outputs of commands: files such as JSON and CSV, written atomically; tables and notes on the console."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jreg_megatron.runtime.errors import UserError

STDOUT = "-"

_LONGEST_NAME = 255


def add_output_arguments(parser: ArgumentParser, csv: bool = True) -> None:
    """Define ``--json``, ``--csv`` and ``--quiet``."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write all figures as JSON; - for standard output")
    if csv:
        group.add_argument("--csv", metavar="FILE", help="write them as CSV; - for standard output")
    group.add_argument("--quiet", action="store_true", help="no table, no progress bar, no notes")


def check_outputs(make_folders: bool = False, /, **paths: str | None) -> None:
    """Refuse at the start files that could not be written at the end. ``paths`` are by flag.

    With ``make_folders``, missing folders are created.

    Raises:
        UserError: naming the flag.
    """
    given = {flag: path for flag, path in paths.items() if path is not None}
    for flag, path in given.items():
        if path == STDOUT:
            continue
        place = Path(path)
        folder = place.absolute().parent
        if len(os.fsencode(place.name)) > _LONGEST_NAME:
            raise UserError(f"--{flag} has a file name of {len(place.name)} characters; give a shorter one")
        if place.is_dir():
            raise UserError(f"--{flag} is {path}, which is a folder; add a file name to it")
        if make_folders:
            with suppress(OSError):  # refused below
                folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise UserError(f"--{flag} is {path}, but there is no folder {folder}; make it or name another")
        if not os.access(folder, os.W_OK):
            raise UserError(f"--{flag} is {path}, but {folder} cannot be written to; name another folder")
    if len(set(given.values())) < len(given):
        raise UserError(f"{' and '.join('--' + flag for flag in given)} name one file; name one for each")


def console(args: Namespace) -> Any:
    """The console for tables: standard output, or standard error if ``--json -`` or ``--csv -`` is given."""
    from rich.console import Console

    # No markup: "[rank1]" is a rank's name.
    return Console(markup=False, stderr=STDOUT in (args.json, getattr(args, "csv", None)))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str = "",
    *,
    console: Any = None,
    words: Container[str] = (),
    box: Any = None,
    bold: Container[int] = (),
) -> None:
    """Print a table of texts.

    Args:
        title, caption: texts above and below the table.
        columns: names of the columns. The first column and those in ``words`` are left-aligned texts; the
            others are right-aligned numbers.
        rows: the cells.
        console: a rich console; by default standard output.
        box: a rich box, which draws the lines.
        bold: indices of bold rows, from 0.
    """
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    made.box = box or HEAVY_HEAD
    for number, column in enumerate(columns):
        is_number = number > 0 and column not in words
        made.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for number, row in enumerate(rows):
        made.add_row(*map(str, row), style="bold" if number in bold else None)
    (console or Console(markup=False)).print(made)


def note(text: str) -> None:
    """Print a line on standard error without breaking a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"Note: {text}", file=sys.stderr)


def put_out(
    args: Namespace,
    document: Any,
    rows: Sequence[dict[str, Any]],
    show: Callable[[Any], None] | None = None,
) -> None:
    """Write the outputs of :func:`add_output_arguments`.

    Without ``show``, write the files. A command calls this again whenever it has more results. With ``show``,
    at the end, write only to standard output: the document or the rows, and then, unless ``--quiet``, the
    output of ``show``.
    """
    try:
        if args.json is not None and (args.json == STDOUT) == bool(show):
            write_json(args.json, document)
    finally:  # a full disk may stop only one of the two
        if args.csv is not None and (args.csv == STDOUT) == bool(show):
            write_csv(args.csv, rows)
    if show and not args.quiet:
        show(console(args))


def write_json(path: str, document: Any) -> None:
    """Write a document as JSON to a file, or to standard output for ``-``.

    Raises:
        ValueError: if it holds NaN or Infinity, which JSON cannot hold.
    """
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_csv(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV to a file, or to standard output for ``-``. Their keys are the columns."""
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: str, text: str) -> None:
    """Write a text as :func:`write_bytes` does; ``-`` is standard output."""
    if path != STDOUT:
        write_bytes(path, text.encode())
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. At exit Python would flush, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise UserError(f"standard output cannot be written ({error.strerror}); write to a file") from error


def write_bytes(path: str, data: bytes) -> None:
    """Write a file atomically. For a link, its target is replaced. A pipe or a device is written directly.

    Raises:
        UserError: if the disk is full or the file cannot be written.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            Path(path).write_bytes(data)
            return
        place = Path(os.path.realpath(path))
        temporary = place.with_name(f".{place.name}-{os.getpid()}"[-_LONGEST_NAME:])
        try:
            temporary.write_bytes(data)
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room or name another file"
        ) from error


def document(kind: str, *packages: str, **content: Any) -> dict[str, Any]:
    """A JSON document: its format, the format's version, the versions of ``packages``, and ``content``."""
    head = {"format": f"jreg_megatron {kind}", "version": 1, "versions": versions(*packages)}
    return head | content


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package and of those ``packages`` that are installed."""
    found = {}
    for package in ("jreg_megatron", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
