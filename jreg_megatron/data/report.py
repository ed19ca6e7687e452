"""What ``inspect`` prints."""

from __future__ import annotations

from collections.abc import Iterable

from jreg_megatron.data.inspection import Summary

_WIDTH = 40


def show(summary: Summary, samples: Iterable[tuple[int, int, str]]) -> None:
    """Print numbers, the lengths of documents, and samples as (number, tokens, beginning)."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console(highlight=False, markup=False)
    for name, value in _rows(summary).items():
        out.print(f"{name:<11} {value}", soft_wrap=True)
    lengths = Table(box=SIMPLE, title="Documents by length in tokens", title_justify="left")
    lengths.add_column("tokens", justify="right")
    lengths.add_column("documents", justify="right")
    lengths.add_column("")
    filled = [exponent for exponent, count in enumerate(summary.histogram) if count]
    most = max(summary.histogram)
    for exponent in range(filled[0], filled[-1] + 1) if filled else ():
        count = summary.histogram[exponent]
        lengths.add_row(_range(exponent), f"{count:,}", "█" * -(-_WIDTH * count // most))
    out.print(lengths)
    for number, tokens, beginning in samples:
        out.print(f"Document {number:,}, {tokens:,} tokens:", style="bold")
        out.print(Text(_printable(beginning)))


def _rows(summary: Summary) -> dict[str, str]:
    mean = summary.tokens / summary.documents if summary.documents else 0
    more = " ..." if len(summary.prefixes) > 1 else ""
    rows = {
        "files": f"{len(summary.prefixes):,} ({summary.prefixes[0]}{more})",
        "documents": f"{summary.documents:,}",
        "sequences": f"{summary.sequences:,}"
        + (f", {summary.empty:,} of them empty" if summary.empty else ""),
        "tokens": f"{summary.tokens:,} ({', '.join(summary.dtypes)})",
        "a document": f"{summary.shortest:,} to {summary.longest:,} tokens, {mean:,.0f} on average",
    }
    if summary.largest_id is None:
        return rows | {"verified": "the index; the tokens were not read"}
    sums = ", and the SHA-256 of the manifest" if summary.checked_sums else ""
    return rows | {"verified": f"the index, all token ids (0 to {summary.largest_id:,}){sums}"}


def _range(exponent: int) -> str:
    if exponent < 2:
        return str(exponent)
    return f"{1 << (exponent - 1):,} to {(1 << exponent) - 1:,}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
