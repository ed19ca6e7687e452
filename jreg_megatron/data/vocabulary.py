"""Train a SentencePiece model on a sample of a corpus. The same input gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jreg_megatron.data.corpus import Source, cut, find, records
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
"""SentencePiece's settings. The number of threads is fixed, because SentencePiece writes it into the model
and the bytes must be the same on every machine. Text is not normalized and spaces stay: decoding returns the
text."""

_LINE = 1 << 18
_PLACES = 256


def make(args: Namespace) -> bool:
    """Train and write a model and its manifest. Returns False if an earlier run has made them.

    ``args`` are the command's arguments.

    Raises:
        UserError: if there is not enough text for the vocabulary, or the file cannot be written.
    """
    manifest = Path(f"{args.output}.manifest.json")
    check_outputs(True, output=str(args.output))
    sources = find(args)
    asked = {
        "sources": [asdict(source) for source in sources],
        "trainer": TRAINER | {"vocab_size": args.vocab_size},
        "settings": {name: getattr(args, name) for name in ("keys", "sample_bytes", "max_record_bytes")},
        "sentencepiece": version("sentencepiece"),
    }
    try:
        if json.loads(manifest.read_text("utf-8")) == asked | {"sha256": sha256_of(args.output)}:
            return False
    except (OSError, ValueError):
        pass  # not made yet
    lines = sample_lines(sources, args.keys, args.sample_bytes, args.max_record_bytes)
    model = train(lines, args.vocab_size)
    manifest.unlink(missing_ok=True)
    write_bytes(str(args.output), model)
    write_json(str(manifest), asked | {"sha256": hashlib.sha256(model).hexdigest()})
    return True


def train(lines: Iterable[str], vocab_size: int) -> bytes:
    """Train on ``lines``, and return the content of the model file.

    Raises:
        UserError: if the lines are too few for ``vocab_size`` pieces.
    """
    import sentencepiece

    # An iterator and a buffer, because SentencePiece would write file names into the model.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, minloglevel=2, **TRAINER
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"--vocab-size is {vocab_size}, which SentencePiece cannot make ({one_line(error)}); lower it "
            "or give more text"
        ) from error
    return model.getvalue()


def sample_lines(
    sources: Sequence[Source], keys: Sequence[str], sample_bytes: int, max_record_bytes: int
) -> Iterator[str]:
    """Lines from up to 256 evenly spaced places in the corpus, about ``sample_bytes`` in all."""
    pieces = cut(sources, None, keys)
    count = min(len(pieces), _PLACES)
    for place in range(count):
        quota = sample_bytes // count
        for record in records(pieces[place * len(pieces) // count], keys, max_record_bytes):
            for text in record.texts:
                for sentence in [text] if isinstance(text, str) else text:
                    quota -= len(sentence.encode())
                    # SentencePiece takes no zero bytes, and would ignore long lines.
                    for line in sentence.replace("\0", " ").split("\n"):
                        yield from (line[start : start + _LINE] for start in range(0, len(line), _LINE))
            if quota <= 0:
                break
