"""Megatron's token files: read and check them, write them by document, and join parts.

The bytes are those of Megatron's ``IndexedDatasetBuilder``. Memory does not grow with the corpus. Megatron's
own reader fails with an assertion, or reads past the end of a file that is cut short.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from jreg_megatron.runtime.errors import UserError

assert sys.byteorder == "little", "Megatron's files have the byte order of the machine"

# Megatron's codes for the type of a token, in its .idx format of version 1.
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_TYPE_CODES = {name: code for code, name in _DTYPES.items()}
_MODE_BYTES = 1  # per sequence, at the end of the file, in multimodal data
_AGAIN = "make the data again"
_CODES = {"uint16": "H", "int32": "i"}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Index:
    """An index: the NumPy type of a token, and the numbers of tokens, sequences and documents."""

    dtype: str
    tokens: int
    sequences: int
    documents: int


def read_index(prefix: str) -> Index:
    """Read the header and the end of ``prefix.idx``, and compare them with the size of ``prefix.bin``.

    Raises:
        UserError: naming the file, if one is missing, of another format, cut short or empty.
    """
    hint = "correct the prefix (the path without .bin/.idx)"
    if prefix.endswith((".bin", ".idx")):
        hint = f"leave {prefix[-4:]} out"
    name = f"{prefix}.idx"
    for path in (name, f"{prefix}.bin"):
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a file; {hint}")
    try:
        with open(name, "rb") as stream, open(f"{prefix}.bin", "rb") as tokens:
            header = stream.read(_HEADER.size)
            size, bin_size = (os.fstat(file.fileno()).st_size for file in (stream, tokens))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); fix its access") from error
    if header[:9] != _MAGIC:
        raise UserError(f"{name} is not a Megatron index; {_AGAIN}")
    if len(header) < _HEADER.size:
        raise UserError(f"{name} is cut short; {_AGAIN}")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{name} has version {version} and token type {code}, which Megatron does not read; {_AGAIN}"
        )
    # Per sequence a length (int32) and a position (int64), per document a sequence number (int64).
    if size < _HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"{name} is cut short; {_AGAIN}")
    if sequences == 0:
        raise UserError(f"{name} holds no text; make the data again from a file with text")
    with open(name, "rb") as stream:
        stream.seek(_HEADER.size + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (position,) = struct.unpack("<q", stream.read(8))
    item = numpy.dtype(_DTYPES[code]).itemsize
    end = position + length * item
    if bin_size < end:
        raise UserError(
            f"{prefix}.bin is cut short: {bin_size} bytes of the {end} that {name} lists; "
            "copy or make it again"
        )
    return Index(dtype=_DTYPES[code], tokens=end // item, sequences=sequences, documents=documents - 1)


class TokenFile:
    """A ``.bin`` and its ``.idx``, mapped and not loaded.

    Attributes:
        prefix: the path without the endings.
        index: the header's numbers.
        lengths: the number of tokens of every sequence.
        tokens: all tokens.
    """

    def __init__(self, prefix: str) -> None:
        """Check that each sequence follows the one before, and that the documents hold all sequences.

        Raises:
            UserError: naming the file, for the first error.
        """
        self.prefix, self.index = prefix, read_index(prefix)
        sequences, documents = self.index.sequences, self.index.documents + 1
        if documents < 1:
            raise self._damaged("it has no list of documents")
        if self.index.dtype.startswith("float"):
            raise UserError(f"{prefix}.idx holds {self.index.dtype}, not token ids; name token files")
        self._item = numpy.dtype(self.index.dtype).itemsize
        listed, size = _HEADER.size + 12 * sequences + 8 * documents, os.path.getsize(f"{prefix}.idx")
        if size not in (listed, listed + _MODE_BYTES * sequences):
            raise UserError(f"{prefix}.idx has {size} bytes, but its lists have {listed}; {_AGAIN}")
        listed, size = self.index.tokens * self._item, os.path.getsize(f"{prefix}.bin")
        if size != listed:
            raise UserError(
                f"{prefix}.bin has {size} bytes, but {prefix}.idx lists {listed}, so they do not match; "
                "copy or make both again"
            )
        self.tokens = numpy.memmap(f"{prefix}.bin", self.index.dtype, "r", shape=(self.index.tokens,))
        name, place = f"{prefix}.idx", _HEADER.size
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
        """The byte of the ``.bin`` at which each sequence starts; one after the last starts at its end."""
        starts = self._starts[numpy.minimum(sequences, len(self._starts) - 1)]
        return numpy.where(sequences < len(self._starts), starts, self.tokens.nbytes)

    def _check_sequences(self) -> None:
        if self.lengths.min() < 0:
            number = int(numpy.argmax(self.lengths < 0))
            raise self._damaged(f"sequence {number} has {self.lengths[number]} tokens")
        if self._starts[0] != 0:
            raise self._damaged(f"sequence 0 starts at byte {self._starts[0]}")
        for first in range(0, len(self.lengths) - 1, _CHUNK):
            following = self._starts[first + 1 : first + 1 + _CHUNK]
            chunk = slice(first, first + len(following))
            ends = self._starts[chunk] + self.lengths[chunk].astype("int64") * self._item
            wrong = ends != following
            if wrong.any():
                place = int(numpy.argmax(wrong))
                raise self._damaged(
                    f"sequence {first + place + 1} starts at byte {following[place]}, but the one before "
                    f"ends at {ends[place]}"
                )

    def _check_documents(self) -> None:
        ends, sequences = self._ends, len(self.lengths)
        if ends[0] != 0 or ends[-1] != sequences:
            raise self._damaged(f"its documents are sequences {ends[0]} to {ends[-1]} of {sequences}")
        is_falling = ends[1:] < ends[:-1]
        if is_falling.any():
            raise self._damaged(f"document {int(numpy.argmax(is_falling))} ends before it starts")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.prefix}.idx is damaged: {what}; {_AGAIN}")


def token_type(vocab_size: int) -> str:
    """The NumPy type in which Megatron's tool stores the ids of this vocabulary."""
    return "uint16" if vocab_size < 65500 else "int32"


