"""Packages of the extra ``data``."""

from __future__ import annotations

from typing import Any

from jreg_megatron.runtime import extras


def need(package: str, purpose: str) -> Any:
    """Import a package that only some inputs need.

    Raises:
        UserError: if it is not installed, with the command that installs it.
    """
    return extras.need(package, purpose, "data")
