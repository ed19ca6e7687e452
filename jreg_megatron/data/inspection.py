"""What Megatron's token files hold, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from jreg_megatron.data.index_file import HEADER, MODE_BYTES, Index, read_index
from jreg_megatron.data.tokenizing import Tokenizer
from jreg_megatron.runtime.errors import UserError

_CHUNK = 1 << 22
_SHOWN_TOKENS = 200


@dataclass
class Summary:
    """What one or several token files hold.

    Attributes:
        prefixes: the files, without their endings.
        documents, sequences, tokens: how much there is.
        empty: sequences without a token.
        dtypes: NumPy types of a token.
        shortest, longest: tokens of a document.
        histogram: number of documents by length: ``histogram[0]`` of length 0, ``histogram[k]`` of length
            2^(k-1) to 2^k - 1.
        largest_id: the greatest token id, or None if the tokens were not read.
        checked_sums: files whose SHA-256 is that of a manifest.
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
    """Prefixes of token files: those named, and all below the folders named, sorted.

    Raises:
        UserError: for a folder without any.
    """
    prefixes = []
    for name in names:
        if not os.path.isdir(name):
            prefixes.append(name)
            continue
        found = sorted(str(path)[:-4] for path in Path(name).rglob("*.idx"))
        if not found:
            raise UserError(f"{name} has no .idx file in it; name a prefix or a folder of token files")
        prefixes += found
    return prefixes


def inspect(
    prefixes: Iterable[str], vocab_size: int | None, read_tokens: bool, bar: Any | None = None
) -> Summary:
    """Verify token files and sum up what they hold.

    Args:
        prefixes: paths without their endings.
        vocab_size: every id must be below it; None to go by the manifest, if there is one.
        read_tokens: whether to read all tokens, for their ids and for the sums that a manifest tells.
        bar: is told by ``update`` the bytes that were read.

    Raises:
        UserError: naming the file, for the first thing that is wrong.
    """
    summary = Summary()
    for prefix in prefixes:
        index = read_index(prefix)
        if index.documents < 0:
            raise UserError(f"{prefix}.idx is damaged: it has no list of documents; make the data again")
        if index.dtype.startswith("float"):
            raise UserError(f"{prefix}.idx tells of {index.dtype}, which are no token ids; name token files")
        summary.prefixes.append(prefix)
        summary.documents += index.documents
        summary.sequences += index.sequences
        summary.tokens += index.tokens
        if index.dtype not in summary.dtypes:
            summary.dtypes.append(index.dtype)
        _check_sizes(prefix, index)
        arrays = _Arrays(prefix, index)
        summary.empty += arrays.check_sequences()
        for lengths in arrays.document_lengths():
            _count(summary, lengths)
        told = _told_by_manifest(prefix)
        if read_tokens:
            greatest = _read_tokens(prefix, index, told, vocab_size, bar)
            summary.largest_id = max(greatest, summary.largest_id or 0)
            summary.checked_sums += 2 if told else 0
    return summary


