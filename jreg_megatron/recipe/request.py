"""The request for a run: parse and check the words of a recipe file and of its user."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import Parser, count, positive, split_at

VARIANTS = ("jreg", "baseline")
SMOKE_ITERATIONS = 4


def read(words: list[str]) -> Namespace:
    """Parse the words of a pretraining recipe and of its user.

    Returns:
        As :func:`read_words`, with ``world_size``, the number of ranks, one per GPU. ``smoke`` is the number
        of iterations of a small model on the CPU, or None for the real run.

    Raises:
        UserError: for a word or value that is not allowed. It names a knob as the recipe does.
        SystemExit: after ``--help``.
    """
    parser = Parser(
        prog="python -m jreg_megatron.recipe",
        usage="%(prog)s OPTIONS -- MEGATRON FLAGS ::: USER'S WORDS",
        description="Check, announce and start a pretraining run. The files in recipes/ call this.",
    )
    for flag, kind, word, meaning in (
        ("--recipe", Path, "FILE", "the recipe, for messages"),
        ("--variant", str, "NAME", "jreg or baseline, as the recipe read it"),
        ("--run", Path, "FOLDER", "the run's folder: checkpoints, TensorBoard, index cache"),
        ("--nodes", count("NODES"), "N", "number of nodes"),
        ("--gpus", count("GPUS"), "N", "GPUs of each node"),
        ("--tokens", count("TOKENS"), "N", "training tokens"),
        ("--epochs", positive("EPOCHS"), "X", "the most passes over the data"),
        ("--tflops", positive("TFLOPS"), "X", "expected speed of a GPU in TFLOP/s"),
    ):
        parser.add_argument(flag, type=kind, required=True, metavar=word, help=meaning)
    user = Parser(
        usage="%(prog)s jreg|baseline [--dry-run] [--smoke [N]] [-- MORE MEGATRON FLAGS]",
        description="Pretrain with JREG, or pretrain the baseline: the same run with lambda 0. All knobs are "
        "in the recipe. The environment can set those that are written ${NAME:-value}. After a crash, start "
        "the same command again: it resumes. On SIGTERM and SIGUSR1 the run saves and ends with status 75.",
    )
    user.add_argument("typed", choices=VARIANTS, metavar="jreg|baseline", help="with JREG, or without")
    smoke = f"train a toy model for N iterations (default {SMOKE_ITERATIONS}) on this machine's CPU instead; "
    asked = read_words(words, parser, user, SMOKE_ITERATIONS, smoke + "Megatron reads every flag")
    if asked.variant != asked.typed:
        raise UserError(
            f"{asked.typed} comes after {asked.variant}; it must come first: "
            f"{asked.recipe} {asked.typed} {asked.variant}"
        )
    asked.world_size = asked.nodes * asked.gpus
    return asked


def read_words(
    words: list[str], parser: Parser, user: Parser, smoke_length: int, smoke_help: str
) -> Namespace:
    """Read ``OPTIONS -- FLAGS ::: USER'S WORDS -- USER'S FLAGS``.

    Returns:
        The results of ``parser`` for the options, and of ``user``, with ``--dry-run`` and ``--smoke``, for
        the user's words; and ``flags`` of the recipe, and ``user_flags``, which override them.
    """
    own, rest = split_at("--", words)
    flags, typed = split_at(":::", rest)
    asked, user_flags = split_at("--", typed)
    options = parser.parse_args(own)
    user.prog = str(options.recipe)
    user.add_argument("--dry-run", action="store_true", help="print the run and its command, start nothing")
    user.add_argument(
        "--smoke", type=count("--smoke"), nargs="?", const=smoke_length, metavar="N", help=smoke_help
    )
    user.parse_args(asked, options)
    options.flags, options.user_flags = flags, user_flags
    return options


class Rendezvous(NamedTuple):
    """The address where the nodes of a run meet, and this node's number."""

    address: str
    port: int
    node_rank: int


def rendezvous(nodes: int, environment: Mapping[str, str] = os.environ) -> Rendezvous | None:
    """``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK``, or None for a run of one node.

    Raises:
        UserError: if one is missing or wrong.
    """
    if nodes == 1:
        return None
    several = f"NODES is {nodes}, so each node needs"
    address = environment.get("MASTER_ADDR")
    if not address:
        raise UserError(f"MASTER_ADDR is missing; {several} the host name of the first node in it")
    port, rank = environment.get("MASTER_PORT", "29500"), environment.get("NODE_RANK", "")
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"MASTER_PORT is {port}; it must be a TCP port, the same on every node")
    if not (rank.isdecimal() and int(rank) < nodes):
        raise UserError(f"NODE_RANK is {rank or 'missing'}; {several} its own number in it, 0 to {nodes - 1}")
    return Rendezvous(address, int(port), int(rank))
