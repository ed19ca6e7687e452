"""Broken input of every kind ends in one line that names it, with status 2, and nothing looks done then."""
# A table has a row to a line.
# ruff: noqa: E501

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toy import (
    call,
    documents,
    hugging_face_folder,
    in_workers,
    sentencepiece_model,
    start,
    write_jsonl,
)

pytest.importorskip("megatron.core")
pytest.importorskip("pyarrow", reason="the extra data is not installed (jreg_megatron[data])")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good things to break: text, two tokenizers and a prepared dataset."""
    folder = tmp_path_factory.mktemp("ground")
    write_jsonl(folder / "text.jsonl", documents(100))
    sentencepiece_model(folder / "tokenizer.model")
    sentencepiece_model(folder / "small.model", 380)
    hugging_face_folder(folder / "hugging_face")
    good = ["--tokenizer-model", folder / "tokenizer.model", "--output", folder / "good"]
    assert call("prepare", folder / "text.jsonl", *good) == 0
    return folder


@dataclass
class Case:
    """A way to break something.

    Attributes:
        name: what is broken.
        argv: the command; {} is replaced with a new copy of the good files.
        line: a regular expression for the line, without its beginning.
        damage: done in the copy before.
        before: done in the process that runs the command, before it.
    """

    name: str
    argv: str
    line: str
    damage: Callable[[Path], Any] = lambda folder: None
    before: Callable[[Path], Any] = field(default=lambda folder: None)


PREPARE = "prepare {}/text.jsonl --tokenizer-model {}/tokenizer.model --output {}/out"


def prepare(source: str, more: str = "") -> str:
    return f"prepare {source} --tokenizer-model {{}}/tokenizer.model --output {{}}/out {more}"


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(
        folder / name, size if size >= 0 else os.stat(folder / name).st_size + size
    )


def patch(name: str, offset: int, content: bytes) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        with (folder / name).open("r+b") as stream:
            stream.seek(offset)
            stream.write(content)

    return damage


def packed(name: str, cut_to: int) -> Callable[[Path], Any]:
    """The text as .gz or .zst, the rest cut off."""
    import pyarrow

    codec = "gzip" if name.endswith(".gz") else "zstd"

    def damage(folder: Path) -> None:
        content = pyarrow.compress((folder / "text.jsonl").read_bytes(), codec=codec, asbytes=True)
        (folder / name).write_bytes(content[:cut_to])

    return damage


def parquet(
    name: str, values: list[Any], cut_to: int | None = None, break_at: int | None = None
) -> Callable[[Path], Any]:
    import pyarrow
    import pyarrow.parquet

    def damage(folder: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), folder / name)
        content = bytearray((folder / name).read_bytes()[:cut_to])
        if break_at is not None:
            content[break_at : break_at + 40] = b"\xff" * 40
        (folder / name).write_bytes(content)

    return damage


def no_root(folder: Path) -> None:
    """Continue as nobody, because root may read everything."""
    folder.chmod(0o777)
    if os.getuid() == 0:
        for path in (folder, *folder.parents):
            if path.stat().st_uid == 0 and path != Path("/") and path != Path("/tmp"):
                path.chmod(path.stat().st_mode | 0o055)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def no_writing(folder: Path) -> None:
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0o555)


def full_after(size: int) -> Callable[[Path], Any]:
    """Let files grow to ``size`` bytes only, as on a full disk."""
    return lambda folder: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disk_of(free: int) -> Callable[[Path], Any]:
    """Let the disk have ``free`` bytes."""

    def before(folder: Path) -> None:
        shutil.disk_usage = lambda path: type("Usage", (), {"free": free})()  # type: ignore[assignment,return-value]

    return before


def without(package: str) -> Callable[[Path], Any]:
    def before(folder: Path) -> None:
        import sys

        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None  # type: ignore[assignment]

    return before


def offline(folder: Path) -> None:
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"


def grow_while_reading(folder: Path) -> None:
    """Let somebody append to the source while it is read."""

    def grow() -> None:
        with (folder / "text.jsonl").open("a") as stream:
            stream.write("\n")

    in_workers(grow)


def die_in_a_worker(folder: Path) -> None:
    in_workers(lambda: os._exit(1))


def many(*damages: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [damage(folder) for damage in damages]


IDX, BIN = "good_text_document.idx", "good_text_document.bin"
INSPECT = "inspect {}/good_text_document"

CASES = [
    # The input files.
    Case("no input", prepare(""), r"INPUT is missing"),
    Case("input that is not there", prepare("{}/nowhere.jsonl"), r"\S+/nowhere.jsonl does not exist"),
    Case("pattern without match", prepare("{}/no*.jsonl"), r"\S+/no\*.jsonl does not exist"),
    Case("folder without text", prepare("{}/empty"), r"\S+/empty has no file with one of the endings .jsonl",
         lambda folder: (folder / "empty").mkdir()),
    Case("unknown ending", prepare("{}/text.csv"), r"\S+/text.csv has none of the endings .*--format",
         write("text.csv", b"a,b\n")),
    Case("the same file twice", prepare("{}/text.jsonl {}/*.jsonl"), r"\S+/text.jsonl is given twice"),
    Case("the same file by a link", prepare("{}/a.jsonl {}/text.jsonl"), r"\S+/text.jsonl is given twice",
         lambda folder: (folder / "a.jsonl").symlink_to(folder / "text.jsonl")),
    Case("dangling link", prepare("{}/a.jsonl"), r"\S+/a.jsonl cannot be read \(No such file",
         lambda folder: (folder / "a.jsonl").symlink_to(folder / "gone")),
    Case("input without permission", prepare("{}/text.jsonl"), r"\S+/text.jsonl cannot be read \(Permission denied\); correct",
         lambda folder: (folder / "text.jsonl").chmod(0), no_root),
    Case("empty file", prepare("{}/empty.jsonl"), r"\S+/empty.jsonl gave no text .*/out_text_document; ", write("empty.jsonl", b"")),
    Case("only empty texts", prepare("{}/empty.jsonl"), r"\S+/empty.jsonl gave no text .*/out_text_document; ",
         write("empty.jsonl", b'{"text": ""}\n')),
    Case("input that grows", prepare("{}/text.jsonl"), r"\S+/text.jsonl changed while it was read; ", before=grow_while_reading),
    # The input's content.
    Case("truncated gzip", prepare("{}/a.jsonl.gz"), r"\S+/a.jsonl.gz cannot be read \(Truncated compressed stream\); .*fetch", packed("a.jsonl.gz", 2000)),
    Case("gzip that is none", prepare("{}/a.jsonl.gz"), r"\S+/a.jsonl.gz cannot be read \(zlib inflate failed: incorrect header",
         write("a.jsonl.gz", b'{"text": "plain"}\n')),
    Case("damaged gzip", prepare("{}/a.jsonl.gz"), r"\S+/a.jsonl.gz cannot be read \(zlib inflate failed: ",
         many(packed("a.jsonl.gz", 10**9), patch("a.jsonl.gz", 1000, b"\0" * 100))),
    Case("truncated zst", prepare("{}/a.jsonl.zst"), r"\S+/a.jsonl.zst cannot be read \(Truncated compressed stream\); .*fetch", packed("a.jsonl.zst", 2000)),
    Case("zst that is none", prepare("{}/a.jsonl.zst"), r"\S+/a.jsonl.zst cannot be read \(ZSTD decompress failed",
         write("a.jsonl.zst", b'{"text": "plain"}\n')),
    Case("invalid UTF-8", prepare("{}/a.jsonl"), r"\S+/a.jsonl line 2 is not UTF-8 \(byte 11 of the line: invalid start byte\), "
         r".*--max-refused 0 ", write("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')),
    Case("no JSON", prepare("{}/a.jsonl"), r"\S+/a.jsonl line 1 is not JSON \(Expecting value", write("a.jsonl", b"text\n")),
    Case("no object", prepare("{}/a.jsonl"), r"\S+/a.jsonl line 1 is not an object \(the line holds a value of type int\)", write("a.jsonl", b"3\n")),
    Case("missing field", prepare("{}/text.jsonl", "--keys body"), r"\S+/text.jsonl line 1 is no such key \(the object has no 'body'\)"),
    Case("field of another type", prepare("{}/text.jsonl", "--keys id"), r"\S+/text.jsonl line 1 is not text \('id' holds a value of type int\)"),
    Case("lone surrogate", prepare("{}/a.jsonl"), r"\S+/a.jsonl line 1 is lone surrogate \('\\ud83d' at character 2\)",
         write("a.jsonl", b'{"text": "x\\ud83d"}\n')),
    Case("record too large", prepare("{}/text.jsonl", "--max-record-bytes 20"), r"\S+/text.jsonl line \d+ is too large \(over the 20 bytes of --max-record-bytes\)"),
    Case("text file in another encoding", prepare("{}/a.txt"), r"\S+/a.txt line 2 is not UTF-8 \(byte 2 of the line", write("a.txt", b"one\nt\xe4o")),
    Case("Parquet without the column", prepare("{}/a.parquet", "--keys body"), r"\S+/a.parquet has no column body of text; it has text \(string\); give one with --keys", parquet("a.parquet", ["a"])),
    Case("Parquet column of numbers", prepare("{}/a.parquet"), r"\S+/a.parquet has no column text of text; it has text \(int64\); give", parquet("a.parquet", [1])),
    Case("null in Parquet", prepare("{}/a.parquet"), r"\S+/a.parquet line 2 is not text \('text' is missing\)", parquet("a.parquet", ["a", None])),
    Case("truncated Parquet", prepare("{}/a.parquet"), r"\S+/a.parquet cannot be read \(.*\); .*fetch", parquet("a.parquet", ["a"] * 99, cut_to=100)),
    Case("damaged Parquet", prepare("{}/a.parquet"), r"\S+/a.parquet cannot be read \(.*\); .*fetch",
         parquet("a.parquet", documents(500), break_at=8)),
    Case("Parquet inside gzip", prepare("{}/a.parquet.gz"), r"\S+/a.parquet.gz cannot be read \(.*\)", write("a.parquet.gz", b"")),
    Case("unknown hub dataset", prepare("", "--hub nobody/nothing"), r"--hub nobody/nothing cannot be found \(.*\); ", before=offline),
    Case("hub and files", prepare("{}/text.jsonl", "--hub nobody/nothing"), r"--hub nobody/nothing and \S+/text.jsonl exclude each other"),
    Case("missing extra", prepare("{}/a.parquet"), r"reading Parquet needs the package pyarrow, which is not installed; install it with: pip install jreg_megatron\[data\]",
         parquet("a.parquet", ["a"]), without("pyarrow")),
    # The tokenizer.
    Case("no tokenizer", "prepare {}/text.jsonl --tokenizer-model {}/no.model --output {}/out", r"--tokenizer-model is \S+/no.model, .*SentencePiece model \(.*No such file or directory\); "),
    Case("wrong tokenizer file", "prepare {}/text.jsonl --tokenizer-model {}/text.jsonl --output {}/out", r"--tokenizer-model is \S+/text.jsonl, .*SentencePiece model \(.*\); "),
    Case("SentencePiece as Hugging Face", f"{PREPARE} --tokenizer-type HuggingFaceTokenizer", r"--tokenizer-model \S+/tokenizer.model cannot be loaded as HuggingFaceTokenizer|"
         r"--tokenizer-model is \S+/tokenizer.model, which has no tokenizer_config.json"),
    Case("broken Hugging Face folder", "prepare {}/text.jsonl --tokenizer-model {}/hugging_face --tokenizer-type HuggingFaceTokenizer --output {}/out",
         r"--tokenizer-model \S+/hugging_face cannot be loaded as HuggingFaceTokenizer \(", write("hugging_face/tokenizer.json", b"{}")),
    Case("vocabulary larger than the text", "tokenizer {}/a.txt --output {}/new.model --vocab-size 9999", r"--vocab-size is 9999, .*SentencePiece.* \(.*\)", write("a.txt", b"a few words")),
    # The output.
    Case("output is a folder", "prepare {}/text.jsonl --tokenizer-model {}/tokenizer.model --output {}", r"--output is \S+, which is a folder; "),
    Case("output under a file", "prepare {}/text.jsonl --tokenizer-model {}/tokenizer.model --output {}/text.jsonl/out", r"--output is \S+/out, .* \S+/text.jsonl; "),
    Case("output without permission", "prepare {}/text.jsonl --tokenizer-model {}/tokenizer.model --output {}/closed/out", r"--output is \S+/closed/out, but \S+/closed cannot be written to; ", no_writing, no_root),
    Case("output of somebody else", PREPARE, r"\S+/out_text_document.bin exists, .*/out.manifest.json .*--output",
         write("out_text_document.bin", b"precious")),
    Case("too little disk", PREPARE, r"\S+ has 0.0 GB free, .* 0.0 GB .*--no-disk-check", before=disk_of(1000)),
    Case("full disk in a worker", f"{PREPARE} --piece-bytes 4000 --workers 1", r"\S+ cannot hold more .*\(File too large\); ", before=full_after(1500)),
    Case("full disk in the end", f"{PREPARE} --piece-bytes 2000", r"\S+ cannot hold more .*\(File too large\); ", before=full_after(4000)),
    Case("worker that dies", PREPARE, r"one of \d workers was killed, .*--workers", before=die_in_a_worker),
    Case("held out, but where", f"{PREPARE} --validation-share 0.1", r"--validation-share and --validation-output "),
    Case("nothing held out", f"{PREPARE} --validation-share 1e-9 --validation-output {{}}/v", r"\S+/text.jsonl gave no text .*/v_text_document; .* larger --validation-share"),
    Case("all held out", f"{PREPARE} --validation-share 1.5 --validation-output {{}}/v", r"--validation-share is 1.5; it must be >= 0 and < 1"),
    Case("one place for both", f"{PREPARE} --validation-share 0.5 --validation-output {{}}/out", r"--output and --validation-output name one file; "),
    Case("no workers", f"{PREPARE} --workers 0", r"--workers is 0; it must be >= 1"),
    # Errors that inspect finds.
    Case("no token file", "inspect {}/nothing", r"\S+/nothing.idx is not a file; correct the prefix"),
    Case("file instead of a prefix", f"inspect {{}}/{IDX}", r"\S+/good_text_document.idx.idx is not a file; leave .idx out"),
    Case("folder without token files", "inspect {}/hugging_face", r"\S+/hugging_face holds no .idx file; "),
    Case("foreign idx", INSPECT, r"\S+.idx is not a Megatron index; ", write(IDX, b"something else altogether")),
    Case("idx of another version", INSPECT, r"\S+.idx has version 2 and token type 8, ", patch(IDX, 9, struct.pack("<Q", 2))),
    Case("idx of an unknown type", INSPECT, r"\S+.idx has version 1 and token type 77, which", patch(IDX, 17, b"\x4d")),
    Case("idx of real numbers", INSPECT, r"\S+.bin is cut short|\S+.idx holds float32, not token ids", patch(IDX, 17, b"\x07")),
    Case("idx cut in its header", INSPECT, r"\S+.idx is cut short; make", cut(IDX, 20)),
    Case("idx cut at its end", INSPECT, r"\S+.idx is cut short; make", cut(IDX, -8)),
    Case("idx with more behind it", INSPECT, r"\S+.idx has \d+ bytes, but \S+.idx lists \d+; copy", lambda folder: (folder / IDX).write_bytes((folder / IDX).read_bytes() + b"12345")),
    Case("truncated bin", INSPECT, r"\S+.bin is cut short: \d+ bytes of the \d+ that \S+.idx lists; copy", cut(BIN, -2)),
    Case("bin of another idx", INSPECT, r"\S+.bin has \d+ bytes, but \S+.idx lists \d+; copy", lambda folder: (folder / BIN).write_bytes((folder / BIN).read_bytes() * 2)),
    Case("missing bin", INSPECT, r"\S+.bin is not a file; correct", lambda folder: (folder / BIN).unlink()),
    Case("negative length", INSPECT, r"\S+.idx is damaged: ", patch(IDX, 34 + 4 * 5, struct.pack("<i", -1))),
    Case("position out of order", INSPECT, r"\S+.idx is damaged: ", patch(IDX, 34 + 400 + 8 * 7, struct.pack("<q", 0))),
    Case("document out of bounds", INSPECT, r"\S+.idx is damaged: ", patch(IDX, 34 + 1200 + 8 * 100, struct.pack("<q", 999))),
    Case("no documents", INSPECT, r"\S+.idx has \d+ bytes, but \S+.idx lists \d+; copy", patch(IDX, 26, struct.pack("<Q", 0))),
    Case("document that ends before it starts", INSPECT, r"\S+.idx is damaged: ", patch(IDX, 34 + 1200 + 8 * 10, struct.pack("<q", 3))),
    Case("other tokens than the manifest tells", INSPECT, r"\S+.bin does not match \S+/good.manifest.json: its SHA-256 differs; copy", patch(BIN, 10, b"\x11\x00")),
    Case("token beyond the vocabulary", INSPECT, r"\S+.bin .* id 65535 as token 5, .* 400 tokens; ", patch(BIN, 10, b"\xff\xff")),
    Case("tokenizer of another vocabulary", f"{INSPECT} --tokenizer-model {{}}/small.model", r"\S+.bin .* id 3\d\d as token \d+, .* 380 tokens; "),
    Case("blend with a space in a path", "inspect {}/spaced --blend {}/list", r"\S+/spaced/a b holds a space, ",
         lambda folder: [(folder / "spaced").mkdir(), *(shutil.copy(folder / f"good_text_document.{e}", folder / "spaced" / f"a b.{e}") for e in ("bin", "idx"))]),
    Case("blend that cannot be written", f"{INSPECT} --blend {{}}/no/list", r"--blend is \S+/no/list, .* \S+/no; "),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_ends_in_one_line_that_names_it(case: Case, ground: Path, tmp_path: Path) -> None:
    folder, errors = tmp_path / "copy", tmp_path / "errors"
    shutil.copytree(ground, folder)
    case.damage(folder)
    argv = case.argv.replace("{}", str(folder)).split()
    errors.touch()
    errors.chmod(0o666)
    run = start(argv, lambda: case.before(folder), errors=errors)
    run.join(60)
    if run.exitcode is None:
        run.kill()
    (line,) = errors.read_text().splitlines()
    assert run.exitcode == 2
    assert re.match("jreg_megatron: error: (?:" + case.line + ")", line), line
    for ending in ("manifest.json", "lock", "refused.jsonl"):
        assert not (folder / f"out.{ending}").is_file(), "it looks finished"
    for name in ("out_text_document.idx", "new.model"):
        assert not (folder / name).exists(), "it looks finished"


def test_after_a_full_disk_the_same_command_continues(ground: Path, tmp_path: Path) -> None:
    argv = ["prepare", ground / "text.jsonl", "--tokenizer-model", ground / "tokenizer.model"]
    argv += ["--output", tmp_path / "good", "--piece-bytes", "2000"]
    run = start(argv, lambda: full_after(4000)(tmp_path), errors=tmp_path / "errors")
    run.join(60)
    assert run.exitcode == 2
    assert call(*argv) == 0
    for ending in ("bin", "idx"):
        name = f"good_text_document.{ending}"
        assert (tmp_path / name).read_bytes() == (ground / name).read_bytes()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        # Lazily, for the failed run's open files are closed only when its exception is forgotten.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_named(
    ground: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["--tokenizer-model", ground / "tokenizer.model", "--output", tmp_path / "disk" / "out"]
    write_jsonl(tmp_path / "text.jsonl", documents(2000))
    with small_disk(tmp_path / "disk"):
        assert call("prepare", tmp_path / "text.jsonl", *argv, "--piece-bytes", 5000) == 2
        assert "disk has 0.0 GB free, " in capfd.readouterr().err
        assert call("prepare", tmp_path / "text.jsonl", *argv, "--no-disk-check") == 2
        assert "(No space left on device); " in capfd.readouterr().err


def test_no_two_cases_have_one_name() -> None:
    assert np.unique([case.name for case in CASES]).size == len(CASES)
