"""Loading a model that a user named, of whichever kind."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jreg_megatron.decoder.reference import Reference
from jreg_megatron.runtime.errors import UserError

if TYPE_CHECKING:
    from jreg_megatron.decoder.decoder import Decoder

DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: ArgumentParser) -> None:
    """Define ``--device``, ``--dtype``, ``--trust-remote-code`` and ``--batch-size``."""
    group = parser.add_argument_group("how to run the models")
    group.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda, cuda:1, or auto to spread over all GPUs (default: %(default)s)",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (default: %(default)s)"
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with a model of the hub"
    )
    group.add_argument(
        "--batch-size", type=int, default=8, help="sequences side by side (default: %(default)s)"
    )


def check_model_arguments(args: Namespace) -> None:
    """Refuse what :func:`add_model_arguments` has defined and this machine cannot do.

    Raises:
        UserError: naming the flag.
    """
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")
    check_device(args.device)


def check_device(device: str) -> None:
    """Raises:
    UserError: if this machine has no such device.
    """
    import torch

    if device == "auto":
        return
    try:
        kind = torch.device(device).type
        torch.empty(1, device=device)
    except Exception as error:  # of torch, or of a device's own package
        raise UserError(
            f"--device is {device}, which this machine does not have; give cpu, or a device that torch sees"
        ) from error
    if kind == "meta":
        raise UserError("--device is meta, which computes nothing; give cpu or cuda")


def load(reference: Reference, *, dtype: str, device: str, trust_remote_code: bool = False) -> Decoder:
    """Load a checkpoint.

    Args:
        reference: one that :func:`find_models` gave.
        dtype: of the weights, one of :data:`DTYPES`.
        device: a device of torch's, or ``auto``.
        trust_remote_code: run code that comes with a model of the hub.

    Raises:
        UserError: if it cannot be loaded, or is not a causal decoder.
    """
    import torch

    weights = getattr(torch, dtype)
    if reference.is_megatron:
        from jreg_megatron.decoder.checkpoint.model import load_megatron

        if device == "auto":
            raise UserError(
                f"--device is auto, and {reference.at} is a Megatron checkpoint; give cpu or cuda"
            )
        folder, place = Path(reference.source), torch.device(device)
        return replace(
            load_megatron(folder, reference.step, dtype=weights, device=place), name=reference.name
        )
    from jreg_megatron.decoder.hugging_face import load_hugging_face

    decoder = load_hugging_face(
        reference.source,
        name=reference.name,
        revision=reference.revision,
        dtype=weights,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return replace(decoder, step=reference.step) if reference.step is not None else decoder
