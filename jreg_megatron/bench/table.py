"""A benchmark's figures on a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jreg_megatron.bench.names import AGAIN, JREG, KINDS, MEASURE, UNMODIFIED, WAYS

COUNTED = {
    "peak_bytes": "peak MiB",
    "kernels": "kernels",
    "collectives": "collectives",
    "synchronisations": "syncs",
}
"""What is counted in a step, and its column."""

TELLS = 0.01
"""Half the width of an interval, above which too few rounds have run to tell."""
_WAITS_FOR = {
    "one": "Host and device are one here: what either does is in a step's time.",
    "device": "A step waits for the device.",
    "host": "A step waits for the host: Python and launches.",
    "unknown": "The profiler saw nothing on the device, so what a step waits for is not known: CUPTI may "
    "need rights here (the driver's NVreg_RestrictProfilingToAdminUsers=0).",
}
_DEVICE_AND_HOST = (
    "Device and host are seconds of an ordinary step in which each does something, by a profiler that makes "
    "the host slower."
)
_KERNELS = {
    "processor": "Kernels are torch's operations that call no other; syncs, tensors' values read by Python.",
    "wall": "Kernels are what ran on the device, copies aside; syncs, the host's waits for it.",
}
_CLOCKS = {
    "processor": "seconds of processor time, on the rank that needs most",
    "wall": "seconds, on the rank that is done last",
}
_OF_RANKS = (
    "The ratio is that of the rank that needs most more, each compared with itself; wall is that of the rank "
    "that is done last."
)


def text_of(console: Console, document: dict[str, Any]) -> str:
    """What :func:`print_document` would print."""
    with console.capture() as capture:
        print_document(console, document)
    return capture.get()


def print_document(console: Console, document: dict[str, Any]) -> None:
    """Print what a run has found, and what it was found on."""
    _print_lines(console, _about(document))
    printers = {"step": print_step, "growth": print_growth, "kernel": print_kernel}
    for part in printers.keys() & document.keys():
        printers[part](console, document[part])
    if "host" in document:
        from jreg_megatron.bench import host  # brings torch

        host.print_table(console, document["host"])


def print_step(console: Console, step: dict[str, Any]) -> None:
    """Print a line for each way to run a training step: its time, and what it does."""
    _print_lines(console, _sizes(step))
    # Wall time too, where processor time is of one rank and says nothing of how ranks wait for each other.
    by_rank = step["clock"] == "processor" and step["layout"]["ranks"] > 1
    busy = step.get("busy", {})
    columns = ["ratio", "95% interval", "steps", "seconds", *(("rank", "wall") if by_rank else ())]
    times = _table(
        "Step time over that of the unmodified steps around it",
        *("way", *columns, *(("device", "host") if busy else ())),
    )
    for name, seconds in step["median_seconds"].items():
        spread = step["spread"].get(name, {"steps": "", "rank": ""})
        row = ["1", ""]
        if name != UNMODIFIED:
            row = [f"{step['ratio'][name]:.4f}", _interval(spread["confidence_95"])]
        row += [str(spread["steps"]), f"{seconds:.4g}"]
        if by_rank:
            row += [
                str(spread["rank"]),
                f"{step['wall'][name]['ratio']:.4f}" if name in step["wall"] else "1",
            ]
        row += [f"{busy[name][what]:.4g}" for what in ("device", "host") if busy]
        times.add_row(name, *row)
    console.print(times)
    settings = {"coeff": step["jreg"]["coeff"], "interval": step["jreg"]["measure_interval"]}
    width = max(map(len, step["median_seconds"]))
    _print_lines(console, *(f" {n:{width}}  {WAYS[n].format(**settings)}" for n in step["median_seconds"]))
    of_ranks = [_OF_RANKS] if by_rank else []
    notes = [
        f"Times are the median {_CLOCKS[step['clock']]}.",
        *of_ranks,
        _WAITS_FOR[step.get("waits_for", "one")],
    ]
    notes += [_DEVICE_AND_HOST] if busy else []
    notes += [*_too_noisy(step), *_too_few(step), *step["notes"]]
    _print_lines(console, *(f" {note}" for note in notes))
    if "kernels" in step:
        counts = _table("Beyond an unmodified step: ordinary / measures and logs", "way", *COUNTED.values())
        for name in step["median_seconds"]:
            counts.add_row(name, *(_counted(step, what, name) for what in COUNTED))
        console.print(counts)
        _print_lines(console, " The most on any rank. " + _KERNELS[step["clock"]])


def print_growth(console: Console, growth: dict[str, Any]) -> None:
    """Print a line for each size and way."""
    title = "What a step does beyond an unmodified one"
    table = _table(title, "size", "way", "kernels", "where it logs", "peak MiB", texts=2)
    axis = None
    for point in growth["points"]:
        if axis not in (None, point["axis"]):
            table.add_section()
        axis = point["axis"]
        size = f"{axis} {point['value']:,}"
        for way in (MEASURE, JREG):
            kernels = (f"{number:+,}" for number in point[way]["kernels"])
            table.add_row(size, way, *kernels, _mib(point[way]["bytes"], "+"))
            size = ""
    console.print(table)
    _print_lines(
        console,
        " On the rank that has most more. kernels: of an ordinary step, and of one that measures and logs.",
    )
    if growth.get("unfinished") is not None:
        _print_lines(console, f" Unfinished: {growth['unfinished']}.")


def print_kernel(console: Console, figures: dict[str, Any]) -> None:
    """Print the kernels beside a copy and a layer's work in several ways, or the tiles that were tried."""
    widths = figures["widths"].items()
    rounds = ", ".join(f"{of['rounds']} at {width}" for width, of in widths)
    _print_lines(
        console, f"{figures['kernels']}: {figures['tokens']:,} tokens, {figures['dtype']}, rounds {rounds}"
    )
    if figures["tuned"]:
        title = "The fastest tiles, and the one in use"
        sizes = ("rows x columns", "warps")
        tuned = _table(title, "width", "kernel", *sizes, "ms", "quartiles", "GB/s", texts=2)
        for width, of in widths:
            for kernel, tiles in of["tiles"].items():
                for tile in [*tiles[:3], *(tile for tile in tiles[3:] if tile["in_use"])]:
                    mark = "  in use" if tile["in_use"] else ""
                    size = f"{tile['rows']} x {tile['columns']}"
                    rate = f"{tile['bytes_per_second'] / 1e9:,.0f}"
                    tuned.add_row(width, kernel + mark, size, str(tile["num_warps"]), *_times(tile), rate)
        console.print(tuned)
    else:
        title = "Kernels, beside a copy that moves as many bytes"
        kernels = _table(title, "width", "kernel", "ms", "quartiles", "GB/s", "of the copy's", texts=2)
        title = "All of a layer's regularizer, forward and backward"
        whole = _table(title, "width", "way", "ms", "quartiles", "times JREG's", texts=2)
        for width, of in widths:
            for name, found in of["kernels"].items():
                share = found["share_of_copy"]
                shown = "-" if share is None else f"{100 * share:.0f}%"
                rate = f"{found['bytes_per_second'] / 1e9:,.1f}"
                kernels.add_row(width, name, *_times(found), rate, shown)
            for name, found in of["ways"].items():
                whole.add_row(width, name, *_times(found), f"{found['ratio']:.2f}")
        console.print(kernels)
        console.print(whole)
        _print_lines(console, *(f" {name:9} {what}" for name, what in figures["about"].items()))
    _print_lines(console, *(f" {note}" for note in figures["notes"]))


