"""Packages that only some inputs need."""

from __future__ import annotations

import importlib
from typing import Any

from jreg_megatron.errors import UserError


def need(package: str, purpose: str) -> Any:
    """Import a package of the extra ``data``.

    Raises:
        UserError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{purpose} needs the package {error.name}, which is not installed; "
            "install it with: pip install jreg_megatron[data]"
        ) from error
