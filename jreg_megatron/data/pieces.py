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
        start: first byte of plain JSON lines, a line that starts before it belongs to the piece before;
            first row group of Parquet; else 0.
        stop: byte or row group behind the last; None for the end of the file.
        first_row: rows of the Parquet file before this piece, else 0.
        rows: rows in the piece, of Parquet, else 0.
        size: bytes on disk that the piece stands for.
    """

    sources: tuple[Source, ...]
    start: int
    stop: int | None
    first_row: int
    rows: int
    size: int


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
    for source in sources:
        if texts and (source.format != "text" or _size(texts) + source.size > piece_bytes):
            pieces.append(_whole(texts))
            texts = []
        if source.format == "text":
            texts.append(source)
        elif source.format == "parquet":
            pieces += _cut_parquet(source, piece_bytes, columns)
        elif source.compression:
            pieces.append(_whole([source]))
        else:
            pieces += _cut_lines(source, piece_bytes)
    return [*pieces, _whole(texts)] if texts else pieces


def default_piece_bytes(sources: Sequence[Source]) -> int:
    """A 256th of all, but 1 to 64 MiB: small enough to spread and to lose, large enough not to be many."""
    return min(_LARGEST, max(_SMALLEST, _size(sources) // _WANTED))


def _size(sources: Sequence[Source]) -> int:
    return sum(source.size for source in sources)


def _whole(sources: Sequence[Source]) -> Piece:
    return Piece(tuple(sources), 0, None, 0, 0, _size(sources))


def _cut_lines(source: Source, piece_bytes: int) -> Iterator[Piece]:
    for start in range(0, source.size, piece_bytes):
        stop = min(start + piece_bytes, source.size)
        yield Piece((source,), start, stop, 0, 0, stop - start)


def _cut_parquet(source: Source, piece_bytes: int, columns: Sequence[str]) -> Iterator[Piece]:
    groups = parquet.row_groups(source, columns)
    start = first_row = rows = size = 0
    for number, (rows_of_group, size_of_group) in enumerate(groups):
        rows, size = rows + rows_of_group, size + size_of_group
        if size >= piece_bytes or number + 1 == len(groups):
            yield Piece((source,), start, number + 1, first_row, rows, size)
            start, first_row, rows, size = number + 1, first_row + rows, 0, 0
