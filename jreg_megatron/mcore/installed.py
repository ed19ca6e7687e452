"""Check whether Megatron's training loop, Transformer Engine and Apex are installed."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from jreg_megatron.runtime.errors import UserError

APEX_FUSION = "fused_weight_gradient_mlp_cuda"
"""Apex's module for fused gradient accumulation in Megatron's own linear layers."""
NO_FUSION = "--no-gradient-accumulation-fusion"
"""Megatron needs this flag if the module is missing."""


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return find_spec("transformer_engine") is not None


def has_apex() -> bool:
    """Whether Apex is installed, with its module for fused gradient accumulation."""
    return find_spec(APEX_FUSION) is not None


def refuse_without_nvidias_packages(asked: Namespace) -> None:
    """Refuse to start without a package that Megatron needs to build the model on a GPU.

    Raises:
        UserError: naming the package.
    """
    layers_are_its = asked.transformer_impl == "transformer_engine" and asked.spec is None
    if layers_are_its and not has_transformer_engine():
        raise UserError(
            "--transformer-impl is transformer_engine, and Transformer Engine is not installed; install "
            "jreg_megatron[te], or give --transformer-impl local"
        )
    if asked.gradient_accumulation_fusion and not has_apex():
        raise UserError(
            f"Megatron's output layer fuses gradient accumulation by Apex's {APEX_FUSION}, which is not "
            f"installed; install NVIDIA's Apex, or give {NO_FUSION}"
        )


def core_folder() -> Path | None:
    """The folder of the ``megatron.core`` that will be imported; None if there is none. Imports nothing."""
    megatron = find_spec("megatron")  # a namespace: several folders may share the name
    for found in megatron.submodule_search_locations or () if megatron else ():
        if Path(found, "core", "__init__.py").is_file():
            return Path(found, "core")
    return None


def has_training_loop() -> bool:
    """Whether ``megatron.training`` comes with ``megatron.core``. Wheels before 0.19 have only the core."""
    import megatron.core

    loop = find_spec("megatron.training")
    root = Path(megatron.core.__file__).parents[1]
    return bool(loop and loop.origin and Path(loop.origin).parents[1] == root)


def need_training_loop(what: str, instead: str = "") -> None:
    """Refuse a Megatron-Core without the training loop of 0.19 or later.

    Raises:
        UserError: naming ``what``, which needs it, and ending with the alternative ``instead``.
    """
    from megatron.core import __version__ as core

    from jreg_megatron.stream.support import is_since_0_19

    if not (has_training_loop() and is_since_0_19()):
        raise UserError(
            f"Megatron-Core {core.partition('+')[0]} is installed, and {what} needs the training loop of "
            f"0.19 or later; upgrade it{instead}"
        )
