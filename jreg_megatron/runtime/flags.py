"""Command lines whose errors are one line."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jreg_megatron.runtime.errors import UserError


class Parser(ArgumentParser):
    """A parser without abbreviations, whose errors are a :class:`UserError`."""

    def __init__(self, **named: Any) -> None:
        super().__init__(allow_abbrev=False, **named)

    def error(self, message: str) -> NoReturn:
        """Raises:
        UserError: always.
        """
        refuse(message)


def refuse(message: str) -> NoReturn:
    """Raise argparse's message as a :class:`UserError`."""
    own = re.sub(r"^argument \S+: (?=\S+ is )", "", message)  # types such as `count` name the setting
    raise UserError(f"{own}; see --help")


def flag_of(name: str) -> str:
    """The flag of an argument: ``--num-layers`` for ``num_layers``."""
    return f"--{name.replace('_', '-')}"


def check_least(args: Namespace, **least: int) -> None:
    """Refuse arguments below their minimum. ``least`` has the minimums by argument; None is not checked.

    Raises:
        UserError: naming the flag.
    """
    for name, limit in least.items():
        value = getattr(args, name)
        if value is not None and value < limit:
            raise UserError(f"{flag_of(name)} is {value}; it must be >= {limit}")


def count(name: str, least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from ``least`` to ``most``. Its error names ``name``."""
    wanted = f"a whole number >= {least}" if most is None else f"a whole number in {least}..{most}"

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise ArgumentTypeError(f"{name} is {text or 'empty'}; it must be {wanted}")
        return int(text)

    return parse


def positive(name: str) -> Callable[[str], float]:
    """An argparse type: a finite number above 0. Its error names ``name``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ArgumentTypeError(f"{name} is {text or 'empty'}; it must be a number > 0")
        return value

    return parse


def split_at(mark: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first ``mark``, and the words after it. Without a ``mark``, all are before it."""
    at = words.index(mark) if mark in words else len(words)
    return list(words[:at]), list(words[at + 1 :])
