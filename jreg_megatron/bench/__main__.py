"""``python -m jreg_megatron.bench``: what JREG costs, on this machine."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from functools import partial
from importlib import import_module
from typing import Any

from jreg_megatron.bench import options
from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.flags import split_at


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0, or 2 for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    with user_errors_exit("nothing was written"):
        ours, more = split_at("--", argv)
        args = options.parser().parse_args(ours)
        if more and args.part != "step":
            raise UserError(f"bench {args.part} starts no Megatron, so it takes no arguments after --")
        ranks = os.environ.get("WORLD_SIZE", "1")
        if args.part != "step" and ranks != "1":
            raise UserError(
                f"bench {args.part} is one process, and WORLD_SIZE is {ranks}; start it without torchrun"
            )
        output.check_outputs(json=args.json)
        run = import_module(f"jreg_megatron.bench.{args.part}").run
        return int(run(args, more, partial(_finish, args, argv)))


def _finish(args: Namespace, argv: list[str], figures: dict[str, Any]) -> None:
    from jreg_megatron.bench import results, table

    document = results.document(argv, args.part, figures)
    if not args.quiet:
        # Before the file: a full disk must not lose the table too.
        table.print_document(output.console(args), document)
    if args.json is not None:
        output.write_json(args.json, document)


if __name__ == "__main__":
    sys.exit(main())
