"""What ``prepare`` is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jreg_megatron.data.sources import Corpus
from jreg_megatron.data.tokenizing import TokenizerSettings


@dataclass(frozen=True)
class Options:
    """What to prepare.

    Attributes:
        corpus: where the text comes from.
        tokenizer: encodes it.
        output: prefix of the files; Megatron's tool names them ``PREFIX_KEY_document.bin`` and ``.idx``.
        keys: the fields of a record that are text; each makes a token file.
        append_eod: whether every document that is not empty ends with the tokenizer's end-of-document id.
        max_record_bytes: larger records are refused.
        validation_share: share of the documents, 0 to 1, that goes to files of its own. A document's text
            decides, so copies of one text come to the same side.
        validation_output: prefix for the documents that are held out, if some are.
        workers: number of processes, at least 1.
        max_refused: more refused records than this stop the run.
        piece_bytes: bytes on disk of a piece, or None for a default.
        check_disk: whether to refuse to start if the disk seems too small.
        quiet: no progress and no words.
    """

    corpus: Corpus
    tokenizer: TokenizerSettings
    output: Path
    keys: Sequence[str]
    append_eod: bool
    max_record_bytes: int
    validation_share: float
    validation_output: Path | None
    workers: int
    max_refused: int
    piece_bytes: int | None
    check_disk: bool
    quiet: bool

    @property
    def outputs(self) -> list[tuple[str, str]]:
        """Split and key of each token file."""
        splits = ("train", "validation") if self.validation_share else ("train",)
        return [(split, key) for split in splits for key in self.keys]

    @property
    def targets(self) -> list[Path]:
        """The token files without their endings, in the order of the outputs."""
        prefixes = {"train": self.output, "validation": self.validation_output}
        return [Path(f"{prefixes[split]}_{key}_document") for split, key in self.outputs]

    @property
    def manifest(self) -> Path:
        """Where the manifest goes."""
        return Path(f"{self.output}.manifest.json")
