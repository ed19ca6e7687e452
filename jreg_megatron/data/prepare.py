"""Turn text into Megatron's token files, in parallel. A killed run can be continued."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jreg_megatron.data import pieces, sources, tokenizing, workers
from jreg_megatron.data.encode import Encoder, full_disk_refused
from jreg_megatron.data.piece_folder import Options, PieceFolder, read_manifest
from jreg_megatron.data.records import Record
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.lock import lock
from jreg_megatron.runtime.output import check_outputs, versions

_LAYOUT = 1  # raise it if files change, and nothing else in the fingerprint does
_SAMPLE_DOCUMENTS, _SAMPLE_SECONDS = 100, 1.0


def prepare(options: Options) -> bool:
    """Prepare a corpus, or continue a stopped run. Returns False if an earlier run has finished it.

    Raises:
        UserError: for anything that stops it. Finished pieces are kept, and the same call continues.
    """
    _check_places(options)
    job = _Job(options)
    with lock(Path(f"{options.output}.lock"), f"{options.output} is being made", "give another --output"):
        job.refuse_foreign()
        if job.is_done():
            shutil.rmtree(job.folder.path, ignore_errors=True)
            return False
        job.remove_others()
        if not job.folder.manifest.exists():
            job.make()
        job.folder.publish()
    return True


def _check_places(options: Options) -> None:
    prefixes = {"output": options.output, "validation-output": options.validation_output}
    check_outputs(True, **{flag: str(prefix) for flag, prefix in prefixes.items() if prefix is not None})
    for path in (options.manifest, *(Path(f"{t}.{end}") for t in options.targets for end in ("bin", "idx"))):
        if path.is_dir():
            raise UserError(
                f"{path} is a folder, but a file has to go there; remove it or give another --output"
            )


class _Job:
    """A run: its options, its input and its folder."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.sources = options.corpus.find()
        identity = tokenizing.identify(options.tokenizer)
        piece_bytes = options.piece_bytes or pieces.default_piece_bytes(self.sources)
        self.pieces = pieces.cut(self.sources, piece_bytes, options.keys)
        self.asked = {
            "sources": [asdict(source) for source in self.sources],
            "tokenizer": identity,
            "settings": {
                "keys": list(options.keys),
                "append_eod": options.append_eod,
                "max_record_bytes": options.max_record_bytes,
                "validation_share": options.validation_share,
                "piece_bytes": piece_bytes,
            },
        }
        asked = json.dumps([_LAYOUT, self.asked], sort_keys=True)
        self.fingerprint = hashlib.sha256(asked.encode()).hexdigest()
        self.folder = PieceFolder(options, self.pieces, self.fingerprint)

    def refuse_foreign(self) -> None:
        """Raises:
        UserError: if a token file that this command has not made is in the place of an output.
        """
        manifest = self.options.manifest
        folders = [self.folder.path, *self.folder.of_other_runs()]
        known = {
            name
            for path in (manifest, *(folder / self.folder.manifest.name for folder in folders))
            for name in read_manifest(path).get("outputs", ())
        }
        for target in self.options.targets:
            for file in (f"{target}.bin", f"{target}.idx"):
                if os.path.relpath(target, manifest.parent) not in known and os.path.lexists(file):
                    raise UserError(
                        f"{file} exists, but {manifest} does not name it, so this command has not made it; "
                        "remove it or give another --output"
                    )

    def is_done(self) -> bool:
        """Whether an earlier run has made the files, and their sizes are those of the manifest."""
        earlier = read_manifest(self.options.manifest)
        if earlier.get("fingerprint") != self.fingerprint:
            return False
        sizes = {
            f"{target}.{ending}": size
            for target, output in zip(self.options.targets, earlier["outputs"].values(), strict=False)
            for ending, size in output["bytes"].items()
        }
        return all(os.path.isfile(file) and os.path.getsize(file) == size for file, size in sizes.items())

    def remove_others(self) -> None:
        """Remove pieces of other sources, tokenizers or settings, and say why the run starts again."""
        if earlier := read_manifest(self.options.manifest):
            changed = [name for name, value in self.asked.items() if earlier.get(name) != value] or ["files"]
            self._say(f"the {' and '.join(changed)} changed since the last run; making it again")
        for other in self.folder.of_other_runs():
            self._say("sources, tokenizer or settings changed since the last run; starting again")
            shutil.rmtree(other)

    def make(self) -> None:
        """Encode the missing pieces, and leave all files in the folder, ready to be moved."""
        options, started = self.options, time.monotonic()
        count = f"{len(self.sources):,} files in {len(self.pieces):,} pieces"
        self._say(f"{count}; loading Megatron's tokenizer")
        encoder = Encoder(self.folder, tokenizing.build(options.tokenizer))
        if options.append_eod and encoder.tokenizer.eod is None:
            raise UserError(
                f"--tokenizer-model {options.tokenizer.tokenizer_model} has no end-of-document token; "
                "give another model or --no-append-eod"
            )
        with full_disk_refused(options.output.parent):
            self.folder.resume()
            if self.folder.results:
                self._say(f"continuing with {len(self.folder.missing)} of {len(self.pieces)} pieces left")
            self._check_disk(encoder)
            self._encode(encoder)
            sources.refuse_changed(self.sources)
            outputs = self.folder.assemble(encoder.dtype)
            self._refuse_empty(outputs)
            manifest = self._manifest(encoder, outputs)
            self.folder.complete(manifest | {"seconds": round(time.monotonic() - started, 1)})

    def _check_disk(self, encoder: Encoder) -> None:
        """Encode the first documents, estimate the size of the output, and compare it with the free space."""
        missing, folder = self.folder.missing, self.options.output.parent
        if not self.options.check_disk or not missing:
            return
        reader = encoder.reader(missing[0])
        size, until = 0, time.monotonic() + _SAMPLE_SECONDS
        item = 2 if encoder.dtype == "uint16" else 4
        for record in itertools.islice(reader, _SAMPLE_DOCUMENTS):
            for text in record.texts if isinstance(record, Record) else ():
                size += 20 + item * len(encoder.ids_of(text)[0])
            if time.monotonic() > until:
                break
        rest = sum(self.pieces[number].size for number in missing)
        needed = int(size / reader.bytes_read * rest) if reader.bytes_read else 0
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{folder} has {free / 1e9:.1f} GB free, but about {needed / 1e9:.1f} GB are needed, by the "
                "size of the first documents; make room, give another --output, or --no-disk-check"
            )

    def _encode(self, encoder: Encoder) -> None:
        from tqdm import tqdm

        missing = self.folder.missing
        total = sum(piece.size for piece in self.pieces)
        before = total - sum(self.pieces[number].size for number in missing)
        progress: dict[int, tuple[int, int]] = {}  # bytes read and tokens, by piece
        started = time.monotonic()
        self._check_refused(encoder)
        with (
            closing(workers.run(missing, encoder.encode_piece, self.options.workers)) as events,
            tqdm(
                total=total,
                initial=before,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                desc=self.options.output.name,
                disable=True if self.options.quiet else None,
            ) as bar,
        ):
            try:
                for number, kind, value in events:
                    if kind == "done":
                        self.folder.results[number] = value
                        self._check_refused(encoder)
                        tokens = sum(part.counts.tokens for part in value.parts)
                    progress[number] = (self.pieces[number].size, tokens) if kind == "done" else value
                    read, tokens = map(sum, zip(*progress.values(), strict=True))
                    rate = tokens / (time.monotonic() - started)
                    bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
                    bar.update(before + read - bar.n)
            except workers.WorkerKilled as error:
                status = error.status
                how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
                raise UserError(
                    f"a worker ended {how} in {self.pieces[error.task].sources[0].path}, perhaps because "
                    "memory ran out; run the same command again with fewer --workers: it continues from here"
                ) from error

    def _check_refused(self, encoder: Encoder) -> None:
        bad = {number: result.refused for number, result in self.folder.results.items() if result.refused}
        if bad:
            last = list(bad)[-1]
            encoder.check_refused(sum(map(len, bad.values())), bad[last][0], self.pieces[last])

    def _refuse_empty(self, outputs: dict[str, dict[str, Any]]) -> None:
        documents = [output["documents"] for output in outputs.values()]
        for (split, key), output in zip(self.options.outputs, outputs.values(), strict=True):
            if output["tokens"]:
                continue
            shutil.rmtree(self.folder.path)
            if split == "validation":
                raise UserError(
                    f"--validation-share is {self.options.validation_share}, which takes no text of "
                    f"{documents[0]} documents; raise it"
                )
            files = self.sources[0].path if len(self.sources) == 1 else f"the {len(self.sources)} input files"
            hold = "holds" if len(self.sources) == 1 else "hold"
            raise UserError(f"{files} {hold} no text under {key!r}; give other inputs")

    def _manifest(self, encoder: Encoder, outputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        results = self.folder.results.values()
        refused = Counter(refusal.kind for result in results for refusal in result.refused)
        return {
            "fingerprint": self.fingerprint,
            "command": sys.argv,
            "outputs": outputs,
            "refused": dict(sorted(refused.items())),
            "workers": self.options.workers,
            "vocab_size": encoder.tokenizer.vocab_size,
            "eod": encoder.tokenizer.eod if self.options.append_eod else None,
            **self.asked,
            "versions": versions("megatron-core", "numpy") | {"python": platform.python_version()},
        }

    def _say(self, words: str) -> None:
        if not self.options.quiet:
            print(f"{self.options.output}: {words}", flush=True)
