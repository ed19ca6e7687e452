"""Text into Megatron's token files, in parallel, and on from where it was when it is killed."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jreg_megatron import __version__
from jreg_megatron.data import assembly, encode, hub, pieces, sources, tokenizing, workers
from jreg_megatron.data.assembly import Assembly
from jreg_megatron.data.encode import Encoder, Recipe
from jreg_megatron.data.pieces import Piece
from jreg_megatron.data.records import Reader
from jreg_megatron.data.sources import Source
from jreg_megatron.data.token_file import token_type
from jreg_megatron.data.tokenizing import Tokenizer, TokenizerSettings
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.lock import lock

_LAYOUT = 1  # raise it when files change for a reason that the rest of the fingerprint does not show
_SAMPLE_DOCUMENTS, _SAMPLE_SECONDS = 100, 1.0


@dataclass(frozen=True)
class Options:
    """What to prepare.

    Attributes:
        corpus: where the text comes from.
        tokenizer: by what it is encoded.
        recipe: how it is encoded.
        output: prefix of the files; Megatron's tool names them ``PREFIX_KEY_document.bin`` and ``.idx``.
        validation_output: prefix for the documents that are held out, if the recipe holds some out.
        workers: number of processes, at least 1.
        max_refused: more refused records than this stop the run.
        piece_bytes: bytes on disk of a piece, or None for a default.
        check_disk: whether to refuse to start if the disk seems too small.
        quiet: no progress and no words.
    """

    corpus: hub.Corpus
    tokenizer: TokenizerSettings
    recipe: Recipe
    output: Path
    validation_output: Path | None
    workers: int
    max_refused: int = 0
    piece_bytes: int | None = None
    check_disk: bool = True
    quiet: bool = False

    @property
    def targets(self) -> list[Path]:
        """The output files without their endings, in the order of the recipe's outputs."""
        prefixes = {"train": self.output, "validation": self.validation_output}
        return [Path(f"{prefixes[split]}_{key}_document") for split, key in self.recipe.outputs]

    @property
    def manifest(self) -> Path:
        """Where the manifest goes."""
        return Path(f"{self.output}.manifest.json")


@dataclass(frozen=True)
class Outcome:
    """The manifest, which is what ``PREFIX.manifest.json`` holds, and whether this call made it."""

    manifest: dict[str, Any]
    made: bool


def prepare(options: Options) -> Outcome:
    """Prepare a corpus, go on with one that was cut short, or find that it is done.

    Raises:
        UserError: for anything that keeps it from being done. What is finished is kept then, and the same
            call goes on.
    """
    _check_outputs(options)
    found = options.corpus.find()
    identity = tokenizing.identify(options.tokenizer)
    piece_bytes = options.piece_bytes or pieces.default_piece_bytes(found)
    work = pieces.cut(found, piece_bytes, options.recipe.keys)
    asked = {
        "sources": [asdict(source) for source in found],
        "tokenizer": identity,
        "settings": asdict(options.recipe) | {"keys": list(options.recipe.keys), "piece_bytes": piece_bytes},
    }
    fingerprint = hashlib.sha256(json.dumps([_LAYOUT, asked], sort_keys=True).encode()).hexdigest()
    being_made = f"{options.output} is being made"
    with lock(Path(f"{options.output}.lock"), being_made, "choose another --output"):
        folder = _work_folder(options, fingerprint, asked)
        if folder is None:
            return Outcome(_read(options.manifest), made=False)
        if not assembly.is_complete(folder):
            _make(options, found, work, folder, asked | {"fingerprint": fingerprint})
        assembly.publish(folder, _moves(options, folder), options.manifest)
    return Outcome(_read(options.manifest), made=True)


def _check_outputs(options: Options) -> None:
    prefixes = [prefix for prefix in (options.output, options.validation_output) if prefix is not None]
    if len(set(prefixes)) != len(prefixes):
        raise UserError(f"--validation-output is {prefixes[0]}, as is --output; give another prefix")
    for prefix, flag in zip(prefixes, ("--output", "--validation-output"), strict=False):
        if prefix.is_dir():
            raise UserError(
                f"{flag} is {prefix}, which is a folder; give the prefix of files, as in {prefix}/train"
            )
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{flag} is {prefix}, but its folder cannot be made ({error.strerror}); correct it"
            ) from error
        if not os.access(prefix.parent, os.W_OK | os.X_OK):
            raise UserError(
                f"{flag} is {prefix}, but its folder cannot be written to; correct it or its access"
            )
    for path in (
        options.manifest,
        *(Path(f"{t}{ending}") for t in options.targets for ending in (".bin", ".idx")),
    ):
        if path.is_dir():
            raise UserError(
                f"{path} is a folder, but a file has to go there; remove it or choose another --output"
            )


