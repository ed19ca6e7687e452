"""How JREG's cost grows: ``bench step`` counts at sizes of layers, width, sequence and pipeline stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from jreg_megatron.bench import options
from jreg_megatron.bench.options import AXES, JREG, KINDS, MEASURE, SHAPES, UNMODIFIED
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.fork import end_with_the_parent
from jreg_megatron.runtime.last_error import LastError

Point = tuple[str, int, tuple[str, ...], int]
"""An axis, the size on it, the words of ``bench step`` for it, and its ranks. The others are the model's."""


def run(args: Namespace, more: list[str], finish: Callable[..., None]) -> int:
    """Measure the step at each size, in a process of its own.

    ``finish`` gets ``points``: axis, value and the costs of each; ``unfinished``: None, or why the runs ended
    before the last point; and the machine, as the first run found it.

    Raises:
        UserError: for a mistake in the options, or where a run ends with one.
    """
    on_cpu = args.cpu or not torch.cuda.is_available()
    points = list(_points(args, on_cpu))
    for axis, value, words, ranks in points:
        try:
            options.complete(options.parser().parse_args(words), more, ranks, on_cpu)
        except UserError as error:
            raise UserError(f"no step can be run at {axis} {value}: {error}") from None
        if not on_cpu and ranks > torch.cuda.device_count():
            has = torch.cuda.device_count()
            raise UserError(f"--stages has {ranks}, one GPU each, and there are {has}; leave it out")
    step = cache(_step)  # the model's own size is on each axis
    rows: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    unfinished = None
    for axis, value, words, ranks in tqdm(
        points, desc="sizes", unit="", disable=args.quiet or None, dynamic_ncols=True
    ):
        try:
            found = step((*words, *(["--", *more] if more else [])), 1 if on_cpu else ranks)
        except (UserError, KeyboardInterrupt) as error:
            is_ours = isinstance(error, UserError)
            unfinished = (
                f"the step at {axis} {value} {error}" if is_ours else f"interrupted at {axis} {value}"
            )
            if not rows:
                raise UserError(unfinished) if is_ours else error from None
            break
        machine = machine or found["machine"]
        rows.append({"axis": axis, "value": value, **costs(found["step"])})
    finish({"points": rows, "unfinished": unfinished}, machine)
    if unfinished is not None:
        raise UserError(f"{unfinished}; the sizes before it are kept")
    return 0


def costs(step: dict[str, Any]) -> dict[str, Any]:
    """What measuring and JREG add to the unmodified step.

    Returns:
        ``tokens`` of a micro-batch, and by way ``bytes`` of peak memory and ``kernels``, ordinary and
        logging, on the rank that has most more.
    """

    def most_more(counted: dict[str, dict[str, list[int]]], way: str) -> list[int]:
        pairs = (zip(counted[way][kind], counted[UNMODIFIED][kind], strict=True) for kind in KINDS)
        return [max(more - without for more, without in of_kind) for of_kind in pairs]

    return {"tokens": step["tokens"]} | {
        way: {"bytes": max(most_more(step["peak_bytes"], way)), "kernels": most_more(step["kernels"], way)}
        for way in (MEASURE, JREG)
    }


def _points(args: Namespace, on_cpu: bool) -> Iterator[Point]:
    shape = SHAPES[args.model]
    common = ["step", "--model", shape.name, "--count", "--rounds", "1", "--ways", f"{MEASURE},{JREG}"]
    for name in ("micro_batch", "micro_batches", "dtype"):
        if (given := getattr(args, name)) is not None:
            common += [f"--{name.replace('_', '-')}", str(given)]
    most = 4 if on_cpu else torch.cuda.device_count()
    stages = [n for n in (1, 2, 4) if shape.num_layers % n == 0 and n <= most]
    own_sizes = dict(zip(AXES, (shape.num_layers, shape.hidden_size, shape.sequence, 1), strict=True))
    sizes = {axis: getattr(args, axis) for axis in AXES if getattr(args, axis) is not None}
    if not sizes:
        sizes = {axis: [own // 2, own, 2 * own] for axis, own in own_sizes.items()}
        sizes["stages"] = stages if len(stages) > 1 else []
    for axis, values in sizes.items():
        own = own_sizes[axis]
        for value in values:
            ranks = value if axis == "stages" else 1
            words = [] if value == own else ["--pp" if axis == "stages" else f"--{axis}", str(value)]
            if on_cpu:
                words += ["--cpu"] if ranks == 1 else ["--nproc", str(ranks)]
            yield axis, value, (*common, *words), ranks


def _step(words: tuple[str, ...], ranks: int) -> dict[str, Any]:
    """The document of ``bench step`` with these words, by torchrun if there are several ranks.

    Raises:
        UserError: with how it ended, and why.
    """
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    launcher = [sys.executable, "-m", *(torchrun if ranks > 1 else ()), "jreg_megatron.bench"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "step.json"
        done = subprocess.run(
            [*launcher, words[0], "--quiet", "--json", str(result), *words[1:]],
            env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            preexec_fn=end_with_the_parent,
        )
        if done.returncode != 0 or not result.is_file():
            why = LastError()
            for line in done.stderr.splitlines():
                why.read(line)
            raise UserError(f"ended with status {done.returncode}: {why}")
        document: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return document
