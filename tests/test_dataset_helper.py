"""A Megatron tree whose dataset helper is not compiled is compiled, or refused by one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core import datasets

from jreg_megatron.mcore.dataset_helper import compile_helper
from jreg_megatron.runtime.errors import UserError

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# As Megatron's, but a copy of the source replaces the compiled helper.
MAKEFILE = """
CPPFLAGS += $(shell python3 -m pybind11 --includes)
LIBEXT = $(shell python3-config --extension-suffix)
OUT = helpers_cpp$(LIBEXT)
default: $(OUT)
$(OUT): helpers.cpp
\techo "$(CPPFLAGS)" > flags
\ttest -n "$(CPPFLAGS)" && grep -q . $< && cp $< $@
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree that ends whoever imports its Megatron."""
    core = tmp_path / "tree" / "megatron" / "core"
    (core / "datasets").mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('Megatron is imported')")
    (core / "datasets" / "Makefile").write_text(MAKEFILE)
    (core / "datasets" / "helpers.cpp").write_text("source")
    (tmp_path / "tree" / "pretrain_gpt.py").write_text("import megatron.core")
    return tmp_path / "tree"


@pytest.fixture
def tools(tmp_path: Path) -> Callable[..., str]:
    """A PATH with these tools, and a ``python3`` that has nothing."""

    def make(without: str = "") -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, body in {"python3": "exit 1", "python3-config": "echo .another.so", "g++": ""}.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        for name in ("make", "sh", "cp", "test", "grep", "echo"):
            (folder / name).symlink_to(str(shutil.which(name)))
        if without:
            (folder / without).unlink()
        return str(folder)

    return make


@pytest.fixture
def compile_in(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``compile_helper`` for the tree, with this PATH."""
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    monkeypatch.syspath_prepend(tree)

    def run(path: str) -> None:
        monkeypatch.setenv("PATH", path)
        compile_helper()

    return run


@pytest.mark.parametrize("tool", ["make", "g++"])
def test_a_missing_tool_is_named_with_the_folder(
    tool: str, tree: Path, tools: Callable[..., str], compile_in: Callable[[str], None]
) -> None:
    with pytest.raises(UserError) as caught:
        compile_in(tools(without=tool))
    assert f"PATH has no {tool}" in str(caught.value)
    assert str(tree / "megatron" / "core" / "datasets") in str(caught.value)


def test_it_is_compiled_for_this_python_without_the_package_pybind11_whatever_python3_is_on_the_path(
    tree: Path, tools: Callable[..., str], compile_in: Callable[[str], None]
) -> None:
    compile_in(tools())
    folder = tree / "megatron" / "core" / "datasets"
    assert (folder / f"helpers_cpp{SUFFIX}").exists()
    folders = [Path(found) for found in re.findall(r"-I(\S+)", (folder / "flags").read_text())]
    for header in ("pybind11/pybind11.h", "Python.h"):
        assert any((found / header).is_file() for found in folders), header


def test_an_empty_name_of_a_compiler_means_the_usual_one(
    tree: Path,
    tools: Callable[..., str],
    compile_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "")
    compile_in(tools())
    assert (tree / "megatron" / "core" / "datasets" / f"helpers_cpp{SUFFIX}").exists()


def test_the_error_quotes_the_linker(
    tree: Path, tools: Callable[..., str], compile_in: Callable[[str], None]
) -> None:
    makefile = tree / "megatron" / "core" / "datasets" / "Makefile"
    said = "echo ld: cannot open output file >&2; echo collect2: error: ld returned 1 >&2; false"
    makefile.write_text(makefile.read_text().replace("cp $< $@", said))
    with pytest.raises(UserError, match="make fails: ld: cannot open output file"):
        compile_in(tools())


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_megatrons_own_source_compiles_so(tree: Path, compile_in: Callable[[str], None]) -> None:
    folder = tree / "megatron" / "core" / "datasets"
    shutil.copy(Path(datasets.__file__).with_name("helpers.cpp"), folder)
    source = (folder / "Makefile").read_text()
    flags = "$(CXX) -O0 -shared -std=c++11 -fPIC $(CPPFLAGS)"
    (folder / "Makefile").write_text(source.replace("cp $< $@", f"{flags} $< -o $@"))
    compile_in(os.environ["PATH"])
    look = "import helpers_cpp; print(helpers_cpp.build_sample_idx_int32)"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "built-in method" in done.stdout


def test_the_first_rank_compiles_and_the_others_do_not(
    tree: Path,
    tools: Callable[..., str],
    compile_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, helper = tools(), tree / "megatron" / "core" / "datasets" / f"helpers_cpp{SUFFIX}"
    for name in ("SLURM_PROCID", "RANK"):
        monkeypatch.setenv(name, "1")
        compile_in(path)
        assert not helper.exists()
    monkeypatch.setenv("RANK", "0")
    compile_in(path)
    assert helper.exists()


@pytest.mark.parametrize("level", [{}, {"MAKELEVEL": "1", "MAKEFLAGS": "n"}], ids=["alone", "under-make"])
def test_a_helper_older_than_its_source_is_compiled_again_and_the_error_quotes_make(
    tree: Path,
    tools: Callable[..., str],
    compile_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    level: dict[str, str],
) -> None:
    for name in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in level.items():
        monkeypatch.setenv(name, value)
    path, folder = tools(), tree / "megatron" / "core" / "datasets"
    (folder / f"helpers_cpp{SUFFIX}").touch()
    os.utime(folder / f"helpers_cpp{SUFFIX}", (1, 1))
    compile_in(path)
    assert (folder / f"helpers_cpp{SUFFIX}").read_text() == "source"
    (folder / "helpers.cpp").write_text("")
    os.utime(folder / f"helpers_cpp{SUFFIX}", (1, 1))
    with pytest.raises(UserError, match=r"make fails: make: .*Makefile:\d+: .* Error 1"):
        compile_in(path)


def test_megatron_without_a_makefile_is_left_alone(
    tree: Path, tools: Callable[..., str], compile_in: Callable[[str], None]
) -> None:
    (tree / "megatron" / "core" / "datasets" / "Makefile").unlink()
    compile_in(tools(without="make"))


@pytest.mark.parametrize("launcher", ["--nproc", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_the_launcher_says_it_once_before_megatron_is_imported(
    launcher: str, tree: Path, tools: Callable[..., str]
) -> None:
    command = [sys.executable, "-m", "jreg_megatron.launch", "--nproc", "4"]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "jreg_megatron.launch", "--cpu"]
    environment = {**os.environ, "PATH": tools(without="g++"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, tree / "pretrain_gpt.py", "--jreg-coeff", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert said.count("jreg_megatron: error: ") == 1 and "PATH has no g++" in said, said
    if launcher == "--nproc":  # under torchrun the other ranks continue until it ends them
        assert "Megatron is imported" not in said
        assert done.returncode == 2 and "Traceback" not in said
