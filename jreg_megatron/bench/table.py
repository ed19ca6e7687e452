"""A benchmark's figures on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console

from jreg_megatron.bench.options import AGAIN, KINDS, UNMODIFIED, WAYS
from jreg_megatron.runtime import output

COUNTED = {
    "peak_bytes": "peak MiB",
    "kernels": "kernels",
    "collectives": "collectives",
    "synchronisations": "syncs",
}
"""What is counted in a step, and its column."""
SHARP = 0.01
"""If half the width of an interval is above this, too few rounds have run."""
_WAITS_FOR = {
    "one": "Host and device are the same here: a step's time contains the work of both.",
    "device": "A step waits for the device.",
    "host": "A step waits for the host: Python and launches.",
    "unknown": "The profiler saw nothing on the device, so it is not known what a step waits for: CUPTI may "
    "need permissions here (the driver's NVreg_RestrictProfilingToAdminUsers=0).",
}
_DEVICE_AND_HOST = (
    "Device and host: seconds in which each is busy in an ordinary step. The profiler makes the host slower."
)
_KERNELS_ON_CPU = "Kernels: torch operations that call no other. Syncs: tensor values that Python reads."
_KERNELS_ON_GPU = (
    "Kernels: all that ran on the device, without copies. Syncs: waits of the host for the device."
)
_CLOCKS = {"processor": "seconds of processor time", "wall": "seconds of wall-clock time on the slowest rank"}


def print_document(console: Console, document: dict[str, Any]) -> None:
    """Print a run's command, machine, versions and figures."""
    machine = document["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    on = machine.get("device") or f"{machine['processor']}, {machine['cores']} cores, {threads} a rank"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    _lines(console, f"$ {document['command']}", f"{document['date']}, {on}", versions)
    printers = {"step": print_step, "kernel": print_kernel, "host": print_host}
    for part in printers.keys() & document.keys():
        printers[part](partial(output.print_table, console=console, box=SIMPLE_HEAD), console, document[part])


def print_step(table: Any, console: Console, step: dict[str, Any]) -> None:
    """Print a line for each way to run a training step: its time, and what it does."""
    model, layout, busy = step["model"], step["layout"], step["busy"]
    parts = "".join(
        f", {name}-parallel {layout[name]}" for name in ("tensor", "pipeline", "context") if layout[name] > 1
    )
    _lines(
        console,
        f"{model['name']}: {model['num_layers']} layers of width {model['hidden_size']}, {step['dtype']}, "
        f"{model['micro_batches']} micro-batches of {model['micro_batch']} x {model['sequence']} tokens on "
        f"{layout['ranks']} {'ranks' if layout['ranks'] > 1 else 'rank'}{parts}; "
        f"gradient in {step['weighted_layers']} layers",
    )
    rows = []
    for name, seconds in step["median_seconds"].items():
        spread = step["spread"].get(name, {})
        is_way = bool(spread)
        row = {
            "way": name,
            "ratio": f"{step['ratio'][name]:.4f}" if is_way else "1",
            "95% interval": _interval(spread["confidence_95"]) if is_way else "",
            "steps": spread.get("steps", ""),
            "seconds": f"{seconds:.4g}",
        }
        rows.append(row | {what: f"{busy[name][what]:.4g}" for what in ("device", "host") if busy})
    title = "Step time relative to the unmodified steps before and after it"
    table(title, list(rows[0]), [row.values() for row in rows])
    _ways(console, {name: WAYS[name].format(**step["jreg"]) for name in step["median_seconds"]})
    notes = [f"Times are the median {_CLOCKS[step['clock']]}.", _WAITS_FOR[step["waits_for"]]]
    notes += [_DEVICE_AND_HOST] if busy else []
    _lines(console, *(f" {note}" for note in (*notes, *_doubts(step["spread"]), *step["notes"])))
    if "kernels" in step:
        counted = (
            (name, *(_counted(step[what], what, name) for what in COUNTED)) for name in step["median_seconds"]
        )
        title = "In addition to an unmodified step: ordinary / measures and logs"
        table(title, ("way", *COUNTED.values()), counted)
        kernels = _KERNELS_ON_CPU if step["waits_for"] == "one" else _KERNELS_ON_GPU
        _lines(console, f" The most on any rank. {kernels}")


def print_kernel(table: Any, console: Console, figures: dict[str, Any]) -> None:
    """Print the kernels compared with a copy, and a layer's whole regularizer in each implementation."""
    widths = figures["widths"].items()
    rounds = ", ".join(f"{of['rounds']} at {width}" for width, of in widths)
    _lines(
        console, f"{figures['kernels']}: {figures['tokens']:,} tokens, {figures['dtype']}, rounds {rounds}"
    )
    kernels = (
        (
            *(width, name, *_times(found), f"{found['bytes_per_second'] / 1e9:,.1f}"),
            "-" if found["share_of_copy"] is None else f"{100 * found['share_of_copy']:.0f}%",
        )
        for width, of in widths
        for name, found in of["kernels"].items()
    )
    title = "Kernels, compared with a copy of as many bytes"
    table(title, ("width", "kernel", "ms", "quartiles", "GB/s", "of the copy's"), kernels, words={"kernel"})
    whole = (
        (width, name, *_times(found), f"{found['ratio']:.2f}")
        for width, of in widths
        for name, found in of["ways"].items()
    )
    title = "A layer's whole regularizer, forward and backward"
    table(title, ("width", "way", "ms", "quartiles", "times JREG's"), whole, words={"way"})
    _ways(console, figures["about"])
    _lines(console, *(f" {note}" for note in figures["notes"]))


def print_host(table: Any, console: Console, host: dict[str, Any]) -> None:
    """Print a line for each way."""
    _lines(
        console,
        f"{host['layers']} layers of width {host['width']} on {host['device']}, 2 x 8 tokens, "
        f"{host['rounds']} rounds",
    )
    rows = (
        (
            name,
            *(f"{of_way[part]:{'' if name == UNMODIFIED else '+'}.1f}" for part in ("forward", "backward")),
        )
        for name, of_way in host["microseconds"].items()
    )
    table("Microseconds per layer and micro-batch", ("way", "forward", "backward"), rows)
    _ways(console, host["about"])
    _lines(console, " The others are in addition to the first. Means of the fastest 5% of rounds.")


def _times(found: dict[str, Any]) -> tuple[str, str]:
    """Milliseconds, and their quartiles."""
    low, high = (f"{1e3 * seconds:.4g}" for seconds in found["quartiles"])
    return f"{1e3 * found['seconds']:.4g}", f"{low} {high}"


def _interval(limits: list[float] | None) -> str:
    return "too few" if limits is None else " ".join(f"{limit:.4f}" for limit in limits)


def _doubts(spread: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Notes if the two unmodified ways differ, and if an interval is wide."""
    intervals = {name: of_way["confidence_95"] for name, of_way in spread.items()}
    if (limits := intervals.get(AGAIN)) and not limits[0] <= 1 <= limits[1]:
        yield (
            f"The machine was too busy: {AGAIN} should have the ratio 1, and its interval does not contain "
            "it. Run it again on a quieter machine, or for longer."
        )
    wide = [name for name, limits in intervals.items() if limits is None or limits[1] - limits[0] > 2 * SHARP]
    if wide:
        yield (
            f"Too few rounds to know the ratio of {', '.join(wide)} within {SHARP:.0%}: raise --seconds, or "
            "name fewer --ways."
        )


def _counted(counts: dict[str, Any], what: str, name: str) -> str:
    """The counts of the ordinary and the logging step; one number if they are equal."""
    is_way = name != UNMODIFIED
    sign, shown = "+" * is_way, []
    for kind in KINDS:
        number = max(counts[name][kind]) - (max(counts[UNMODIFIED][kind]) if is_way else 0)
        shown.append(_mib(number, sign) if what == "peak_bytes" else f"{number:{sign},}")
    return " / ".join(dict.fromkeys(shown))


def _mib(number: int, sign: str) -> str:
    """Bytes in MiB; a few KiB come and go with the profiler itself."""
    return f"{round(number / 2**20, 2) + 0.0:{sign}.2f}"


def _ways(console: Console, about: dict[str, str]) -> None:
    width = max(map(len, about))
    _lines(console, *(f" {name:{width}}  {what}" for name, what in about.items()))


def _lines(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
