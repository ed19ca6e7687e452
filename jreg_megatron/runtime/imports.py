"""How packages are imported: those that may be missing, and Megatron without its noise and compilation."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
            f"{purpose} needs the package {(error.name or package).split('.')[0]}, which is not installed; "
            f"install it with: pip install jreg_megatron[{extra}]"
        ) from error


@contextmanager
def errors_alone(*loggers: str) -> Iterator[None]:
    """Hide what these loggers say below the level of an error."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def without_noise() -> Iterator[None]:
    """Keep warnings, and what Megatron and torch say below an error, from the user."""
    with errors_alone("megatron", "torch.utils.cpp_extension", "nvidia"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def silence_megatron() -> None:
    """Hide all warnings, and what Megatron logs below the level of an error, until the process ends."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def without_compilation() -> Any:
    """A context in which ``torch.compile`` does nothing. Megatron calls it on import; a process that runs no
    model of it imports Megatron in half the time so."""
    from unittest import mock

    return mock.patch("torch.compile", uncompiled)


def uncompiled(function: Any = None, **_: Any) -> Any:
    """Replaces ``torch.compile``: returns the function unchanged."""
    return (lambda decorated: decorated) if function is None else function
