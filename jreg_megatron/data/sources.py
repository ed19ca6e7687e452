"""The input files of a corpus: find them, order them and open them."""

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

from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.extras import need

FORMATS = {"jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet", ".pq"), "text": (".txt", ".md")}
"""Formats and their file endings. ``.gz`` or ``.zst`` may follow, except for Parquet."""

_KNOWN = " ".join(chain(*FORMATS.values())) + " (and .gz, .zst after them)"
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Source:
    """An input file, as it was found."""

    path: str
    """Absolute path, or the URL of a file on the Hugging Face hub."""
    format: str
    """A key of :data:`FORMATS`."""
    compression: str
    """``gz``, ``zst`` or nothing."""
    size: int
    """Bytes on disk."""
    modified: int
    """Nanoseconds since 1970; 0 on the hub, where the URL holds the revision."""
    ends: str
    """SHA-256 of the first and the last MiB. A sum of a whole corpus would take hours."""

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return "://" not in self.path


@dataclass(frozen=True)
class Corpus:
    """The arguments that name the input, which ``--help`` describes."""

    inputs: tuple[str, ...] = ()
    kind: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"

    def find(self) -> list[Source]:
        """The files, in order.

        Raises:
            UserError: if there are none, or their format is not known.
        """
        if self.hub is None:
            return find_sources(self.inputs, self.kind)
        if self.inputs:
            raise UserError(f"--hub {self.hub} and {self.inputs[0]} exclude each other; give one of them")
        return [_hub_source(url) for url in self._urls(self.hub)]

    def _urls(self, name: str) -> list[str]:
        """The files of the split, found by the hub's library, which runs no code of the dataset.

        They are read over the network, range by range, so the disk holds the tokens alone.
        """
        datasets = need("datasets", "--hub", "data")
        datasets.logging.set_verbosity_error()
        log = need("huggingface_hub.utils.logging", "--hub", "data")
        log.set_verbosity_error()  # it reports every attempt
        where = f"--hub {name}" + (f" --subset {self.subset}" if self.subset else "")
        try:
            builder = datasets.load_dataset_builder(name, self.subset)
            files = builder.config.data_files
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"{where} cannot be found ({one_line(error, 300)}); correct the name or the network access"
            ) from error
        if not files or self.split not in files:
            known = ", ".join(map(str, files or ["none"]))
            raise UserError(f"{where} has no split {self.split}; it has {known}; give one with --hub-split")
        return [os.fspath(file) for file in files[self.split]]


def find_sources(inputs: Iterable[str], kind: str | None = None) -> list[Source]:
    """The files that ``inputs`` name, in this order.

    A folder gives the files below it that have a known ending and are not hidden, sorted by path. A pattern
    such as ``data/*.jsonl`` gives its matches, sorted. ``kind`` is the format of all files, one of
    :data:`FORMATS`; None to go by the ending.

    Raises:
        UserError: if something is missing, unreadable, of unknown format, or named twice.
    """
    paths = [path for name in inputs for path in _expand(name, kind)]
    if not paths:
        raise UserError("INPUT is missing; name files, folders or patterns, before --keys and its values")
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
    """A file of a dataset on the Hugging Face hub, or in a local folder with the same structure."""
    if "://" not in url:
        return local_source(url)
    fsspec = need("fsspec", "--hub", "data")
    kind, compression = _kind_of(url, None)
    with _readable(url):
        return Source(url, kind, compression, fsspec.url_to_fs(url)[0].size(url), 0, "")


def _kind_of(path: str, kind: str | None) -> tuple[str, str]:
    """Format and compression of a file. The format is ``kind``, or else by the ending."""
    by_ending, compression = _by_ending(path)
    kind = kind or by_ending
    if kind is None:
        raise UserError(f"{path} has none of the endings {_KNOWN}; give the format with --format")
    if kind == "parquet" and compression:
        raise UserError(f"{path} is Parquet inside .{compression}, which cannot be read; unpack it first")
    return kind, compression


def _by_ending(path: str) -> tuple[str | None, str]:
    """Format and compression of a file by its ending; None for an unknown format."""
    endings = PurePosixPath(path.lower()).suffixes
    compression = _COMPRESSIONS.get(endings[-1], "") if endings else ""
    ending = "".join(endings[-2:-1] if compression else endings[-1:])
    return next((kind for kind, known in FORMATS.items() if ending in known), None), compression


def refuse_changed(sources: Iterable[Source]) -> None:
    """Raises:
    UserError: for a file that has changed since it was found.
    """
    for source in sources:
        if source.is_local and local_source(source.path, source.format) != source:
            raise UserError(
                f"{source.path} changed while it was read; run the command again when nothing writes to it"
            )


@contextmanager
def open_source(source: Source) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file for reading: its unpacked content, and itself. Its ``tell()`` counts packed bytes.

    Raises:
        UserError: naming the file, if it is cut short, damaged or unreadable; inside the block too.
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
    """Turn errors in reading ``path`` into one line that names it."""
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
            raise UserError(f"{name} has no file with one of the endings {_KNOWN}; give --format")
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
    digest = hashlib.sha256(stream.read(_BUFFER))
    if size > _BUFFER:
        stream.seek(max(_BUFFER, size - _BUFFER))
        digest.update(stream.read(_BUFFER))
    return digest.hexdigest()


class _NotZstandard(Exception):
    pass


class _Zstandard(io.RawIOBase):
    """All frames of a ``.zst`` file, one after the other.

    The reader of the ``zstandard`` package does not notice a file that is cut short.
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
