"""A worker's task: encode a piece of a corpus into parts of token files."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from jreg_megatron.data.piece_folder import Options, PieceFolder, Result
from jreg_megatron.data.pieces import Piece
from jreg_megatron.data.records import Reader, Refusal, Text
from jreg_megatron.data.sources import open_source
from jreg_megatron.data.token_file import PartWriter, token_type
from jreg_megatron.data.tokenizing import Tokenizer
from jreg_megatron.runtime.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Encoder:
    """Encodes the pieces of a folder."""

    folder: PieceFolder
    tokenizer: Tokenizer

    @property
    def options(self) -> Options:
        """The run's options."""
        return self.folder.options

    @property
    def dtype(self) -> str:
        """The NumPy type of a token."""
        return token_type(self.tokenizer.vocab_size)

    def reader(self, number: int) -> Reader:
        """Reads the records of a piece."""
        return Reader(self.folder.pieces[number], self.options.keys, self.options.max_record_bytes)

    def encode_piece(self, number: int, report: Callable[[tuple[int, int]], None]) -> Result:
        """Encode a piece and keep it in the folder. ``report`` gets the bytes read and the tokens so far.

        Raises:
            UserError: if it cannot be read or written, or too many records are refused.
        """
        with full_disk_refused(self.folder.path.parent):
            reader, place = self.reader(number), self.folder.begin(number)
            writers = [PartWriter(place / str(n), self.dtype) for n in range(len(self.options.outputs))]
            refused = []
            for record in reader:
                if isinstance(record, Refusal):
                    refused.append(record)
                    self.check_refused(len(refused), record, self.folder.pieces[number])
                else:
                    self._add(writers, record.texts)
                report((reader.bytes_read, sum(writer.counts.tokens for writer in writers)))
            result = Result([writer.close() for writer in writers], reader.lines, refused)
            self.folder.keep(number, place, result)
            return result

    def check_refused(self, count: int, refusal: Refusal, piece: Piece) -> None:
        """Raises:
        UserError: if ``count`` refused records are too many; it names ``refusal`` in ``piece``.
        """
        if count > self.options.max_refused:
            line = refusal.line + _lines_before(piece)
            raise UserError(
                f"{refusal.file} line {line} is {refusal.kind} ({refusal.reason}), and more than "
                f"--max-refused {self.options.max_refused} records are refused; correct the file or "
                "raise the limit, then run the same command: it keeps the finished pieces"
            )

    def _add(self, writers: list[PartWriter], texts: list[Text]) -> None:
        share = self.options.validation_share
        is_held_out = share > 0 and _uniform(texts[0]) < share
        for writer, text in zip(writers[len(texts) if is_held_out else 0 :], texts, strict=False):
            try:
                writer.add(*self.ids_of(text))
            except OverflowError as error:
                raise UserError(
                    f"--tokenizer-model gives an id beyond its {self.tokenizer.vocab_size} tokens; correct it"
                ) from error

    def ids_of(self, text: Text) -> tuple[list[int], list[int]]:
        """Ids of a document and the lengths of its sequences, as Megatron's tool makes them."""
        sentences = [text] if isinstance(text, str) else text
        parts = [part for sentence in sentences if (part := self.tokenizer.encode(sentence))]
        if parts and self.options.append_eod:
            assert self.tokenizer.eod is not None
            parts[-1] = [*parts[-1], self.tokenizer.eod]
        return list(chain.from_iterable(parts)), [len(part) for part in parts]


def _lines_before(piece: Piece) -> int:
    """Lines or rows of the file before the piece. Plain JSON lines are read to count them."""
    if not piece.start or piece.sources[0].format != "jsonl":
        return piece.first_row
    count, left = 1, piece.start - 1
    with open_source(piece.sources[0]) as (stream, _):
        while left and (part := stream.read(min(left, 1 << 24))):
            count += part.count(b"\n")
            left -= len(part)
    return count


def _uniform(text: Text) -> float:
    """A number from 0 to 1 that is the same for the same text."""
    content = text if isinstance(text, str) else "".join(text)
    return int.from_bytes(blake2b(content.encode(), digest_size=8).digest()) / 2**64


@contextlib.contextmanager
def full_disk_refused(folder: Path) -> Iterator[None]:
    """Turn the system's errors of a full disk into one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{folder} takes no more data ({error.strerror}); make room and run the same command again: "
            "it keeps the finished pieces"
        ) from error
