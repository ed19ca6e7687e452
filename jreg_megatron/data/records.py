"""The documents of a piece, one by one, and what is wrong with those that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from jreg_megatron.data.parquet import read_rows
from jreg_megatron.data.pieces import Piece
from jreg_megatron.data.sources import open_source

Text = str | list[str]
"""A document; a list stands for its sentences, as in Megatron's tool."""

KINDS = ("not UTF-8", "not JSON", "not an object", "no such key", "not text", "lone surrogate", "too large")
"""The ways in which a record is refused."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """A record of a file.

    Attributes:
        file: number of the file among the piece's sources.
        line: line or row, from 1; counted from the start of the piece where the piece starts inside a file.
        texts: a text per key, or None if it is refused.
        kind: one of :data:`KINDS` if it is refused.
        reason: what is wrong with it, in words.
    """

    file: int
    line: int
    texts: tuple[Text, ...] | None
    kind: str = ""
    reason: str = ""


class Reader:
    """Reads a piece's records.

    Attributes:
        bytes_read: bytes on disk read so far, at most the piece's size.
        lines: lines, rows or files read so far.
    """

    def __init__(self, piece: Piece, keys: Sequence[str], max_record_bytes: int) -> None:
        """Read ``keys`` of each record; records of more than ``max_record_bytes`` bytes are refused."""
        self.bytes_read = 0
        self.lines = 0
        self._piece, self._keys, self._limit = piece, tuple(keys), max_record_bytes
        self._too_large = f"over the {max_record_bytes:,} bytes of --max-record-bytes"

    def __iter__(self) -> Iterator[Record]:
        """Each record in order.

        Raises:
            UserError: naming the file, if it cannot be read on.
        """
        kind = self._piece.sources[0].format
        if kind == "parquet":
            return self._rows()
        return self._json_lines() if kind == "jsonl" else self._files()

    def _json_lines(self) -> Iterator[Record]:
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
                length = len(line)
                too_large = length > self._limit and not line.endswith(b"\n")
                if too_large:
                    length += _skip_line(stream)
                position += length
                self.lines += 1
                self.bytes_read = min(
                    raw.tell() if piece.stop is None else position - piece.start, piece.size
                )
                if too_large:
                    yield Record(0, self.lines, None, "too large", self._too_large)
                    continue
                if position == length and line.startswith(_BOM):
                    line = line[3:]
                if line.isspace():
                    continue
                yield self._json_record(line)

    def _json_record(self, line: bytes) -> Record:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            return self._refused("not UTF-8", f"byte {error.start + 1} of the line: {error.reason}")
        except ValueError as error:
            return self._refused("not JSON", " ".join(str(error).split()))
        except RecursionError:
            return self._refused("not JSON", "nested too deeply")
        if not isinstance(record, dict):
            return self._refused("not an object", f"the line holds a {_json_type(record)}")
        texts = []
        for key in self._keys:
            if key not in record:
                return self._refused("no such key", f"the object has no {key!r}")
            text = record[key]
            if not isinstance(text, str) and not (
                isinstance(text, list) and all(isinstance(sentence, str) for sentence in text)
            ):
                return self._refused("not text", f"{key!r} is a {_json_type(text)}")
            texts.append(text)
        return Record(0, self.lines, tuple(texts))

    def _rows(self) -> Iterator[Record]:
        piece = self._piece
        assert piece.stop is not None
        self.lines = piece.first_row
        for values in read_rows(piece.sources[0], range(piece.start, piece.stop), self._keys):
            self.lines += 1
            self.bytes_read = piece.size * (self.lines - piece.first_row) // piece.rows
            texts = []
            for key, value in zip(self._keys, values, strict=True):
                if value is None:
                    yield self._refused("not text", f"{key!r} is a null")
                    break
                if len(value) > self._limit:
                    yield self._refused("too large", self._too_large)
                    break
                try:
                    texts.append(value.decode())
                except UnicodeDecodeError as error:
                    yield self._refused("not UTF-8", f"byte {error.start + 1} of {key!r}: {error.reason}")
                    break
            else:
                yield Record(0, self.lines, tuple(texts))

    def _files(self) -> Iterator[Record]:
        for number, source in enumerate(self._piece.sources):
            with open_source(source) as (stream, _):
                content = stream.read(self._limit + 1)
            self.lines += 1
            self.bytes_read += source.size
            if len(content) > self._limit:
                yield Record(number, 1, None, "too large", self._too_large)
                continue
            try:
                yield Record(number, 1, (content.removeprefix(_BOM).decode(),) * len(self._keys))
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                column = error.start - content.rfind(b"\n", 0, error.start)
                yield Record(number, line, None, "not UTF-8", f"byte {column} of the line: {error.reason}")

    def _refused(self, kind: str, reason: str) -> Record:
        return Record(0, self.lines, None, kind, reason)


def _skip_line(stream: IO[bytes]) -> int:
    """Read up to the end of a line; the number of bytes that took."""
    count = 0
    while part := stream.readline(1 << 20):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _json_type(value: object) -> str:
    names = {
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
        list: "list",
        dict: "object",
    }
    if isinstance(value, list):
        return "list that holds more than strings"
    return names.get(type(value), "string")
