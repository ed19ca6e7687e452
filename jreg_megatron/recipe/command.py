"""The command that starts the ranks of a node."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jreg_megatron.recipe.request import Rendezvous

MODULE = ("-m", "jreg_megatron.pretrain")
_SHOWN = ("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS")


def on_gpus(gpus: int, nodes: int, rendezvous: Rendezvous | None, flags: Sequence[str]) -> list[str]:
    """``torchrun`` of this Python, for this node's ranks.

    torchrun leaves SIGTERM to the ranks, which save first. Otherwise it would kill them after half a minute.
    """
    from torch.distributed.run import get_args_parser

    beside = Path(sys.executable).with_name("torchrun")
    command = [str(beside)] if beside.exists() else [sys.executable, "-m", "torch.distributed.run"]
    if rendezvous is None:
        command += ["--standalone"]
    else:
        command += ["--nnodes", str(nodes), "--node-rank", str(rendezvous.node_rank)]
        command += ["--master-addr", rendezvous.address, "--master-port", str(rendezvous.port)]
    command += ["--nproc-per-node", str(gpus)]
    if any("--signals-to-handle" in action.option_strings for action in get_args_parser()._actions):
        command += ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
    return [*command, *MODULE, *flags]


def as_text(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command for a shell, one flag a line, with the environment variables that it needs."""
    lines, line = [], [f"{name}={shlex.quote(environment[name])}" for name in _SHOWN if name in environment]
    for word in command:
        if word.startswith("--"):
            lines.append(" ".join(line))
            line = []
        line.append(shlex.quote(word))
    return " \\\n    ".join([*lines, " ".join(line)])
