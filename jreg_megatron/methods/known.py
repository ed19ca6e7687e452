"""All methods, and what they have in common on a command line."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.stream.settings import Settings

Kinds = Sequence[type[Settings]]

METHODS: tuple[type[Settings], ...] = (JRegConfig,)
"""The settings of each method that this package has."""


def add_arguments(parser: ArgumentParser, methods: Kinds = METHODS) -> ArgumentParser:
    """Add the flags of all methods, a group for each; returns the parser."""
    for method in methods:
        method.add_arguments(parser)
    return parser


def settings_in(args: Namespace, methods: Kinds = METHODS) -> tuple[Settings, ...]:
    """The settings of the methods of which a flag is given.

    Raises:
        UserError: for a value that is not allowed.
    """
    return tuple(method.from_args(args) for method in methods if method.is_in(args))


def has_flag(argv: Sequence[str], methods: Kinds = METHODS) -> bool:
    """Whether a command line has a flag of any method."""
    return any(method.is_flag(word) for method in methods for word in argv)


def check_flags(argv: list[str], methods: Kinds = METHODS) -> None:
    """Check the methods' flags among a command line's words, before anything else is parsed.

    Raises:
        UserError: for an unknown flag, with the nearest known one, or a value that is not allowed.
    """
    for method in methods:
        method.check_flags(argv)


def with_a_flag(argv: list[str], methods: Kinds = METHODS) -> list[str]:
    """``argv``, with ``--jreg-coeff 0`` behind it if it has no flag of any method: then JREG measures."""
    return argv if has_flag(argv, methods) else [*argv, JRegConfig.flag("coeff"), "0"]
