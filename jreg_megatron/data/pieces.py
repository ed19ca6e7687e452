"""A corpus cut into pieces of work that any process can do and that can be kept when a run is cut short.

The cut depends on the sources alone, never on the number of workers, so a run goes on with other workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jreg_megatron.data import parquet
from jreg_megatron.data.sources import Source

_SMALLEST, _LARGEST, _WANTED = 1 << 20, 1 << 26, 256


@dataclass(frozen=True)
class Piece:
    """Part of a file, or several small files.

    Attributes:
        sources: the file, or for text the files.
        size: bytes on disk of the piece.
        start: first byte of plain JSON lines, a line that starts before it belongs to the piece before;
            first row group of Parquet; else 0.
        stop: byte or row group behind the last; None for the end of the file.
        first_row: rows of the Parquet file before this piece, else 0.
        rows: rows in the piece, of Parquet, else 0.
    """

    sources: tuple[Source, ...]
    size: int
    start: int = 0
    stop: int | None = None
    first_row: int = 0
    rows: int = 0


def cut(sources: Sequence[Source], piece_bytes: int, columns: Sequence[str]) -> list[Piece]:
    """Cut sources into pieces of about ``piece_bytes``, in order.

    Plain JSON lines are cut anywhere, Parquet between row groups, text between files; a compressed file
    is one piece, since it can be read from its start only.

    Args:
        sources: the files.
        piece_bytes: bytes on disk, at least 1.
        columns: the columns that Parquet must have.

    Raises:
        UserError: for Parquet that cannot be read or has no such columns of text.
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
    """A 256th of all, but 1 to 64 MiB: small enough to spread and to lose, large enough not to be many."""
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
