"""Megatron's C++ dataset helper. The wheel has it compiled. A source tree compiles it on first use."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from jreg_megatron.mcore.installed import core_folder
from jreg_megatron.runtime.errors import UserError

_SAYS_WHY = re.compile(r"error|cannot|denied|no space|read-only", re.IGNORECASE)
"""Finds the line of compiler, linker or make that names the cause. The linker's line has no "error"."""


def compile_helper() -> None:
    """Compile the helper of the Megatron that will be imported, if it is not compiled yet.

    Megatron does this late, and an error ends every rank with a traceback. Here the first rank of a job
    compiles, or the process that starts the ranks. Megatron's Makefile asks the ``python3`` on ``PATH`` for
    pybind11 and for the file's name. This may be another Python, so both are passed to ``make``.

    Raises:
        UserError: naming the missing tool, or with the error of ``make``.
    """
    core = core_folder()
    folder = None if core is None else core / "datasets"
    if folder is None or not (folder / "Makefile").is_file() or _is_compiled(folder):
        return
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    what = f"Megatron's dataset helper in {folder} is not compiled"
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    if missing := [tool for tool in ("make", compiler) if shutil.which(tool) is None]:
        raise UserError(f"{what}, and PATH has no {' and no '.join(missing)}; install it")
    includes = Path(torch.__file__).with_name("include"), sysconfig.get_path("include")  # torch has pybind11
    flags = f"CPPFLAGS={' '.join(f'-I{path}' for path in includes)}"
    name = f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"
    # If make started this process, its flags (-n) and its level must not reach this make.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    plain |= {"GCC_COLORS": "", "LC_ALL": "C"}
    command = ["make", "-C", str(folder), flags, name]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if _SAYS_WHY.search(line)]
        raise UserError(f"{what}, and make fails: {(lines or ['no error text'])[0]}; correct it")


def use_built_helper() -> None:
    """Stop Megatron's start-up from running ``make`` if the helper is compiled.

    The wheel has no Makefile. Megatron 0.19 runs ``make`` anyway, and its error ends the process.
    """
    from megatron.core.datasets import utils

    if _is_compiled(Path(utils.__file__).parent):
        utils.compile_helpers = lambda: None


def _is_compiled(folder: Path) -> bool:
    """Whether this Python finds the helper in ``folder``. With a Makefile it must be as new as its source."""
    files = [folder / f"helpers_cpp{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    source = folder / "helpers.cpp"
    least = source.stat().st_mtime if (folder / "Makefile").is_file() and source.is_file() else 0.0
    return any(file.is_file() and file.stat().st_mtime >= least for file in files)
