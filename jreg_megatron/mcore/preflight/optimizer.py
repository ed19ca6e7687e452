"""Checks of the optimizer. Megatron finds these errors after it has built the model, or in a step."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from jreg_megatron.mcore.installed import core_folder
from jreg_megatron.mcore.preflight.asked import Refusals, refuse
from jreg_megatron.runtime.errors import UserError

_EMERGING = ("muon", "dist_muon", "adaptive_muon", "lion", "soap")
"""Optimizers of the package ``emerging_optimizers``."""
_OLDEST = (0, 2)
"""The oldest version of the package that Megatron-Core 0.19 supports."""


def package(name: str | None) -> None:
    """Refuse the optimizer ``name`` if its package is not installed. It does not import Megatron.

    A Megatron tree that has its own optimizers of these names does not need the package.

    Raises:
        UserError: naming the package.
    """
    if name in _EMERGING and find_spec("emerging_optimizers") is None and _megatron_wants_it():
        raise UserError(
            f"--optimizer is {name}, which needs the package emerging_optimizers; pip install "
            "emerging-optimizers, or give --optimizer adam"
        )


_REFUSED: Refusals = {
    "--optimizer is {optimizer}, which does not run with --fp16; give --bf16": lambda args: args.fp16,
    "--optimizer is {optimizer}, which runs with --use-distributed-optimizer in bf16 only; give --bf16, or "
    "leave --use-distributed-optimizer out": lambda args: (
        not args.bf16 and (args.use_distributed_optimizer or args.optimizer == "dist_muon")
    ),
    "--optimizer is {optimizer}, which needs emerging_optimizers 0.2 or later, and {installed} is installed; "
    "pip install --upgrade emerging-optimizers": lambda _: () < _installed() < _OLDEST,
    "--optimizer is {optimizer}, for which Megatron-Core 0.19 needs emerging_optimizers 0.2, and {installed} "
    "is installed; install 0.2, or give --optimizer muon": lambda args: (
        args.optimizer == "adaptive_muon" and _installed() > _OLDEST and _is_megatron_0_19()
    ),
}


_NO_STEP = (
    " with --use-torch-fsdp2, and Megatron 0.19 does not resume FSDP2's optimizer: the number of Adam's step "
    "is lost; give --no-{0}-optim to {0} the weights alone, or --use-distributed-optimizer instead of "
    "--use-torch-fsdp2"
)
# From a torch_dist checkpoint Megatron 0.19 loads Adam's moments, but not the number of its step. It cannot
# read a torch_dcp checkpoint.
_RESUMING_FSDP2: Refusals = {
    "--load is {load} with --ckpt-format torch_dcp, which Megatron 0.19 writes and cannot read; give "
    "--ckpt-format torch_dist": lambda args: args.load and args.ckpt_format == "torch_dcp",
    "--load is {load}" + _NO_STEP.format("load"): lambda args: (
        args.load and not (args.finetune or args.no_load_optim)
    ),
    "--save is {save}" + _NO_STEP.format("save"): lambda args: args.save and not args.no_save_optim,
}


# Megatron-FSDP's save hangs if a rank has no row of some weight, and so no moments of it; seen on a CPU.
# Without the optimizer, loading ends with "does not implement a model-to-main parameter update".
_NO_CHECKPOINTS = (
    "--{0} is {{{1}}} with --use-megatron-fsdp, whose optimizer Megatron 0.19 may hang on, and without "
    "which it loads no weights; leave --{0} out, or give --use-distributed-optimizer instead of "
    "--use-megatron-fsdp"
)
_MEGATRON_FSDP: Refusals = {
    "--use-megatron-fsdp needs the package einops; pip install einops": lambda _: find_spec("einops") is None,
    "--pipeline-model-parallel-size is {pipeline_model_parallel_size} with --use-megatron-fsdp, which "
    "Megatron 0.19 does not lay over pipeline stages; leave one of the two out": lambda args: (
        args.pipeline_model_parallel_size > 1
    ),
    _NO_CHECKPOINTS.format("save", "save"): lambda args: args.save,
    _NO_CHECKPOINTS.format("load", "load"): lambda args: args.load,
    _NO_CHECKPOINTS.format("pretrained-checkpoint", "pretrained_checkpoint"): lambda args: (
        args.pretrained_checkpoint
    ),
}


def combination(args: Namespace) -> None:
    if args.optimizer == "sgd" and args.use_distributed_optimizer:
        raise UserError(
            "--optimizer is sgd, which does not run with --use-distributed-optimizer; leave one of them out"
        )
    if args.optimizer in _EMERGING:
        refuse(Namespace(**vars(args), installed=".".join(map(str, _installed()))), _REFUSED)


def resuming(args: Namespace) -> None:
    """Refuse to save or load the optimizer's state with FSDP2, and features that Megatron-FSDP lacks."""
    if args.use_torch_fsdp2 and not args.skip_train:
        refuse(args, _RESUMING_FSDP2)
    if args.use_megatron_fsdp and not args.skip_train:
        refuse(args, _MEGATRON_FSDP)


def _is_megatron_0_19() -> bool:
    from megatron.core import __version__

    return str(__version__).startswith("0.19.")


def _megatron_wants_it() -> bool:
    folder = core_folder()
    files = [] if folder is None else (folder / "optimizer").glob("*.py")
    return folder is None or any("emerging_optimizers" in file.read_text("utf-8") for file in files)


def _installed() -> tuple[int, ...]:
    """The first two numbers of the package's version; empty if it is not installed."""
    try:
        return tuple(int(number) for number in version("emerging-optimizers").split(".")[:2])
    except PackageNotFoundError:
        return ()
