"""Checks of the optimizer. Megatron finds these errors after it has built the model, or at a step."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from jreg_megatron.mcore.dataset_helper import core_folder
from jreg_megatron.runtime.errors import UserError

_EMERGING = ("muon", "dist_muon", "adaptive_muon", "lion", "soap")
"""Optimizers of the package ``emerging_optimizers``."""
_OLDEST = (0, 2)
"""The oldest version of the package for Megatron-Core 0.19."""


def package(name: str | None) -> None:
    """Refuse the optimizer ``name`` if its package is not installed. Imports nothing of Megatron.

    A Megatron tree with its own optimizers of these names does not mention the package.

    Raises:
        UserError: naming the package.
    """
    if name in _EMERGING and find_spec("emerging_optimizers") is None and _megatron_wants_it():
        raise UserError(
            f"--optimizer is {name}, which needs the package emerging_optimizers; pip install "
            "emerging-optimizers, or give --optimizer adam"
        )


def combination(args: Namespace) -> None:
    name, is_distributed = args.optimizer, args.use_distributed_optimizer
    if name == "sgd" and is_distributed:
        raise UserError(
            "--optimizer is sgd, which does not run with --use-distributed-optimizer; leave one of them out"
        )
    if name not in _EMERGING:
        return
    if args.fp16:
        raise UserError(f"--optimizer is {name}, which does not run with --fp16; give --bf16")
    if not args.bf16 and (is_distributed or name == "dist_muon"):
        raise UserError(
            f"--optimizer is {name}, which runs with --use-distributed-optimizer in bf16 only; give --bf16, "
            "or leave --use-distributed-optimizer out"
        )
    installed = _installed_version()
    if () < installed < _OLDEST:
        raise UserError(
            f"--optimizer is {name}, which needs emerging_optimizers 0.2 or later, and "
            f"{'.'.join(map(str, installed))} is installed; pip install --upgrade emerging-optimizers"
        )
    if name == "adaptive_muon" and installed > (0, 2):
        from megatron.core import __version__

        if __version__.startswith("0.19."):
            raise UserError(
                f"--optimizer is {name}, for which Megatron-Core 0.19 needs emerging_optimizers 0.2, and "
                f"{'.'.join(map(str, installed))} is installed; install 0.2, or give --optimizer muon"
            )


def _megatron_wants_it() -> bool:
    folder = core_folder()
    files = [] if folder is None else (folder / "optimizer").glob("*.py")
    return folder is None or any("emerging_optimizers" in file.read_text("utf-8") for file in files)


def _installed_version() -> tuple[int, ...]:
    """The first two numbers of the package's version; empty if it is not installed."""
    try:
        return tuple(int(number) for number in version("emerging-optimizers").split(".")[:2])
    except PackageNotFoundError:
        return ()
