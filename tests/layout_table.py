"""Writes the table of layouts in ``jreg_megatron/selftest/README.md``.

They are those that the tests compare, with the largest errors seen.
"""

from __future__ import annotations

import re
from importlib.metadata import version

import readme
from layout_rows import rows
from layout_step import on_ranks

NAME = "layouts"


def listed_layouts() -> list[str]:
    """The layouts' names in that table."""
    return re.findall(r"^\| ([^|]+?) \| \d+ \|", readme.read(NAME), re.MULTILINE)


def main() -> None:
    """Run every layout and write the table."""
    table = [["layout", "ranks", "losses", "gradient", "gradient allowed"]]
    for layout in rows():
        found, limit = on_ranks(layout)
        assert not found.exceeds(limit), f"{layout.name}: {found} exceeds {limit}"
        numbers = (f"{number:.0e}" for number in (found.losses, found.gradient, limit.gradient))
        table.append([layout.name, str(layout.world_size), *numbers])
        print(*table[-1], sep=" | ", flush=True)
    readme.write(NAME, table, f"Megatron-Core {version('megatron-core')}")


if __name__ == "__main__":
    main()
