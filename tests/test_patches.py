"""``patches/apply.sh`` puts JREG into a Megatron tree and takes it out again, or changes nothing.

No Megatron-LM tree is at hand here, but the wheel holds the two files that are patched. The trees themselves
are tried by ``ways_in.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import megatron.core
import pytest
import readme
from harness import read_scalars, run_ranks
from megatron.training import global_vars

from jreg_megatron import training_loop

PATCHES = Path(__file__).parents[1] / "patches"
SCRIPT = Path(__file__).with_name("unmodified_pretrain.py")
PATCHED = ("megatron/training/arguments.py", "megatron/training/training.py")
WHEEL = Path(megatron.core.__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree that can be imported: the wheel's Megatron, its ``training`` a copy."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "core").symlink_to(WHEEL / "megatron" / "core")
    shutil.copytree(WHEEL / "megatron" / "training", tmp_path / "megatron" / "training")
    return tmp_path


def apply(*argv: object, status: int = 0) -> str:
    command = [PATCHES / "apply.sh", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done
    return done.stdout + done.stderr


def contents(tree: Path) -> list[bytes]:
    return [(tree / name).read_bytes() for name in PATCHED]


def test_a_patched_tree_is_reverted_to_what_it_was(tree: Path) -> None:
    before = contents(tree)
    assert "fits" in apply("--check", tree)
    assert contents(tree) == before
    assert "Applied megatron-lm/core_v0.19" in apply(tree)
    patched = contents(tree)
    assert patched != before
    assert "already" in apply(tree)
    assert contents(tree) == patched
    assert "Reverted" in apply("--revert", tree)
    assert contents(tree) == before
    assert "nothing to revert" in apply("--revert", tree, status=2)


def test_a_tree_inside_another_repository_is_patched_all_the_same(tree: Path) -> None:
    vendored = tree / "third_party" / "megatron-lm"
    vendored.mkdir(parents=True)
    (tree / "megatron").rename(vendored / "megatron")
    subprocess.run(["git", "init", "--quiet", tree], check=True)
    before = contents(vendored)
    apply(vendored)
    assert contents(vendored) != before


def test_a_tree_that_is_a_link_into_another_repository_is_patched_too(tree: Path) -> None:
    (tree / "repository").mkdir()
    (tree / "megatron").rename(tree / "repository" / "megatron")
    subprocess.run(["git", "init", "--quiet", tree], check=True)
    link = tree / "link"
    link.symlink_to(tree / "repository")
    before = contents(link)
    apply(link)
    assert contents(link) != before


def test_a_tree_that_the_patch_does_not_fit_stays_as_it_is(tree: Path) -> None:
    training = tree / PATCHED[1]
    training.write_text(training.read_text().replace("def training_log(", "def log_training("))
    before = contents(tree)
    said = apply(tree, status=2)
    assert "does not fit" in said and "nothing was changed" in said
    assert contents(tree) == before


def test_a_folder_that_is_not_a_megatron_tree_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path} is no Megatron-LM tree" in apply(tmp_path, status=2)


def test_every_patch_adds_the_same_eight_lines() -> None:
    added = []
    for patch in sorted(PATCHES.glob("megatron-lm/*/jreg.patch")):
        lines = patch.read_text().splitlines()
        assert not any(re.match(r"-(?!--)", line) for line in lines), f"{patch} removes a line"
        added.append([line for line in lines if re.match(r"\+[^+]", line)])
    assert len(added) >= 5
    assert all(len(lines) == 8 and lines == added[0] for lines in added)


def test_the_readme_shows_every_patched_tree() -> None:
    shown = re.findall(r"^\| (\S+) \| pretrain_gpt.py \|", readme.read("ways in"), re.MULTILINE)
    assert shown == sorted(patch.parent.name for patch in PATCHES.glob("megatron-lm/*/jreg.patch"))


def test_a_patched_function_that_has_drifted_still_runs_a_job_without_jreg() -> None:
    @training_loop.log_training
    def training_log(losses: dict[str, float]) -> str:
        return f"logged {losses}"

    global_vars.set_args(Namespace())
    try:
        assert training_log({}) == "logged {}"
    finally:
        global_vars.destroy_global_vars()


def run(tree: Path, *argv: object) -> str:
    command = [sys.executable, "-m", "jreg_megatron.cpu", "--nproc", "2", SCRIPT, *argv]
    path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same(one: Path, other: Path, *tags: str) -> dict[str, list[float]]:
    """The values that both runs logged under these tags, which must be equal; returns those of ``one``."""
    logs = read_scalars(one), read_scalars(other)
    for tag in (*tags, "lm loss", "grad-norm", "lm loss validation"):
        assert logs[0][tag] == logs[1][tag] and len(logs[0][tag]) > 0, tag
    return logs[0]


STEPS = "--pipeline-model-parallel-size 2 --train-iters 3 --eval-interval 3 --eval-iters 1 --log-interval 2"


def test_a_patched_tree_trains_as_launched(toy_arguments: list[str], tree: Path, tmp_path: Path) -> None:
    apply(tree)
    argv = [*toy_arguments, *STEPS.split(), "--jreg-coeff", 0.5, "--jreg-alpha", 0.5, "--tensorboard-dir"]
    said = run(tree, *argv, tmp_path / "patched")
    assert "JREG attached" in said
    assert re.search(r"^ JREG at iteration 3 \| jreg loss: .* \| measured in iteration 3 \|", said, re.M)
    run_ranks([SCRIPT, *argv, tmp_path / "launched"], 2, entry="jreg_megatron.launch:main")
    same(tmp_path / "patched", tmp_path / "launched", "jreg loss", "jump rate", "jreg loss validation")


@pytest.mark.slow
def test_a_patched_tree_trains_as_its_own_without_a_flag(
    toy_arguments: list[str], tree: Path, tmp_path: Path
) -> None:
    apply(tree)
    argv = [*toy_arguments, *STEPS.split(), "--tensorboard-dir"]
    assert "JREG" not in run(tree, *argv, tmp_path / "without")
    run_ranks([*argv, tmp_path / "own"], 2, entry="unmodified_pretrain:main")
    assert "jreg loss" not in same(tmp_path / "without", tmp_path / "own")
