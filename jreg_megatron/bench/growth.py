"""How JREG's cost grows with layers, width, sequence and pipeline stages: counted in a step of each size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jreg_megatron.bench import options
from jreg_megatron.bench.names import JREG, KINDS, MEASURE, UNMODIFIED
from jreg_megatron.bench.shapes import SHAPES, Shape, find_shape
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.last_error import LastError

_AXES = {"layers": "num_layers", "width": "hidden_size", "sequence": "sequence"}
STAGES = "stages"


@dataclass(frozen=True)
class Point:
    """One size on one axis; the others are the model's own."""

    axis: str
    value: int
    options: tuple[str, ...]
    """Of ``bench step``."""
    ranks: int = 1


def add_arguments(parser: ArgumentParser) -> None:
    """Define the options of ``bench growth``."""
    parser.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help=f"where to start: {', '.join(SHAPES)}, or the name of its recipe (default: %(default)s)",
    )
    for axis in (*_AXES, STAGES):
        default = "1, 2 and 4" if axis == STAGES else "half, the model's own, and twice it"
        what = "pipeline stages, one rank each" if axis == STAGES else axis
        parser.add_argument(
            f"--{axis}", metavar="N,...", help=f"{what} to measure at; none to leave out (default: {default})"
        )
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences of a micro-batch")
    parser.add_argument("--micro-batches", type=int, metavar="N", help="micro-batches of a step")
    parser.add_argument("--dtype", choices=options.DTYPES, help="by default bf16 on a GPU and fp32 on a CPU")
    parser.add_argument("--cpu", action="store_true", help="the default where there is no CUDA device")


def run(args: Namespace, more: list[str]) -> dict[str, Any]:
    """Measure the step at each size, in a process of its own.

    Returns:
        ``points``: axis, value and the costs of each; ``machine``, as the first run found it;
        ``unfinished``: None, or why the runs ended before the last point.

    Raises:
        UserError: for a mistake in the options, or where the first run ends with one.
    """
    on_cpu = args.cpu or not options.has_cuda()
    points = list(_points(args, on_cpu))
    for axis in {point.axis: None for point in points}:
        if sum(point.axis == axis for point in points) < 2:
            raise UserError(f"--{axis} is {getattr(args, axis)}; growth needs two sizes, or none")
    if not points:
        raise UserError("every axis is none; leave one in")
    for point in points:
        _check(point, args, more, on_cpu)
    from tqdm import tqdm

    measured: dict[tuple[str, ...], dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    unfinished = None
    for point in tqdm(points, desc="sizes", unit="", disable=args.quiet or None, dynamic_ncols=True):
        if point.options not in measured:
            try:
                measured[point.options] = _step(point, args, more, on_cpu)
            except (UserError, KeyboardInterrupt) as error:
                if not rows:
                    raise
                unfinished = str(error) or f"interrupted at {point.axis} {point.value}"
                break
        found = measured[point.options]
        machine = machine or found["machine"]
        rows.append({"axis": point.axis, "value": point.value, **costs(found["step"])})
    return {"points": rows, "machine": machine, "unfinished": unfinished}


def costs(step: dict[str, Any]) -> dict[str, Any]:
    """What measuring and JREG add to the unmodified step.

    Returns:
        ``tokens`` of a micro-batch, and by way ``bytes`` of peak memory and ``kernels``, ordinary and
        logging, on the rank that has most more.
    """
    found: dict[str, Any] = {"tokens": step["tokens"]}
    for way in (MEASURE, JREG):
        kernels = _most_more(step["kernels"], way)
        found[way] = {"bytes": max(_most_more(step["peak_bytes"], way)), "kernels": kernels}
    return found


def _most_more(counted: dict[str, dict[str, list[int]]], way: str) -> list[int]:
    """Beyond the unmodified step, on the rank that has most more, by kind of step."""
    return [
        max(
            more - without
            for more, without in zip(counted[way][kind], counted[UNMODIFIED][kind], strict=True)
        )
        for kind in KINDS
    ]


def _points(args: Namespace, on_cpu: bool) -> Iterator[Point]:
    shape = find_shape(args.model)
    if shape is None:
        raise UserError(f"--model is {args.model}; it must be one of {', '.join(SHAPES)}, or a recipe's name")
    for axis, name in _AXES.items():
        own: int = getattr(shape, name)
        for value in _values(args, axis, [own // 2, own, 2 * own]):
            yield Point(axis, value, () if value == own else (f"--{axis}", str(value)))
    for value in _values(args, STAGES, _stages(shape, on_cpu)):
        yield Point(STAGES, value, () if value == 1 else ("--pp", str(value)), ranks=value)


def _stages(shape: Shape, on_cpu: bool) -> list[int]:
    """What can be run here; no less than two sizes, or none."""
    most = 4 if on_cpu else _devices()
    stages = [stages for stages in (1, 2, 4) if shape.num_layers % stages == 0 and stages <= most]
    return stages if len(stages) > 1 else []


def _values(args: Namespace, axis: str, default: list[int]) -> list[int]:
    text = getattr(args, axis)
    if text is None:
        return default
    if text == "none":
        return []
    try:
        values = list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise UserError(f"--{axis} is {text}; it must be whole numbers >= 1 with commas, or none")
    return values


def _words(point: Point, args: Namespace, on_cpu: bool) -> list[str]:
    """The options of ``bench step`` at a point."""
    words = ["--model", args.model, "--count", "--rounds", "1"]
    words += ["--ways", f"{MEASURE},{JREG}"]
    for name in ("micro_batch", "micro_batches", "dtype"):
        value = getattr(args, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    if on_cpu:
        words += ["--cpu"] if point.ranks == 1 else ["--nproc", str(point.ranks)]
    return [*words, *point.options]


def _check(point: Point, args: Namespace, more: list[str], on_cpu: bool) -> None:
    """Refuse what ``bench step`` would refuse at a point."""
    parser = ArgumentParser()
    options.add_step_arguments(parser)
    try:
        options.setup_of(parser.parse_args(_words(point, args, on_cpu)), more, point.ranks, on_cpu)
    except UserError as error:
        raise UserError(f"no step can be run at {point.axis} {point.value}: {error}") from None
    if not on_cpu and point.ranks > (has := _devices()):
        raise UserError(f"--{STAGES} has {point.ranks}, one GPU each, and there are {has}; leave it out")


def _step(point: Point, args: Namespace, more: list[str], on_cpu: bool) -> dict[str, Any]:
    """The document of ``bench step`` at a point."""
    launcher = ["-m"]
    if not on_cpu and point.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.ranks}", "-m"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "step.json"
        command = [sys.executable, *launcher, "jreg_megatron.bench", "step", *_words(point, args, on_cpu)]
        command += ["--quiet", "--json", str(result), *(["--", *more] if more else [])]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        from jreg_megatron.runtime.fork import end_with_the_parent

        done = subprocess.run(
            command,
            env=environment,
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
            raise UserError(
                f"the step at {point.axis} {point.value} ended with status {done.returncode}: {why}"
            )
        document: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return document


def _devices() -> int:
    import torch

    return torch.cuda.device_count()