def _work_folder(options: Options, fingerprint: str, asked: dict[str, Any]) -> Path | None:
    """The folder for the pieces of this run, or None if all is done; what was begun of another is removed."""
    stem = options.output.name
    folder = options.output.parent / f"{stem}.pieces-{fingerprint[:8]}"
    others = [path for path in options.output.parent.glob(f"{glob.escape(stem)}.pieces-*") if path != folder]
    assembly.refuse_foreign(options.targets, options.manifest, [folder, *others])
    earlier = _read(options.manifest)
    if earlier.get("fingerprint") == fingerprint and _is_there(options, earlier):
        if folder.exists():
            shutil.rmtree(folder)
        return None
    if earlier:
        changed = [name for name, value in asked.items() if earlier.get(name) != value] or ["files"]
        _say(
            options,
            f"{options.output}: the {' and '.join(changed)} changed since it was made; making it anew",
        )
    for other in others:
        _say(
            options,
            f"{options.output}: sources, tokenizer or settings changed since it was begun; starting anew",
        )
        shutil.rmtree(other)
    return folder


def _make(
    options: Options, found: Sequence[Source], work: list[Piece], folder: Path, asked: dict[str, Any]
) -> None:
    """Encode what is missing and leave all files in ``folder``, ready to be moved."""
    started = time.monotonic()
    _say(
        options,
        f"{options.output}: {len(found):,} files in {len(work):,} pieces; loading Megatron's tokenizer",
    )
    tokenizer = tokenizing.build(options.tokenizer)
    if options.recipe.append_eod and tokenizer.eod is None:
        raise UserError(
            f"--tokenizer-model {options.tokenizer.tokenizer_model} has no end-of-document token; "
            "give another or --no-append-eod"
        )
    dtype = token_type(tokenizer.vocab_size)
    with encode.full_disk_refused(options.output.parent):
        state = Assembly(folder, len(work), len(options.recipe.outputs), dtype)
        if state.results:
            _say(options, f"Going on with {len(state.missing)} of {len(work)} pieces left")
        _check_disk(options, work, state, tokenizer, dtype)
        _encode(options, work, state, tokenizer)
        _refuse_nothing(options, state, found)
        sums = state.finish()
        _write_refusals(folder, work, state)
        sources.refuse_changed(found)
        content = _manifest(options, state, tokenizer, dtype, sums, asked, time.monotonic() - started)
        assembly.write_manifest(folder, content)


def _encode(options: Options, work: list[Piece], state: Assembly, tokenizer: Tokenizer) -> None:
    from tqdm import tqdm

    encoder = Encoder(options.recipe, tokenizer, state.folder, options.max_refused)
    _refuse_too_many(options, work, state)
    tasks = [(number, work[number]) for number in state.missing]
    total = sum(piece.size for piece in work)
    done = total - sum(piece.size for _, piece in tasks)
    tokens, started = 0, time.monotonic()
    events = workers.run(tasks, encoder, options.workers)
    with tqdm(
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        desc=options.output.name,
        disable=True if options.quiet else None,
    ) as bar:
        try:
            for event in events:
                number, _ = event.task
                if event.done:
                    state.add(number, event.value)
                    _refuse_too_many(options, work, state)
                else:
                    tokens += event.value.tokens
                    bar.set_postfix_str(
                        f"{tokens / (time.monotonic() - started) / 1e6:.2f}M tokens/s", refresh=False
                    )
                    bar.update(event.value.size)
        except workers.WorkerKilled as error:
            number, piece = error.task
            raise UserError(_killed(error, piece)) from error
        finally:
            events.close()  # type: ignore[attr-defined]
    state.append()


def _killed(error: workers.WorkerKilled, piece: Piece) -> str:
    status = error.status or 0
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return (
        f"a worker ended {how} in {piece.sources[0].path}, perhaps for want of memory; run the same command "
        "again, with fewer --workers: it goes on from here"
    )


def _refuse_too_many(options: Options, work: list[Piece], state: Assembly) -> None:
    if sum(state.refused.values()) <= options.max_refused:
        return
    number = max(number for number, result in state.results.items() if result.refused)
    first = next(encode.refusals(state.folder, number, work[number], encode.lines_before(work[number])))
    raise UserError(encode.too_many(first, options.max_refused))


