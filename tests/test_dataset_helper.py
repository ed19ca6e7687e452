"""A Megatron tree whose dataset helper is still to be compiled is compiled, or refused by one line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from jreg_megatron.dataset_helper import compile_helper
from jreg_megatron.errors import UserError

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# As Megatron's, but a copy of the source stands for the compiled helper.
MAKEFILE = """
CPPFLAGS += $(shell python3 -m pybind11 --includes)
LIBEXT = $(shell python3-config --extension-suffix)
OUT = helpers_cpp$(LIBEXT)
default: $(OUT)
$(OUT): helpers.cpp
\ttest -n "$(CPPFLAGS)" && grep -q . $< && cp $< $@
"""
PYTHON = """#!/bin/sh
case "$*" in
    "-m pybind11 --includes") {pybind11} ;;
    "-c import sys; print(sys.executable)") echo /elsewhere/python3 ;;
esac
"""
HAS, HAS_NOT = "echo -I/includes", "exit 1"


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
    """A PATH with these tools, and a ``python3`` of this kind."""

    def make(pybind11: str = HAS, suffix: str = SUFFIX, without: str = "") -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        scripts = {
            "python3": PYTHON.format(pybind11=pybind11),
            "python3-config": f"#!/bin/sh\necho {suffix}\n",
            "g++": "#!/bin/sh\n",
        }
        for name, text in scripts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        for name in ("make", "sh", "cp", "test", "grep"):
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


MISTAKES = {
    "no pybind11": ({"pybind11": HAS_NOT}, "the python3 on PATH (/elsewhere/python3) has no pybind11"),
    "another Python": ({"suffix": ".cpython-39-x86_64-linux-gnu.so"}, "helpers_cpp.cpython-39-x86_64-linux"),
    "no python3-config": ({"without": "python3-config"}, "names it helpers_cpp, which this Python does not"),
    "no make": ({"without": "make"}, "make cannot be found on PATH"),
    "no compiler": ({"without": "g++"}, "g++ cannot be found on PATH"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_missing_is_named_with_the_folder(
    mistake: str, tree: Path, tools: Callable[..., str], compile_in: Callable[[str], None]
) -> None:
    given, expected = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        compile_in(tools(**given))
    assert expected in str(caught.value) and str(tree / "megatron" / "core" / "datasets") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_that_the_line_gives_compiles_for_this_python_without_the_package(
    tree: Path, tools: Callable[..., str], compile_in: Callable[[str], None]
) -> None:
    path = tools(pybind11=HAS_NOT, suffix=".cpython-39-x86_64-linux-gnu.so")
    with pytest.raises(UserError) as caught:
        compile_in(path)
    command = shlex.split(str(caught.value).partition("pybind11: ")[2])
    subprocess.run(command, env={"PATH": path}, check=True)
    assert (tree / "megatron" / "core" / "datasets" / f"helpers_cpp{SUFFIX}").exists()
    compile_in(path)
    folders = [Path(folder) for folder in re.findall("-I([^ ]+)", " ".join(command))]
    for header in ("pybind11/pybind11.h", "Python.h"):
        assert any((folder / header).is_file() for folder in folders), header


def test_the_first_rank_compiles_and_the_others_do_not(
    tree: Path,
    tools: Callable[..., str],
    compile_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, helper = tools(), tree / "megatron" / "core" / "datasets" / f"helpers_cpp{SUFFIX}"
    monkeypatch.setenv("RANK", "1")
    compile_in(path)
    assert not helper.exists()
    monkeypatch.setenv("RANK", "0")
    compile_in(path)
    assert helper.exists()


@pytest.mark.parametrize("level", [{}, {"MAKELEVEL": "1", "MAKEFLAGS": "n"}], ids=["alone", "under-make"])
def test_a_helper_older_than_its_source_is_compiled_anew_and_what_make_says_is_told(
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
    with pytest.raises(UserError, match=r"make fails: make: .*Makefile:\d+: .* Error 1; correct that"):
        compile_in(path)


def test_megatron_without_a_makefile_is_left_alone(
    tree: Path, tools: Callable[..., str], compile_in: Callable[[str], None]
) -> None:
    (tree / "megatron" / "core" / "datasets" / "Makefile").unlink()
    compile_in(tools(without="make"))


@pytest.mark.parametrize("launcher", ["--nproc", "torchrun"])
def test_the_launcher_says_it_once_before_it_imports_megatron(
    launcher: str, tree: Path, tools: Callable[..., str]
) -> None:
    command = [sys.executable, "-m", "jreg_megatron.launch", "--nproc", "4"]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "jreg_megatron.launch", "--cpu"]
    environment = {**os.environ, "PATH": tools(pybind11=HAS_NOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, tree / "pretrain_gpt.py", "--jreg-coeff", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert said.count("jreg_megatron: error: ") == 1 and "has no pybind11" in said, said
    assert "Megatron is imported" not in said
    if launcher == "--nproc":
        assert done.returncode == 2 and "Traceback" not in said
