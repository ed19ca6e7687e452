"""Preparation that is killed: the same command goes on and gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from data_toy import ODD, call, documents, sentencepiece_model, start, write_jsonl

from jreg_megatron.data import encode, workers
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


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, whose times differ; and what the manifest tells of the files."""
    found = {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("manifest.json")
    }
    (manifest,) = folder.glob("*.manifest.json")
    return found | {"outputs": json.dumps(json.loads(manifest.read_text())["outputs"]).encode()}


@pytest.fixture(scope="module")
def whole(source: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing disturbs leaves behind."""
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


# A piece that is appended is unlinked; an index is brought to the disk; a file moves to its place.
@pytest.mark.parametrize(
    ("name", "numbers"), [("unlink", (1, 2, 5, 9, 14)), ("fsync", (1, 3, 5)), ("replace", range(1, 7))]
)
def test_killed_anywhere_and_started_again_it_gives_the_same_bytes(
    name: str, numbers: tuple[int, ...], source: Path, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    argv = command(source, model, tmp_path / "out")
    deaths = 0
    for number in numbers:
        run = start(argv, killer(name, number))
        run.join(120)
        assert run.exitcode in (0, -signal.SIGKILL)
        deaths += run.exitcode != 0
    assert deaths >= 2, "nothing was killed"
    time.sleep(0.5)  # the workers of a killed run see that it is gone
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def test_killed_in_the_middle_of_the_pieces_it_makes_only_those_that_are_left(
    source: Path, model: Path, whole: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = command(source, model, tmp_path / "out")
    slow = start(argv, lambda: _slow_down(0.05))
    wait_for(lambda: len(list(tmp_path.glob("out.pieces-*/*.json"))) >= 3)
    of_run = psutil.Process(slow.pid).children(recursive=True)
    os.kill(slow.pid or 0, signal.SIGKILL)
    slow.join(60)
    assert psutil.wait_procs(of_run, timeout=180)[1] == [], "workers outlive a killed run"
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.pieces-*/*.json")}
    pieces = -(-source.stat().st_size // 5000)
    assert 3 <= len(done) < pieces
    again = start(argv, _die_before_publishing)
    again.join(120)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished piece was made again"
    capfd.readouterr()
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def test_damaged_leftovers_of_a_killed_run_are_not_trusted(
    source: Path, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    argv = command(source, model, tmp_path / "out")
    for number, damage in enumerate((_cut_lengths, _cut_whole, _cut_json)):
        run = start(argv, killer("unlink", 8 + 2 * number))
        run.join(120)
        time.sleep(0.5)
        (folder,) = tmp_path.glob("out.pieces-*")
        damage(folder)
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def _cut_lengths(folder: Path) -> None:
    victim = sorted(folder.glob("*.lengths"))[0]
    victim.write_bytes(victim.read_bytes()[:-4])


def _cut_whole(folder: Path) -> None:
    victim = folder / "whole.0.bin"
    victim.write_bytes(victim.read_bytes()[:-2])


def _cut_json(folder: Path) -> None:
    victim = sorted(folder.glob("0*.json"))[-1]
    victim.write_text(victim.read_text()[:20])


def test_a_killed_worker_ends_the_run_with_one_line_and_it_goes_on(
    source: Path, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    argv = command(source, model, tmp_path / "out")
    errors = tmp_path / "errors"
    run = start(argv, lambda: _kill_a_worker(tmp_path / "died"), errors=errors)
    run.join(120)
    assert run.exitcode == 2
    (line,) = errors.read_text().splitlines()
    assert f"a worker ended by SIGKILL in {source}" in line and "it goes on from here" in line
    for left in (errors, tmp_path / "died"):
        left.unlink()
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def test_workers_end_with_a_killed_run(source: Path, model: Path, tmp_path: Path) -> None:
    argv = command(source, model, tmp_path / "out")
    run = start(argv, lambda: _slow_down(0.2, tmp_path / "workers"))
    wait_for(lambda: (tmp_path / "workers").exists() and len((tmp_path / "workers").read_text().split()) >= 2)
    os.kill(run.pid or 0, signal.SIGKILL)
    run.join(60)
    alive = {int(word) for word in (tmp_path / "workers").read_text().split()}
    wait_for(lambda: not any(_is_running(pid) for pid in alive))


def test_a_second_run_on_the_same_output_is_refused_while_the_first_one_runs(
    source: Path, model: Path, whole: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = command(source, model, tmp_path / "out")
    first = start(argv, lambda: _slow_down(0.02))
    wait_for(lambda: any(tmp_path.glob("out.pieces-*/*.json")))
    assert call(*argv) == 2
    assert f"out is being made by process {first.pid} on " in capfd.readouterr().err
    first.join(120)
    assert first.exitcode == 0
    assert contents(tmp_path) == whole


def test_files_of_others_are_not_taken_over_beside_an_output_of_ones_own(
    source: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = command(source, model, tmp_path / "out")
    alone = argv[: argv.index("--validation-share")]
    assert call(*alone) == 0
    theirs = tmp_path / "out_valid_text_document.bin"
    theirs.write_bytes(b"theirs")
    assert call(*argv) == 2
    assert f"{theirs} exists, but {tmp_path / 'out.manifest.json'} does not name it" in capfd.readouterr().err
    assert theirs.read_bytes() == b"theirs"


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path / "lock", "it is made", "go"):
            assert (tmp_path / "lock").exists()
        assert not (tmp_path / "lock").exists()
    with pytest.raises(UserError), lock(tmp_path / "lock", "it is made", "go"):
        raise UserError("from inside")
    assert not (tmp_path / "lock").exists()


def test_ctrl_c_says_how_to_go_on(source: Path, model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    argv = command(source, model, tmp_path / "out")
    errors = tmp_path / "errors"
    run = start(argv, lambda: _slow_down(0.05), errors=errors)
    wait_for(lambda: any(tmp_path.glob("out.pieces-*/*.json")))
    os.kill(run.pid or 0, signal.SIGINT)
    run.join(60)
    assert run.exitcode == 130
    assert errors.read_text().split("\n")[-2] == "Interrupted; the same command goes on from here"
    errors.unlink()
    assert call(*argv) == 0
    assert contents(tmp_path) == whole


def test_a_workers_exception_is_not_swallowed() -> None:
    def fail(task: int, report: object) -> None:
        raise KeyError(f"task {task}")

    with pytest.raises(RuntimeError, match="KeyError: 'task 7'"):
        list(workers.run([7], fail, 1))


def _slow_down(seconds: float, pids: Path | None = None) -> None:
    """Let a worker take its time for every document, and write down which processes those are."""
    real = encode.Encoder._ids

    def slow(self: encode.Encoder, sentences: list[str]) -> tuple[list[int], list[int]]:
        if pids is not None:
            with pids.open("a") as stream:
                stream.write(f"{os.getpid()} ")
        time.sleep(seconds)
        return real(self, sentences)

    encode.Encoder._ids = slow  # type: ignore[method-assign]


def _die_before_publishing() -> None:
    from jreg_megatron.data import assembly

    assembly.write_manifest = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def _kill_a_worker(died: Path) -> None:
    """Let one worker die in its second piece, as the kernel ends what takes too much memory."""
    real = encode.Encoder.__call__

    def dying(self: encode.Encoder, task: tuple[int, object], report: object) -> object:
        if task[0] == 2 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, task, report)  # type: ignore[arg-type]

    encode.Encoder.__call__ = dying  # type: ignore[method-assign,assignment]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_the_reference_is_not_empty(whole: dict[str, bytes]) -> None:
    assert {"out_text_document.bin", "out_valid_text_document.bin", "out.refused.jsonl"} <= set(whole)
    assert all(whole.values())