def _times(found: dict[str, Any]) -> tuple[str, str]:
    """Milliseconds, and their quartiles."""
    low, high = (f"{1e3 * seconds:.4g}" for seconds in found["quartiles"])
    return f"{1e3 * found['seconds']:.4g}", f"{low} {high}"


def _interval(limits: list[float] | None) -> str:
    return "too few" if limits is None else " ".join(f"{limit:.4f}" for limit in limits)


def _too_noisy(step: dict[str, Any]) -> list[str]:
    """A note where the same as before shows a difference."""
    limits = step["spread"].get(AGAIN, {}).get("confidence_95")
    if limits is None or limits[0] <= 1 <= limits[1]:
        return []
    return [
        f"The machine was too busy: {AGAIN}, which differs in nothing, has an interval without 1. Run it "
        "again when less else runs, or for longer."
    ]


def _too_few(step: dict[str, Any]) -> list[str]:
    """A note where a ratio says little."""
    intervals = {name: spread["confidence_95"] for name, spread in step["spread"].items()}
    wide = [name for name, limits in intervals.items() if limits is None or limits[1] - limits[0] > 2 * TELLS]
    if not wide:
        return []
    return [
        f"Too few rounds to tell the ratio of {', '.join(wide)} within {TELLS:.0%}: raise --seconds, or name "
        "fewer --ways."
    ]


def _about(document: dict[str, Any]) -> str:
    machine = document["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    on = machine.get("device") or f"{machine['processor']}, {machine['cores']} cores, {threads} a rank"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"$ {document['command']}\n{document['date']}, {on}\n{versions}"


def _sizes(step: dict[str, Any]) -> str:
    model, layout = step["model"], step["layout"]
    parts = "".join(
        f", {name}-parallel {layout[name]}" for name in ("tensor", "pipeline", "context") if layout[name] > 1
    )
    return (
        f"{model['name']}: {model['num_layers']} layers of width {model['hidden_size']}, {step['dtype']}, "
        f"{model['micro_batches']} micro-batches of {model['micro_batch']} x {model['sequence']} tokens on "
        f"{layout['ranks']} {'ranks' if layout['ranks'] > 1 else 'rank'}{parts}; "
        f"gradient in {step['weighted_layers']} layers"
    )


def _counted(step: dict[str, Any], what: str, name: str) -> str:
    """Of the ordinary and the logging step, or once for both."""

    def most(of: str, kind: str) -> int:
        return int(max(step[what][of][kind]))

    def shown(kind: str) -> str:
        number = most(name, kind)
        if name != UNMODIFIED:
            number -= most(UNMODIFIED, kind)
        sign = "" if name == UNMODIFIED else "+"
        return _mib(number, sign) if what == "peak_bytes" else f"{number:{sign},}"

    return " / ".join(dict.fromkeys(map(shown, KINDS)))


def _mib(number: int, sign: str) -> str:
    """Bytes in MiB; a few KiB come and go with the profiler itself."""
    return f"{round(number / 2**20, 2) + 0.0:{sign}.2f}"


def _table(title: str, *columns: str, texts: int = 1) -> Table:
    """A table whose first columns, so many, are texts and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < texts else "right", no_wrap=True)
    return table


def _print_lines(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
