"""Megatron's C++ dataset helper, which its wheel brings compiled and a source tree compiles on first use."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from jreg_megatron.errors import UserError


def compile_helper() -> None:
    """Compile the helper of the Megatron that will be imported, if that is still to do.

    Megatron does so late, and where it fails every rank ends with a traceback. Here the first rank of a job
    compiles, or the process that starts the ranks; the others only look for the tools.

    Raises:
        UserError: naming the tool that is missing, or what ``make`` says.
    """
    folder = _folder()
    if folder is None or _is_compiled(folder):
        return
    what = f"Megatron's dataset helper in {folder} is still to be compiled"
    if lacking := _lacking():
        raise UserError(f"{what}, and {lacking}")
    if os.environ.get("RANK", "0") == "0":
        done = subprocess.run(["make", "-C", folder], capture_output=True, text=True, check=False)
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


def _lacking() -> str:
    """What ``make`` would fail for, and what to do; empty if it has all it needs."""
    compiler = os.environ.get("CXX", "g++")
    for tool in ("make", compiler.split()[0], "python3", "python3-config"):
        if shutil.which(tool) is None:
            return f"{tool} is not on PATH; install it"
    python = shutil.which("python3")
    if subprocess.run(
        ["python3", "-m", "pybind11", "--includes"], capture_output=True, check=False
    ).returncode:
        fix = f"install it there ({python} -m pip install pybind11)"
        if importlib.util.find_spec("pybind11") is not None:
            fix = f"put {Path(sys.executable).parent} first on PATH, whose python3 has it"
        return f"the python3 on PATH, {python}, has no pybind11; {fix}"
    config = ["python3-config", "--extension-suffix"]
    suffix = subprocess.run(config, capture_output=True, text=True, check=False).stdout.strip()
    if suffix not in importlib.machinery.EXTENSION_SUFFIXES:
        return (
            f"python3-config on PATH names it helpers_cpp{suffix}, which this Python does not import; put "
            f"the one first that gives {importlib.machinery.EXTENSION_SUFFIXES[0]}"
        )
    return ""
