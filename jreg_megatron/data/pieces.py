"""A corpus cut into pieces. A worker makes one piece at a time, and a stopped run keeps the finished ones.

The cut does not depend on the number of workers, so a run can continue with another number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jreg_megatron.data import parquet
from jreg_megatron.data.sources import Source

_SMALLEST, _LARGEST, _WANTED = 1 << 20, 1 << 26, 256


@dataclass(frozen=True)
class Piece:
    """Part of a file, or several small text files."""

    sources: tuple[Source, ...]
    size: int
    """Bytes on disk."""
    start: int = 0
    """First byte of plain JSON lines, or first row group of Parquet. A line that starts before it belongs to
    the piece before."""
    stop: int | None = None
    """The byte or row group after the last; None for the end of the file."""
    first_row: int = 0
    """Rows of the Parquet file before this piece."""
    rows: int = 0
    """Rows of Parquet in this piece."""


def cut(sources: Sequence[Source], piece_bytes: int, columns: Sequence[str]) -> list[Piece]:
    """Cut sources into pieces of about ``piece_bytes`` on disk, in order.

    Plain JSON lines are cut at any line, Parquet between row groups, text between files. A compressed file is
    one piece, because it can only be read from its start. ``columns`` are those of Parquet that hold text.

    Raises:
        UserError: for Parquet that is damaged or lacks such a column.
    """
    pieces: list[Piece] = []
    texts: list[Source] = []
    size = 0
    for source in sources:
        if texts and (source.format != "text" or size + source.size > piece_bytes):
            pieces.append(Piece(tuple(texts), size))
            texts, size = [], 0
        if source.format == "text":
            texts.append(source)
            size += source.size
        elif source.format == "parquet":
            pieces += _cut_parquet(source, piece_bytes, columns)
        elif source.compression:
            pieces.append(Piece((source,), source.size))
        else:
            for start in range(0, source.size, piece_bytes):
                stop = min(start + piece_bytes, source.size)
                pieces.append(Piece((source,), stop - start, start, stop))
    return [*pieces, Piece(tuple(texts), size)] if texts else pieces


def default_piece_bytes(sources: Sequence[Source]) -> int:
    """A 256th of the corpus, at least 1 MiB and at most 64 MiB."""
    total = sum(source.size for source in sources)
    return min(_LARGEST, max(_SMALLEST, total // _WANTED))


def _cut_parquet(source: Source, piece_bytes: int, columns: Sequence[str]) -> Iterator[Piece]:
    groups = parquet.row_groups(source, columns)
    start = first_row = rows = size = 0
    for number, (rows_of_group, size_of_group) in enumerate(groups, start=1):
        rows, size = rows + rows_of_group, size + size_of_group
        if size >= piece_bytes or number == len(groups):
            yield Piece((source,), size, start, number, first_row, rows)
            start, first_row, rows, size = number, first_row + rows, 0, 0
