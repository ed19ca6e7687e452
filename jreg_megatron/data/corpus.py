"""The input of a command: find its files, cut them into pieces, and read them record by record."""

from __future__ import annotations

import glob
import io
import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.imports import need

FORMATS = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet", ".pq"), "text": (".txt", ".md")}
"""Formats and their file endings. ``.gz`` or ``.zst`` may follow, except for Parquet."""
Text = str | list[str]
"""A document. A list holds its sentences, as in Megatron's tool."""

_KNOWN = " ".join(chain(*FORMATS.values())) + " (and .gz, .zst after them)"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER, _ROWS = 1 << 20, 256
_SMALLEST_PIECE, _LARGEST_PIECE, _PIECES = 1 << 20, 1 << 26, 256
_MARK = "\ufeff"  # byte order mark


@dataclass(frozen=True)
class Source:
    """An input file, with its size and time when it was found."""

    path: str  # absolute, or the URL of a file on the Hugging Face hub
    format: str  # a key of FORMATS
    compression: str  # gzip, zstd or nothing
    size: int  # bytes on disk
    modified: int  # nanoseconds since 1970; 0 on the hub, where the URL holds the revision


@dataclass(frozen=True)
class Piece:
    """Part of a file, or several small text files.

    ``start`` and ``stop`` are bytes in plain JSON lines, and row groups in Parquet. ``stop`` is not included;
    None means the end of the file. A line belongs to the piece in which it starts.
    """

    sources: tuple[Source, ...]
    size: int  # bytes on disk
    start: int = 0
    stop: int | None = None
    first_row: int = 0  # rows of the Parquet file before this piece


@dataclass(frozen=True)
class Record:
    """A record, with one text per key. An empty line and a refused record have no texts."""

    file: str
    line: int  # or row, from 1, counted from the start of the piece
    texts: Sequence[Text] = ()
    kind: str = ""  # of a refused record, such as "not JSON"
    reason: str = ""


class _Refused(Exception):
    def __init__(self, kind: str, reason: str, lines: int = 0) -> None:
        self.kind, self.reason, self.lines = kind, reason, lines


def find(args: Namespace) -> list[Source]:
    """The input files of the command's arguments, in order.

    Raises:
        UserError: if there is no file, or one is missing, unreadable or of unknown format.
    """
    if args.hub is None:
        return find_sources(args.input, args.format)
    if args.input:
        raise UserError(f"--hub {args.hub} and {args.input[0]} exclude each other; give one of them")
    # The hub's library runs no code of the dataset. The files are read over the network, range by range. Only
    # the tokens go to the disk.
    datasets = need("datasets", "--hub", "data")
    datasets.logging.set_verbosity_error()
    need("huggingface_hub.utils.logging", "--hub", "data").set_verbosity_error()  # it reports every attempt
    where = f"--hub {args.hub}" + (f" --subset {args.subset}" if args.subset else "")
    try:
        files = datasets.load_dataset_builder(args.hub, args.subset).config.data_files or {}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{where} cannot be found ({one_line(error, 300)}); correct the name or the network access"
        ) from error
    if args.hub_split not in files:
        known = ", ".join(map(str, files)) or "none"
        raise UserError(f"{where} has no split {args.hub_split}; it has {known}; give one with --hub-split")
    return [_source(os.fspath(file), args.format) for file in files[args.hub_split]]


def find_sources(inputs: Iterable[str], kind: str | None = None) -> list[Source]:
    """The files that ``inputs`` name, in this order.

    A folder gives all files below it with a known ending, sorted by path; hidden files are left out. A
    pattern such as ``data/*.jsonl`` gives its matches, sorted. ``kind`` is the format of all files, one of
    :data:`FORMATS`; with None, the ending decides.

    Raises:
        UserError: if something is missing, unreadable, of unknown format, or named twice.
    """
    paths = [path for name in inputs for path in _expand(name, kind)]
    if not paths:
        raise UserError("INPUT is missing; name files, folders or patterns, before --keys and its values")
    for path, count in Counter(map(os.path.realpath, paths)).items():
        if count > 1:
            raise UserError(f"{path} is given twice; give it once")
    return [_source(path, kind) for path in paths]


def refuse_changed(sources: Iterable[Source]) -> None:
    """Raises:
    UserError: for a file that has changed since it was found.
    """
    for source in sources:
        if "://" not in source.path and _source(source.path, source.format) != source:
            raise UserError(
                f"{source.path} changed while it was read; run the command again when nothing writes to it"
            )