def _refuse_nothing(options: Options, state: Assembly, found: Sequence[Source]) -> None:
    for output, (split, key) in enumerate(options.recipe.outputs):
        if state.totals(output).tokens:
            continue
        shutil.rmtree(state.folder)
        if split == "validation":
            raise UserError(
                f"--validation-share {options.recipe.validation_share} holds no text out of "
                f"{state.totals(0).documents} documents; raise it"
            )
        where = found[0].path if len(found) == 1 else f"the {len(found)} input files"
        raise UserError(
            f"{where} hold{'s' if len(found) == 1 else ''} no text under {key!r}; give other inputs"
        )


def _check_disk(
    options: Options, work: list[Piece], state: Assembly, tokenizer: Tokenizer, dtype: str
) -> None:
    """Encode the first documents and hold what the rest will take against what is free."""
    if not options.check_disk or not state.missing:
        return
    reader = Reader(work[state.missing[0]], options.recipe.keys, options.recipe.max_record_bytes)
    size, until = 0, time.monotonic() + _SAMPLE_SECONDS
    item = 2 if dtype == "uint16" else 4
    for record in itertools.islice(reader, _SAMPLE_DOCUMENTS):
        for text in record.texts or ():
            sentences = [text] if isinstance(text, str) else text
            size += 20 + item * sum(len(tokenizer.encode(_clean(sentence))) for sentence in sentences)
        if time.monotonic() > until:
            break
    rest = sum(work[number].size for number in state.missing)
    needed = int(size / reader.bytes_read * rest) if reader.bytes_read else 0
    free = shutil.disk_usage(options.output.parent).free
    if needed > free:
        raise UserError(
            f"{options.output.parent} has {free / 1e9:.1f} GB free, but about {needed / 1e9:.1f} GB are "
            "needed, as the first documents are; make room, choose another --output, or go ahead with "
            "--no-disk-check"
        )


def _clean(text: str) -> str:
    return text.encode(errors="replace").decode()


def _write_refusals(folder: Path, work: list[Piece], state: Assembly) -> None:
    starts = [
        (piece.start if piece.sources[0].format == "jsonl" else 0, piece.sources[0].path) for piece in work
    ]
    with (folder / "refused.jsonl").open("w", encoding="utf-8") as stream:
        for number, lines in enumerate(assembly.line_offsets(state.results, starts)):
            for refusal in encode.refusals(folder, number, work[number], lines):
                stream.write(f"{json.dumps(asdict(refusal))}\n")


def _manifest(
    options: Options,
    state: Assembly,
    tokenizer: Tokenizer,
    dtype: str,
    sums: list[dict[str, str]],
    asked: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    outputs = {}
    for output, target in enumerate(options.targets):
        name = os.path.relpath(target, options.output.parent)
        sizes = {ending: state.whole(output, f".{ending}").stat().st_size for ending in ("bin", "idx")}
        outputs[name] = asdict(state.totals(output)) | {
            "dtype": dtype,
            "bytes": sizes,
            "sha256": sums[output],
        }
    return {
        "fingerprint": asked["fingerprint"],
        "command": sys.argv,
        "outputs": outputs,
        "refused": state.refused,
        "seconds": round(seconds, 1),
        "workers": options.workers,
        "tokenizer": asked["tokenizer"],
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod if options.recipe.append_eod else None,
        "settings": asked["settings"],
        "versions": {
            "jreg_megatron": __version__,
            "megatron-core": version("megatron-core"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
        "sources": asked["sources"],
    }


def _moves(options: Options, folder: Path) -> dict[Path, Path]:
    moves = {
        folder / f"whole.{output}{ending}": Path(f"{target}{ending}")
        for output, target in enumerate(options.targets)
        for ending in (".bin", ".idx")
    }
    return moves | {folder / "refused.jsonl": Path(f"{options.output}.refused.jsonl")}


def _is_there(options: Options, manifest: dict[str, Any]) -> bool:
    """Whether the files that the manifest tells of have its sizes."""
    for target, output in zip(options.targets, manifest["outputs"].values(), strict=False):
        for ending, size in output["bytes"].items():
            path = Path(f"{target}.{ending}")
            if not path.is_file() or path.stat().st_size != size:
                return False
    return True


def _read(manifest: Path) -> dict[str, Any]:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and "outputs" in content else {}


def _say(options: Options, words: str) -> None:
    if not options.quiet:
        print(words, flush=True)
