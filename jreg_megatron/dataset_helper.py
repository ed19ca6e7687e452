"""Megatron's C++ dataset helper, which its wheel brings compiled and a source tree compiles on first use."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from jreg_megatron.errors import UserError


def compile_helper() -> None:
    """Compile the helper of the Megatron that will be imported, if that is still to do.

    Megatron does so late, and where it fails every rank ends with a traceback. Here the first rank of a job
    compiles, or the process that starts the ranks; the others only look for the tools.

    Raises:
        UserError: naming the tool that is missing, or what ``make`` says.
    """
    folder = _folder()
    if folder is None or not (folder / "Makefile").is_file() or _is_compiled(folder):
        return
    what = f"Megatron's dataset helper in {folder} is still to be compiled"
    if lacking := _lacking(folder):
        raise UserError(f"{what}, and {lacking}")
    if os.environ.get("RANK", "0") == "0":
        # Of a make that started this process: its flags (-n) would be followed, its level would be told.
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        plain["GCC_COLORS"] = ""
        done = subprocess.run(["make", "-C", folder], env=plain, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
            raise UserError(f"{what}, and make fails: {(lines or ['it says nothing'])[0]}; correct that")


def use_built_helper() -> None:
    """Keep Megatron's start-up from running ``make``, if there is nothing to make.

    The wheel leaves the Makefile out, yet start-up (0.19) runs ``make`` there all the same and ends the
    process when that fails.
    """
    from megatron.core.datasets import utils

    if _is_compiled(Path(utils.__file__).parent):
        utils.compile_helpers = lambda: None


def _folder() -> Path | None:
    megatron = importlib.util.find_spec("megatron")  # a namespace: several folders may share the name
    for found in megatron.submodule_search_locations or () if megatron else ():
        if Path(found, "core", "__init__.py").is_file():
            return Path(found, "core", "datasets")
    return None


def _is_compiled(folder: Path) -> bool:
    """Whether this Python finds the helper there, as new as its source where ``make`` would look."""
    files = [folder / f"helpers_cpp{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    source = folder / "helpers.cpp"
    least = source.stat().st_mtime if (folder / "Makefile").is_file() and source.is_file() else 0.0
    return any(file.is_file() and file.stat().st_mtime >= least for file in files)


def _lacking(folder: Path) -> str:
    """What ``make`` would fail for in the folder, and what to do; empty if it has all it needs."""

    def ask(*command: str) -> subprocess.CompletedProcess[str]:
        # Where make would: which Python a name stands for can depend on the working directory.
        if shutil.which(command[0]) is None:
            return subprocess.CompletedProcess(command, 127, "", "")
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    compiler = os.environ.get("CXX", "g++").split()[0]
    if missing := [tool for tool in ("make", compiler) if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} cannot be found on PATH; install that"
    wrong = []
    if ask("python3", "-m", "pybind11", "--includes").returncode:
        python = ask("python3", "-c", "import sys; print(sys.executable)").stdout.strip()
        wrong.append(f"the python3 on PATH ({python}) has no pybind11")
    suffix = ask("python3-config", "--extension-suffix").stdout.strip()
    if suffix not in importlib.machinery.EXTENSION_SUFFIXES:
        wrong.append(
            f"the python3-config on PATH names it helpers_cpp{suffix}, which this Python does not find"
        )
    if not wrong:
        return ""
    includes = Path(torch.__file__).with_name("include"), sysconfig.get_path("include")
    flags = f"CPPFLAGS='{' '.join(f'-I{path}' for path in includes)}'"
    name = f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"
    return (
        f"{' and '.join(wrong)}; mend that, or compile it for this Python, with torch's pybind11: "
        f"make -C {folder} {flags} {name}"
    )
