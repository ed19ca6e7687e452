"""Megatron's C++ dataset helper, which its wheel brings compiled and a source tree compiles on first use."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from jreg_megatron.runtime.errors import UserError

_SAYS_WHY = re.compile(r"error|cannot|denied|no space|read-only", re.IGNORECASE)
"""A line of compiler, linker or make that tells what is wrong; the linker's own has no "error" in it."""


def compile_helper() -> None:
    """Compile the helper of the Megatron that will be imported, if that is still to do.

    Megatron does so late, and where it fails every rank ends with a traceback. Here the first rank of a job
    compiles, or the process that starts the ranks. Megatron's Makefile asks the ``python3`` on ``PATH`` for
    pybind11 and for the file's name, which may be another Python; both are given to it.

    Raises:
        UserError: naming the tool that is missing, or what ``make`` says.
    """
    core = core_folder()
    folder = None if core is None else core / "datasets"
    if folder is None or not (folder / "Makefile").is_file() or _is_compiled(folder):
        return
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    what = f"Megatron's dataset helper in {folder} is still to be compiled"
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    if missing := [tool for tool in ("make", compiler) if shutil.which(tool) is None]:
        raise UserError(f"{what}, and {' and '.join(missing)} cannot be found on PATH; install that")
    includes = Path(torch.__file__).with_name("include"), sysconfig.get_path("include")  # torch has pybind11
    flags = f"CPPFLAGS={' '.join(f'-I{path}' for path in includes)}"
    name = f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"
    # Of a make that started this process: its flags (-n) would be followed, its level would be told.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    plain |= {"GCC_COLORS": "", "LC_ALL": "C"}
    command = ["make", "-C", str(folder), flags, name]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if _SAYS_WHY.search(line)]
        raise UserError(f"{what}, and make fails: {(lines or ['it says nothing'])[0]}; correct that")


def use_built_helper() -> None:
    """Keep Megatron's start-up from running ``make``, if there is nothing to make.

    The wheel leaves the Makefile out, yet start-up (0.19) runs ``make`` there all the same and ends the
    process when that fails.
    """
    from megatron.core.datasets import utils

    if _is_compiled(Path(utils.__file__).parent):
        utils.compile_helpers = lambda: None


def core_folder() -> Path | None:
    """Where the ``megatron.core`` is that will be imported, without importing it."""
    megatron = importlib.util.find_spec("megatron")  # a namespace: several folders may share the name
    for found in megatron.submodule_search_locations or () if megatron else ():
        if Path(found, "core", "__init__.py").is_file():
            return Path(found, "core")
    return None


def _is_compiled(folder: Path) -> bool:
    """Whether this Python finds the helper there, as new as its source where ``make`` would look."""
    files = [folder / f"helpers_cpp{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    source = folder / "helpers.cpp"
    least = source.stat().st_mtime if (folder / "Makefile").is_file() and source.is_file() else 0.0
    return any(file.is_file() and file.stat().st_mtime >= least for file in files)
