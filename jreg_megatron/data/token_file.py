"""Megatron's token files, written document by document and put together from parts.

The bytes are those of Megatron's ``IndexedDatasetBuilder``, in memory that does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from jreg_megatron.data.index_file import HEADER, MAGIC, TYPE_CODES

assert sys.byteorder == "little", "Megatron's files are written in the order of the machine"

_CODES = {"uint16": "H", "int32": "i"}


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
    """What a part of a token file holds, and by their endings the size and the CRC-32 of its files."""

    counts: Counts
    files: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of its tokens."""
        return self.files[".bin"][0]


class PartWriter:
    """Writes a part of a token file: ``PATH.bin`` as in the whole, and ``PATH.lengths``, ``PATH.ends``.

    ``.lengths`` has the tokens of every sequence (int32), ``.ends`` the number of sequences up to the end
    of every document (int64).

    Attributes:
        counts: what was added.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        """Start a part of tokens of ``dtype``, ``uint16`` or ``int32``."""
        self.counts = Counts()
        self._code = _CODES[dtype]
        endings = (".bin", ".lengths", ".ends")
        self._files = {ending: Path(f"{path}{ending}").open("wb") for ending in endings}  # noqa: SIM115

    def add(self, ids: list[int], lengths: Sequence[int]) -> None:
        """Add a document of sequences of these lengths; one without tokens has no sequence.

        Raises:
            OverflowError: for an id that the type cannot hold.
        """
        tokens = array(self._code, ids)
        self.counts += Counts(1, len(lengths), len(ids))
        self._files[".bin"].write(tokens)
        self._files[".lengths"].write(array("i", lengths))
        self._files[".ends"].write(array("q", [self.counts.sequences]))

    def close(self) -> Part:
        """Finish the files. They need not be on the disk yet: the sums tell whether they came there."""
        files = {}
        for ending, file in self._files.items():
            file.close()
            size = os.path.getsize(file.name)
            files[ending] = (size, crc_of(Path(file.name), 0, size) or 0)
        return Part(self.counts, files)


def crc_of(path: Path, start: int, size: int) -> int | None:
    """CRC-32 of ``size`` bytes of a file behind the first ``start``; None if it does not hold as many."""
    if not path.is_file() or path.stat().st_size < start + size:
        return None
    return zlib.crc32(numpy.memmap(path, "uint8", "r", start, (size,))) if size else 0


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_index(path: Path, parts: Mapping[Path, Counts], dtype: str) -> None:
    """Write the ``.idx`` of parts that stand one behind the other.

    Args:
        path: the file to write.
        parts: what each holds, in order, by its path as given to :class:`PartWriter`.
        dtype: type of a token.
    """
    total = sum(parts.values(), Counts())
    item = numpy.dtype(dtype).itemsize
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, TYPE_CODES[dtype], total.sequences, total.documents + 1))
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
