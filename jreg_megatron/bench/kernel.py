"""``bench kernel``: what can be asked of it, and its figures as tables."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from jreg_megatron.runtime.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

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
        action="store_true",
        help="instead, on a GPU: time the Triton kernels with tiles and warps of every size that makes sense",
    )


def run(args: Namespace) -> dict[str, Any]:
    """Measure.

    Returns:
        ``{"kernel": figures}``; times in seconds, by width.

    Raises:
        UserError: for a mistake in the options.
    """
    widths = _widths(args.widths)
    for option, value in (("tokens", args.tokens), ("rounds", args.rounds)):
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; it must be >= 1")
    if not 0 < args.seconds < 86400:
        raise UserError(f"--seconds is {args.seconds:g}; it must be above 0 and below a day")
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
            return {"kernel": kernel_run.tune(sizes, widths)}
        return {"kernel": kernel_run.measure(sizes, widths, with_compile=not args.no_compile)}
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(
            f"--tokens is {args.tokens}, for which the memory does not suffice; give less"
        ) from None


def _widths(given: str) -> list[int]:
    words = given.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= _WIDEST for word in words):
        raise UserError(f"--widths is {given}; it must be numbers in 1..{_WIDEST} with commas between them")
    return list(dict.fromkeys(map(int, words)))


def print_table(console: Console, figures: dict[str, Any]) -> None:
    """Print what :func:`run` has found."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for number, column in enumerate(columns):
            made.add_column(column, justify="left" if number == 1 else "right", no_wrap=True)
        return made

    def times(found: dict[str, Any]) -> tuple[str, str]:
        low, high = (f"{1e3 * seconds:.4g}" for seconds in found["quartiles"])
        return f"{1e3 * found['seconds']:.4g}", f"{low} {high}"

    console.print(
        f"{figures['kernels']}: {figures['tokens']:,} tokens, {figures['dtype']}, rounds "
        + ", ".join(f"{of['rounds']} at {width}" for width, of in figures["widths"].items()),
        highlight=False,
        soft_wrap=True,
    )
    if figures["tuned"]:
        tuned = table(
            "The fastest tiles, and the one in use",
            *("width", "kernel", "rows x columns", "warps", "ms", "quartiles", "GB/s"),
        )
        for width, of in figures["widths"].items():
            for kernel, tiles in of["tiles"].items():
                for tile in [*tiles[:3], *(tile for tile in tiles[3:] if tile["in_use"])]:
                    mark = "  in use" if tile["in_use"] else ""
                    size = f"{tile['rows']} x {tile['columns']}"
                    rate = f"{tile['bytes_per_second'] / 1e9:,.0f}"
                    tuned.add_row(width, kernel + mark, size, str(tile["num_warps"]), *times(tile), rate)
        console.print(tuned)
    else:
        kernels = table(
            "Kernels, beside a copy that moves as many bytes",
            *("width", "kernel", "ms", "quartiles", "GB/s", "of the copy's"),
        )
        whole = table(
            "All of a layer's regularizer, forward and backward",
            *("width", "way", "ms", "quartiles", "times JREG's"),
        )
        for width, of in figures["widths"].items():
            for name, found in of["kernels"].items():
                rate = f"{found['bytes_per_second'] / 1e9:,.1f}"
                share = found["share_of_copy"]
                shown = "-" if share is None else f"{100 * share:.0f}%"
                kernels.add_row(width, name, *times(found), rate, shown)
            for name, found in of["ways"].items():
                whole.add_row(width, name, *times(found), f"{found['ratio']:.2f}")
        console.print(kernels)
        console.print(whole)
        for name, what in figures["about"].items():
            console.print(f" {name:9} {what}", highlight=False, soft_wrap=True)
    for note in figures["notes"]:
        console.print(f" {note}", highlight=False, soft_wrap=True)
