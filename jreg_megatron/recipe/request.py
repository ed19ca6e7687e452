"""The request for a run: the words of a recipe file and of its user, read and checked."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jreg_megatron.runtime.errors import UserError

VARIANTS = ("jreg", "baseline")
SMOKE_ITERATIONS = 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run of a recipe: where, how long, and Megatron's flags for it."""

    recipe: Path
    variant: str
    run: Path
    """Folder of the run: checkpoints, TensorBoard, index cache."""
    nodes: int
    gpus: int
    """GPUs of each node."""
    tokens: int
    """Tokens to train on; ``--train-iters`` follows from it unless it is among :attr:`user_flags`."""
    epochs: float
    """The most passes over the training data that are allowed."""
    tflops: float
    """Expected speed of a GPU in TFLOP/s, for the time that the table shows."""
    flags: tuple[str, ...]
    """Megatron's flags in the recipe."""
    user_flags: tuple[str, ...]
    """Megatron's flags of the user, which override the recipe's."""
    dry_run: bool
    smoke: int | None
    """Iterations of a run with a toy model on the CPU, or None for the real one."""

    @property
    def world_size(self) -> int:
        """Number of ranks, one a GPU."""
        return self.nodes * self.gpus

    @classmethod
    def from_words(cls, words: list[str]) -> Request:
        """Read ``OPTIONS -- MEGATRON FLAGS ::: USER'S WORDS``.

        Raises:
            UserError: for a word or value that is not allowed; it names a knob as the recipe's user knows it.
            SystemExit: after ``--help``.
        """
        own, rest = split_at("--", words)
        flags, typed = split_at(":::", rest)
        options = _options_parser().parse_args(own)
        asked, user_flags = split_at("--", typed)
        choice = _user_parser(options.recipe).parse_args(asked)
        if options.variant != choice.variant:
            raise UserError(
                f"{choice.variant} is behind {options.variant}; it must come first: "
                f"{options.recipe} {choice.variant} {options.variant}"
            )
        return cls(**vars(options) | vars(choice), flags=tuple(flags), user_flags=tuple(user_flags))


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes of a run meet."""

    address: str
    port: int
    node_rank: int

    @classmethod
    def from_environment(
        cls, request: Request, environment: Mapping[str, str] = os.environ
    ) -> Rendezvous | None:
        """``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK``, or None for a run of one node.

        Raises:
            UserError: if one is missing or cannot be.
        """
        if request.nodes == 1:
            return None
        several = f"NODES is {request.nodes}, so each node needs"
        address = environment.get("MASTER_ADDR")
        if not address:
            raise UserError(f"MASTER_ADDR is missing; {several} the host name of the first one there")
        port, rank = environment.get("MASTER_PORT", "29500"), environment.get("NODE_RANK", "")
        if not (port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"MASTER_PORT is {port}; it must be a TCP port, the same on every node")
        if not (rank.isdecimal() and int(rank) < request.nodes):
            raise UserError(
                f"NODE_RANK is {rank or 'missing'}; {several} its own number there, 0 to {request.nodes - 1}"
            )
        return cls(address, int(port), int(rank))


def split_at(mark: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first ``mark`` and the words after it; all are before it if it is missing."""
    at = words.index(mark) if mark in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def _options_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m jreg_megatron.recipe",
        usage="%(prog)s OPTIONS -- MEGATRON FLAGS ::: USER'S WORDS",
        description="Check, announce and start a pretraining run. The files in recipes/ call this.",
    )
    for flag, kind, default, word, meaning in (
        ("--recipe", Path, None, "FILE", "the recipe, for messages"),
        ("--variant", str, None, "NAME", "jreg or baseline, as the recipe has read it"),
        ("--run", Path, None, "FOLDER", "the run's folder"),
        ("--nodes", count("NODES"), 1, "N", "number of nodes"),
        ("--gpus", count("GPUS"), 8, "N", "GPUs of each node"),
        ("--tokens", count("TOKENS"), None, "N", "training tokens"),
        ("--epochs", _positive("EPOCHS"), 1.0, "X", "the most passes over the data"),
        ("--tflops", _positive("TFLOPS"), 350.0, "X", "expected speed of a GPU in TFLOP/s"),
    ):
        parser.add_argument(
            flag, type=kind, default=default, required=default is None, metavar=word, help=meaning
        )
    return parser


def _user_parser(recipe: Path) -> argparse.ArgumentParser:
    parser = Parser(
        prog=str(recipe),
        usage="%(prog)s jreg|baseline [--dry-run] [--smoke [N]] [-- MORE MEGATRON FLAGS]",
        description="Pretrain with JREG, or pretrain the baseline: the same run with lambda 0. All knobs are "
        "in the recipe. The environment can set those that are written ${NAME:-value}. After a crash, start "
        "the same command again: it resumes. On SIGTERM and SIGUSR1 the run saves and ends with status 75.",
    )
    parser.add_argument("variant", choices=VARIANTS, metavar="jreg|baseline", help="with JREG, or without")
    add_trials(
        parser,
        SMOKE_ITERATIONS,
        f"train a toy model for N iterations (default {SMOKE_ITERATIONS}) on this machine's CPU instead; "
        "Megatron reads every flag",
    )
    return parser


def add_trials(parser: argparse.ArgumentParser, smoke_length: int, smoke_help: str) -> None:
    """Add ``--dry-run``, and ``--smoke`` with its default length."""
    parser.add_argument("--dry-run", action="store_true", help="print the run and its command, start nothing")
    parser.add_argument(
        "--smoke", type=count("--smoke"), nargs="?", const=smoke_length, metavar="N", help=smoke_help
    )


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line."""

    def __init__(self, **named: Any) -> None:
        super().__init__(allow_abbrev=False, **named)

    def error(self, message: str) -> NoReturn:
        """Raises:
        UserError: always.
        """
        refuse(message)


def refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")


def count(name: str, least: int = 1) -> Callable[[str], int]:
    """An argparse type: an integer of at least ``least``; its error calls it ``name``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{name} is {text or 'empty'}; it must be a whole number >= {least}"
            )
        return int(text)

    return parse


def _positive(name: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{name} is {text or 'empty'}; it must be a number > 0")
        return value

    return parse
