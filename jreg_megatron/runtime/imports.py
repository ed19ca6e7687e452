"""Imports of optional packages, and of Megatron without its warnings and without compilation."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jreg_megatron.runtime.errors import UserError


def need(package: str, purpose: str, extra: str) -> Any:
    """Import ``package``, which this project's extra ``extra`` installs.

    Raises:
        UserError: if it is not installed; it names ``purpose`` and the command that installs it.
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
    """Hide messages of these loggers below the level ERROR."""
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
    """Hide warnings, and log messages of Megatron and torch below the level ERROR."""
    with errors_alone("megatron", "torch.utils.cpp_extension", "nvidia"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def silence_megatron() -> None:
    """Hide all warnings, and Megatron's log messages below the level ERROR, until the process ends."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def without_compilation() -> Any:
    """A context in which ``torch.compile`` is a no-op.

    Megatron calls it at import. A process that runs no Megatron model then imports it in half the time.
    """
    from unittest import mock

    return mock.patch("torch.compile", uncompiled)


def uncompiled(function: Any = None, **_: Any) -> Any:
    """A no-op in place of ``torch.compile``, also as a decorator with options."""
    return (lambda decorated: decorated) if function is None else function