def samples(prefix: str, count: int, tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """Number, length in tokens and beginning of up to ``count`` documents that lie evenly in a file."""
    index = read_index(prefix)
    arrays = _Arrays(prefix, index)
    tokens = _tokens(prefix, index)
    for place in range(min(count, index.documents)):
        number = place * index.documents // min(count, index.documents)
        start, stop = arrays.document(number)
        ids = tokens[start : min(stop, start + _SHOWN_TOKENS)].tolist()
        if ids and ids[-1] == tokenizer.eod:
            ids.pop()
        yield number, stop - start, tokenizer.decode(ids)


def documents(prefix: str) -> Iterator[numpy.ndarray]:
    """The token ids of each document of a file, mapped and not loaded.

    Raises:
        UserError: naming the file, if it is missing, damaged or holds no token ids.
    """
    index = read_index(prefix)
    if index.dtype.startswith("float"):
        raise UserError(f"{prefix}.idx tells of {index.dtype}, which are no token ids; name token files")
    _check_sizes(prefix, index)
    arrays = _Arrays(prefix, index)
    arrays.check_sequences()
    tokens = _tokens(prefix, index)
    for number in range(index.documents):
        start, stop = arrays.document(number)
        yield tokens[start:stop]


def write_blend(path: Path, prefixes: list[str]) -> None:
    """Write the list for Megatron's ``--data-args-path``. Without weights it blends by the files' lengths.

    Raises:
        UserError: if a path has a space in it, where Megatron would split it, or the file cannot be written.
    """
    absolute = [os.path.abspath(prefix) for prefix in prefixes]
    for prefix in absolute:
        if len(prefix.split()) != 1:
            raise UserError(f"{prefix} has a space in it, which Megatron's list cannot hold; move it")
    try:
        path.write_text("".join(f"{prefix}\n" for prefix in absolute), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--blend is {path}, which cannot be written ({error.strerror}); correct it"
        ) from error


class _Arrays:
    """The three arrays of an index, mapped and not loaded."""

    def __init__(self, prefix: str, index: Index) -> None:
        self._name, self._item = f"{prefix}.idx", numpy.dtype(index.dtype).itemsize
        sequences, documents = index.sequences, index.documents + 1
        place = HEADER.size
        self.lengths = self._map("int32", place, sequences)
        self.pointers = self._map("int64", place + 4 * sequences, sequences)
        self.ends = self._map("int64", place + 12 * sequences, documents)

    def _map(self, dtype: str, offset: int, count: int) -> numpy.ndarray:
        return numpy.memmap(self._name, dtype=dtype, mode="r", offset=offset, shape=(count,))

    def check_sequences(self) -> int:
        """Check that sequences follow each other and documents hold them all; the number of empty ones.

        Raises:
            UserError: naming the first that does not.
        """
        position = empty = 0
        for start in range(0, len(self.lengths), _CHUNK):
            lengths = self.lengths[start : start + _CHUNK].astype("int64")
            if lengths.min() < 0:
                number = start + int(numpy.argmax(lengths < 0))
                raise self._damaged(f"sequence {number} has {self.lengths[number]} tokens")
            ends = position + numpy.cumsum(lengths) * self._item
            starts = numpy.concatenate([[position], ends[:-1]])
            wrong = starts != self.pointers[start : start + _CHUNK]
            if wrong.any():
                first = int(numpy.argmax(wrong))
                pointer = self.pointers[start + first]
                raise self._damaged(
                    f"sequence {start + first} is said to start at byte {pointer}, but the one before ends "
                    f"at {starts[first]}"
                )
            position = int(ends[-1])
            empty += int((lengths == 0).sum())
        if self.ends[0] != 0 or self.ends[-1] != len(self.lengths):
            raise self._damaged(
                f"its documents are sequences {self.ends[0]} to {self.ends[-1]} of {len(self.lengths)}"
            )
        for start in range(0, len(self.ends) - 1, _CHUNK):
            falling = numpy.diff(self.ends[start : start + _CHUNK + 1]) < 0
            if falling.any():
                raise self._damaged(f"document {start + int(numpy.argmax(falling))} ends before it starts")
        return empty

    def document_lengths(self) -> Iterator[numpy.ndarray]:
        """Tokens of the documents, in chunks."""
        for start in range(0, len(self.ends) - 1, _CHUNK):
            bounds = self._positions(self.ends[start : start + _CHUNK + 1])
            yield numpy.diff(bounds) // self._item

    def document(self, number: int) -> tuple[int, int]:
        """First token of a document, and the one behind its last."""
        start, stop = self._positions(self.ends[number : number + 2]) // self._item
        return int(start), int(stop)

    def _positions(self, sequences: numpy.ndarray) -> numpy.ndarray:
        """Where sequences start, in bytes; the one behind the last starts at the end."""
        last = int(self.pointers[-1]) + int(self.lengths[-1]) * self._item
        inside = self.pointers[numpy.minimum(sequences, len(self.pointers) - 1)]
        return numpy.where(sequences < len(self.pointers), inside, last)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._name} is damaged: {what}; make the data again")


def _check_sizes(prefix: str, index: Index) -> None:
    listed = HEADER.size + 12 * index.sequences + 8 * (index.documents + 1)
    size = os.path.getsize(f"{prefix}.idx")
    if size not in (listed, listed + MODE_BYTES * index.sequences):
        raise UserError(f"{prefix}.idx has {size} bytes, {listed} are in its lists; make the data again")
    tokens = index.tokens * numpy.dtype(index.dtype).itemsize
    size = os.path.getsize(f"{prefix}.bin")
    if size != tokens:
        raise UserError(
            f"{prefix}.bin has {size} bytes, but {prefix}.idx lists {tokens}: they do not belong together; "
            "copy or make both again"
        )


def _tokens(prefix: str, index: Index) -> numpy.ndarray:
    return numpy.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r", shape=(index.tokens,))


def _read_tokens(
    prefix: str, index: Index, told: dict[str, Any], vocab_size: int | None, bar: Any | None
) -> int:
    """Check ids and sums; the greatest id."""
    vocab_size = vocab_size or told.get("vocab_size")
    digest = hashlib.sha256()
    tokens, greatest = _tokens(prefix, index), 0
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            wrong = (chunk < 0) if low < 0 else (chunk >= vocab_size)
            place = int(numpy.argmax(wrong))
            raise UserError(
                f"{prefix}.bin holds the id {chunk[place]} as token {start + place}, but the tokenizer has "
                f"{vocab_size} tokens; give the tokenizer that made the data"
            )
        greatest = max(greatest, high)
        if told:
            digest.update(chunk)
        if bar is not None:
            bar.update(chunk.nbytes)
    if told:
        with open(f"{prefix}.idx", "rb") as stream:
            sums = {"bin": digest.hexdigest(), "idx": hashlib.file_digest(stream, "sha256").hexdigest()}
        for ending, value in sums.items():
            if value != told["sha256"][ending]:
                raise UserError(
                    f"{prefix}.{ending} is not what {told['manifest']} tells: its SHA-256 differs; "
                    "copy or make it again"
                )
    return greatest


def _told_by_manifest(prefix: str) -> dict[str, Any]:
    """What a manifest in the same folder says of the file, or nothing."""
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
    # frexp gives the exponent of the next power of two: 0 for 0, k for 2^(k-1) to 2^k - 1.
    counts = numpy.bincount(numpy.frexp(lengths.astype("float64"))[1], minlength=len(summary.histogram))
    for exponent, count in enumerate(counts):
        summary.histogram[exponent] += int(count)
