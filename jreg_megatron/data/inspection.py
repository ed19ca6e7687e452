"""Verify Megatron's token files and summarize them: ``data inspect``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
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
_BITS = 33


@dataclass
class Summary:
    """A summary of one or several token files, as ``--json`` prints it.

    ``empty`` counts sequences without a token. ``shortest`` and ``longest`` are documents' lengths in tokens.
    ``histogram[0]`` counts documents of length 0, and ``histogram[k]`` those of length 2^(k-1) to 2^k - 1.
    ``largest_id`` is None if the tokens were not read. ``checked_sums`` counts files whose SHA-256 was
    compared with a manifest.
    """

    prefixes: list[str] = field(default_factory=list)
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    empty: int = 0
    dtypes: list[str] = field(default_factory=list)
    shortest: int | None = None
    longest: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * _BITS)
    largest_id: int | None = None
    checked_sums: int = 0


def find_prefixes(names: Iterable[str]) -> list[str]:
    """Prefixes of token files: the named prefixes, and those of all files below the named folders, sorted.

    Raises:
        UserError: for a folder without token files.
    """
    prefixes = []
    for name in names:
        below = [str(path)[:-4] for path in Path(name).rglob("*.idx")] if os.path.isdir(name) else [name]
        if not below:
            raise UserError(f"{name} holds no .idx file; name a prefix or a folder of token files")
        prefixes += sorted(below)
    return prefixes


def inspect(prefixes: Sequence[str], vocab_size: int | None, read_tokens: bool) -> Summary:
    """Verify token files and summarize them. A bar shows the progress.

    Args:
        prefixes: paths without their endings.
        vocab_size: every id must be below it. None means the manifest's number, if there is a manifest.
        read_tokens: read all tokens, to check their ids and the manifest's checksums.

    Raises:
        UserError: for the first error, naming the file.
    """
    from tqdm import tqdm

    summary = Summary(list(prefixes))
    size = sum(path.stat().st_size for prefix in prefixes if (path := Path(f"{prefix}.bin")).is_file())
    off = None if read_tokens else True
    with tqdm(total=size, unit="B", unit_scale=True, desc="verifying", disable=off, leave=False) as bar:
        for prefix in prefixes:
            file = TokenFile(prefix)
            file.verify()
            lengths = file.document_lengths()
            summary.documents += file.documents
            summary.sequences += len(file.lengths)
            summary.tokens += len(file.tokens)
            summary.empty += len(file.lengths) - int(numpy.count_nonzero(file.lengths))
            summary.dtypes += [file.dtype] if file.dtype not in summary.dtypes else []
            summary.longest = max(summary.longest, int(lengths.max(initial=0)))
            shortest = int(lengths.min(initial=summary.longest))
            summary.shortest = shortest if summary.shortest is None else min(shortest, summary.shortest)
            # frexp gives the exponent of the next larger power of two.
            counts = numpy.bincount(numpy.frexp(lengths.astype("float64"))[1], minlength=_BITS)
            summary.histogram = (counts + summary.histogram).tolist()
            if read_tokens:
                told = _told_by_manifest(prefix)
                greatest = _read_tokens(file, told, vocab_size or told.get("vocab_size"), bar)
                summary.largest_id = max(greatest, summary.largest_id or 0)
                summary.checked_sums += 2 if told else 0
    return summary


def samples(prefix: str, count: int, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Index, length and start of up to ``count`` evenly spaced documents, as ``--json`` prints them."""
    file = TokenFile(prefix)
    count = min(count, file.documents)
    for place in range(count):
        number = place * file.documents // count
        document = file.document(number)
        ids = document[:_SHOWN_TOKENS].tolist()
        if ids and ids[-1] == tokenizer.eod:
            ids.pop()
        yield {"document": number, "tokens": len(document), "text": tokenizer.decode(ids)}


def write_blend(path: str, prefixes: Iterable[str]) -> None:
    """Write the list for Megatron's ``--data-args-path``. It has no weights, so Megatron blends by size.

    Raises:
        UserError: if a path has a space, at which Megatron would split it, or if the file cannot be written.
    """
    absolute = [os.path.abspath(prefix) for prefix in prefixes]
    for prefix in absolute:
        if len(prefix.split()) != 1:
            raise UserError(f"{prefix} holds a space, which Megatron's list cannot hold; move it")
    write_text(path, "".join(f"{prefix}\n" for prefix in absolute))


def show(summary: Summary, samples: Iterable[dict[str, Any]]) -> None:
    """Print the numbers, a histogram of lengths, and the samples."""
    mean = summary.tokens / summary.documents if summary.documents else 0
    more = " ..." if summary.prefixes[1:] else ""
    empty = f", {summary.empty:,} of them empty" if summary.empty else ""
    verified = "; the tokens were not read"
    if summary.largest_id is not None:
        verified = f", all token ids (0 to {summary.largest_id:,})"
        verified += ", and the SHA-256 of the manifest" if summary.checked_sums else ""
    print(f"files       {len(summary.prefixes):,} ({summary.prefixes[0]}{more})")
    print(f"documents   {summary.documents:,}")
    print(f"sequences   {summary.sequences:,}{empty}")
    print(f"tokens      {summary.tokens:,} ({', '.join(summary.dtypes)})")
    print(f"a document  {summary.shortest:,} to {summary.longest:,} tokens, {mean:,.0f} on average")
    print(f"verified    the index{verified}\n\nDocuments by length in tokens\n")
    filled = [exponent for exponent, count in enumerate(summary.histogram) if count]
    for exponent in range(filled[0], filled[-1] + 1) if filled else ():
        least, most, count = 1 << exponent >> 1, (1 << exponent) - 1, summary.histogram[exponent]
        lengths = f"{least:,} to {most:,}" if least < most else str(least)
        print(f"{lengths:>30} {count:>15,} {'█' * -(-_BAR * count // max(summary.histogram))}")
    for sample in samples:
        text = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in sample["text"])
        print(f"\nDocument {sample['document']:,}, {sample['tokens']:,} tokens:\n{text}")


def _read_tokens(file: TokenFile, told: dict[str, Any], vocab_size: int | None, bar: Any) -> int:
    """Check ids and checksums; returns the largest id."""
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
    """The file's checksums and vocabulary size from a manifest in its folder; empty without a manifest."""
    folder, name = os.path.split(os.path.abspath(prefix))
    for path in sorted(Path(folder).glob("*.manifest.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = {"sha256": content["outputs"][name]["sha256"], "vocab_size": content["vocab_size"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return found | {"manifest": str(path)}
    return {}
