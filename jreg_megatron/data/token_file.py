"""Megatron's token files, written document by document and put together from parts.

The bytes are those of Megatron's ``IndexedDatasetBuilder``, in memory that does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from jreg_megatron.data.index_file import HEADER, MAGIC, TYPE_CODES

assert sys.byteorder == "little", "Megatron's files are written in the order of the machine"

ENDINGS = (".bin", ".lengths", ".ends")
"""Of the files of a part."""

_CODES = {"uint16": "H", "int32": "i"}
_FLUSH = 1 << 20
_CHUNK = 1 << 22


def token_type(vocab_size: int) -> str:
    """The NumPy type that Megatron's tool stores ids of that vocabulary in."""
    return "uint16" if vocab_size < 65500 else "int32"


@dataclass(frozen=True)
class Counts:
    """How much a token file holds."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.documents + other.documents, self.sequences + other.sequences, self.tokens + other.tokens
        )


@dataclass(frozen=True)
class Part:
    """What a part of a token file holds, and the CRC-32 of its files by their endings."""

    counts: Counts
    sums: dict[str, int]

    def sizes(self, dtype: str) -> dict[str, int]:
        """Bytes of its files by their endings."""
        counts = self.counts
        item = numpy.dtype(dtype).itemsize
        return {".bin": counts.tokens * item, ".lengths": counts.sequences * 4, ".ends": counts.documents * 8}


class PartWriter:
    """Writes a part of a token file: ``PATH.bin`` as in the whole, and ``PATH.lengths``, ``PATH.ends``.

    ``.lengths`` has the tokens of every sequence (int32), ``.ends`` the number of sequences up to the end
    of every document (int64).
    """

    def __init__(self, path: Path, dtype: str) -> None:
        """Start a part of tokens of ``dtype``, ``uint16`` or ``int32``."""
        self._files = {ending: Path(f"{path}{ending}").open("wb") for ending in ENDINGS}  # noqa: SIM115
        self._sums = dict.fromkeys(ENDINGS, 0)
        self._tokens = array(_CODES[dtype])
        self._lengths, self._ends = array("i"), array("q")
        self._code = _CODES[dtype]
        self._counts = [0, 0, 0]

    def add(self, ids: list[int], lengths: Sequence[int]) -> None:
        """Add a document of sequences of these lengths; one without tokens has no sequence.

        Raises:
            OverflowError: for an id that the type cannot hold.
        """
        counts = self._counts
        counts[0] += 1
        counts[1] += len(lengths)
        counts[2] += len(ids)
        self._tokens += array(self._code, ids)
        self._lengths.extend(lengths)
        self._ends.append(counts[1])
        if len(self._tokens) >= _FLUSH:
            self._flush()

    @property
    def counts(self) -> Counts:
        """What was added."""
        return Counts(*self._counts)

    def close(self) -> Part:
        """Finish the files. They need not be on the disk yet: the sums tell whether they came there."""
        self._flush()
        for file in self._files.values():
            file.close()
        return Part(self.counts, self._sums)

    def _flush(self) -> None:
        for ending, values in zip(ENDINGS, (self._tokens, self._lengths, self._ends), strict=True):
            self._files[ending].write(values)
            self._sums[ending] = zlib.crc32(values, self._sums[ending])
            del values[:]


class Appender:
    """Puts parts one behind the other into a ``.bin`` and takes the sum of its bytes."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it if it is not there; what it holds is to be accepted part by part."""
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._digest = hashlib.sha256()

    def accept(self, size: int, crc: int) -> bool:
        """Go on behind the next ``size`` bytes, if they are there and have that CRC-32."""
        start, digest, found = self._file.tell(), self._digest.copy(), 0
        while size and (chunk := self._file.read(min(size, _CHUNK))):
            digest.update(chunk)
            found = zlib.crc32(chunk, found)
            size -= len(chunk)
        if size or found != crc:
            self._file.seek(start)
            return False
        self._digest = digest
        return True

    def append(self, part: Path) -> None:
        """Append a file behind what was accepted or appended; what stood there is gone."""
        self._file.truncate()
        with part.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                self._digest.update(chunk)
                self._file.write(chunk)
        self._file.flush()

    def close(self) -> str:
        """Bring the file to the disk and close it; its SHA-256."""
        self._file.truncate()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


def crc_of(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_index(path: Path, parts: Iterable[Path], counts: Counts, dtype: str) -> str:
    """Write the ``.idx`` of all parts together; its SHA-256.

    Args:
        path: the file to write.
        parts: paths of the parts in order, as given to :class:`PartWriter`.
        counts: what all parts hold.
        dtype: type of a token.
    """
    parts = list(parts)
    digest = hashlib.sha256()
    item = numpy.dtype(dtype).itemsize
    with path.open("wb") as stream:

        def write(data: bytes) -> None:
            digest.update(data)
            stream.write(data)

        write(HEADER.pack(MAGIC, 1, TYPE_CODES[dtype], counts.sequences, counts.documents + 1))
        for part in parts:
            write(Path(f"{part}.lengths").read_bytes())
        position = 0
        for part in parts:
            ends = position + numpy.cumsum(_read(part, "lengths", "int32"), dtype=numpy.int64) * item
            if ends.size:
                write(numpy.concatenate([[position], ends[:-1]]).astype("int64").tobytes())
                position = int(ends[-1])
        write(numpy.int64(0).tobytes())
        sequences = 0
        for part in parts:
            documents = _read(part, "ends", "int64") + sequences
            write(documents.tobytes())
            sequences = int(documents[-1]) if documents.size else sequences
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def write_documents(prefix: Path, documents: Iterable[list[int]], dtype: str) -> Counts:
    """Write ``PREFIX.bin`` and ``PREFIX.idx`` of documents of one sequence each, none of them empty."""
    writer = PartWriter(prefix, dtype)
    for ids in documents:
        writer.add(ids, [len(ids)])
    counts = writer.close().counts
    write_index(Path(f"{prefix}.idx"), [prefix], counts, dtype)
    for ending in (".lengths", ".ends"):
        Path(f"{prefix}{ending}").unlink()
    return counts


def _read(part: Path, ending: str, dtype: str) -> numpy.ndarray:
    return numpy.fromfile(f"{part}.{ending}", dtype=dtype)
