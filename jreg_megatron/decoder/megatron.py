"""Megatron's ``torch_dist`` checkpoints as decoders, saved at any layout, in one process without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jreg_megatron.decoder.megatron_folder import CheckpointFolder, is_megatron, megatron_steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from jreg_megatron.decoder.decoder import Decoder
    from jreg_megatron.decoder.megatron_weights import Checkpoint

__all__ = ["is_megatron", "last_validation", "load_megatron", "megatron_settings", "megatron_steps"]


def load_megatron(
    folder: Path, step: int | None = None, *, dtype: torch.dtype, device: torch.device
) -> Decoder:
    """A checkpoint of Megatron's training loop, with the layers of Megatron's ``GPTModel``.

    Its logits are those of the vocabulary. Megatron's own loss also counts the probability of the rows of
    padding behind it, so it is a little higher.

    Args:
        folder: what the training was given as ``--save``, or one ``iter_...`` folder in it.
        step: iteration; by default the last.
        dtype: type of weights and states, whatever they were saved in.
        device: on the CPU, what Megatron asks of CUDA is redirected for the life of the process.

    Raises:
        UserError: if there is no such checkpoint, it is damaged, or its model is no plain ``GPTModel``,
            nor a ``HybridModel`` whose sub-layers are pairs of attention and MLP.
    """
    from jreg_megatron.decoder.megatron_decoder import decoder_of

    return decoder_of(open_checkpoint(folder, step, device), dtype=dtype, device=device, source=str(folder))


def open_checkpoint(folder: Path, step: int | None, device: torch.device) -> Checkpoint:
    """Find a checkpoint and read all but its weights; imports Megatron.

    Raises:
        UserError: if there is no such checkpoint, or it is damaged.
    """
    from jreg_megatron.decoder.megatron_model import import_megatron, without_noise

    place = CheckpointFolder.find(folder, step)
    import_megatron(device)
    from jreg_megatron.decoder.megatron_weights import Checkpoint

    with without_noise():
        return Checkpoint(place)


def megatron_settings(folder: Path, step: int | None = None) -> dict[str, str]:
    """The training's arguments as text, those of JREG included; imports Megatron.

    Raises:
        UserError: if there is no such checkpoint, or it is damaged.
    """
    arguments = open_checkpoint(folder, step, _device()).arguments
    return {name: str(value) for name, value in sorted(arguments.items())}


def last_validation(folder: Path, step: int | None = None) -> Tensor:
    """Token ids ``[n, seq_length]`` that the model saw in the last validation, read from the training's data.

    Megatron evaluates once more behind the last iteration, after it has saved; for a checkpoint of the last
    iteration that is the one. Else it is the last one before the checkpoint.

    Raises:
        UserError: if data or tokenizer are not where they were, or there was no validation.
    """
    checkpoint = open_checkpoint(folder, step, _device())
    from jreg_megatron.decoder.megatron_model import without_noise
    from jreg_megatron.decoder.megatron_validation import last_validation_samples

    with without_noise():
        return last_validation_samples(checkpoint).tokens


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
