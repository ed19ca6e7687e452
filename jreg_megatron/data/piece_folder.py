"""What ``prepare`` is to do, and the folder in which it keeps pieces and joins them to token files.

000012/         a finished piece
    0.bin       the tokens of its part of output 0, until they are in whole.0.bin
    0.lengths   see ``PartWriter``
    0.ends
    result.json
000012-4711/    a piece that process 4711 makes
whole.0.bin     output 0
whole.0.idx
refused.jsonl
manifest.json   written last: after it, files are only moved
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from jreg_megatron.data.pieces import Piece
from jreg_megatron.data.records import Refusal
from jreg_megatron.data.sources import Corpus
from jreg_megatron.data.token_file import Counts, Part, crc_of, sha256_of, write_index
from jreg_megatron.data.tokenizing import TokenizerSettings

_RESULT, _REFUSED = "result.json", "refused.jsonl"
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Options:
    """What to prepare. The fields are the command's flags, which ``--help`` describes."""

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
        """The token files without their endings, in the order of the outputs; named as by Megatron's tool."""
        prefixes = {"train": self.output, "validation": self.validation_output}
        return [Path(f"{prefixes[split]}_{key}_document") for split, key in self.outputs]

    @property
    def manifest(self) -> Path:
        """The manifest's file."""
        return Path(f"{self.output}.manifest.json")


@dataclass(frozen=True)
class Result:
    """A finished piece: a part for each output, the lines or rows read, and the refused records."""

    parts: list[Part]
    lines: int
    refused: list[Refusal]

    @classmethod
    def read(cls, path: Path) -> Result | None:
        """A result from its file; None if the file is missing or damaged."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValueError):
            return None


class PieceFolder:
    """The folder of a run.

    Tokens in the whole file are removed from their piece, so the disk holds them once. Only the end waits for
    the disk. So pieces of an earlier run are checked against their sums.

    ``path`` is the folder, ``results`` are the finished pieces by number.
    """

    def __init__(self, options: Options, pieces: Sequence[Piece], fingerprint: str) -> None:
        """The folder beside the output for this fingerprint. It is not made or read yet."""
        self.options, self.pieces = options, pieces
        self.path = Path(f"{options.output}.pieces-{fingerprint[:8]}")
        self.results: dict[int, Result] = {}

    def of_other_runs(self) -> list[Path]:
        """Folders for the same output, left by runs with other sources, tokenizers or settings."""
        name = f"{glob.escape(self.options.output.name)}.pieces-*"
        return [path for path in self.path.parent.glob(name) if path != self.path]

    def resume(self) -> None:
        """Take the undamaged pieces of an earlier run, and remove the others."""
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob("*-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        starts = [0 for _ in self.options.outputs]
        for number in range(len(self.pieces)):
            piece = self._piece(number)
            result = Result.read(piece / _RESULT)
            # The place of its tokens in a whole file is known only if no piece before it is missing.
            if result and self._is_whole(piece, result, starts if len(self.results) == number else None):
                self.results[number] = result
                starts = [start + part.size for start, part in zip(starts, result.parts, strict=True)]
            elif piece.exists():
                shutil.rmtree(piece)

    def _is_whole(self, piece: Path, result: Result, starts: list[int] | None) -> bool:
        for output, part in enumerate(result.parts):
            for ending, (size, crc) in part.files.items():
                file, start = piece / f"{output}{ending}", 0
                if ending == ".bin" and starts and not file.exists():
                    file, start = self._whole(output, ending), starts[output]
                if crc_of(file, start, size) != crc:
                    return False
        return True

    @property
    def missing(self) -> list[int]:
        """Numbers of the pieces that are not made yet."""
        return [number for number in range(len(self.pieces)) if number not in self.results]

    def begin(self, number: int) -> Path:
        """A new folder of this process, to make a piece in."""
        place = self.path / f"{number:06d}-{os.getpid()}"
        place.mkdir()
        return place

    def keep(self, number: int, place: Path, result: Result) -> None:
        """Keep the piece that was made in ``place``."""
        (place / _RESULT).write_text(json.dumps(asdict(result)))
        place.rename(self._piece(number))

    def assemble(self, dtype: str) -> dict[str, dict[str, Any]]:
        """Join all pieces, flush them to the disk, and list the refused records.

        Returns:
            For each token file, by its path from the output's folder: its counts, the type of a token, and
            size and SHA-256 of its ``bin`` and ``idx``.
        """
        self._list_refused()
        outputs = {}
        for output, target in enumerate(self.options.targets):
            parts = {
                self._piece(number) / str(output): self.results[number].parts[output]
                for number in range(len(self.pieces))
            }
            files = {ending: self._whole(output, f".{ending}") for ending in ("bin", "idx")}
            _join(files["bin"], parts)
            write_index(files["idx"], {path: part.counts for path, part in parts.items()}, dtype)
            outputs[os.path.relpath(target, self.path.parent)] = {
                **asdict(sum((part.counts for part in parts.values()), Counts())),
                "dtype": dtype,
                "bytes": {ending: file.stat().st_size for ending, file in files.items()},
                "sha256": {ending: sha256_of(file) for ending, file in files.items()},
            }
        return outputs

    def _list_refused(self) -> None:
        with (self.path / _REFUSED).open("w") as stream:
            before, lines = "", 0
            for number, piece in enumerate(self.pieces):
                file = piece.sources[0].path
                lines, before = (lines if piece.start and file == before else 0), file
                for refusal in self.results[number].refused:
                    listed = replace(refusal, line=refusal.line + lines)
                    stream.write(f"{json.dumps(asdict(listed))}\n")
                lines += self.results[number].lines

    @property
    def manifest(self) -> Path:
        """The manifest before it is moved. If it exists, only :meth:`publish` is left to do."""
        return self.path / "manifest.json"

    def complete(self, manifest: dict[str, Any]) -> None:
        """Write the manifest. After that, files are only moved."""
        temporary = self.path / "manifest.new"
        with temporary.open("w") as stream:
            stream.write(f"{json.dumps(manifest, indent=2)}\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.manifest)

    def publish(self) -> None:
        """Move the files into place, the manifest last, and remove the folder. Can be called again."""
        moves = {self.path / _REFUSED: Path(f"{self.options.output}.refused.jsonl")}
        for output, target in enumerate(self.options.targets):
            for ending in (".bin", ".idx"):
                moves[self._whole(output, ending)] = Path(f"{target}{ending}")
        # Without a manifest, nothing counts as finished.
        self.options.manifest.unlink(missing_ok=True)
        for source, target in moves.items():
            if source.exists():
                os.replace(source, target)
        os.replace(self.manifest, self.options.manifest)
        shutil.rmtree(self.path)

    def _piece(self, number: int) -> Path:
        return self.path / f"{number:06d}"

    def _whole(self, output: int, ending: str) -> Path:
        return self.path / f"whole.{output}{ending}"


def _join(whole: Path, parts: Mapping[Path, Part]) -> None:
    """Write the parts' tokens one after the other. A part without a file is in its place already."""
    whole.touch()
    with whole.open("r+b") as stream:
        position = 0
        for path, part in parts.items():
            tokens = Path(f"{path}.bin")
            if tokens.exists():
                stream.seek(position)
                with tokens.open("rb") as source:
                    shutil.copyfileobj(source, stream, _BUFFER)
                stream.flush()
                tokens.unlink()
            position += part.size
        stream.truncate(position)
        os.fsync(stream.fileno())


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest of :meth:`PieceFolder.complete`; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "outputs" in content else {}
