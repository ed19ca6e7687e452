"""A benchmark's result as a JSON document: command, date, machine, versions and figures."""

from __future__ import annotations

import os
import platform
import re
import shlex
from contextlib import suppress
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from jreg_megatron.runtime import output


def document(argv: list[str], part: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The document of one run: ``argv`` made the figures of ``part`` on this machine."""
    made = {"command": command(argv), "date": date.today().isoformat(), "machine": machine()}
    packages = ("megatron-core", "torch", "triton", "transformer-engine", "apex")
    return output.document("benchmark", *packages, **made, **{part: figures})


def command(argv: list[str]) -> str:
    """The command that repeats the run, without its output options."""
    kept = [
        word
        for before, word in pairwise(["", *argv])
        if before != "--json" and word not in ("--json", "--quiet") and not word.startswith("--json=")
    ]
    return shlex.join(["python", "-m", "jreg_megatron.bench", *kept])


def machine() -> dict[str, Any]:
    """The device in use, the processor and how busy it is with other work."""
    import torch

    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        named = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = named[1].strip() if named else processor
    found: dict[str, Any] = {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }
    if torch.version.cuda and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found
