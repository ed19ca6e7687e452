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

from jreg_megatron.data.index_file import HEADER, MODE_BYTES, read_index
from jreg_megatron.data.token_file import sha256_of
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
        vocab_size: every id must be below it; None to take it from the manifest, if there is one.
        read_tokens: whether to read all tokens, for their ids and for the sums in the manifest.
        bar: its ``update`` is told the bytes that were read.

    Raises:
        UserError: naming the file, for the first thing that is wrong.
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
    """Number, length in tokens and beginning of up to ``count`` documents that lie evenly in a file."""
    file = TokenFile(prefix)
    count = min(count, file.index.documents)
    for place in range(count):
        number = place * file.index.documents // count
        document = file.document(number)
        ids = document[:_SHOWN_TOKENS].tolist()
        if ids and ids[-1] == tokenizer.eod:
            ids.pop()
        yield number, len(document), tokenizer.decode(ids)


def documents(prefix: str) -> Iterator[numpy.ndarray]:
    """The token ids of each document of a file, mapped and not loaded.

    Raises:
        UserError: naming the file, if it is missing, damaged or holds no token ids.
    """
    file = TokenFile(prefix)
    for number in range(file.index.documents):
        yield file.document(number)


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


class TokenFile:
    """A ``.bin`` and its ``.idx``, which are mapped and not loaded.

    Attributes:
        prefix: their path without the endings.
        index: what the index says.
        lengths: tokens of every sequence.
        tokens: all tokens.
    """

    def __init__(self, prefix: str) -> None:
        """Check that sequences follow each other and that documents hold them all.

        Raises:
            UserError: naming the file, for the first thing that is wrong.
        """
        self.prefix, self.index = prefix, read_index(prefix)
        sequences, documents = self.index.sequences, self.index.documents + 1
        if documents < 1:
            raise self._damaged("it has no list of documents")
        if self.index.dtype.startswith("float"):
            raise UserError(f"{prefix}.idx holds {self.index.dtype}, not token ids; name token files")
        self._item = numpy.dtype(self.index.dtype).itemsize
        listed, size = HEADER.size + 12 * sequences + 8 * documents, os.path.getsize(f"{prefix}.idx")
        if size not in (listed, listed + MODE_BYTES * sequences):
            raise UserError(f"{prefix}.idx has {size} bytes, {listed} are in its lists; make the data again")
        listed, size = self.index.tokens * self._item, os.path.getsize(f"{prefix}.bin")
        if size != listed:
            raise UserError(
                f"{prefix}.bin has {size} bytes, but {prefix}.idx lists {listed}: they do not belong "
                "together; copy or make both again"
            )
        self.tokens = numpy.memmap(f"{prefix}.bin", self.index.dtype, "r", shape=(self.index.tokens,))
        name, place = f"{prefix}.idx", HEADER.size
        self.lengths = numpy.memmap(name, "int32", "r", place, (sequences,))
        self._starts = numpy.memmap(name, "int64", "r", place + 4 * sequences, (sequences,))
        self._ends = numpy.memmap(name, "int64", "r", place + 12 * sequences, (documents,))
        self._check_sequences()
        self._check_documents()

    def document(self, number: int) -> numpy.ndarray:
        """The tokens of a document."""
        start, stop = self._bytes_before(self._ends[number : number + 2]) // self._item
        return self.tokens[start:stop]

    def document_lengths(self) -> Iterator[numpy.ndarray]:
        """Tokens of the documents, in chunks."""
        for start in range(0, self.index.documents, _CHUNK):
            yield numpy.diff(self._bytes_before(self._ends[start : start + _CHUNK + 1])) // self._item

    def _bytes_before(self, sequences: numpy.ndarray) -> numpy.ndarray:
        """Where sequences start in the ``.bin``; the one behind the last starts at its end."""
        starts = self._starts[numpy.minimum(sequences, len(self._starts) - 1)]
        return numpy.where(sequences < len(self._starts), starts, self.tokens.nbytes)

    def _check_sequences(self) -> None:
        if self.lengths.min() < 0:
            number = int(numpy.argmax(self.lengths < 0))
            raise self._damaged(f"sequence {number} has {self.lengths[number]} tokens")
        if self._starts[0] != 0:
            raise self._damaged(f"sequence 0 is said to start at byte {self._starts[0]}")
        for first in range(0, len(self.lengths) - 1, _CHUNK):
            following = self._starts[first + 1 : first + 1 + _CHUNK]
            chunk = slice(first, first + len(following))
            ends = self._starts[chunk] + self.lengths[chunk].astype("int64") * self._item
            wrong = ends != following
            if wrong.any():
                place = int(numpy.argmax(wrong))
                raise self._damaged(
                    f"sequence {first + place + 1} is said to start at byte {following[place]}, but the one "
                    f"before ends at {ends[place]}"
                )

    def _check_documents(self) -> None:
        ends, sequences = self._ends, len(self.lengths)
        if ends[0] != 0 or ends[-1] != sequences:
            raise self._damaged(f"its documents are sequences {ends[0]} to {ends[-1]} of {sequences}")
        is_falling = ends[1:] < ends[:-1]
        if is_falling.any():
            raise self._damaged(f"document {int(numpy.argmax(is_falling))} ends before it starts")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.prefix}.idx is damaged: {what}; make the data again")


def _read_tokens(file: TokenFile, told: dict[str, Any], vocab_size: int | None, bar: Any | None) -> int:
    """Check ids and sums; the greatest id."""
    digest, greatest = hashlib.sha256(), 0
    for start in range(0, len(file.tokens), _CHUNK):
        chunk = file.tokens[start : start + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            place = int(numpy.argmax(chunk < 0 if low < 0 else chunk >= vocab_size))
            limit = f"the tokenizer has {vocab_size} tokens" if vocab_size else "no id is negative"
            raise UserError(
                f"{file.prefix}.bin holds the id {chunk[place]} as token {start + place}, but {limit}; "
                "give the tokenizer that made the data"
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
