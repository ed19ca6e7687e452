"""The output of a run before it starts: a table of the checks' results, and its command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jreg_megatron.recipe.request import Rendezvous
from jreg_megatron.runtime.errors import UserError

MODULE = ("-m", "jreg_megatron.pretrain")
_SHOWN = ("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS")
_WIDTH = 118


def found(findings: Mapping[str, Callable[[], str]], is_dry_run: bool) -> dict[str, str]:
    """The results of checks, by row. In a dry run a refusal is a result.

    Raises:
        UserError: from the first check that refuses, unless this is a dry run.
    """
    rows = {}
    for name, find in findings.items():
        try:
            rows[name] = find()
        except UserError as error:
            if not is_dry_run:
                raise
            rows[name] = f"would be refused: {error}"
    return rows


def show(title: str, rows: dict[str, str]) -> None:
    """Print a table of names and texts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    for name, text in rows.items():
        table.add_row(name, Text(text))
    Console(width=_WIDTH, markup=False).print(table)


def torchrun(gpus: int, nodes: int, meets: Rendezvous | None, flags: Sequence[str]) -> list[str]:
    """``torchrun`` of this Python, for this node's ranks.

    torchrun gets no handler for SIGTERM, so that the ranks can save first. With its handler it would kill
    them after half a minute.
    """
    from torch.distributed.run import get_args_parser

    beside = Path(sys.executable).with_name("torchrun")
    command = [str(beside)] if beside.exists() else [sys.executable, "-m", "torch.distributed.run"]
    if meets is None:
        command += ["--standalone"]
    else:
        command += ["--nnodes", str(nodes), "--node-rank", str(meets.node_rank)]
        command += ["--master-addr", meets.address, "--master-port", str(meets.port)]
    command += ["--nproc-per-node", str(gpus)]
    if any("--signals-to-handle" in action.option_strings for action in get_args_parser()._actions):
        command += ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
    return [*command, *MODULE, *flags]


def as_text(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command for a shell, one flag per line, with the environment variables that it needs."""
    words = [f"{name}={shlex.quote(environment[name])}" for name in _SHOWN if name in environment]
    words += [("\\\n    " if word.startswith("--") else "") + shlex.quote(word) for word in command]
    return " ".join(words)


def seconds_as_text(seconds: float) -> str:
    """A rounded duration: ``52 h``, ``8 days``, ``40 min``."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 3 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def number_as_text(number: float, unit: str = "") -> str:
    """A large number to three digits: ``10.0B``, ``80.0 GB``."""
    space = " " if unit else ""
    for size, name in ((1e15, "P"), (1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{space}{name}{unit}"
    return f"{number:.0f}{space}{unit}"
