"""``python -m jreg_megatron.bench``: what JREG costs, on this machine."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from typing import Any

from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import UserError, user_errors_exit

_EXAMPLES = """examples:
  python -m jreg_megatron.bench step                            the demo's model, 2.5 minutes
  torchrun --nproc-per-node 8 -m jreg_megatron.bench step --model 1b --tp 2
  python -m jreg_megatron.bench step --model 3.4b --layers 12 -- --recompute-granularity selective
  python -m jreg_megatron.bench growth --json growth.json
  python -m jreg_megatron.bench host                            Python and launches, 2 minutes on a CPU
  python -m jreg_megatron.bench show growth.json
"""


_WITH_MEGATRON = ("step", "growth")
"""What takes Megatron's arguments behind ``--``."""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0, or 2 for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors_exit("nothing was written"):
        ours, more = _split(argv)
        args = _parser().parse_args(ours)
        if more and args.part not in _WITH_MEGATRON:
            raise UserError(f"bench {args.part} starts no Megatron, so it takes no arguments behind --")
        ranks = os.environ.get("WORLD_SIZE", "1")
        if args.part != "step" and ranks != "1":
            raise UserError(
                f"bench {args.part} is one process, and WORLD_SIZE is {ranks}; start it without torchrun"
            )
        if args.part == "show":
            return _show(args)
        output.check_outputs(json=args.json)
        return _run(args, more, partial(_finish, args, argv))


def _run(args: Namespace, more: list[str], finish: Callable[..., None]) -> int:
    from jreg_megatron.bench import growth, kernel

    if args.part == "step":
        from jreg_megatron.bench import step_run

        return step_run.run(args, more, finish)
    if args.part == "growth":
        figures = growth.run(args, more)
        finish(figures, figures.pop("machine"))
        if figures["unfinished"] is not None:
            raise UserError(f"{figures['unfinished']}; the sizes before it are kept")
    elif args.part == "kernel":
        finish(kernel.run(args))
    else:
        from jreg_megatron.bench import host

        finish(host.run(args))
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The benchmark's own words, and those behind ``--``."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _parser() -> ArgumentParser:
    from jreg_megatron.bench import growth, kernel, options

    parser = ArgumentParser(
        prog="python -m jreg_megatron.bench",
        description="Measure what JREG costs, beside the same work without it in the same run.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    about = {
        "kernel": ("displacement and gradients by themselves", kernel.add_arguments),
        "host": ("what Python and launches take of a layer", options.add_host_arguments),
        "step": ("Megatron's training step, unmodified and with JREG", options.add_step_arguments),
        "growth": ("the step's cost over model sizes and pipeline stages", growth.add_arguments),
    }
    for name, (what, add_arguments) in about.items():
        part = parts.add_parser(name, help=what, description=f"Measure {what}.")
        add_arguments(part)
        output.add_output_arguments(part, csv=False)
        if name in _WITH_MEGATRON:
            part.epilog = "Further arguments of Megatron, and --jreg-... settings, can follow behind --."
    show = parts.add_parser("show", help="print what --json has written", description="Print results.")
    show.add_argument("files", nargs="+", metavar="FILE")
    return parser


def _finish(
    args: Namespace, argv: list[str], figures: dict[str, Any], machine: dict[str, Any] | None = None
) -> None:
    from jreg_megatron.bench import results, table

    document = results.document(argv, args.part, figures, machine or results.machine())
    if not args.quiet:
        # First, so that a full disk does not take all.
        console = output.console(args)
        _put_out(console, table.text_of(console, document))
    if args.json is not None:
        output.write_json(args.json, document)


def _show(args: Namespace) -> int:
    from rich.console import Console

    from jreg_megatron.bench import results, table

    console = Console(markup=False)
    texts = []
    for path in args.files:
        document = results.read(path)
        try:
            texts.append(table.text_of(console, document))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path} is no whole result of this benchmark ({what}); name one that --json has written"
            ) from None
    _put_out(console, "".join(texts))
    return 0


def _put_out(console: Any, text: str) -> None:
    if console.stderr:
        sys.stderr.write(text)
    else:
        output.write_text(output.STDOUT, text)


if __name__ == "__main__":
    sys.exit(main())
