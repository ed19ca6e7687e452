"""Writes the README's table of layouts: those that the tests compare, with the largest errors seen."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from layout_rows import rows
from layout_step import on_ranks

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- layouts: written by make layouts -->", "<!-- end of layouts -->"


def listed_layouts() -> list[str]:
    """The layouts' names in the README."""
    return re.findall(r"^\| ([^|]+?) \| \d+ \|", _table(README.read_text()), re.MULTILINE)


def _table(text: str) -> str:
    return text[text.index(BEGIN) : text.index(END)]


def main() -> None:
    """Run every layout and write the table."""
    lines = ["| layout | ranks | losses | gradient | gradient allowed |", "|---|---|---|---|---|"]
    for layout in rows():
        found, limit = on_ranks(layout)
        assert not found.exceeds(limit), f"{layout.name}: {found} exceeds {limit}"
        numbers = f"{found.losses:.0e} | {found.gradient:.0e} | {limit.gradient:.0e}"
        lines.append(f"| {layout.name} | {layout.world_size} | {numbers} |")
        print(lines[-1], flush=True)
    where = f"Megatron-Core {version('megatron-core')}, torch {version('torch')}, CPU with gloo"
    lines += ["", f"{where}, {datetime.now(UTC):%Y-%m-%d}."]
    text = README.read_text()
    README.write_text(text.replace(_table(text), BEGIN + "\n\n" + "\n".join(lines) + "\n\n"))


if __name__ == "__main__":
    main()
