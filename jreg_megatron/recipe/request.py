"""What a recipe and its user ask for, read from the command line that the recipe file composes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jreg_megatron.runtime.errors import UserError

VARIANTS = ("jreg", "baseline")
SMOKE_ITERATIONS = 4
_FLAGS_FOLLOW, _USER_FOLLOWS = "--", ":::"


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
    """How often the training data may be read, at most."""
    tflops: float
    """TFLOP/s that a GPU is expected to achieve."""
    flags: tuple[str, ...]
    """Megatron's flags as the recipe has them."""
    user_flags: tuple[str, ...]
    """Megatron's flags that the user adds; they win over the recipe's."""
    dry_run: bool
    smoke: int | None
    """Iterations of a run with a toy model on the CPU, or None for the real one."""

    @property
    def world_size(self) -> int:
        """Number of ranks, one a GPU."""
        return self.nodes * self.gpus

    @classmethod
    def from_words(cls, words: list[str]) -> Request:
        """Read ``OPTIONS -- FLAGS ::: WHAT THE USER TYPED``.

        Raises:
            UserError: for what does not fit; settings are named as the recipe's user knows them.
            SystemExit: after ``--help``.
        """
        own, _, rest = partition(words, _FLAGS_FOLLOW)
        flags, _, typed = partition(rest, _USER_FOLLOWS)
        options = _options_parser().parse_args(own)
        asked, _, user_flags = partition(typed, _FLAGS_FOLLOW)
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


def partition(words: list[str], mark: str) -> tuple[list[str], str, list[str]]:
    if mark not in words:
        return words, "", []
    at = words.index(mark)
    return words[:at], mark, words[at + 1 :]


def _options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jreg_megatron.recipe",
        usage="%(prog)s OPTIONS -- MEGATRON FLAGS ::: USER'S WORDS",
        description="Check, announce and start a pretraining run. The files in recipes/ call this.",
        allow_abbrev=False,
    )
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="the recipe, for messages", required=True)
    parser.add_argument("--variant", metavar="NAME", help="as the recipe has read it", required=True)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="where the run is kept", required=True)
    parser.add_argument("--nodes", type=count("NODES"), metavar="N", help="number of nodes", default=1)
    parser.add_argument("--gpus", type=count("GPUS"), metavar="N", help="GPUs of each node", default=8)
    parser.add_argument("--tokens", type=count("TOKENS"), metavar="N", help="training tokens", required=True)
    parser.add_argument(
        "--epochs", type=_positive("EPOCHS"), metavar="X", help="passes over the data, at most", default=1.0
    )
    parser.add_argument(
        "--tflops",
        type=_positive("TFLOPS"),
        metavar="X",
        help="expected of a GPU, for the time",
        default=350.0,
    )
    return parser


def _user_parser(recipe: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=str(recipe),
        usage="%(prog)s jreg|baseline [--dry-run] [--smoke [N]] [-- MORE MEGATRON FLAGS]",
        description="Pretrain with JREG, or the baseline: the same run with lambda 0. The knobs stand in the "
        "recipe; those written ${NAME:-value} can be set in the environment. The same command goes on after "
        "a crash. SIGTERM and SIGUSR1 save first; the status is then 75.",
        allow_abbrev=False,
    )
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("variant", choices=VARIANTS, metavar="jreg|baseline")
    add_trials(
        parser,
        SMOKE_ITERATIONS,
        f"instead, train a toy model for N iterations (default {SMOKE_ITERATIONS}) on this machine's "
        "CPU, so that Megatron reads every flag",
    )
    return parser


def add_trials(parser: argparse.ArgumentParser, smoke_length: int, smoke_help: str) -> None:
    """Add ``--dry-run``, and ``--smoke`` with its length where none is given."""
    parser.add_argument("--dry-run", action="store_true", help="only print what would run, and the command")
    parser.add_argument(
        "--smoke", type=count("--smoke"), nargs="?", const=smoke_length, metavar="N", help=smoke_help
    )


def refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; --help says what there is")


def count(name: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{name} is {text or 'empty'}; it must be a whole number >= 1")
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
