"""What a tool leaves for other programs: JSON and CSV files, whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
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


def check_outputs(**paths: str | None) -> None:
    """Refuse, before any time is spent, files that could not be written; ``paths`` by flag.

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
            raise UserError(f"--{flag} names a file of {len(place.name)} letters; name a shorter one")
        if place.is_dir():
            raise UserError(f"--{flag} is {path}, which is a folder; name a file")
        if not folder.is_dir():
            raise UserError(f"--{flag} is {path}, but there is no folder {folder}; make it first")
        if not os.access(folder, os.W_OK):
            raise UserError(f"--{flag} is {path}, but {folder} cannot be written to; name another folder")
    if len(set(given.values())) < len(given):
        raise UserError(f"{' and '.join('--' + flag for flag in given)} name one file; name one for each")


def console(args: Namespace) -> Any:
    """Where tables go: standard output, unless ``--json -`` or ``--csv -`` writes there."""
    from rich.console import Console

    # What is printed is no markup: "[rank1]" is a rank's name.
    return Console(markup=False, stderr=STDOUT in (args.json, getattr(args, "csv", None)))


def note(text: str) -> None:
    """Print a remark on standard error, on a line of its own beside a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"Note: {text}", file=sys.stderr)


def write_json(path: str, document: Any) -> None:
    """Write a document as JSON to a file, or to standard output for ``-``.

    Raises:
        ValueError: if it holds NaN or Infinity, which JSON has no words for.
    """
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_csv(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, whose keys are the columns, as CSV to a file, or to standard output for ``-``."""
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: str, text: str) -> None:
    """Write a text as :func:`write_bytes` does; ``-`` is standard output."""
    if path == STDOUT:
        _write_to_stdout(text)
    else:
        write_bytes(path, text.encode())


def write_bytes(path: str, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    A link stays and what it leads to is written; a pipe or a device is written to as it is.

    Raises:
        UserError: if the disk is full or the place cannot be written to after all.
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


def _write_to_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough, as `head` has. Python would complain again when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise UserError(
            f"standard output takes no more ({error.strerror}); write to a file elsewhere"
        ) from error


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed, this one first."""
    found = {}
    for package in ("jreg_megatron", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
