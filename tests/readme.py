"""The parts of the README that a command writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def _part(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: written by .* -->\n)(.*)(<!-- end of {name} -->)", re.DOTALL)


def read(name: str) -> str:
    """A part's text."""
    found = _part(name).search(README.read_text())
    assert found, f"the README has no part {name}"
    return found[2]


def write(name: str, rows: Sequence[Sequence[str]], where: str) -> None:
    """Write a part as a table, the first row its head, and below it where and when it was measured."""
    head, *body = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    with_torch = f"{where}, torch {version('torch')}, CPU with gloo, {datetime.now(UTC):%Y-%m-%d}."
    text = "\n".join(["", *lines, "", with_torch, "", ""])
    README.write_text(_part(name).sub(lambda part: part[1] + text + part[3], README.read_text()))
