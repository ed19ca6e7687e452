"""The list of all methods, and their flags on a command line."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from jreg_megatron.methods.attenuation.settings import AttenuationConfig
from jreg_megatron.methods.depth.settings import DepthConfig
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.methods.let.settings import LETConfig
from jreg_megatron.methods.lns.settings import LayerNormScalingConfig
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.methods.periln.settings import PeriLNConfig
from jreg_megatron.methods.slowqk.settings import SlowQKConfig
from jreg_megatron.stream.settings import Settings

MEASURING = {f"{JRegConfig.prefix}_coeff": 0.0}
"""Parsed arguments with which JREG measures and does nothing else."""

METHODS: list[type[Settings]] = [
    *(JRegConfig, NormsConfig, DepthConfig, AttenuationConfig, SlowQKConfig, LETConfig),
    *(LayerNormScalingConfig, PeriLNConfig),
]
"""The settings of each method. A script with its own method appends that method's settings before it
trains."""


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of all methods, a group for each; returns the parser."""
    for method in METHODS:
        method.add_arguments(parser)
    return parser


def settings_in(args: Namespace) -> tuple[Settings, ...]:
    """The settings of each method that has a flag on the command line.

    Raises:
        UserError: for a value that is not allowed.
    """
    return tuple(method.from_args(args) for method in METHODS if method.is_in(args))


def changes_in(args: Namespace) -> tuple[Settings, ...]:
    """Those of :func:`settings_in` whose method changes the model.

    Args:
        args: Megatron's arguments, of this run or as a checkpoint holds them.
    """
    return tuple(of_one for of_one in settings_in(args) if of_one.changes_model)


def has_flag(argv: Sequence[str]) -> bool:
    """Whether a command line has a flag of any method."""
    return any(method.is_flag(word) for method in METHODS for word in argv)


def check_flags(argv: list[str]) -> None:
    """Check the methods' flags among a command line's words, before anything else is parsed.

    Raises:
        UserError: for an unknown flag, with the nearest known one, or a value that is not allowed.
    """
    for method in METHODS:
        method.check_flags(argv)
