"""Run a Megatron script on a CPU.

``torchrun --nproc-per-node N -m jreg_megatron.cpu SCRIPT.py ARGS...`` or, with one import of Megatron
for all ranks and so a much faster start, ``python -m jreg_megatron.cpu --nproc N SCRIPT.py ARGS...``.
As with torchrun, ``-m MODULE`` can stand for ``SCRIPT.py``.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from jreg_megatron.cpu import announcement, enable, with_cpu_flags
from jreg_megatron.errors import UserError, user_errors_exit


def main() -> None:
    """Run the script named on the command line, with the rest of it and the CPU's flags as arguments."""
    parser = argparse.ArgumentParser(prog="python -m jreg_megatron.cpu", description="Run Megatron on a CPU.")
    parser.add_argument(
        "--nproc", type=int, default=None, help="ranks to fork; without it, one rank of torchrun's"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a Megatron script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    own = parser.parse_args()

    with user_errors_exit():
        if not own.module and not os.path.isfile(own.script):
            raise UserError(f"script {own.script} not found; give the path of a Megatron script")
        if own.nproc is not None and "RANK" in os.environ:
            raise UserError("--nproc is for a run without torchrun; leave it out under torchrun")
        arguments = with_cpu_flags(own.arguments)
    if os.environ.get("RANK", "0") == "0":
        print(announcement(own.arguments), flush=True)
    sys.argv = [own.script, *arguments]
    if not own.module:
        # As `python SCRIPT.py` does it; before enable(), so that a script in a Megatron tree gets that tree.
        sys.path.insert(0, os.path.dirname(os.path.abspath(own.script)))

    def work() -> None:
        if own.module:
            runpy.run_module(own.script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(own.script, run_name="__main__")

    if own.nproc is None:
        enable()
        work()
    else:
        enable()
        from jreg_megatron.cpu.launch import fork_ranks

        sys.exit(fork_ranks(own.nproc, work))


if __name__ == "__main__":
    main()
