"""Finished pieces put together into token files, in order and as soon as they can be."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jreg_megatron.data import encode
from jreg_megatron.data.encode import Result
from jreg_megatron.data.token_file import Appender, Counts, crc_of, write_index
from jreg_megatron.runtime.errors import UserError

_MANIFEST = "manifest.json"


class Assembly:
    """The pieces of a run in their folder.

    A piece's tokens are removed once they stand in the whole, so the disk holds them once. Its lengths stay
    for the index. Nothing waits for the disk: what an earlier run left is held against its sums.
    """

    def __init__(self, folder: Path, pieces: int, outputs: int, dtype: str) -> None:
        """Take up what an earlier run left in ``folder``, or start with an empty one."""
        self.folder, self._pieces, self._dtype = folder, pieces, dtype
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*-*"):
            left.unlink()  # from a process that was killed
        self.results: dict[int, Result] = {}
        for number in range(pieces):
            result = encode.finished(folder, number)
            if result is not None and self._is_whole(number, result):
                self.results[number] = result
        self._appenders = [Appender(self.whole(output)) for output in range(outputs)]
        self._next = [self._accept(output) for output in range(outputs)]
        for number in list(self.results):
            if not all(self._is_kept(number, output) for output in range(outputs)):
                del self.results[number]

    @property
    def missing(self) -> list[int]:
        """Numbers of the pieces that are still to be made."""
        return [number for number in range(self._pieces) if number not in self.results]

    @property
    def refused(self) -> dict[str, int]:
        """Refused records of the finished pieces, by kind."""
        total: Counter[str] = Counter()
        for result in self.results.values():
            total.update(result.refused)
        return dict(sorted(total.items()))

    def totals(self, output: int) -> Counts:
        """What the finished pieces hold for an output."""
        return sum((result.parts[output].counts for result in self.results.values()), Counts())

    def add(self, number: int, result: Result) -> None:
        """Take a finished piece; append it and those behind it, if they are next."""
        for output, following in enumerate(self._next):
            if number < following:  # made again for the sake of another output
                self._file(number, output, ".bin").unlink()
        self.results[number] = result
        self.append()

    def append(self) -> None:
        """Append all pieces that are next."""
        for output, appender in enumerate(self._appenders):
            while self._next[output] in self.results:
                tokens = self._file(self._next[output], output, ".bin")
                appender.append(tokens)
                tokens.unlink()
                self._next[output] += 1

    def finish(self) -> list[dict[str, str]]:
        """Write the indices and bring all to the disk; SHA-256 of each output's files."""
        self.append()
        sums = []
        for output, appender in enumerate(self._appenders):
            parts = [encode.part_path(self.folder, number, output) for number in range(self._pieces)]
            index = write_index(self.whole(output, ".idx"), parts, self.totals(output), self._dtype)
            sums.append({"bin": appender.close(), "idx": index})
        return sums

    def whole(self, output: int, ending: str = ".bin") -> Path:
        """Where an output's file is before it is moved to its place."""
        return self.folder / f"whole.{output}{ending}"

    def _file(self, number: int, output: int, ending: str) -> Path:
        return Path(f"{encode.part_path(self.folder, number, output)}{ending}")

    def _is_whole(self, number: int, result: Result) -> bool:
        """Whether a piece's files have its sums; those of its tokens may be gone."""
        for output, part in enumerate(result.parts):
            for ending, size in part.sizes(self._dtype).items():
                file = self._file(number, output, ending)
                if not file.exists() and ending == ".bin":
                    continue
                if not file.exists() or file.stat().st_size != size or crc_of(file) != part.sums[ending]:
                    return False
        return (self.folder / f"{number:06d}.refused").is_file()

    def _accept(self, output: int) -> int:
        """Number of pieces, from the first, that stand in an output's whole."""
        number = 0
        while number in self.results and not self._file(number, output, ".bin").exists():
            part = self.results[number].parts[output]
            if not self._appenders[output].accept(part.sizes(self._dtype)[".bin"], part.sums[".bin"]):
                break
            number += 1
        return number

    def _is_kept(self, number: int, output: int) -> bool:
        return number < self._next[output] or self._file(number, output, ".bin").exists()


def refuse_foreign(targets: list[Path], manifest: Path, folders: list[Path]) -> None:
    """Raises:
    UserError: for a token file in the place of an output that no run of this command made.
    """
    known = {name for path in (manifest, *(f / _MANIFEST for f in folders)) for name in _outputs_of(path)}
    for target in targets:
        if os.path.relpath(target, manifest.parent) in known:
            continue
        for ending in (".bin", ".idx"):
            if os.path.lexists(f"{target}{ending}"):
                raise UserError(
                    f"{target}{ending} exists, but {manifest} does not name it, so it was not made by this "
                    "command; remove it or choose another --output"
                )


def _outputs_of(manifest: Path) -> list[str]:
    try:
        return list(json.loads(manifest.read_text())["outputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def is_complete(folder: Path) -> bool:
    """Whether only the moves of :func:`publish` are left to do."""
    return (folder / _MANIFEST).exists()


def publish(folder: Path, moves: dict[Path, Path], manifest: Path) -> None:
    """Move the finished files into place, the manifest last, and remove the folder.

    It may be cut short anywhere and called again.
    """
    if is_complete(folder):
        manifest.unlink(missing_ok=True)  # until the new one is there, nothing counts as finished
        for source, target in moves.items():
            if source.exists():
                os.replace(source, target)
        os.replace(folder / _MANIFEST, manifest)
    shutil.rmtree(folder)


def write_manifest(folder: Path, content: object) -> None:
    """Write the manifest beside the finished files; from then on they only have to be moved."""
    encode.write_atomically(folder / _MANIFEST, content, sync=True)


def line_offsets(results: dict[int, Result], files: list[tuple[int, str]]) -> Iterator[int]:
    """For each piece, as (start, path of its file), the lines of its file before it."""
    lines, before = 0, ""
    for number, (start, path) in enumerate(files):
        lines = lines if start and path == before else 0
        before = path
        yield lines
        lines += results[number].lines
