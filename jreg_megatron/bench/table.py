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

_MIB = 2**20
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
    console.print(_about(document), highlight=False, soft_wrap=True)
    if "step" in document:
        print_step(console, document["step"])
    if "growth" in document:
        print_growth(console, document["growth"])
    if "host" in document:
        from jreg_megatron.bench import host

        host.print_table(console, document["host"])
    if "kernel" in document:
        from jreg_megatron.bench import kernel

        kernel.print_table(console, document["kernel"])


def print_step(console: Console, step: dict[str, Any]) -> None:
    """Print a line for each way to run a training step: its time, and what it does."""
    console.print(_sizes(step), highlight=False, soft_wrap=True)
    times = _table("Step time over that of the unmodified steps around it")
    # Wall time too, where processor time is of one rank and says nothing of how ranks wait for each other.
    by_rank = step["clock"] == "processor" and step["layout"]["ranks"] > 1
    columns = ["way", "ratio", "95% interval", "steps", "seconds", *(("rank", "wall") if by_rank else ())]
    for column in columns:
        times.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for name, seconds in step["median_seconds"].items():
        if name == UNMODIFIED:
            times.add_row(name, "1", "", "", f"{seconds:.4g}", *(("", "1") if by_rank else ()))
            continue
        spread = step["spread"][name]
        row = [name, f"{step['ratio'][name]:.4f}", _interval(spread["confidence_95"], ".4f")]
        row += [str(spread["steps"]), f"{seconds:.4g}"]
        row += [str(spread["rank"]), f"{step['wall'][name]['ratio']:.4f}"] if by_rank else []
        times.add_row(*row)
    console.print(times)
    settings = {"coeff": step["jreg"]["coeff"], "interval": step["jreg"]["measure_interval"]}
    width = max(map(len, step["median_seconds"]))
    for name in step["median_seconds"]:
        console.print(f" {name:{width}}  {WAYS[name].format(**settings)}", highlight=False, soft_wrap=True)
    clock = f"Times are the median {_CLOCKS[step['clock']]}."
    of_ranks = [_OF_RANKS] if by_rank else []
    for note in (clock, *of_ranks, *_too_noisy(step), *_unseen(step), *step["notes"]):
        console.print(f" {note}", highlight=False, soft_wrap=True)
    _print_counts(console, step)


def _print_counts(console: Console, step: dict[str, Any]) -> None:
    counts = _table("Beyond an unmodified step: ordinary / measures and logs")
    counts.add_column("way", no_wrap=True)
    for column in COUNTED.values():
        counts.add_column(column, justify="right", no_wrap=True)
    for name in step["median_seconds"]:
        counts.add_row(name, *(_counted(step, what, name) for what in COUNTED))
    console.print(counts)
    console.print(" The most on any rank. " + _KERNELS[step["clock"]], highlight=False, soft_wrap=True)


def print_growth(console: Console, growth: dict[str, Any]) -> None:
    """Print a line for each size and way."""
    table = _table("What a step costs beyond an unmodified one, in ms")
    for column in ("size", "way", "step", "more", "95% interval", "kernels", "MiB"):
        is_text = column in ("size", "way")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    axis = None
    for point in growth["points"]:
        if axis not in (None, point["axis"]):
            table.add_section()
        axis = point["axis"]
        size = f"{axis} {point['value']:,}"
        for way in (MEASURE, JREG):
            cost = point[way]
            memory = f"{round(cost['bytes'] / _MIB, 2) + 0.0:.2f}"
            before = f"{1e3 * point['unmodified_seconds']:.0f}"
            interval = _interval(cost["milliseconds_95"], ".1f")
            kernels = " ".join(f"{number:,}" for number in cost["kernels"])
            more = (f"{cost['milliseconds']:.1f}", interval, kernels, memory)
            table.add_row(size, way, before, *more)
            size = ""
    console.print(table)
    console.print(
        " step: the unmodified one. kernels: of an ordinary step, and of one that measures and logs. "
        "MiB: of peak memory. Both on the rank that has most more.",
        highlight=False,
        soft_wrap=True,
    )
    if growth.get("unfinished") is not None:
        console.print(f" Unfinished: {growth['unfinished']}.", highlight=False, soft_wrap=True)


def _interval(limits: list[float] | None, form: str) -> str:
    return "too few" if limits is None else " ".join(format(limit, form) for limit in limits)


def _too_noisy(step: dict[str, Any]) -> list[str]:
    """A note where the same as before shows a difference."""
    limits = step["spread"].get(AGAIN, {}).get("confidence_95")
    if limits is None or limits[0] <= 1 <= limits[1]:
        return []
    return [
        f"The machine was too busy: {AGAIN}, which differs in nothing, has an interval without 1. Run it "
        "again when less else runs, or for longer."
    ]


def _unseen(step: dict[str, Any]) -> list[str]:
    """A note where the profiler has not seen the device, so that counts of zero mean nothing."""
    if all(any(ranks) for ranks in step["kernels"][UNMODIFIED].values()):
        return []
    return [
        "The profiler saw no kernel, so kernels and synchronisations are not counted: CUPTI may need rights "
        "here (the driver's NVreg_RestrictProfilingToAdminUsers=0)."
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
        # A few KiB come and go with the profiler itself.
        return f"{round(number / _MIB, 2) + 0.0:{sign}.2f}" if what == "peak_bytes" else f"{number:{sign},}"

    return " / ".join(dict.fromkeys(map(shown, KINDS)))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD)
