"""Turn text into Megatron's token files, in parallel. A killed run can be continued.

Until the end, the folder ``PREFIX.pieces-0123abcd`` holds all files:

000012.0.bin, 000012.0.idx   the token file of piece 12 for output 0
000012.json                  written after these two: their checksums, and the refused records
0.bin, 0.idx                 output 0, joined from all pieces
refused.jsonl, manifest.json
"""

from __future__ import annotations

import errno
import gc
import glob
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

from jreg_megatron.data import corpus, token_file, tokenizing
from jreg_megatron.data.corpus import Piece, Text
from jreg_megatron.data.token_file import sha256_of
from jreg_megatron.data.tokenizing import Tokenizer, TokenizerSettings
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.fork import end_with_the_parent
from jreg_megatron.runtime.lock import lock
from jreg_megatron.runtime.output import check_outputs, versions

_LAYOUT = 2  # increase it if the files change and nothing else in the fingerprint does
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(args: Namespace) -> tuple[dict[str, Any], bool]:
    """Prepare a corpus, or continue a stopped run. ``args`` are the command's.

    Returns:
        The manifest, and False if an earlier run had finished the corpus.

    Raises:
        UserError: if the run cannot finish. Finished pieces are kept, and the same call continues.
    """
    prefixes = {"output": args.output, "validation-output": args.validation_output}
    check_outputs(True, **{flag: str(prefix) for flag, prefix in prefixes.items() if prefix is not None})
    job = _Job(args)
    with lock(Path(f"{args.output}.lock"), f"{args.output} is being made", "give another --output"):
        if made := not job.is_done():
            try:
                job.make()
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise UserError(
                    f"{args.output.parent} cannot hold more data ({error.strerror}); make room and run the "
                    "same command again: it keeps the finished pieces"
                ) from error
        shutil.rmtree(job.folder, ignore_errors=True)
        return _read(job.manifest), made


