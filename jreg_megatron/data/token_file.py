"""Megatron's token files: read, check, write and join them. Megatron's own builder writes.

Megatron's own reader is not used: it fails with an assertion, or reads past the end of a truncated file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from jreg_megatron.runtime.errors import UserError

assert sys.byteorder == "little", "Megatron's files have the byte order of the machine"

# Megatron's codes for the type of a token, in its .idx format of version 1.
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_MODE_BYTES = 1  # per sequence, at the end of a multimodal .idx
_AGAIN = "make the data again"
_BUFFER = 1 << 20


class TokenFile:
    """A ``.bin`` and its ``.idx``, memory-mapped.

    Attributes:
        prefix: the path without the endings.
        dtype: the NumPy type of a token.
        lengths: the number of tokens of every sequence.
        tokens: all tokens.
        documents: the number of documents.
    """

    def __init__(self, prefix: str) -> None:
        """Read the index, and compare its last entry with the size of the ``.bin``.

        Raises:
            UserError: if a file is missing, of another format, truncated or empty. It names the file.
        """
        self.prefix = prefix
        hint = "correct the prefix (the path without .bin/.idx)"
        if prefix.endswith((".bin", ".idx")):
            hint = f"leave {prefix[-4:]} out"
        name, bin_name = f"{prefix}.idx", f"{prefix}.bin"
        for path in (name, bin_name):
            if not os.path.isfile(path):
                raise UserError(f"{path} is not a file; {hint}")
        self.dtype, self.lengths, self._starts, self._ends = _read_lists(prefix)
        self._item = numpy.dtype(self.dtype).itemsize
        self.documents = len(self._ends) - 1
        end = int(self._starts[-1]) + int(self.lengths[-1]) * self._item if len(self.lengths) else 0
        if end <= 0:
            raise UserError(f"{name} has no tokens; make the data again from a file with text")
        if os.path.getsize(bin_name) < end:
            raise UserError(
                f"{bin_name} is cut short: {os.path.getsize(bin_name)} bytes of the {end} that {name} lists; "
                "copy or make it again"
            )
        self.tokens = numpy.memmap(bin_name, self.dtype, "r", shape=(end // self._item,))

    def verify(self) -> None:
        """Check that each sequence follows the previous one, and that the documents hold all sequences.

        Raises:
            UserError: for the first error, naming the file.
        """
        name, ends, count = f"{self.prefix}.idx", self._ends, len(self.lengths)
        if self.dtype.startswith("float"):
            raise UserError(f"{name} holds {self.dtype}, not token ids; name token files")
        lists = _HEADER.size + 12 * count + 8 * len(ends)
        modes = _MODE_BYTES * count * (os.path.getsize(name) != lists)
        for path, listed in ((name, lists + modes), (f"{self.prefix}.bin", self.tokens.nbytes)):
            if os.path.getsize(path) != listed:
                raise UserError(
                    f"{path} has {os.path.getsize(path)} bytes, but {name} lists {listed}; copy or make both "
                    "again"
                )
        starts = (numpy.cumsum(self.lengths, dtype="int64") - self.lengths) * self._item
        is_whole = self.lengths.min() >= 0 and (starts == self._starts).all()
        is_whole &= len(ends) > 0 and ends[0] == 0 and ends[-1] == count and (numpy.diff(ends) >= 0).all()
        if not is_whole:
            raise UserError(
                f"{name} is damaged: its sequences or documents do not follow each other; {_AGAIN}"
            )

    def document(self, number: int) -> numpy.ndarray:
        """The tokens of document ``number``, from 0."""
        start, stop = self._tokens_before(self._ends[number : number + 2])
        return self.tokens[start:stop]

    def document_lengths(self) -> numpy.ndarray:
        """The number of tokens of every document."""
        return numpy.diff(self._tokens_before(self._ends))

    def _tokens_before(self, sequences: numpy.ndarray) -> numpy.ndarray:
        """The index of each sequence's first token. For one sequence after the last: the number of tokens."""
        starts = self._starts[numpy.minimum(sequences, len(self._starts) - 1)] // self._item
        return numpy.where(sequences < len(self._starts), starts, len(self.tokens))


def builder(prefix: Path, vocab_size: int) -> Any:
    """Megatron's writer of token files; its ``finalize`` writes the ``.idx``."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocab_size))


def join(prefix: Path, parts: Iterable[Path], vocab_size: int) -> dict[str, Any]:
    """Join token files. Returns the numbers of documents, sequences and tokens, and the token type."""
    whole, sequences = builder(prefix, vocab_size), 0
    lengths, ends = [numpy.zeros(0, "int32")], [numpy.zeros(1, "int64")]
    for part in parts:
        with open(f"{part}.bin", "rb") as source:
            shutil.copyfileobj(source, whole.data_file, _BUFFER)
        _, lengths_of_part, _, ends_of_part = _read_lists(str(part))
        lengths.append(lengths_of_part.copy())  # a copy, so that the mapped file can be closed
        ends.append(ends_of_part[1:] + sequences)
        sequences += len(lengths_of_part)
    # Megatron's add_index is slow: it makes a Python object per number, and collects garbage per part.
    whole.sequence_lengths = numpy.concatenate(lengths)
    whole.document_indices = numpy.concatenate(ends)
    whole.finalize(f"{prefix}.idx")
    tokens, documents = whole.sequence_lengths.sum(dtype="int64"), len(whole.document_indices) - 1
    dtype = whole.dtype.__name__
    return {"documents": documents, "sequences": sequences, "tokens": int(tokens), "dtype": dtype}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_lists(prefix: str) -> tuple[str, numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """From an ``.idx``: the token type, each sequence's length and first byte, and the documents' bounds.

    Document n holds the sequences from ``bounds[n]`` up to ``bounds[n + 1]``.
    """
    name = f"{prefix}.idx"
    try:
        with open(name, "rb") as stream, open(f"{prefix}.bin", "rb"):
            header = stream.read(_HEADER.size).ljust(_HEADER.size, b"\0")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); fix its access") from error
    magic, version, code, sequences, ends = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise UserError(f"{name} is not a Megatron index; {_AGAIN}")
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{name} has version {version} and token type {code}, which Megatron does not read; {_AGAIN}"
        )
    index, place = numpy.memmap(name, "uint8", "r"), _HEADER.size
    if len(index) < place + 12 * sequences + 8 * ends:
        raise UserError(f"{name} is cut short; {_AGAIN}")
    lengths = numpy.frombuffer(index, "int32", sequences, place)
    starts = numpy.frombuffer(index, "int64", sequences, place + 4 * sequences)
    return _DTYPES[code], lengths, starts, numpy.frombuffer(index, "int64", ends, place + 12 * sequences)
