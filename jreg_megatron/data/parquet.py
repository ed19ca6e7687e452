"""Columns of text in Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jreg_megatron.data.sources import Source, open_source
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.extras import need

_ROWS = 256
_TEXT = ("string", "large_string", "string_view", "binary", "large_binary")


def row_groups(source: Source, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Rows and bytes on disk of each row group.

    Raises:
        UserError: if the Parquet file is damaged, or a column is missing or holds no text.
    """
    with _opened(source) as file:
        schema = file.schema_arrow
        for column in columns:
            if column not in schema.names:
                raise UserError(
                    f"{source.path} has no column {column}; it has {', '.join(schema.names)}; give one with "
                    "--keys"
                )
            kind = schema.field(column).type
            if str(kind.value_type if _is_dictionary(kind) else kind) not in _TEXT:
                raise UserError(
                    f"{source.path} has a column {column} of {kind}, not of text; give another with --keys"
                )
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        return [
            (group.num_rows, sum(group.column(n).total_compressed_size for n in range(group.num_columns)))
            for group in groups
        ]


def read_rows(
    source: Source, groups: Sequence[int], columns: Sequence[str]
) -> Iterator[tuple[bytes | None, ...]]:
    """The columns of every row, as bytes; None for a missing value.

    Raises:
        UserError: if the file is damaged.
    """
    pyarrow = _pyarrow()
    with _opened(source) as file:
        # Memory holds one packed row group. Its rows are unpacked in small batches.
        for group in groups:
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=list(columns), use_threads=False)
            for batch in batches:
                values = []
                for column in columns:
                    data = batch.column(batch.schema.get_field_index(column))
                    if _is_dictionary(data.type):
                        data = data.dictionary_decode()
                    values.append(data.cast(pyarrow.large_binary()).to_pylist())
                yield from zip(*values, strict=True)


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    pyarrow = _pyarrow()
    with open_source(source) as (stream, _):
        try:
            yield pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError | PermissionError):
                raise
            reason = one_line(error).rstrip(".")
            raise UserError(f"{source.path} is damaged or no Parquet ({reason}); fetch it again") from error


def _pyarrow() -> Any:
    pyarrow = need("pyarrow", "reading Parquet", "data")
    need("pyarrow.parquet", "reading Parquet", "data")
    return pyarrow


def _is_dictionary(kind: Any) -> bool:
    return bool(_pyarrow().types.is_dictionary(kind))
