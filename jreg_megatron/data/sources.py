"""The files that text comes from: which they are, in what order, and how to open them."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath
from typing import IO, Any

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.extras import need

FORMATS = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet", ".pq"), "text": (".txt", ".md")}
"""What a file may be, and the endings by which it is known; ``.gz`` and ``.zst`` may follow those of text."""

_KNOWN = " ".join(chain(*FORMATS.values())) + " (and .gz, .zst behind them)"
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_ENDS = 1 << 20
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file as it was when it was found.

    Attributes:
        path: absolute path, or the URL of a file on the Hugging Face hub.
        format: ``jsonl``, ``parquet`` or ``text``.
        compression: ``gz``, ``zst`` or nothing.
        size: bytes on disk.
        modified: nanoseconds since 1970; 0 on the hub, where the URL holds the revision.
        ends: SHA-256 of the first and the last MiB; reading all of a corpus for a sum would take hours.
    """

    path: str
    format: str
    compression: str
    size: int
    modified: int
    ends: str

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return "://" not in self.path


@dataclass(frozen=True)
class Corpus:
    """Inputs to look for.

    Attributes:
        inputs: files, folders and patterns.
        kind: their format, or None to go by the endings.
        hub: a dataset's name instead, or a folder that is laid out like one.
        subset: its configuration, or None if it has only one.
        split: its split.
    """

    inputs: tuple[str, ...] = ()
    kind: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"

    def find(self) -> list[Source]:
        """The files, in order.

        Raises:
            UserError: if there are none, or they are not of a kind that is read here.
        """
        if self.hub is None:
            return find_sources(self.inputs, self.kind)
        if self.inputs:
            raise UserError(f"--hub {self.hub} and {self.inputs[0]} exclude each other; give one of them")
        return [_hub_source(url) for url in self._urls(self.hub)]

    def _urls(self, name: str) -> list[str]:
        """The files of the split as the hub's own library finds them; it runs no code of the dataset.

        They are read where they are, range by range, so nothing has to fit the disk but the tokens.
        """
        datasets = need("datasets", "--hub", "data")
        datasets.logging.set_verbosity_error()
        log = need("huggingface_hub.utils.logging", "--hub", "data")
        log.set_verbosity_error()  # it tells of every attempt
        where = f"--hub {name}" + (f" --subset {self.subset}" if self.subset else "")
        try:
            builder = datasets.load_dataset_builder(name, self.subset)
            files = builder.config.data_files
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            said = (" ".join(str(error).split()) or type(error).__name__)[:300]
            raise UserError(
                f"{where} cannot be found ({said}); correct the name or the network access"
            ) from error
        if not files or self.split not in files:
            known = f"only {', '.join(map(str, files))}" if files else "none"
            raise UserError(f"{where} has no split {self.split}, {known}; name one with --hub-split")
        return [os.fspath(file) for file in files[self.split]]


def find_sources(inputs: Iterable[str], kind: str | None = None) -> list[Source]:
    """The files that ``inputs`` name, in that order.

    A folder stands for the files below it whose ending is known, sorted by path, hidden ones left out; a
    pattern for its matches, sorted.

    Args:
        inputs: files, folders and patterns such as ``data/*.jsonl``.
        kind: one of :data:`FORMATS` for all files, whatever their ending; None to go by the ending.

    Raises:
        UserError: if something is missing, unreadable, of unknown kind, or named twice.
    """
    paths: list[str] = []
    for name in inputs:
        paths += _expand(name, kind)
    if not paths:
        raise UserError(
            "no input is given; name files, folders or patterns, before flags that take several words"
        )
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            also = "" if seen[real] == path else f" (as {seen[real]} too)"
            raise UserError(f"{path} is given twice{also}; name it once")
        seen[real] = path
    return [local_source(path, kind) for path in paths]


def local_source(path: str, kind: str | None = None) -> Source:
    """The file at ``path``.

    Raises:
        UserError: if it cannot be read, or its ending is not known and ``kind`` is None.
    """
    kind, compression = _kind_of(path, kind)
    with _readable(path), open(path, "rb") as stream:
        status = os.fstat(stream.fileno())
        ends = _digest_of_ends(stream, status.st_size)
    return Source(os.path.abspath(path), kind, compression, status.st_size, status.st_mtime_ns, ends)


