"""What a Megatron ``.idx`` file says of its ``.bin``, read without Megatron.

Megatron's own reader would do, but it fails by assertion, or past the end of a file that was cut short.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy

from jreg_megatron.runtime.errors import UserError

# Megatron's codes for the type of a token, in its .idx format of version 1.
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
TYPE_CODES = {name: code for code, name in DTYPES.items()}
MODE_BYTES = 1  # per sequence, behind all else, in multimodal data
_AGAIN = "make the data again"


@dataclass(frozen=True)
class Index:
    """What an index says: the NumPy type of a token, and the numbers of tokens, sequences and documents."""

    dtype: str
    tokens: int
    sequences: int
    documents: int


def read_index(prefix: str) -> Index:
    """Read the header and the end of ``prefix.idx`` and hold the size of ``prefix.bin`` against it.

    Raises:
        UserError: naming the file, if one of the two is missing, foreign, cut short or holds no text.
    """
    for ending in (".idx", ".bin"):
        if not os.path.isfile(prefix + ending):
            raise UserError(f"{prefix}{ending} is not a file; {_prefix_hint(prefix)}")
    name = f"{prefix}.idx"
    try:
        with open(name, "rb") as stream:
            header = stream.read(HEADER.size)
        size, bin_size = os.path.getsize(name), os.path.getsize(f"{prefix}.bin")
        with open(f"{prefix}.bin", "rb"):
            pass
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); fix its access") from error
    if header[:9] != MAGIC:
        raise UserError(f"{name} is not a Megatron index; {_AGAIN}")
    if len(header) < HEADER.size:
        raise UserError(f"{name} is cut short; {_AGAIN}")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{name} has version {version} and token type {code}, which Megatron does not read; {_AGAIN}"
        )
    # Per sequence a length (int32) and a position (int64), per document a sequence number (int64).
    if size < HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"{name} is cut short; {_AGAIN}")
    if sequences == 0:
        raise UserError(f"{name} holds no text; make the data again from a filled file")
    with open(name, "rb") as stream:
        stream.seek(HEADER.size + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", stream.read(4))
        stream.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (position,) = struct.unpack("<q", stream.read(8))
    item = numpy.dtype(DTYPES[code]).itemsize
    end = position + length * item
    if bin_size < end:
        raise UserError(
            f"{prefix}.bin is cut short: {bin_size} bytes of the {end} that {name} lists; "
            "copy or make it again"
        )
    return Index(dtype=DTYPES[code], tokens=end // item, sequences=sequences, documents=documents - 1)


def _prefix_hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"leave {prefix[-4:]} out"
    return "correct the prefix (the path without .bin/.idx)"
