"""How well token ids are predicted from states: in pieces, so that logits take little memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.errors import UserError

_MAX_LOGITS = 1 << 25
"""Logits at a time: 128 MiB in fp32."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 2e-2  # bf16 and fp16
_CHECKED_TOKENS = 32


@dataclass(frozen=True)
class Scores:
    """How tokens ``[n]`` were predicted."""

    loss: Tensor
    """Cross-entropy ``[n]`` in nats, fp32."""
    top: Tensor
    """The most likely ids ``[n]``."""


def score(to_logits: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, decoder: Decoder) -> Scores:
    """Score the ids ``targets`` ``[n]`` by the logits that ``to_logits`` makes of ``states`` ``[n, h]``.

    Raises:
        UserError: if a logit is NaN, or a target is given no probability at all.
    """
    rows = max(1, _MAX_LOGITS // decoder.vocab_size)
    losses, tops = [], []
    for some, wanted in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
        logits = to_logits(some[None])[0].to(wanted.device).float()
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        tops.append(logits.argmax(-1))
    loss = torch.cat(losses)
    if not bool(loss.isfinite().all()):
        raise UserError(
            f"{decoder.name} gives logits that are not finite with {decoder.dtype}; give --dtype float32, or "
            "if it is that already, look for broken weights"
        )
    return Scores(loss, torch.cat(tops))


def final_states(decoder: Decoder, ids: Tensor) -> Tensor:
    """The states ``[b, s, h]`` behind the final norm of ids ``[b, s]``."""
    seen = _Last()
    with torch.inference_mode(), decoder.observed(seen):
        decoder.run(ids)
    return seen.normed


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of ids as one tensor ``[b, s]``, filled up on the right, where a causal model does not look."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def check_decoder(decoder: Decoder) -> None:
    """Make sure that the last layer, read out by the final norm and the head, gives the model's own logits.

    Raises:
        UserError: naming the model, if it does not.
    """
    ids = torch.arange(_CHECKED_TOKENS, device=decoder.device)[None] % decoder.vocab_size
    if decoder.max_length is not None:
        ids = ids[:, : decoder.max_length]
    seen = _Last()
    with torch.inference_mode():
        with decoder.observed(seen):
            decoder.run(ids)
        own = decoder.logits(ids).float()
        try:
            read = decoder.read_out(seen.layer_output).float()
        except RuntimeError as error:  # a projection between them
            raise UserError(
                f"{decoder.name} ({type(decoder.model).__name__}) cannot be evaluated: its head does not "
                "take the states behind its layers"
            ) from error
    off, size = float((own - read).abs().max()), float(own.abs().max())
    if not off <= _TOLERANCE.get(decoder.dtype, _COARSE_TOLERANCE) * size and own.isfinite().all():
        raise UserError(
            f"{decoder.name} ({type(decoder.model).__name__}) cannot be evaluated: its last layer, read out "
            f"by final norm and head, misses its logits by {off:.2g} of {size:.2g}"
        )


class _Last:
    """Keeps the states behind the last layer and behind the final norm."""

    layer_output: Tensor
    normed: Tensor

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        self.layer_output = layer_output

    def final_norm(self, normed: Tensor) -> None:
        self.normed = normed
