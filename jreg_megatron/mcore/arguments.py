"""Megatron's own parser, with the flags of ``jreg_megatron.pretrain`` and of the methods."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from unittest import mock

from jreg_megatron.mcore import initialization
from jreg_megatron.methods import known
from jreg_megatron.runtime.flags import refuse

CPU_FLAG = "--cpu"


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of ``jreg_megatron.pretrain``; returns the parser."""
    group = parser.add_argument_group("jreg_megatron.pretrain")
    group.add_argument(
        CPU_FLAG,
        action="store_true",
        help="run on the CPU with gloo; the default without a CUDA device",
    )
    group.add_argument(
        initialization.FLAG,
        action="store_true",
        help="initial weights as in Meta Lingua: each matrix is normal with standard deviation "
        "1/sqrt(inputs), cut at three standard deviations, without a scale by depth",
    )

    for action in parser._actions:
        # Some of Megatron's help texts have a bare percent sign (0.19.2), which breaks --help.
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):
            action.help = str(action.help).replace("%", "%%")

    # argparse would print the usage of several hundred flags before the error.
    parser.error = refuse  # type: ignore[method-assign]
    return parser


def parse(flags: list[str], world_size: int) -> Namespace:
    """Megatron's arguments for ``world_size`` ranks, parsed but not validated.

    Raises:
        UserError: for unknown flags, or values that a method refuses.
    """
    from megatron.training import arguments

    def add_all(parser: ArgumentParser) -> ArgumentParser:
        return known.add_arguments(add_arguments(parser))

    with as_rank_zero_of(world_size, flags):
        args: Namespace = arguments.parse_args(add_all)
    known.settings_in(args)
    return args


@contextlib.contextmanager
def as_rank_zero_of(world_size: int, flags: list[str]) -> Iterator[None]:
    """Set the command line and the rank that Megatron reads from the process, and hide its output."""
    here = {"RANK": "0", "WORLD_SIZE": str(world_size)}
    with (
        mock.patch.object(sys, "argv", [sys.argv[0], *flags]),
        mock.patch.dict(os.environ, here),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield
