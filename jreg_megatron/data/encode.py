"""A piece of a corpus into parts of token files: what a worker does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from jreg_megatron.data.pieces import Piece
from jreg_megatron.data.records import Reader, Record, Text
from jreg_megatron.data.sources import open_source
from jreg_megatron.data.token_file import ENDINGS, Counts, Part, PartWriter, token_type
from jreg_megatron.data.tokenizing import Tokenizer
from jreg_megatron.runtime.errors import UserError

_INTERVAL = 0.2
"""Seconds between two reports of progress."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Recipe:
    """What decides the ids beside the sources and the tokenizer.

    Attributes:
        keys: the fields of a record that are text; each makes a token file.
        append_eod: whether every document that is not empty ends with the tokenizer's end-of-document id.
        max_record_bytes: larger records are refused.
        validation_share: share of the documents, 0 to 1, that goes to files of its own. A document's text
            decides, so copies of one text come to the same side.
    """

    keys: tuple[str, ...]
    append_eod: bool
    max_record_bytes: int
    validation_share: float

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """Split and key of each token file."""
        splits = ("train", "validation") if self.validation_share else ("train",)
        return [(split, key) for split in splits for key in self.keys]


@dataclass(frozen=True)
class Progress:
    """What was read and made since the last report; ``size`` is in bytes on disk."""

    size: int = 0
    documents: int = 0
    tokens: int = 0


@dataclass
class Result:
    """A finished piece: a part per output, lines or rows read, and refused records by kind."""

    parts: list[Part]
    lines: int
    refused: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """A refused record: its file, its line or row from 1, one of ``records.KINDS``, and why in words."""

    file: str
    line: int
    kind: str
    reason: str

    @classmethod
    def of(cls, record: Record, piece: Piece, lines: int) -> Refusal:
        """Place a record of a piece; ``lines`` is the number of lines of its file before the piece."""
        return cls(piece.sources[record.file].path, record.line + lines, record.kind, record.reason)


@dataclass(frozen=True)
class Encoder:
    """Encodes pieces into a folder.

    Attributes:
        recipe: how.
        tokenizer: by what.
        folder: for the parts.
        max_refused: number of refused records in one piece that stops the work.
    """

    recipe: Recipe
    tokenizer: Tokenizer
    folder: Path
    max_refused: int

    def __call__(self, task: tuple[int, Piece], report: Callable[[Progress], None]) -> Result:
        """Encode piece number ``task[0]``; :func:`finished` finds it then.

        Raises:
            UserError: if it cannot be read or written, or too many records are refused.
        """
        number, piece = task
        with full_disk_refused(self.folder.parent):
            return self._encode(number, piece, report)

    def _encode(self, number: int, piece: Piece, report: Callable[[Progress], None]) -> Result:
        recipe, reader = self.recipe, Reader(piece, self.recipe.keys, self.recipe.max_record_bytes)
        parts = [part_path(self.folder, number, output) for output in range(len(recipe.outputs))]
        dtype = token_type(self.tokenizer.vocab_size)
        # Under another name first, since a process of a killed run may still be at the same piece.
        writers = [PartWriter(Path(f"{part}-{os.getpid()}"), dtype) for part in parts]
        refused: dict[str, int] = {}
        reported, due = Progress(), time.monotonic() + _INTERVAL

        def now() -> Progress:
            counts = sum((writer.counts for writer in writers), Counts())
            return Progress(reader.bytes_read, counts.documents, counts.tokens)

        with (self.folder / f"{number:06d}.refused-{os.getpid()}").open("w") as refusals:
            for record in reader:
                bad = record if record.texts is None else self._add(writers, record, record.texts)
                if bad is not None:
                    refused[bad.kind] = refused.get(bad.kind, 0) + 1
                    if sum(refused.values()) > self.max_refused:
                        refusal = Refusal.of(bad, piece, lines_before(piece))
                        raise UserError(too_many(refusal, self.max_refused))
                    refusals.write(f"{json.dumps(astuple(bad))}\n")
                if time.monotonic() >= due:
                    at, due = now(), time.monotonic() + _INTERVAL
                    report(_difference(at, reported))
                    reported = at
        report(_difference(Progress(piece.size, now().documents, now().tokens), reported))
        result = Result([writer.close() for writer in writers], reader.lines, refused)
        for part in parts:
            for ending in ENDINGS:
                os.replace(f"{part}-{os.getpid()}{ending}", f"{part}{ending}")
        os.replace(refusals.name, self.folder / f"{number:06d}.refused")
        write_atomically(self.folder / f"{number:06d}.json", asdict(result))
        return result

    def _add(self, writers: list[PartWriter], record: Record, texts: tuple[Text, ...]) -> Record | None:
        """Add a document to its files; a refusal if it cannot be encoded."""
        encoded = []
        try:
            for text in texts:
                sentences = [text] if isinstance(text, str) else text
                content = "".join(sentences).encode()  # fails for what is no text in Unicode
                encoded.append((self._ids(sentences), content))
        except UnicodeEncodeError as error:
            reason = f"{error.object[error.start]!a} at character {error.start + 1}"
            return Record(record.file, record.line, None, "lone surrogate", reason)
        share, first = self.recipe.validation_share, 0
        if share and _uniform(encoded[0][1]) < share:
            first = len(self.recipe.keys)
        for writer, ((ids, lengths), _) in zip(writers[first:], encoded, strict=False):
            try:
                writer.add(ids, lengths)
            except OverflowError as error:
                raise UserError(
                    f"the tokenizer gave an id beyond its {self.tokenizer.vocab_size} tokens; "
                    "correct --tokenizer-model"
                ) from error
        return None

    def _ids(self, sentences: list[str]) -> tuple[list[int], list[int]]:
        """Ids of a document and the lengths of its sequences, as Megatron's tool makes them."""
        if len(sentences) == 1:
            ids = self.tokenizer.encode(sentences[0])
            lengths = [len(ids)] if ids else []
        else:
            parts = [part for sentence in sentences if (part := self.tokenizer.encode(sentence))]
            ids, lengths = [token for part in parts for token in part], [len(part) for part in parts]
        if ids and self.recipe.append_eod:
            assert self.tokenizer.eod is not None
            ids.append(self.tokenizer.eod)
            lengths[-1] += 1
        return ids, lengths


def part_path(folder: Path, number: int, output: int) -> Path:
    """Where the part of a piece for an output lies, without its ending."""
    return folder / f"{number:06d}.{output}"


def finished(folder: Path, number: int) -> Result | None:
    """The result of a piece that was finished, now or by an earlier run."""
    try:
        content = json.loads((folder / f"{number:06d}.json").read_text())
        parts = [Part(Counts(**part["counts"]), part["sums"]) for part in content["parts"]]
        return Result(parts, content["lines"], content["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refusals(folder: Path, number: int, piece: Piece, lines: int) -> Iterator[Refusal]:
    """The refused records of a finished piece; ``lines`` is the number of lines of its file before it."""
    with (folder / f"{number:06d}.refused").open() as stream:
        for row in stream:
            yield Refusal.of(Record(*json.loads(row)), piece, lines)


def too_many(first: Refusal, limit: int) -> str:
    """The line that ends a run with more bad records than allowed; ``first`` is one of them."""
    return (
        f"{first.file} line {first.line} is {first.kind} ({first.reason}), and more than --max-refused "
        f"{limit} records are refused; correct the file, or raise the limit: the same command goes on"
    )


def lines_before(piece: Piece) -> int:
    """Lines of a file of plain JSON lines before the piece, by reading up to there."""
    if not piece.start or piece.sources[0].format != "jsonl":
        return 0
    count, left = 1, piece.start - 1
    with open_source(piece.sources[0]) as (stream, _):
        while left and (part := stream.read(min(left, 1 << 24))):
            count += part.count(b"\n")
            left -= len(part)
    return count


def write_atomically(path: Path, content: Any, sync: bool = False) -> None:
    """Write JSON so that the file is there whole or not at all, with ``sync`` after a power cut too."""
    temporary = path.with_name(f"{path.name}-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        if sync:
            stream.flush()
            os.fsync(stream.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def full_disk_refused(folder: Path) -> Iterator[None]:
    """Turn the system's word for a full disk into one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{folder} takes no more data ({error.strerror}); make room and run the same command again: "
            "what is finished is kept"
        ) from error


def _uniform(content: bytes) -> float:
    """A number from 0 to 1 that is the same for the same content."""
    return int.from_bytes(blake2b(content, digest_size=8).digest()) / 2**64


def _difference(now: Progress, before: Progress) -> Progress:
    return Progress(now.size - before.size, now.documents - before.documents, now.tokens - before.tokens)