@dataclass(frozen=True)
class Counts:
    """Numbers of a token file."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.documents + other.documents, self.sequences + other.sequences, self.tokens + other.tokens
        )


@dataclass(frozen=True)
class Part:
    """A part of a token file: its counts, and the size and CRC-32 of its files by ending."""

    counts: Counts
    files: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of the tokens."""
        return self.files[".bin"][0]


class PartWriter:
    """Writes a part of a token file: ``PATH.bin``, ``PATH.lengths`` and ``PATH.ends``.

    ``.bin`` is as in the whole file. ``.lengths`` has the number of tokens of every sequence (int32).
    ``.ends`` has the number of sequences up to the end of every document (int64).
    """

    def __init__(self, path: Path, dtype: str) -> None:
        """Open the files. ``dtype`` is ``uint16`` or ``int32``."""
        self.counts = Counts()
        self._code = _CODES[dtype]
        endings = (".bin", ".lengths", ".ends")
        self._files = {ending: Path(f"{path}{ending}").open("wb") for ending in endings}  # noqa: SIM115

    def add(self, ids: list[int], lengths: Sequence[int]) -> None:
        """Add a document with sequences of these lengths. A document without tokens has no sequence.

        Raises:
            OverflowError: for an id that the type cannot hold.
        """
        tokens = array(self._code, ids)
        self.counts += Counts(1, len(lengths), len(ids))
        self._files[".bin"].write(tokens)
        self._files[".lengths"].write(array("i", lengths))
        self._files[".ends"].write(array("q", [self.counts.sequences]))

    def close(self) -> Part:
        """Close the files. They may not be on the disk yet; the sums show it later."""
        files = {}
        for ending, file in self._files.items():
            file.close()
            size = os.path.getsize(file.name)
            files[ending] = (size, crc_of(Path(file.name), 0, size) or 0)
        return Part(self.counts, files)


def crc_of(path: Path, start: int, size: int) -> int | None:
    """CRC-32 of ``size`` bytes of a file from ``start`` on; None if the file is shorter."""
    if not path.is_file() or path.stat().st_size < start + size:
        return None
    return zlib.crc32(numpy.memmap(path, "uint8", "r", start, (size,))) if size else 0


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_index(path: Path, parts: Mapping[Path, Counts], dtype: str) -> None:
    """Write the ``.idx`` of joined parts. ``parts`` has, in order, the counts of each by its path.

    The path is as in :class:`PartWriter`; ``dtype`` is the type of a token.
    """
    total = sum(parts.values(), Counts())
    item = numpy.dtype(dtype).itemsize
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, _TYPE_CODES[dtype], total.sequences, total.documents + 1))
        for part, counts in parts.items():
            stream.write(numpy.fromfile(f"{part}.lengths", "int32", counts.sequences))
        before = Counts()
        for part, counts in parts.items():
            lengths = numpy.fromfile(f"{part}.lengths", "int32", counts.sequences).astype("int64")
            stream.write((before.tokens + numpy.cumsum(lengths) - lengths) * item)
            before += counts
        stream.write(bytes(8))  # the first document starts at sequence 0
        before = Counts()
        for part, counts in parts.items():
            stream.write(before.sequences + numpy.fromfile(f"{part}.ends", "int64", counts.documents))
            before += counts
        stream.flush()
        os.fsync(stream.fileno())


def write_documents(prefix: Path, documents: Iterable[list[int]], dtype: str) -> Counts:
    """Write ``PREFIX.bin`` and ``PREFIX.idx`` of documents of one sequence each, none of them empty."""
    writer = PartWriter(prefix, dtype)
    for ids in documents:
        writer.add(ids, [len(ids)])
    writer.close()
    write_index(Path(f"{prefix}.idx"), {prefix: writer.counts}, dtype)
    for ending in (".lengths", ".ends"):
        Path(f"{prefix}{ending}").unlink()
    return writer.counts
