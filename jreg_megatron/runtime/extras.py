"""Packages that only some inputs and tools need."""

from __future__ import annotations

import importlib
from typing import Any

from jreg_megatron.runtime.errors import UserError


def need(package: str, purpose: str, extra: str) -> Any:
    """Import a package of one of this project's extras.

    Raises:
        UserError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{purpose} needs the package {error.name}, which is not installed; "
            f"install it with: pip install jreg_megatron[{extra}]"
        ) from error