def _hub_source(url: str) -> Source:
    """The file of a dataset on the Hugging Face hub, or of one that lies in a local folder."""
    if "://" not in url:
        return local_source(url)
    fsspec = need("fsspec", "--hub", "data")
    kind, compression = _kind_of(url, None)
    with _readable(url):
        return Source(url, kind, compression, fsspec.url_to_fs(url)[0].size(url), 0, "")


def _kind_of(path: str, kind: str | None) -> tuple[str, str]:
    """Format and compression of a file; the format is ``kind`` or by its ending.

    Raises:
        UserError: if neither tells the format, or the format cannot be compressed so.
    """
    by_ending, compression = _by_ending(path)
    kind = kind or by_ending
    if kind is None:
        raise UserError(f"{path} has none of the endings {_KNOWN}; name the format with --format")
    if kind == "parquet" and compression:
        raise UserError(
            f"{path} is Parquet inside .{compression}; unpack it first, Parquet is compressed itself"
        )
    return kind, compression


def _by_ending(path: str) -> tuple[str | None, str]:
    """Format, if the ending tells it, and compression of a file."""
    endings = PurePosixPath(path.lower()).suffixes
    compression = _COMPRESSIONS.get(endings[-1], "") if endings else ""
    ending = "".join(endings[-2:-1] if compression else endings[-1:])
    return next((kind for kind, known in FORMATS.items() if ending in known), None), compression


def refuse_changed(sources: Iterable[Source]) -> None:
    """Raises:
    UserError: for a file that is no longer as it was found.
    """
    for source in sources:
        if source.is_local and local_source(source.path, source.format) != source:
            raise UserError(
                f"{source.path} changed while it was read; run the command again when nothing writes to it"
            )


@contextmanager
def open_source(source: Source) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file for reading: its content unpacked, and the file itself, whose ``tell()`` is what was read.

    Raises:
        UserError: naming the file, for what goes wrong inside the block: cut short, not what its ending
            says, or unreadable.
    """
    with _readable(source.path), _opened(source) as raw:
        if source.compression == "gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER), raw
        elif source.compression == "zst":
            yield io.BufferedReader(_Zstandard(raw), _BUFFER), raw
        else:
            yield raw, raw


def _opened(source: Source) -> IO[bytes]:
    if source.is_local:
        return open(source.path, "rb", buffering=_BUFFER)
    fsspec = need("fsspec", "--hub", "data")
    stream: IO[bytes] = fsspec.open(source.path, "rb", block_size=16 * _BUFFER).open()
    return stream


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what goes wrong in reading ``path`` into one line that names it."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{path} is cut short ({error}); fetch it again") from error
    except (gzip.BadGzipFile, zlib.error, _NotZstandard) as error:
        raise UserError(f"{path} is damaged or not what its ending says ({error}); fetch it again") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); correct the path or its access"
        ) from error


def _expand(name: str, kind: str | None) -> list[str]:
    if os.path.isdir(name):
        found = sorted(path for path in _files_below(name) if kind or _by_ending(path)[0])
        if not found:
            raise UserError(
                f"{name} has no file with one of the endings {_KNOWN}; name its files and --format"
            )
        return found
    if os.path.lexists(name):
        return [name]
    found = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
    if not found:
        what = "matches no file" if glob.has_magic(name) else "does not exist"
        raise UserError(f"{name} {what}; correct the path")
    return found


def _files_below(name: str) -> Iterator[str]:
    for folder, below, files in os.walk(name, onerror=_refuse):
        below[:] = [part for part in below if not part.startswith(".")]
        yield from (os.path.join(folder, file) for file in files if not file.startswith("."))


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}); fix its access") from error


def _digest_of_ends(stream: IO[bytes], size: int) -> str:
    digest = hashlib.sha256(stream.read(_ENDS))
    if size > _ENDS:
        stream.seek(max(_ENDS, size - _ENDS))
        digest.update(stream.read(_ENDS))
    return digest.hexdigest()


class _NotZstandard(Exception):
    pass


class _Zstandard(io.RawIOBase):
    """All frames of a ``.zst`` file, one behind the other.

    The reader of the ``zstandard`` package takes the end of a file that was cut short for its end.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._ready = raw, memoryview(b"")
        self._zstandard: Any = need("zstandard", "reading .zst files", "data")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._raw.read(1 << 17)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._ready = memoryview(b"".join(self._unpack(packed)))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self, packed: bytes) -> Iterator[bytes]:
        while packed:
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield self._frame.decompress(packed)
            except self._zstandard.ZstdError as error:
                raise _NotZstandard(error) from error
            packed = b""
            if self._frame.eof:
                packed, self._frame = self._frame.unused_data, None
