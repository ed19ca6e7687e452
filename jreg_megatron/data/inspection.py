"""Verify Megatron's token files and summarize them: ``data inspect``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from jreg_megatron.data.token_file import TokenFile, sha256_of
from jreg_megatron.data.tokenizing import Tokenizer
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import write_text

_CHUNK = 1 << 22
_SHOWN_TOKENS, _BAR = 200, 40


@dataclass
class Summary:
    """A summary of one or several token files, as ``--json`` prints it.

    ``empty`` counts sequences without a token; ``shortest`` and ``longest`` are of documents, in tokens.
    ``histogram[0]`` counts documents of length 0, ``histogram[k]`` those of length 2^(k-1) to 2^k - 1.
    ``largest_id`` is None if the tokens were not read. ``checked_sums`` counts files whose SHA-256 is the
    manifest's.
    """

    prefixes: list[str] = field(default_factory=list)
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    empty: int = 0
    dtypes: list[str] = field(default_factory=list)
    shortest: int | None = None
    longest: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * 33)
    largest_id: int | None = None
    checked_sums: int = 0


def find_prefixes(names: Iterable[str]) -> list[str]:
    """Prefixes of token files: the named ones, and all below the named folders, sorted.

    Raises:
        UserError: for a folder without token files.
    """
    prefixes = []
    for name in names:
        if not os.path.isdir(name):
            prefixes.append(name)
            continue
        found = sorted(str(path)[:-4] for path in Path(name).rglob("*.idx"))
        if not found:
            raise UserError(f"{name} holds no .idx file; name a prefix or a folder of token files")
        prefixes += found
    return prefixes


def inspect(
    prefixes: Iterable[str], vocab_size: int | None, read_tokens: bool, bar: Any | None = None
) -> Summary:
    """Verify token files and summarize them.

    Args:
        prefixes: paths without their endings.
        vocab_size: every id must be below it; None for the manifest's number, if there is a manifest.
        read_tokens: read all tokens, to check their ids and the manifest's sums.
        bar: a progress bar in bytes.

    Raises:
        UserError: naming the file, for the first error.
    """
    summary = Summary()
    for prefix in prefixes:
        file = TokenFile(prefix)
        summary.prefixes.append(prefix)
        summary.documents += file.index.documents
        summary.sequences += file.index.sequences
        summary.tokens += file.index.tokens
        summary.empty += file.index.sequences - int(numpy.count_nonzero(file.lengths))
        if file.index.dtype not in summary.dtypes:
            summary.dtypes.append(file.index.dtype)
        for lengths in file.document_lengths():
            _count(summary, lengths)
        if read_tokens:
            told = _told_by_manifest(prefix)
            greatest = _read_tokens(file, told, vocab_size or told.get("vocab_size"), bar)
            summary.largest_id = max(greatest, summary.largest_id or 0)
            summary.checked_sums += 2 if told else 0
    return summary


def samples(prefix: str, count: int, tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """Number, length in tokens and beginning of up to ``count`` evenly spaced documents of a file."""
    file = TokenFile(prefix)
    count = min(count, file.index.documents)
    for place in range(count):
        number = place * file.index.documents // count
        document = file.document(number)
        ids = document[:_SHOWN_TOKENS].tolist()
        if ids and ids[-1] == tokenizer.eod:
            ids.pop()
        yield number, len(document), tokenizer.decode(ids)


def write_blend(path: str, prefixes: list[str]) -> None:
    """Write the list for Megatron's ``--data-args-path``. It has no weights, so Megatron blends by size.

    Raises:
        UserError: if a path holds a space, where Megatron would split it, or the file cannot be written.
    """
    absolute = [os.path.abspath(prefix) for prefix in prefixes]
    for prefix in absolute:
        if len(prefix.split()) != 1:
            raise UserError(f"{prefix} holds a space, which Megatron's list cannot hold; move it")
    write_text(path, "".join(f"{prefix}\n" for prefix in absolute))


def _read_tokens(file: TokenFile, told: dict[str, Any], vocab_size: int | None, bar: Any | None) -> int:
    """Check ids and sums; returns the largest id."""
    digest, greatest = hashlib.sha256(), 0
    for start in range(0, len(file.tokens), _CHUNK):
        chunk = file.tokens[start : start + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            place = int(numpy.argmax(chunk < 0 if low < 0 else chunk >= vocab_size))
            limit = f"the tokenizer has {vocab_size} tokens" if vocab_size else "no id is negative"
            raise UserError(
                f"{file.prefix}.bin holds the id {chunk[place]} as token {start + place}, but {limit}; give "
                "the tokenizer of the data"
            )
        greatest = max(greatest, high)
        digest.update(chunk)
        if bar is not None:
            bar.update(chunk.nbytes)
    if told:
        sums = {"bin": digest.hexdigest(), "idx": sha256_of(Path(f"{file.prefix}.idx"))}
        for ending, value in sums.items():
            if value != told["sha256"][ending]:
                raise UserError(
                    f"{file.prefix}.{ending} does not match {told['manifest']}: its SHA-256 differs; "
                    "copy or make it again"
                )
    return greatest


def _told_by_manifest(prefix: str) -> dict[str, Any]:
    """The file's entry in a manifest of its folder; empty if there is none."""
    folder, name = os.path.split(os.path.abspath(prefix))
    for path in sorted(Path(folder).glob("*.manifest.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = {"sha256": content["outputs"][name]["sha256"], "vocab_size": content["vocab_size"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return found | {"manifest": str(path)}
    return {}


def _count(summary: Summary, lengths: numpy.ndarray) -> None:
    if not len(lengths):
        return
    low, high = int(lengths.min()), int(lengths.max())
    summary.shortest = low if summary.shortest is None else min(low, summary.shortest)
    summary.longest = max(high, summary.longest)
    # frexp gives the exponent of the next power of two.
    counts = numpy.bincount(numpy.frexp(lengths.astype("float64"))[1], minlength=len(summary.histogram))
    for exponent, count in enumerate(counts):
        summary.histogram[exponent] += int(count)


def show(summary: Summary, samples: Iterable[tuple[int, int, str]]) -> None:
    """Print the numbers, a histogram of lengths, and samples as (number, tokens, beginning)."""
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
        lengths.add_row(_range(exponent), f"{count:,}", "█" * -(-_BAR * count // most))
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
    return str(exponent) if exponent < 2 else f"{1 << (exponent - 1):,} to {(1 << exponent) - 1:,}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
