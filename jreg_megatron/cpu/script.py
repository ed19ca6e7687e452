"""Run a user's Megatron script as ``python SCRIPT.py ARGS`` does, on GPUs or on the CPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from jreg_megatron.runtime.errors import UserError, user_errors_exit


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the script, its arguments and ``--nproc``; returns the parser."""
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="start N ranks on this machine's CPU; leave it out under torchrun",
    )
    parser.add_argument(
        "-m", dest="is_module", action="store_true", help="SCRIPT is a module's name, not a path"
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Megatron script, such as pretrain_gpt.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    return parser


def run(
    options: argparse.Namespace,
    on_cpu: bool,
    before_import: Callable[[], None] = lambda: None,
    make_ready: Callable[[], None] = lambda: None,
    check_at_end: Callable[[], None] = lambda: None,
) -> None:
    """Run the script in this process, or with ``--nproc`` in processes forked from it.

    Args:
        options: the result of a parser with :func:`add_arguments`.
        on_cpu: redirect CUDA to the CPU, and give the script the flags that this needs.
        before_import: called when the script's Megatron can be found, before its import.
        make_ready: called when the script's Megatron can be imported, before the script starts.
        check_at_end: called in every rank in which the script has ended without an error.

    Raises:
        UserError: if there is no such script, or an option does not fit the others.
        SystemExit: with the script's status.
    """
    from jreg_megatron import cpu
    from jreg_megatron.runtime.fork import be_alone_unless_started, check_nproc, fork_ranks, started_by_others

    script, arguments = options.script, options.arguments
    _refuse_script(script, options.is_module)
    if options.nproc is not None:
        check_nproc(options.nproc)
        if not on_cpu:
            raise UserError("--nproc is for CPU mode; start GPU ranks with torchrun")
    elif on_cpu or not started_by_others():  # later Megatrons read SLURM's variables
        be_alone_unless_started()
    if on_cpu:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(cpu.announcement(arguments), flush=True)
        arguments = cpu.with_cpu_flags(arguments)
    sys.argv = [script, *arguments]
    if not options.is_module:
        _take_modules_from(Path(script).resolve().parent)
    # Only now is Megatron imported, so that a script in a Megatron tree gets that tree.
    before_import()
    if on_cpu:
        cpu.enable()
    make_ready()

    def work() -> None:
        with user_errors_exit():
            try:
                if options.is_module:
                    runpy.run_module(script, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                if not end.code:
                    check_at_end()
                raise
            check_at_end()

    if options.nproc is None:
        work()
    else:
        sys.exit(fork_ranks(options.nproc, work))


def _take_modules_from(folder: Path) -> None:
    """Put the script's folder first on the path, in place of the working directory of ``python -m``."""
    if not sys.flags.safe_path and sys.path[:1] in ([os.getcwd()], [""]):
        del sys.path[0]
    sys.path.insert(0, str(folder))


def _refuse_script(script: str, is_module: bool) -> None:
    if is_module:
        try:
            is_found = importlib.util.find_spec(script) is not None
        except ImportError:
            is_found = False
        if not is_found:
            raise UserError(f"module {script} not found; give the name of a module on Python's path")
        return
    if not os.path.isfile(script):
        raise UserError(f"script {script} not found; give the path of a Megatron script")
    try:
        compile(Path(script).read_bytes(), script, "exec")
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{script} is not a Python script ({error}); give the Python script, such as pretrain_gpt.py"
        ) from None
