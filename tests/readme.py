"""The parts of README files that a command writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {
    "settings": ROOT / "README.md",
    "support": ROOT / "jreg_megatron" / "selftest" / "README.md",
    "refusals": ROOT / "jreg_megatron" / "selftest" / "README.md",
    "layouts": ROOT / "jreg_megatron" / "selftest" / "README.md",
    "ways in": ROOT / "patches" / "README.md",
}
"""The file of each part."""


def _part(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: written by .* -->\n)(.*)(<!-- end of {name} -->)", re.DOTALL)


def read(name: str) -> str:
    """A part's text."""
    found = _part(name).search(FILES[name].read_text())
    assert found, f"{FILES[name]} has no part {name}"
    return found[2]


def write(name: str, rows: Sequence[Sequence[str]], where: str) -> None:
    """Write a part as a table, the first row its head, and below it where and when it was measured."""
    head, *body = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    with_torch = f"{where}, torch {version('torch')}, CPU with gloo, {datetime.now(UTC):%Y-%m-%d}."
    replace(name, "\n".join(["", *lines, "", with_torch, "", ""]))


def replace(name: str, text: str) -> None:
    """Write a part."""
    file = FILES[name]
    file.write_text(_part(name).sub(lambda part: part[1] + text + part[3], file.read_text()))
