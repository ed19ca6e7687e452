"""Columns of text in Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jreg_megatron.data.extra import need
from jreg_megatron.data.sources import Source, open_source
from jreg_megatron.runtime.errors import UserError

_ROWS = 256


@dataclass(frozen=True)
class RowGroup:
    """Rows, and bytes on disk of all columns, of a part of a file that is read at once."""

    rows: int
    size: int


def row_groups(source: Source, columns: Sequence[str]) -> list[RowGroup]:
    """The row groups of a file, by its footer.

    Raises:
        UserError: if it is not a whole Parquet file, or a column is missing or holds no text.
    """
    with _opened(source) as file:
        schema = file.schema_arrow
        for column in columns:
            if column not in schema.names:
                raise UserError(
                    f"{source.path} has no column {column}, only {', '.join(schema.names)}; "
                    "name one with --keys"
                )
            if not _is_text(schema.field(column).type):
                kind = schema.field(column).type
                raise UserError(
                    f"{source.path} has a column {column} of {kind}, not of text; name another with --keys"
                )
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        return [
            RowGroup(
                group.num_rows, sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            )
            for group in groups
        ]


def read_rows(
    source: Source, groups: Sequence[int], columns: Sequence[str]
) -> Iterator[tuple[bytes | None, ...]]:
    """The columns of every row, as the bytes of the file; None where there is no value.

    Raises:
        UserError: if a page of it cannot be read.
    """
    pyarrow = need("pyarrow", "reading Parquet")
    with _opened(source) as file:
        # One row group is in memory at a time, packed; its rows are unpacked in small batches.
        for group in groups:
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=list(columns), use_threads=False)
            for batch in batches:
                values = []
                for column in columns:
                    data = batch.column(batch.schema.get_field_index(column))
                    if pyarrow.types.is_dictionary(data.type):
                        data = data.dictionary_decode()
                    values.append(data.cast(pyarrow.large_binary()).to_pylist())
                yield from zip(*values, strict=True)


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    pyarrow, parquet = need("pyarrow", "reading Parquet"), need("pyarrow.parquet", "reading Parquet")
    with open_source(source) as (stream, _):
        try:
            yield parquet.ParquetFile(stream, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError | PermissionError):
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{source.path} is not a whole Parquet file ({reason}); fetch it again"
            ) from error


def _is_text(kind: Any) -> bool:
    types = need("pyarrow", "reading Parquet").types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    )
