"""``bench kernel``: what can be asked of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from jreg_megatron.bench.options import check_seconds, require_at_least_one
from jreg_megatron.runtime.errors import UserError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WIDTHS = "768,2048,3072,3200"  # the recipes', and 3200 as some 3B models have it

_WIDEST = 65536


def add_arguments(parser: ArgumentParser) -> None:
    """Define the options of ``bench kernel``."""
    group = parser.add_argument_group("sizes")
    group.add_argument(
        "--widths", default=WIDTHS, metavar="H,...", help="hidden sizes of the states (default: %(default)s)"
    )
    group.add_argument(
        "--tokens", type=int, default=8192, metavar="N", help="rows of a state (default: %(default)s)"
    )
    group.add_argument(
        "--dtype", choices=DTYPES, help="number type; by default bf16 on a GPU and fp32 on a CPU"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="at most N rounds a width, in each of which everything runs once (default: 200; 20 on a CPU)",
    )
    run.add_argument(
        "--seconds",
        type=float,
        default=30,
        metavar="S",
        help="no round of a width begins after so long (default: %(default)g)",
    )
    run.add_argument("--cpu", action="store_true", help="the default where there is no CUDA device")
    run.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes its time to compile"
    )
    run.add_argument(
        "--tune",
        choices=("displacement", "gradients"),
        help="instead, on a GPU: time this Triton kernel with tiles and warps of every size that makes sense",
    )


def run(args: Namespace) -> dict[str, Any]:
    """Measure.

    Returns:
        Times in seconds, by width.

    Raises:
        UserError: for a mistake in the options.
    """
    widths = _widths(args.widths)
    require_at_least_one("tokens", args.tokens)
    require_at_least_one("rounds", args.rounds)
    check_seconds(args.seconds)
    import torch

    on_cpu = args.cpu or not torch.cuda.is_available()
    if args.tune and on_cpu:
        raise UserError("--tune times Triton's kernels, and there is no CUDA device here; leave it out")
    from jreg_megatron.bench import kernel_run

    sizes = kernel_run.Sizes(
        device=torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
        dtype=getattr(torch, DTYPES[args.dtype or ("fp32" if on_cpu else "bf16")]),
        tokens=args.tokens,
        rounds=args.rounds or (20 if on_cpu else 200),
        seconds=args.seconds,
    )
    kernel_run.check_memory(sizes, max(widths))
    try:
        if args.tune:
            return kernel_run.tune(sizes, widths, args.tune)
        return kernel_run.measure(sizes, widths, with_compile=not args.no_compile)
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(
            f"--tokens is {args.tokens}, for which the memory does not suffice; give less"
        ) from None


def _widths(given: str) -> list[int]:
    words = given.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= _WIDEST for word in words):
        raise UserError(f"--widths is {given}; it must be numbers in 1..{_WIDEST} with commas between them")
    return list(dict.fromkeys(map(int, words)))