def cut(sources: Sequence[Source], piece_bytes: int | None, columns: Sequence[str]) -> list[Piece]:
    """Cut sources into pieces of about ``piece_bytes`` on disk, in order.

    None means 1/256 of the corpus, at least 1 MiB and at most 64 MiB. Plain JSON lines are cut between lines,
    Parquet between row groups, text between files. A compressed file is one piece, because it can only be
    read from its start. The pieces do not depend on the number of workers, so a run can continue with another
    number. ``columns`` are the text columns of Parquet.

    Raises:
        UserError: for Parquet that is damaged or lacks such a column.
    """
    wanted = min(_LARGEST_PIECE, max(_SMALLEST_PIECE, sum(source.size for source in sources) // _PIECES))
    piece_bytes = piece_bytes or wanted
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


def records(piece: Piece, keys: Sequence[str], max_bytes: int) -> Iterator[Record]:
    """The records of a piece in order, with their texts under ``keys``. Larger records are refused.

    Raises:
        UserError: naming the file, if it cannot be read.
    """
    readers = {"jsonl": _lines, "parquet": _rows, "text": _files}
    return readers[piece.sources[0].format](piece, keys, max_bytes)


def lines_before(piece: Piece) -> int:
    """Number of lines or rows of the file before the piece. For plain JSON lines this reads the file."""
    if not piece.start or piece.sources[0].format != "jsonl":
        return piece.first_row
    count, left = 1, piece.start - 1
    with _opened(piece.sources[0].path) as stream:
        while left and (part := stream.read(min(left, _BUFFER))):
            count += part.count(b"\n")
            left -= len(part)
    return count


def _expand(name: str, kind: str | None) -> list[str]:
    what = "does not exist; correct the path"
    if os.path.isdir(name):
        what = f"has no file with one of the endings {_KNOWN}; give --format"
        found = [path for path in _files_below(name) if kind or _by_ending(path)[0]]
    elif os.path.lexists(name):
        found = [name]
    else:
        found = [path for path in glob.glob(name, recursive=True) if not os.path.isdir(path)]
    if not found:
        raise UserError(f"{name} {what}")
    return sorted(found)


def _files_below(name: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); fix its access") from error

    for folder, below, files in os.walk(name, onerror=refuse):
        below[:] = [part for part in below if not part.startswith(".")]
        yield from (os.path.join(folder, file) for file in files if not file.startswith("."))


def _source(path: str, kind: str | None) -> Source:
    by_ending, compression = _by_ending(path)
    kind = kind or by_ending
    if kind is None:
        raise UserError(f"{path} has none of the endings {_KNOWN}; give the format with --format")
    with _opened(path) as stream:
        size = stream.seek(0, os.SEEK_END)
    if "://" in path:
        return Source(path, kind, compression, size, 0)
    return Source(os.path.abspath(path), kind, compression, size, os.stat(path).st_mtime_ns)


def _by_ending(path: str) -> tuple[str | None, str]:
    """Format and compression of a file by its ending; None for an unknown format."""
    stem, ending = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(stem)[1]
    return next((kind for kind, known in FORMATS.items() if ending in known), None), compression


@contextmanager
def _opened(path: str, compression: str = "") -> Iterator[IO[bytes]]:
    """Open a file's unpacked content for reading.

    Raises:
        UserError: naming the file, if it is cut short, damaged or unreadable; inside the block too.
    """
    fsspec = need("fsspec", "reading files", "data")

    try:
        with fsspec.open(path, "rb", block_size=16 * _BUFFER) as raw:
            if compression:
                # The packages gzip and zstandard are slower, and zstandard accepts a truncated file.
                pyarrow = need("pyarrow", "reading .gz and .zst", "data")
                yield io.BufferedReader(pyarrow.CompressedInputStream(raw, compression), _BUFFER)
            else:
                yield raw
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        reason = (getattr(error, "strerror", None) or one_line(error)).rstrip(".")
        raise UserError(
            f"{path} cannot be read ({reason}); correct the path or its access, or fetch the file again"
        ) from error


def _record(file: str, line: int, texts_of: Callable[..., Sequence[Text]], *content: Any) -> Record:
    try:
        return Record(file, line, texts_of(*content))
    except _Refused as bad:
        return Record(file, line + bad.lines, (), bad.kind, bad.reason)


def _decoded(content: bytes, max_bytes: int) -> str:
    if len(content) > max_bytes:
        raise _Refused("too large", f"over the {max_bytes:,} bytes of --max-record-bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        reason = f"byte {error.start - before.rfind(b'\n')} of the line: {error.reason}"
        raise _Refused("not UTF-8", reason, before.count(b"\n")) from error


def _lines(piece: Piece, keys: Sequence[str], max_bytes: int) -> Iterator[Record]:
    (source,) = piece.sources
    position, number = piece.start, 0
    with _opened(source.path, source.compression) as stream:
        if position:
            stream.seek(position - 1)
            position += _skip_line(stream) - 1
        while (piece.stop is None or position < piece.stop) and (line := stream.readline(max_bytes + 1)):
            number += 1
            position += len(line)
            if len(line) > max_bytes and not line.endswith(b"\n"):
                position += _skip_line(stream)
            yield _record(source.path, number, _texts_of_line, line.removesuffix(b"\n"), keys, max_bytes)


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of a line in blocks, for lines larger than memory. Returns the number of bytes."""
    count = 0
    while part := stream.readline(_BUFFER):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _texts_of_line(line: bytes, keys: Sequence[str], max_bytes: int) -> Sequence[Text]:
    text = _decoded(line, max_bytes).removeprefix(_MARK)
    if not text.strip():
        return ()
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Refused("not JSON", one_line(error)) from error
    if not isinstance(record, dict):
        raise _Refused("not an object", f"the line holds a value of type {type(record).__name__}")
    for key in keys:
        if key not in record:
            raise _Refused("no such key", f"the object has no {key!r}")
        sentences = record[key] if isinstance(record[key], list) else [record[key]]
        for sentence in sentences:
            if not isinstance(sentence, str):
                raise _Refused("not text", f"{key!r} holds a value of type {type(sentence).__name__}")
        try:
            "".join(sentences).encode()
        except UnicodeEncodeError as error:
            where = f"{error.object[error.start]!a} at character {error.start + 1}"
            raise _Refused("lone surrogate", where) from error
    return [record[key] for key in keys]


def _files(piece: Piece, keys: Sequence[str], max_bytes: int) -> Iterator[Record]:
    def texts_of(content: bytes) -> Sequence[Text]:
        return [_decoded(content, max_bytes).removeprefix(_MARK)] * len(keys)

    for source in piece.sources:
        with _opened(source.path, source.compression) as stream:
            content = stream.read(max_bytes + 1)
        yield _record(source.path, 1, texts_of, content)


@contextmanager
def _parquet(source: Source, columns: Sequence[str]) -> Iterator[Any]:
    """An open Parquet file. Raises :class:`UserError` if it is damaged or lacks one of the text columns."""
    parquet = need("pyarrow.parquet", "reading Parquet", "data")
    with _opened(source.path, source.compression) as stream:
        file = parquet.ParquetFile(stream, pre_buffer=False)
        kinds = {field.name: str(field.type) for field in file.schema_arrow}
        for column in columns:
            kind = kinds.get(column, "").removeprefix("dictionary<values=").removeprefix("large_")
            if not kind.startswith(("string", "binary")):
                known = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
                raise UserError(
                    f"{source.path} has no column {column} of text; it has {known}; give one with --keys"
                )
        yield file


def _cut_parquet(source: Source, piece_bytes: int, columns: Sequence[str]) -> Iterator[Piece]:
    start = first_row = rows = size = 0
    with _parquet(source, columns) as file:
        metadata = file.metadata
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows += group.num_rows
        size += sum(group.column(n).total_compressed_size for n in range(group.num_columns))
        if size >= piece_bytes or number == metadata.num_row_groups - 1:
            yield Piece((source,), size, start, number + 1, first_row)
            start, first_row, rows, size = number + 1, first_row + rows, 0, 0


def _rows(piece: Piece, keys: Sequence[str], max_bytes: int) -> Iterator[Record]:
    def texts_of(values: Sequence[bytes | None]) -> Sequence[Text]:
        for key, value in zip(keys, values, strict=True):
            if value is None:
                raise _Refused("not text", f"{key!r} is missing")
        try:
            return [_decoded(value or b"", max_bytes) for value in values]
        except _Refused as bad:
            raise _Refused(bad.kind, bad.reason) from bad  # lines inside a value are no lines of the file

    (source,) = piece.sources
    number, binary = 0, need("pyarrow", "reading Parquet", "data").large_binary()
    with _parquet(source, keys) as file:
        stop = file.metadata.num_row_groups if piece.stop is None else piece.stop
        # Memory holds one compressed row group. Its rows are unpacked in small batches.
        for group in range(piece.start, stop):
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=list(keys), use_threads=False)
            for batch in batches:
                # As bytes: if a text is not UTF-8, only this record is refused.
                for values in zip(*(batch[key].cast(binary).to_pylist() for key in keys), strict=True):
                    number += 1
                    yield _record(source.path, number, texts_of, values)
