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


def resuming(args: Namespace) -> None:
    """Refuse to save or load the optimizer's state with FSDP2. Megatron 0.19 loads Adam's moments from a
    ``torch_dist`` checkpoint and not the number of its step; it reads no ``torch_dcp`` checkpoint at all."""
    if not args.use_torch_fsdp2 or args.skip_train:
        return
    if args.load and args.ckpt_format == "torch_dcp":
        raise UserError(
            f"--load is {args.load} with --ckpt-format torch_dcp, which Megatron 0.19 writes and cannot "
            "read; give --ckpt-format torch_dist"
        )
    is_loaded = args.load and not (args.finetune or args.no_load_optim)
    for name, is_used in (("load", is_loaded), ("save", args.save and not args.no_save_optim)):
        if is_used:
            raise UserError(
                f"--{name} is {getattr(args, name)} with --use-torch-fsdp2, and Megatron 0.19 does not "
                f"resume FSDP2's optimizer: the number of Adam's step is lost; give --no-{name}-optim to "
                f"{name} the weights alone, or --use-distributed-optimizer instead of --use-torch-fsdp2"
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
