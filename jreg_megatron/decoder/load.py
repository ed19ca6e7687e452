"""Load the models that a user named. Imports torch late."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jreg_megatron.decoder.reference import Reference
from jreg_megatron.runtime.errors import UserError, one_line

if TYPE_CHECKING:
    from jreg_megatron.decoder.decoder import Decoder

DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: ArgumentParser, models: str) -> None:
    """Define MODEL (``models`` is its ``nargs``), ``--device``, ``--dtype``, ``--trust-remote-code`` and
    ``--batch-size``."""
    parser.add_argument(
        "models",
        nargs=models,
        metavar="MODEL",
        help="[NAME=]MODEL[@REVISION,...]: a name on the Hugging Face hub, a folder, a .gguf file, or the "
        "--save folder of a Megatron training. After @ come revisions on the hub or iterations of a "
        "training; @all means all of them",
    )
    add = parser.add_argument_group("how to run the models").add_argument
    devices = "cpu, cuda, cuda:1, or auto to spread the model over all GPUs (default: %(default)s)"
    add("--device", default="cpu", help=devices)
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="type of the weights (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model of the hub")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (default: %(default)s)")


def check_model_arguments(args: Namespace) -> None:
    """Refuse a batch size below 1 and a device that this machine does not have.

    Raises:
        UserError: naming the flag.
    """
    import torch

    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")
    try:
        if args.device != "auto":
            torch.zeros(1, device=args.device).item()  # fails on "meta", which holds no numbers
    except Exception as error:  # torch's, or that of a device's own package
        raise UserError(
            f"--device is {args.device}, which does not work on this machine ({one_line(error, most=200)}); "
            "give cpu, or a device that torch sees"
        ) from error


def load(reference: Reference, args: Namespace) -> Decoder:
    """Load a checkpoint of :func:`find_models`, with the flags of :func:`add_model_arguments`.

    Raises:
        UserError: if it cannot be loaded, or is not a causal decoder.
    """
    import torch

    dtype = getattr(torch, args.dtype)
    if not reference.is_megatron:
        from jreg_megatron.decoder.hugging_face import load_hugging_face

        return load_hugging_face(reference, dtype, args.device, args.trust_remote_code)
    from jreg_megatron.decoder.checkpoint.model import load_megatron

    if args.device == "auto":
        raise UserError(f"--device is auto, and {reference.at} is a Megatron checkpoint; give cpu or cuda")
    decoder = load_megatron(
        Path(reference.source), reference.step, dtype=dtype, device=torch.device(args.device)
    )
    return replace(decoder, name=reference.name)
