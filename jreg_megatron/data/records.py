"""The documents of a piece, one by one, and the reasons why bad records are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from jreg_megatron.data.parquet import read_rows
from jreg_megatron.data.pieces import Piece
from jreg_megatron.data.sources import open_source

Text = str | list[str]
"""A document; a list holds its sentences, as in Megatron's tool."""

KINDS = ("not UTF-8", "not JSON", "not an object", "no such key", "not text", "lone surrogate", "too large")
"""Why a record is refused."""

_MARK = "\ufeff"  # byte order mark


@dataclass(frozen=True)
class Record:
    """A good record."""

    file: str
    line: int
    """Line or row from 1, counted from the start of the piece."""
    texts: list[Text]
    """A text for each key. UTF-8 can hold it."""


@dataclass(frozen=True)
class Refusal:
    """A refused record: file and line as in :class:`Record`, one of :data:`KINDS`, and the reason."""

    file: str
    line: int
    kind: str
    reason: str


class _Refused(Exception):
    def __init__(self, kind: str, reason: str, line: int = 1) -> None:
        self.kind, self.reason, self.line = kind, reason, line


class Reader:
    """Reads the texts under ``keys`` of a piece's records. Records above ``max_record_bytes`` are refused.

    ``bytes_read`` counts bytes on disk, at most the piece's size; ``lines`` counts lines, rows or files.
    """

    def __init__(self, piece: Piece, keys: Sequence[str], max_record_bytes: int) -> None:
        self.bytes_read = self.lines = 0
        self._piece, self._keys, self._limit = piece, keys, max_record_bytes

    def __iter__(self) -> Iterator[Record | Refusal]:
        """Each record in order.

        Raises:
            UserError: naming the file, if it cannot be read.
        """
        kinds: dict[str, tuple[Callable[[], Iterator[Any]], Callable[[Any], list[Text]]]] = {
            "jsonl": (self._lines, self._texts_of_line),
            "parquet": (self._rows, self._texts_of_row),
            "text": (self._files, self._texts_of_file),
        }
        first = self._piece.sources[0]
        is_text = first.format == "text"  # each file is a record, and a piece may hold several
        read, texts_of = kinds[first.format]
        for content in read():
            file = self._piece.sources[self.lines - 1].path if is_text else first.path
            try:
                yield Record(file, self.lines, texts_of(content))
            except _Refused as bad:
                yield Refusal(file, bad.line if is_text else self.lines, bad.kind, bad.reason)

    def _lines(self) -> Iterator[bytes]:
        """Lines that are not empty, without line ends; of a line that is too large, the beginning."""
        piece = self._piece
        with open_source(piece.sources[0]) as (stream, raw):
            position = piece.start
            if position:
                stream.seek(position - 1)
                position += _skip_line(stream) - 1
            while piece.stop is None or position < piece.stop:
                line = stream.readline(self._limit + 1)
                if not line:
                    break
                position += len(line)
                line = line.removesuffix(b"\n")
                is_too_large = len(line) > self._limit
                if is_too_large:
                    position += _skip_line(stream)
                self.lines += 1
                read = raw.tell() if piece.stop is None else position - piece.start
                self.bytes_read = min(read, piece.size)
                if is_too_large or line.strip():
                    yield line

    def _texts_of_line(self, line: bytes) -> list[Text]:
        text = self._decoded(line)
        try:
            is_first = self.lines == 1 and not self._piece.start
            record = json.loads(text.removeprefix(_MARK) if is_first else text)
        except ValueError as error:
            raise _Refused("not JSON", " ".join(str(error).split())) from error
        except RecursionError as error:
            raise _Refused("not JSON", "nested too deeply") from error
        if not isinstance(record, dict):
            raise _Refused("not an object", f"the line holds a {_json_type(record)}")
        for key in self._keys:
            if key not in record:
                raise _Refused("no such key", f"the object has no {key!r}")
            sentences = record[key] if isinstance(record[key], list) else [record[key]]
            if not all(isinstance(sentence, str) for sentence in sentences):
                raise _Refused("not text", f"{key!r} is a {_json_type(record[key])}")
            try:
                "".join(sentences).encode()
            except UnicodeEncodeError as error:
                where = f"{error.object[error.start]!a} at character {error.start + 1}"
                raise _Refused("lone surrogate", where) from error
        return [record[key] for key in self._keys]

    def _rows(self) -> Iterator[tuple[bytes | None, ...]]:
        piece = self._piece
        assert piece.stop is not None
        for values in read_rows(piece.sources[0], range(piece.start, piece.stop), self._keys):
            self.lines += 1
            self.bytes_read = piece.size * self.lines // piece.rows
            yield values

    def _texts_of_row(self, values: tuple[bytes | None, ...]) -> list[Text]:
        texts: list[Text] = []
        for key, value in zip(self._keys, values, strict=True):
            if value is None:
                raise _Refused("not text", f"{key!r} is a null")
            texts.append(self._decoded(value, f"a line in {key!r}"))
        return texts

    def _files(self) -> Iterator[bytes]:
        for source in self._piece.sources:
            with open_source(source) as (stream, _):
                content = stream.read(self._limit + 1)
            self.lines += 1
            self.bytes_read += source.size
            yield content

    def _texts_of_file(self, content: bytes) -> list[Text]:
        return [self._decoded(content).removeprefix(_MARK)] * len(self._keys)

    def _decoded(self, content: bytes, place: str = "the line") -> str:
        if len(content) > self._limit:
            raise _Refused("too large", f"over the {self._limit:,} bytes of --max-record-bytes")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            *lines, before = content[: error.start].split(b"\n")
            reason = f"byte {len(before) + 1} of {place}: {error.reason}"
            raise _Refused("not UTF-8", reason, len(lines) + 1) from error


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of a line; returns the number of bytes."""
    count = 0
    while part := stream.readline(1 << 20):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _json_type(value: object) -> str:
    if isinstance(value, list):
        return "list that holds more than strings"
    names = {bool: "boolean", int: "number", float: "number", type(None): "null", dict: "object"}
    return names.get(type(value), "string")
