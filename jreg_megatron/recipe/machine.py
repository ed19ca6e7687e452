"""Check whether this machine and the files are sufficient for a run.

Each check returns a text for the table, or raises a :class:`UserError` if they are not sufficient.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from jreg_megatron.data.token_file import sha256_of
from jreg_megatron.decoder.checkpoint.folder import last_checkpoint
from jreg_megatron.mcore.preflight.data import local_prefixes, token_file_of, training_blends
from jreg_megatron.recipe.announcement import number_as_text
from jreg_megatron.recipe.plan import Plan
from jreg_megatron.runtime.errors import UserError

_SAVED_BYTES = 14
"""Bytes of a checkpoint per parameter: bf16 weights (2), fp32 weights and Adam's two moments (4 each)."""
_NOT_HERE = "not on this machine, so not checked"


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this node."""

    count: int
    name: str = ""
    bytes: int | None = None
    """Memory of the smallest GPU, or None if the driver does not say."""

    @classmethod
    def of_this_node(cls) -> Gpus:
        """Their number from torch, the rest from the driver. It creates no context on a GPU.

        Like torch, it sees only the GPUs in ``CUDA_VISIBLE_DEVICES``. Name and memory stay unknown for a part
        of a GPU (MIG), and where GPUs differ and are given by numbers, which CUDA and the driver do not count
        in the same order.
        """
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count or shutil.which("nvidia-smi") is None:
            return cls(count)
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        is_exact = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or visible.startswith(("GPU-", "MIG-"))
        if visible and is_exact:
            query.append(f"--id={visible}")
        told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        if visible and not is_exact and len(set(told.splitlines())) > 1:
            return cls(count)
        rows = [row.rpartition(", ") for row in told.splitlines()]
        sizes = [int(size) * 2**20 for _, _, size in rows if size.strip().isdecimal()]
        return cls(count, rows[0][0] if rows else "", min(sizes, default=None))


def check_gpus(wanted: int, gpus: Gpus) -> str:
    """The GPUs of this node."""
    if gpus.count < wanted:
        raise UserError(
            f"GPUS is {wanted}, but this node has {gpus.count}; lower GPUS, or try the "
            "recipe on the CPU with --smoke"
        )
    return f"{wanted} of {gpus.count} x {gpus.name or 'GPU'}"


def check_memory(plan: Plan, gpus: Gpus) -> str:
    """The memory that the fullest GPU needs."""
    total = plan.state_bytes + plan.activation_bytes
    state, activations = number_as_text(plan.state_bytes, "B"), number_as_text(plan.activation_bytes, "B")
    text = (
        f"about {number_as_text(total, 'B')} a GPU: {state} weights, gradients, optimizer, "
        f"{activations} activations (Megatron's estimate)"
    )
    if gpus.bytes is None:
        return text
    has = number_as_text(gpus.bytes, "B")
    if plan.state_bytes > gpus.bytes:
        raise UserError(
            f"weights, gradients and optimizer take {state} a GPU, and {gpus.name} has {has}; "
            "raise TP or PP, or train on more GPUs"
        )
    if total > gpus.bytes:
        return f"{text}; more than the {has} of {gpus.name}: lower MICRO_BATCH if memory runs out"
    return f"{text} of {has}"


def check_training_data(args: Namespace, tokens: int, epochs: float) -> str:
    """The number of passes over the training data. At the end of the data Megatron silently begins again."""
    there, most, fullest = 0.0, 0.0, ""
    for flag, share, blend in training_blends(args):
        if any("://" in prefix for _, prefix in blend):
            return _NOT_HERE
        sizes = [share * len(token_file_of(flag, prefix).tokens) for _, prefix in blend]
        # Without weights Megatron reads all datasets equally often.
        weights = [size if weight is None else weight for (weight, _), size in zip(blend, sizes, strict=True)]
        for (_, prefix), weight, size in zip(blend, weights, sizes, strict=True):
            passes = tokens * weight / sum(weights) / size
            if passes > most:
                most, fullest = passes, prefix
        there += sum(sizes)
    if not fullest:
        return _NOT_HERE
    if most > epochs:
        raise UserError(
            f"TOKENS is {tokens:,}, but there are only {there:,.0f}: it takes {most:.2f} passes over "
            f"{fullest}, and EPOCHS allows {epochs:g}; prepare more, lower TOKENS, or set "
            f"EPOCHS={math.ceil(most)}"
        )
    return f"{number_as_text(there)} tokens, read {'at most ' if len(sizes) > 1 else ''}{most:.2f} times"


def check_tokenizer(args: Namespace) -> None:
    """Refuse a tokenizer that differs from that in the data's manifests."""
    if not args.tokenizer_model or not os.path.isfile(args.tokenizer_model):
        return
    ours = sha256_of(Path(args.tokenizer_model))
    for flag, prefix in local_prefixes(args):
        manifest = Path(re.sub(r"_[^_]+_document$", ".manifest.json", prefix))
        try:
            made_with = json.loads(manifest.read_text())["tokenizer"]
            other = made_with["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if other != ours:
            raise UserError(
                f"--tokenizer-model is {args.tokenizer_model}, but {prefix} of {flag} was made with another "
                f"one, {made_with['tokenizer_model']} (see {manifest}); give that one"
            )


def check_disk(plan: Plan) -> str:
    """The disk space that the remaining checkpoints need."""
    args = plan.args
    if args.save is None:
        return "none"
    folder = Path(args.save).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"RUN is {args.save}, and {folder} cannot be written; name another folder")
    every = args.save_retain_interval or args.save_interval
    kept = {*range(every, args.train_iters + 1, every), args.train_iters}
    # Megatron removes a checkpoint after it has written the next one.
    still = sum(iteration > last_checkpoint(args.load) for iteration in kept) + 1
    each, free = plan.parameters * _SAVED_BYTES, shutil.disk_usage(folder).free
    text = f"{still} x {number_as_text(each, 'B')}, {number_as_text(free, 'B')} free"
    if still * each > free:
        raise UserError(
            f"checkpoints will take {number_as_text(still * each, 'B')} ({text}) in {args.save}; "
            "free some space, set RUN to another disk, or raise --save-retain-interval"
        )
    return text
