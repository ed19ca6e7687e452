"""The pieces of a run in a folder, and their parts put together into token files.

000012/         a piece that is finished
    0.bin       the tokens of its part of output 0, until they stand in whole.0.bin
    0.lengths   see ``PartWriter``
    0.ends
    result.json
000012-4711/    a piece that process 4711 makes
whole.0.bin     output 0
whole.0.idx
refused.jsonl
manifest.json   is written last: then the files only have to be moved
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

from jreg_megatron.data.options import Options
from jreg_megatron.data.pieces import Piece
from jreg_megatron.data.records import Refusal
from jreg_megatron.data.token_file import Counts, Part, crc_of, sha256_of, write_index

_RESULT, _REFUSED = "result.json", "refused.jsonl"
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Result:
    """A finished piece: a part per output, lines or rows read, and the records that were refused."""

    parts: list[Part]
    lines: int
    refused: list[Refusal]

    @classmethod
    def read(cls, path: Path) -> Result | None:
        """What a file says, if it is there and whole."""
        try:
            content = json.loads(path.read_text())
            parts = [Part(Counts(**part["counts"]), part["files"]) for part in content["parts"]]
            return cls(parts, content["lines"], [Refusal(**refusal) for refusal in content["refused"]])
        except (OSError, ValueError, KeyError, TypeError):
            return None


class PieceFolder:
    """The folder of a run.

    A piece's tokens are removed once they stand in the whole, so the disk holds them once. Nothing waits for
    the disk before the end: what an earlier run left is held against its sums.

    Attributes:
        options: what the run is to do.
        pieces: all pieces.
        path: where the folder is.
        results: the finished pieces, by number.
    """

    def __init__(self, options: Options, pieces: Sequence[Piece], fingerprint: str) -> None:
        """The folder beside the output for that fingerprint; it is neither made nor read yet."""
        self.options, self.pieces = options, pieces
        self.path = Path(f"{options.output}.pieces-{fingerprint[:8]}")
        self.results: dict[int, Result] = {}

    def of_other_runs(self) -> list[Path]:
        """Folders that runs with other sources, tokenizers or settings have left for the same output."""
        name = f"{glob.escape(self.options.output.name)}.pieces-*"
        return [path for path in self.path.parent.glob(name) if path != self.path]

    def resume(self) -> None:
        """Take up the pieces that an earlier run has left whole, and remove the others."""
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob("*-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        starts = [0 for _ in self.options.outputs]
        for number in range(len(self.pieces)):
            piece = self._piece(number)
            result = Result.read(piece / _RESULT)
            # Where its tokens are in a whole is known as long as no piece before it is missing.
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
        """Numbers of the pieces that are still to be made."""
        return [number for number in range(len(self.pieces)) if number not in self.results]

    def begin(self, number: int) -> Path:
        """A new folder, of this process alone, to make a piece in."""
        place = self.path / f"{number:06d}-{os.getpid()}"
        place.mkdir()
        return place

    def keep(self, number: int, place: Path, result: Result) -> None:
        """Keep the piece that was made in ``place``."""
        (place / _RESULT).write_text(json.dumps(asdict(result)))
        place.rename(self._piece(number))

    def assemble(self, dtype: str) -> dict[str, dict[str, Any]]:
        """Put all pieces together, bring them to the disk, and list the refused records.

        Returns:
            For each token file, by its name relative to the output's folder: its counts, the type of a
            token, and the size and the SHA-256 of its ``bin`` and ``idx``.
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
        """The manifest before it is moved; if it is there, only :meth:`publish` is left to do."""
        return self.path / "manifest.json"

    def complete(self, manifest: dict[str, Any]) -> None:
        """Write the manifest; from then on the files only have to be moved."""
        temporary = self.path / "manifest.new"
        with temporary.open("w") as stream:
            stream.write(f"{json.dumps(manifest, indent=2)}\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.manifest)

    def publish(self) -> None:
        """Move the files into place, the manifest last, and remove the folder.

        It may be cut short anywhere and called again.
        """
        moves = {self.path / _REFUSED: Path(f"{self.options.output}.refused.jsonl")}
        for output, target in enumerate(self.options.targets):
            for ending in (".bin", ".idx"):
                moves[self._whole(output, ending)] = Path(f"{target}{ending}")
        # Until the new manifest is there, nothing counts as finished.
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
    """Put the tokens of parts one behind the other; those that have no file are in their place already."""
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
    """A manifest of :meth:`PieceFolder.complete`, or nothing if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "outputs" in content else {}
