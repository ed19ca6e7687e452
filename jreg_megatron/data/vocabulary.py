"""Train a SentencePiece model on a sample of a corpus. The bytes are the same every time."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jreg_megatron.data import pieces, sources
from jreg_megatron.data.records import Reader, Record
from jreg_megatron.data.sources import Corpus
from jreg_megatron.data.token_file import sha256_of
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.output import check_outputs, write_bytes, write_json

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
"""SentencePiece's settings. It writes the number of threads into the model. So the number is fixed, for the
same bytes on every machine. Text is not normalized and spaces stay: decoding returns the text."""

_LINE = 1 << 18
_PLACES = 256


@dataclass(frozen=True)
class Options:
    """What to train. The fields are the command's flags, which ``--help`` describes."""

    corpus: Corpus
    keys: Sequence[str]
    vocab_size: int
    output: Path
    sample_bytes: int
    max_record_bytes: int


def make(options: Options) -> bool:
    """Train and write a model and its manifest. Returns False if an earlier run has made them.

    Raises:
        UserError: if there is not enough text for the vocabulary, or the file cannot be written.
    """
    manifest = Path(f"{options.output}.manifest.json")
    check_outputs(True, output=str(options.output))
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
    manifest.unlink(missing_ok=True)
    write_bytes(str(options.output), model)
    write_json(str(manifest), asked | {"sha256": hashlib.sha256(model).hexdigest()})
    return True


def train(lines: Iterable[str], vocab_size: int) -> bytes:
    """Train on ``lines``, and return the content of the model file.

    Raises:
        UserError: if the lines are too few for ``vocab_size`` pieces.
    """
    import sentencepiece

    # An iterator and a buffer: SentencePiece would write file names into the model.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, minloglevel=2, **TRAINER
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"--vocab-size is {vocab_size}, which SentencePiece cannot make ({one_line(error)})"
        ) from error
    return model.getvalue()


def lines_of(text: str) -> Iterator[str]:
    """A document's lines for SentencePiece. Long lines are cut: SentencePiece would ignore them."""
    for line in text.split("\n"):
        for start in range(0, len(line), _LINE):
            yield line[start : start + _LINE]


def sample_lines(found: Sequence[sources.Source], options: Options) -> Iterator[str]:
    """Lines from up to 256 evenly spaced places in the corpus, about ``sample_bytes`` in all."""
    work = pieces.cut(found, pieces.default_piece_bytes(found), options.keys)
    count = min(len(work), _PLACES)
    for place in range(count):
        quota = options.sample_bytes // count
        for record in Reader(work[place * len(work) // count], options.keys, options.max_record_bytes):
            for text in record.texts if isinstance(record, Record) else ():
                for sentence in [text] if isinstance(text, str) else text:
                    quota -= len(sentence.encode())
                    # SentencePiece takes no zero bytes.
                    yield from lines_of(sentence.replace("\0", " "))
            if quota <= 0:
                break


def _is_made(model: Path, manifest: Path, asked: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(manifest.read_text("utf-8")) == asked | {"sha256": sha256_of(model)})
    except (OSError, ValueError):
        return False
