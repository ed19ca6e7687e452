"""Megatron's token files: read and check them, write them by document, and join them.

The bytes are those of Megatron's ``IndexedDatasetBuilder``, which makes a Python object of every number. Its
own reader fails with an assertion, or reads past the end of a file that is cut short.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy

from jreg_megatron.runtime.errors import UserError

assert sys.byteorder == "little", "Megatron's files have the byte order of the machine"

# Megatron's codes for the type of a token, in its .idx format of version 1.
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_MODE_BYTES = 1  # per sequence, at the end of the file, in multimodal data
_AGAIN = "make the data again"
_BUFFER = 1 << 20


class TokenFile:
    """A ``.bin`` and its ``.idx``, mapped and not loaded.

    Attributes:
        prefix: the path without the endings.
        dtype: the NumPy type of a token.
        lengths: the number of tokens of every sequence.
        tokens: all tokens.
        documents: the number of documents.
    """

    def __init__(self, prefix: str) -> None:
        """Read the header, and compare the end of the index with the size of the ``.bin``.

        Raises:
            UserError: naming the file, if one is missing, of another format, cut short or empty.
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
            raise UserError(f"{name} holds no text; make the data again from a file with text")
        if os.path.getsize(bin_name) < end:
            raise UserError(
                f"{bin_name} is cut short: {os.path.getsize(bin_name)} bytes of the {end} that {name} lists; "
                "copy or make it again"
            )
        self.tokens = numpy.memmap(bin_name, self.dtype, "r", shape=(end // self._item,))

    def verify(self) -> None:
        """Check that each sequence follows the one before, and that the documents hold all sequences.

        Raises:
            UserError: naming the file, for the first error.
        """
        name, ends, count = f"{self.prefix}.idx", self._ends, len(self.lengths)
        if not len(ends):
            raise self._damaged("it has no list of documents")
        if self.dtype.startswith("float"):
            raise UserError(f"{name} holds {self.dtype}, not token ids; name token files")
        size, listed = os.path.getsize(name), _HEADER.size + 12 * count + 8 * len(ends)
        if size not in (listed, listed + _MODE_BYTES * count):
            raise UserError(f"{name} has {size} bytes, but its lists have {listed}; {_AGAIN}")
        size = os.path.getsize(f"{self.prefix}.bin")
        if size != self.tokens.nbytes:
            raise UserError(
                f"{self.prefix}.bin has {size} bytes, but {name} lists {self.tokens.nbytes}, so they do not "
                "match; copy or make both again"
            )
        if self.lengths.min() < 0:
            number = int(numpy.argmax(self.lengths < 0))
            raise self._damaged(f"sequence {number} has {self.lengths[number]} tokens")
        starts = _starts(self.lengths, self._item)
        if (wrong := starts != self._starts).any():
            number = int(numpy.argmax(wrong))
            raise self._damaged(
                f"sequence {number} starts at byte {self._starts[number]}, but those before end at "
                f"{starts[number]}"
            )
        if ends[0] != 0 or ends[-1] != count:
            raise self._damaged(f"its documents are sequences {ends[0]} to {ends[-1]} of {count}")
        if (is_falling := ends[1:] < ends[:-1]).any():
            raise self._damaged(f"document {int(numpy.argmax(is_falling))} ends before it starts")

    def document(self, number: int) -> numpy.ndarray:
        """The tokens of a document."""
        start, stop = self._tokens_before(self._ends[number : number + 2])
        return self.tokens[start:stop]

    def document_lengths(self) -> numpy.ndarray:
        """Tokens of every document."""
        return numpy.diff(self._tokens_before(self._ends))

    def _tokens_before(self, sequences: numpy.ndarray) -> numpy.ndarray:
        """The token at which each sequence starts; one after the last starts at the end."""
        starts = self._starts[numpy.minimum(sequences, len(self._starts) - 1)] // self._item
        return numpy.where(sequences < len(self._starts), starts, len(self.tokens))

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.prefix}.idx is damaged: {what}; {_AGAIN}")


def token_type(vocab_size: int) -> str:
    """The NumPy type in which Megatron's tool stores the ids of this vocabulary."""
    return "uint16" if vocab_size < 65500 else "int32"


class TokenWriter:
    """Writes ``PREFIX.bin`` document by document, and ``PREFIX.idx`` in the end.

    Attributes:
        lengths: the number of tokens of every sequence (int32).
        ends: 0, and the number of sequences up to the end of every document (int64).
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        """Open the ``.bin``. ``dtype`` is ``uint16`` or ``int32``."""
        self.prefix, self.dtype = prefix, dtype
        self.lengths, self.ends = array("i"), array("q", [0])
        self._stream = open(f"{prefix}.bin", "wb")  # noqa: SIM115

    def add(self, ids: list[int], lengths: Sequence[int]) -> None:
        """Add a document with sequences of these lengths. A document without tokens has no sequence.

        Raises:
            OverflowError: for an id that the type cannot hold.
        """
        self._stream.write(array("H" if self.dtype == "uint16" else "i", ids))
        self.lengths.extend(lengths)
        self.ends.append(len(self.lengths))

    def close(self) -> None:
        """Write the ``.idx``. The files may not be on the disk yet."""
        self._stream.close()
        _write_lists(self.prefix, self.dtype, numpy.array(self.lengths), numpy.array(self.ends))


def write_documents(prefix: Path, documents: Iterable[list[int]], dtype: str) -> int:
    """Write documents of one sequence each, none of them empty; returns the number of tokens."""
    writer = TokenWriter(prefix, dtype)
    for ids in documents:
        writer.add(ids, [len(ids)])
    writer.close()
    return sum(writer.lengths)


def join(prefix: Path, parts: Iterable[Path], dtype: str) -> dict[str, int]:
    """Join token files to one; returns its numbers of documents, sequences and tokens."""
    lengths, ends, sequences = [numpy.zeros(0, "int32")], [numpy.zeros(1, "int64")], 0
    with open(f"{prefix}.bin", "wb") as stream:
        for part in parts:
            with open(f"{part}.bin", "rb") as source:
                shutil.copyfileobj(source, stream, _BUFFER)
            _, lengths_of_part, _, ends_of_part = _read_lists(str(part))
            lengths.append(lengths_of_part.copy())  # and let the file be closed
            ends.append(ends_of_part[1:] + sequences)
            sequences += len(lengths_of_part)
    _write_lists(prefix, dtype, numpy.concatenate(lengths), numpy.concatenate(ends))
    documents, tokens = sum(map(len, ends)) - 1, sum(int(some.sum()) for some in lengths)
    return {"documents": documents, "sequences": sequences, "tokens": tokens}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_lists(prefix: str) -> tuple[str, numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Of an ``.idx``: the type of a token, each sequence's length and first byte, each document's end."""
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


def _write_lists(prefix: Path, dtype: str, lengths: numpy.ndarray, ends: numpy.ndarray) -> None:
    code = next(code for code, name in _DTYPES.items() if name == dtype)
    starts = _starts(lengths, numpy.dtype(dtype).itemsize)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(ends)))
        for values in (lengths, starts, ends):
            stream.write(values.tobytes())


def _starts(lengths: numpy.ndarray, item: int) -> numpy.ndarray:
    """The byte at which each sequence starts."""
    starts: numpy.ndarray = (numpy.cumsum(lengths, dtype="int64") - lengths) * item
    return starts
