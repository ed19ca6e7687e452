"""Preparation that is killed: the same command continues and gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from data_toy import ODD, call, documents, in_workers, sentencepiece_model, start, write_jsonl

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.lock import lock

pytest.importorskip("megatron.core")

TEXTS = [*documents(150), *ODD, *documents(50, seed=1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_jsonl(tmp_path_factory.mktemp("source") / "text.jsonl", TEXTS)
    with path.open("a") as stream:
        stream.write("nonsense\n")
    return path


def command(source: Path, model: Path, output: Path) -> list[object]:
    argv = ["prepare", source, "--tokenizer-model", model, "--output", output, "--workers", 2]
    held_out = ["--validation-share", 0.2, "--validation-output", f"{output}_valid"]
    return [*argv, "--piece-bytes", 5000, "--max-refused", 1, "--no-disk-check", *held_out]


@pytest.fixture
def argv(source: Path, model: Path, tmp_path: Path) -> list[object]:
    return command(source, model, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of the output except the manifest, whose times differ; and its entries about the files."""
    manifest = folder / "out.manifest.json"
    found = {path.name: path.read_bytes() for path in folder.glob("out*") if path != manifest}
    return found | {"outputs": json.dumps(json.loads(manifest.read_text())["outputs"]).encode()}


@pytest.fixture(scope="module")
def whole(source: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert call(*command(source, model, folder / "out")) == 0
    return contents(folder)


def killer(name: str, number: int) -> Callable[[], None]:
    """Make the process kill itself, as by ``kill -9``, instead of its ``number``-th call of ``os.NAME``."""

    def install() -> None:
        parent, real, calls = os.getpid(), getattr(os, name), 0

        def dying(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += os.getpid() == parent
            if calls == number and os.getpid() == parent:
                os.kill(parent, signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, dying)

    return install


# The joined files are brought to the disk and moved into place; then the pieces are removed.
@pytest.mark.parametrize(
    ("name", "numbers"), [("fsync", (1, 3, 5)), ("rename", range(1, 8)), ("unlink", (1, 5, 2))]
)
def test_killed_anywhere_and_started_again_it_gives_the_same_bytes(
    name: str, numbers: tuple[int, ...], argv: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    deaths = 0
    for number in numbers:
        run = start(argv, killer(name, number))
        run.join(120)
        assert run.exitcode in (0, -signal.SIGKILL)
        deaths += run.exitcode != 0
    assert deaths >= 2, "nothing was killed"
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def test_killed_in_the_middle_of_the_pieces_it_makes_only_those_that_are_left(
    argv: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    slow = start(argv, lambda: watch(log, 0.05))
    wait_for(lambda: texts_in(log) > 100)
    of_run = psutil.Process(slow.pid).children(recursive=True)
    assert len(of_run) == 2
    os.kill(slow.pid or 0, signal.SIGKILL)
    slow.join(60)
    assert psutil.wait_procs(of_run, timeout=60)[1] == [], "workers outlive a killed run"
    log.unlink()
    again = start(argv, lambda: watch(log))
    again.join(120)
    assert 0 < texts_in(log) < len(TEXTS) - 50, "a finished piece was made again"
    assert contents(tmp_path) == whole


# Which of the pieces' files with an ending, and how many bytes are cut from it; a bit of it is changed too.
@pytest.mark.parametrize(("ending", "which"), [("idx", 0), ("bin", -1), ("json", -1)])
@pytest.mark.parametrize("cut", [2, 0])
def test_damaged_leftovers_of_a_killed_run_are_not_trusted(
    ending: str, which: int, cut: int, argv: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    run = start(argv, killer("fsync", 1))
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    victim = sorted(tmp_path.rglob(f"00*.{ending}"))[which]
    content = bytearray(victim.read_bytes())
    content[5] ^= 1
    victim.write_bytes(content[: len(content) - cut])
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def test_a_killed_worker_ends_the_run_with_one_line_and_the_run_can_continue(
    argv: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    errors, log = tmp_path / "errors", tmp_path / "log"
    run = start(argv, lambda: watch(log, kill=True), errors=errors)
    run.join(120)
    assert run.exitcode == 2
    (line,) = errors.read_text().splitlines()
    assert "one of 2 workers was killed" in line and "fewer --workers" in line
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def test_a_second_run_on_the_same_output_is_refused_while_the_first_one_runs(
    argv: list[object], whole: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    first = start(argv, lambda: watch(log, 0.02))
    wait_for(log.exists)
    assert call(*argv) == 2
    assert f"process {first.pid} on " in capfd.readouterr().err
    first.join(120)
    assert first.exitcode == 0
    assert contents(tmp_path) == whole


def test_files_of_other_programs_are_not_overwritten(
    argv: list[object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = argv[: argv.index("--validation-share")]
    assert call(*alone) == 0
    theirs = tmp_path / "out_valid_text_document.bin"
    theirs.write_bytes(b"theirs")
    assert call(*argv) == 2
    told = capfd.readouterr().err
    assert f"{theirs} exists" in told and f"{tmp_path / 'out.manifest.json'} " in told
    assert theirs.read_bytes() == b"theirs"


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path / "lock", "it is made", "go"):
            assert (tmp_path / "lock").exists()
        assert not (tmp_path / "lock").exists()
    with pytest.raises(UserError), lock(tmp_path / "lock", "it is made", "go"):
        raise UserError("from inside")
    assert not (tmp_path / "lock").exists()


def test_ctrl_c_says_how_to_continue(argv: list[object], whole: dict[str, bytes], tmp_path: Path) -> None:
    errors, log = tmp_path / "errors", tmp_path / "log"
    run = start(argv, lambda: watch(log, 0.05), errors=errors)
    wait_for(lambda: texts_in(log) > 20)
    os.kill(run.pid or 0, signal.SIGINT)
    run.join(60)
    assert run.exitcode == 130
    assert errors.read_text().split("\n")[-2] == "Interrupted; the same command continues from here"
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def test_a_workers_exception_is_not_swallowed(argv: list[object], tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("of a worker")

    run = start(argv, lambda: in_workers(fail), errors=tmp_path / "errors")
    run.join(60)
    assert run.exitcode == 1
    assert "KeyError: 'of a worker'" in (tmp_path / "errors").read_text()


def watch(log: Path, seconds: float = 0, kill: bool = False) -> None:
    """Let the workers log every text and take their time for it; or end, as for want of memory, after 60."""

    def act() -> None:
        with log.open("a") as stream:
            stream.write("text\n")
        time.sleep(seconds)
        if kill and texts_in(log) > 60:
            os.kill(os.getpid(), signal.SIGKILL)

    in_workers(act)


def texts_in(log: Path) -> int:
    return len(log.read_text().split()) if log.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_the_reference_is_not_empty(whole: dict[str, bytes]) -> None:
    assert {"out_text_document.bin", "out_valid_text_document.bin", "out.refused.jsonl"} <= set(whole)
    assert all(whole.values())
