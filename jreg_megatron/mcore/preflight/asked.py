"""Megatron's arguments, read as Megatron reads them, and checks of one or two of them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import flag_of

Refusals = dict[str, Callable[[Namespace], Any]]
"""Message -> condition. A name in braces is replaced with the argument's value."""


def refuse(args: Namespace, refusals: Refusals) -> None:
    """Raises:
    UserError: with the first message whose condition is true. "is None" becomes "is missing".
    """
    for message, holds in refusals.items():
        if holds(args):
            raise UserError(message.format_map(vars(args)).replace(" is None", " is missing"))


def given(args: Namespace, *names: str) -> list[str]:
    return [flag_of(name) for name in names if getattr(args, name) is not None]


def divisible(args: Namespace, name: str, by: str, fix: str = "change one of them") -> None:
    """Raises:
    UserError: if the argument ``name`` is given and not divisible by the argument ``by``.
    """
    value, part = getattr(args, name), getattr(args, by)
    if value is not None and value % part:
        raise UserError(f"{flag_of(name)} {value} is not divisible by {flag_of(by)} {part}; {fix}")