class _Job:
    """A run: its arguments, its input, its outputs, and the folder in which it makes them."""

    tokenizer: Tokenizer

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.sources = corpus.find(args)
        self.settings = TokenizerSettings.from_args(args)
        self.pieces = corpus.cut(self.sources, args.piece_bytes, args.keys)
        self.size = sum(piece.size for piece in self.pieces)
        self.results: dict[int, dict[str, Any]] = {}  # by piece: the content of its .json
        prefixes = [args.output] + ([args.validation_output] if args.validation_share else [])
        # By the names in the manifest. Megatron's tool gives the same names.
        targets = [Path(f"{prefix}_{key}_document") for prefix in prefixes for key in args.keys]
        self.targets = {os.path.relpath(target, args.output.parent): target for target in targets}
        settings = ("keys", "append_eod", "max_record_bytes", "validation_share", "piece_bytes")
        self.asked = {
            "sources": [asdict(source) for source in self.sources],
            "tokenizer": tokenizing.identify(self.settings),
            "settings": {name: getattr(args, name) for name in settings},
        }
        asked = json.dumps([_LAYOUT, [*self.targets], self.asked], sort_keys=True)
        self.fingerprint = hashlib.sha256(asked.encode()).hexdigest()
        self.manifest = Path(f"{args.output}.manifest.json")
        self.folder = Path(f"{args.output}.pieces-{self.fingerprint[:8]}")

    def is_done(self) -> bool:
        """Whether an earlier run has made the files, and their sizes still match the manifest."""
        earlier = _read(self.manifest)
        return earlier.get("fingerprint") == self.fingerprint and all(
            os.path.isfile(file := f"{target}.{ending}") and os.path.getsize(file) == size
            for name, target in self.targets.items()
            for ending, size in earlier["outputs"][name]["bytes"].items()
        )

    def make(self) -> None:
        """Encode the missing pieces, join all, and move the files into place."""
        started = time.monotonic()
        self._take_place()
        self._say(f"{len(self.sources):,} files in {len(self.pieces):,} pieces; loading Megatron's tokenizer")
        self.tokenizer = tokenizing.build(self.settings)
        if self.args.append_eod and self.tokenizer.eod is None:
            raise UserError(
                f"--tokenizer-model {self.args.tokenizer_model} has no end-of-document token; "
                "give another model or --no-append-eod"
            )
        for number in range(len(self.pieces)):
            result = _read(self.folder / f"{number:06d}.json")
            # A crash of the machine may damage files. They are made again.
            sums = [(self.folder / name, value) for name, value in result.get("sha256", {}).items()]
            if sums and all(file.is_file() and sha256_of(file) == value for file, value in sums):
                self._keep(number, result)
        missing = [number for number in range(len(self.pieces)) if number not in self.results]
        if self.results:
            self._say(f"continuing with {len(missing)} of {len(self.pieces)} pieces left")
        self._encode_all(missing)
        corpus.refuse_changed(self.sources)
        self._publish(started)

    def _take_place(self) -> None:
        """Make the folder, and remove those of other settings. Refuse to replace files of another origin."""
        earlier = _read(self.manifest)
        # If the folder exists, an earlier run of the same command has passed this check.
        known = self.targets if self.folder.exists() else earlier.get("outputs", ())
        for name, target in self.targets.items():
            for file in (f"{target}.bin", f"{target}.idx"):
                if name not in known and os.path.lexists(file):
                    raise UserError(
                        f"{file} exists, but {self.manifest} does not name it, so this command has not made "
                        "it; remove it or give another --output"
                    )
        if earlier:
            changed = [name for name, value in self.asked.items() if earlier.get(name) != value] or ["files"]
            self._say(f"the {' and '.join(changed)} changed since the last run; making it again")
        for other in self.folder.parent.glob(f"{glob.escape(self.args.output.name)}.pieces-*"):
            if other != self.folder:
                self._say("sources, tokenizer or settings changed since the last run; starting again")
                shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True)

    def _part(self, number: int, output: int) -> Path:
        """The token file of a piece for an output, without its ending."""
        return self.folder / f"{number:06d}.{output}"

    def _encode_all(self, missing: list[int]) -> None:
        from tqdm import tqdm

        workers = min(self.args.workers, len(missing)) or 1
        # Forked processes share the imported modules and the tokenizer.
        context = multiprocessing.get_context("fork")
        others = multiprocessing.active_children()
        with ProcessPoolExecutor(workers, context, _begin_worker, (self,)) as pool:
            try:
                pieces = {pool.submit(_encode, number): number for number in missing}
                bar = tqdm(
                    as_completed(pieces),
                    desc=self.args.output.name,
                    total=len(self.pieces),
                    initial=len(self.results),
                    unit=" pieces",
                    disable=True if self.args.quiet else None,
                )
                for done in bar:
                    self._keep(pieces[done], done.result())
                    self._check_disk()
            except BaseException as error:
                for process in multiprocessing.active_children():
                    if process not in others:
                        process.terminate()
                if not isinstance(error, BrokenProcessPool):
                    raise
                raise UserError(
                    f"one of {workers} workers was killed, perhaps because memory ran out; run the same "
                    "command again with fewer --workers: it continues from here"
                ) from error

    def encode(self, number: int) -> dict[str, Any]:
        """Make the files of a piece, in a worker. Returns the content of its ``.json``."""
        piece, vocab_size = self.pieces[number], self.tokenizer.vocab_size
        parts = [self._part(number, output) for output in range(len(self.targets))]
        writers = [token_file.builder(part, vocab_size) for part in parts]
        refused: list[dict[str, Any]] = []
        lines = 0
        for record in corpus.records(piece, self.args.keys, self.args.max_record_bytes):
            lines = record.line
            if record.kind:
                names = ("file", "line", "kind", "reason")
                refused.append({name: getattr(record, name) for name in names})
                self._check_refused(len(refused), refused[-1], piece)
            elif record.texts:
                outputs = writers[len(record.texts) :] if self._is_held_out(record.texts[0]) else writers
                for writer, text in zip(outputs, record.texts, strict=False):
                    writer.add_document(*self._ids_of(text))
        for writer, part in zip(writers, parts, strict=True):
            writer.finalize(f"{part}.idx")
        files = [Path(f"{part}{ending}") for part in parts for ending in (".bin", ".idx")]
        result = {
            "sha256": {file.name: sha256_of(file) for file in files},
            "bytes": sum(file.stat().st_size for file in files),
            "lines": lines,
            "refused": refused,
        }
        (self.folder / f"{number:06d}.json").write_text(json.dumps(result))
        return result

    def _is_held_out(self, text: Text) -> bool:
        """Whether the text is for validation. A hash of the text decides, so its copies stay together."""
        content = text if isinstance(text, str) else "".join(text)
        share = int.from_bytes(blake2b(content.encode(), digest_size=8).digest()) / 2**64
        return bool(share < self.args.validation_share)

    def _ids_of(self, text: Text) -> tuple[list[int], list[int]]:
        """Ids of a document and the lengths of its sequences, as Megatron's tool makes them."""
        sentences = [text] if isinstance(text, str) else text
        parts = [part for sentence in sentences if (part := self.tokenizer.encode(sentence))]
        if parts and self.args.append_eod:
            assert self.tokenizer.eod is not None
            parts[-1] = [*parts[-1], self.tokenizer.eod]
        return list(chain.from_iterable(parts)), [len(part) for part in parts]

    def _keep(self, number: int, result: dict[str, Any]) -> None:
        self.results[number] = result
        if result["refused"]:
            count = sum(len(each["refused"]) for each in self.results.values())
            self._check_refused(count, result["refused"][0], self.pieces[number])

    def _check_refused(self, count: int, refusal: dict[str, Any], piece: Piece) -> None:
        """Raises:
        UserError: if ``count`` refused records exceed the limit; it names ``refusal`` in ``piece``.
        """
        if count > self.args.max_refused:
            line = refusal["line"] + corpus.lines_before(piece)
            raise UserError(
                f"{refusal['file']} line {line} is {refusal['kind']} ({refusal['reason']}), and more than "
                f"--max-refused {self.args.max_refused} records are refused; correct the file or raise the "
                "limit, then run the same command: it keeps the finished pieces"
            )

    def _check_disk(self) -> None:
        """Stop if the disk has no room for the remaining pieces and for the joined files."""
        read = sum(self.pieces[number].size for number in self.results)
        written = sum(result["bytes"] for result in self.results.values())
        needed = written * (2 * self.size - read) // max(1, read)
        folder = self.args.output.parent
        free = shutil.disk_usage(folder).free
        if self.args.check_disk and needed > free:
            raise UserError(
                f"{folder} has {free / 1e9:.1f} GB free, but the run needs about {needed / 1e9:.1f} GB more "
                "(estimated from the finished pieces); make room and run the same command again, or give "
                "--no-disk-check"
            )

    def _publish(self, started: float) -> None:
        """Join the pieces, and move the files into place, the manifest last."""
        moves: dict[Path, str] = {}
        outputs: dict[str, dict[str, Any]] = {}
        for output, (name, target) in enumerate(self.targets.items()):
            parts = [self._part(number, output) for number in range(len(self.pieces))]
            numbers = token_file.join(self.folder / str(output), parts, self.tokenizer.vocab_size)
            if not numbers["tokens"]:
                more = " and the other files" if self.sources[1:] else ""
                raise UserError(
                    f"{self.sources[0].path}{more} gave no text for {target}; give other inputs, other "
                    "--keys or a larger --validation-share"
                )
            made = {ending: self.folder / f"{output}.{ending}" for ending in ("bin", "idx")}
            moves |= {file: f"{target}.{ending}" for ending, file in made.items()}
            outputs[name] = numbers | {
                "bytes": {ending: file.stat().st_size for ending, file in made.items()},
                "sha256": {ending: sha256_of(file) for ending, file in made.items()},
            }
        refused = list(self._refused())
        (self.folder / "refused.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in refused))
        moves[self.folder / "refused.jsonl"] = f"{self.args.output}.refused.jsonl"
        manifest = {
            "fingerprint": self.fingerprint,
            "command": sys.argv,
            "outputs": outputs,
            "refused": dict(sorted(Counter(row["kind"] for row in refused).items())),
            "workers": self.args.workers,
            "vocab_size": self.tokenizer.vocab_size,
            "eod": self.tokenizer.eod if self.args.append_eod else None,
            **self.asked,
            "versions": versions("megatron-core", "numpy") | {"python": platform.python_version()},
            "seconds": round(time.monotonic() - started, 1),
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        moves[self.folder / "manifest.json"] = str(self.manifest)
        for file in moves:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        # Without a manifest, nothing counts as finished.
        self.manifest.unlink(missing_ok=True)
        for file, place in moves.items():
            shutil.move(file, place)

    def _refused(self) -> Iterator[dict[str, Any]]:
        """All refused records, with line numbers from the start of the file."""
        before = 0
        for number, piece in enumerate(self.pieces):
            before = before if piece.start else 0
            for row in self.results[number]["refused"]:
                yield row | {"line": row["line"] + before}
            before += self.results[number]["lines"]

    def _say(self, words: str) -> None:
        if not self.args.quiet:
            print(f"{self.args.output}: {words}", flush=True)


_jobs: list[_Job] = []  # a worker's job, inherited by the fork, because not every tokenizer can be pickled


def _begin_worker(job: _Job) -> None:
    end_with_the_parent()
    gc.freeze()  # a garbage collection would copy the parent's objects into every worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    _jobs.append(job)


def _encode(number: int) -> dict[str, Any]:
    return _jobs[-1].encode(number)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
