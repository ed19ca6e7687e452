"""A SentencePiece vocabulary trained on a sample of a corpus, the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jreg_megatron.data import pieces, sources
from jreg_megatron.data.records import Reader, Record
from jreg_megatron.data.sources import Corpus
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import write_json

TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "max_sentence_length": 1 << 20,
    "num_threads": 4,
}
"""SentencePiece's settings. The thread count is written into the model, so it is fixed for the same bytes on
every machine. No normalization and no added or removed spaces: decoding gives back the text."""

_LINE = 1 << 18
_PLACES = 256


@dataclass(frozen=True)
class Options:
    """What to train.

    Attributes:
        corpus: where the text comes from.
        keys: fields or columns that hold text.
        vocab_size: number of pieces.
        output: the model file to write.
        sample_bytes: about this much text is taken, from up to 256 places that lie evenly in the corpus.
        max_record_bytes: larger records are left out, as are bad ones.
    """

    corpus: Corpus
    keys: Sequence[str]
    vocab_size: int
    output: Path
    sample_bytes: int
    max_record_bytes: int


def make(options: Options) -> bool:
    """Train and write a model and its manifest, or find that they are there.

    Returns:
        whether it was trained now.

    Raises:
        UserError: if there is not enough text for the vocabulary, or the file cannot be written.
    """
    manifest = Path(f"{options.output}.manifest.json")
    if options.output.is_dir():
        raise UserError(
            f"--output is {options.output}, which is a folder; give a file, as in tokenizer.model"
        )
    found = options.corpus.find()
    asked = {
        "sources": [asdict(source) for source in found],
        "trainer": TRAINER | {"vocab_size": options.vocab_size},
        "settings": {
            "keys": list(options.keys),
            "sample_bytes": options.sample_bytes,
            "max_record_bytes": options.max_record_bytes,
        },
        "sentencepiece": version("sentencepiece"),
    }
    if _is_made(options.output, manifest, asked):
        return False
    model = train(sample_lines(found, options), options.vocab_size)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)
        temporary = options.output.with_name(f"{options.output.name}-{os.getpid()}")
        temporary.write_bytes(model)
        temporary.replace(options.output)
    except OSError as error:
        raise UserError(
            f"--output is {options.output}, which cannot be written ({error.strerror}); correct it or "
            "make room on the disk"
        ) from error
    write_json(str(manifest), asked | {"sha256": hashlib.sha256(model).hexdigest()})
    return True


def train(lines: Iterable[str], vocab_size: int) -> bytes:
    """The model file of a vocabulary trained on ``lines``.

    Raises:
        UserError: if they do not suffice for ``vocab_size`` pieces.
    """
    import sentencepiece

    # Through an iterator and a buffer, since file names would end up in the model file.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, minloglevel=2, **TRAINER
        )
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--vocab-size is {vocab_size}, which SentencePiece cannot make ({said})") from error
    return model.getvalue()


def lines_of(text: str) -> Iterator[str]:
    """A document's lines for SentencePiece; long ones in parts, since it would leave them out."""
    for line in text.split("\n"):
        for start in range(0, len(line), _LINE):
            yield line[start : start + _LINE]


def sample_lines(found: Sequence[sources.Source], options: Options) -> Iterator[str]:
    """Lines from places that lie evenly in the corpus, about ``sample_bytes`` of text in all."""
    work = pieces.cut(found, pieces.default_piece_bytes(found), options.keys)
    count = min(len(work), _PLACES)
    for place in range(count):
        quota = options.sample_bytes // count
        for record in Reader(work[place * len(work) // count], options.keys, options.max_record_bytes):
            for text in record.texts if isinstance(record, Record) else ():
                for sentence in [text] if isinstance(text, str) else text:
                    quota -= len(sentence.encode())
                    # SentencePiece takes no text with a zero in it.
                    yield from lines_of(sentence.replace("\0", " "))
            if quota <= 0:
                break


def _is_made(model: Path, manifest: Path, asked: dict[str, Any]) -> bool:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False
    return bool(content == asked | {"sha256": digest})
