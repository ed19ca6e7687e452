"""Score predictions of token ids from states, in pieces, so that logits need little memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jreg_megatron.decoder.comparing import comparable
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.runtime.errors import UserError

Scores = tuple[Tensor, Tensor]
"""Of predictions of n tokens: cross-entropy ``[n]`` in nats, fp32, and the most likely ids ``[n]``."""

_MAX_LOGITS = 1 << 25
"""Logits at a time: 128 MiB in fp32."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 2e-2  # bf16 and fp16
_CHECKED_TOKENS = 32


def score(to_logits: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, decoder: Decoder) -> Scores:
    """Score the ids ``targets`` ``[n]`` by the logits that ``to_logits`` gives for ``states`` ``[n, h]``.

    Raises:
        UserError: if a logit is NaN, or a target has probability 0.
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
            f"{decoder.name} gives logits that are not finite with {decoder.dtype}; give --dtype float32, "
            "and if that does not help, check the weights"
        )
    return loss, torch.cat(tops)


def score_own(decoder: Decoder, ids: Tensor, at: Sequence[Tensor], targets: Tensor) -> Scores:
    """Score the ids ``targets`` ``[n]`` by the whole model's logits of ids ``[b, s]`` at n rows and columns;
    raises as :func:`score`."""
    rows, columns = at
    if decoder.head is None:
        return score(lambda logits: logits, decoder.logits(ids)[rows, columns], targets, decoder)
    return score(decoder.head, decoder.last_states(ids)[1][rows, columns], targets, decoder)


@torch.inference_mode()
def read_out_error(decoder: Decoder) -> str | None:
    """Why no layer can be read out; None if final norm and head give the last layer's own logits."""
    ids = (
        torch.arange(_CHECKED_TOKENS, device=decoder.device)[None, : decoder.max_length] % decoder.vocab_size
    )
    what = f"{decoder.name} ({type(decoder.model).__name__}) cannot be read out: "
    if decoder.head is None:
        return f"{what}its head was not found"
    last, state = decoder.last_states(ids)
    own = decoder.logits(ids)
    try:
        # As layers are read out, and as the whole model is scored.
        reads = (decoder.read_out(last), decoder.head(state))
    except RuntimeError:  # a projection between them
        return f"{what}its head does not take the last layer's states"
    if any(read.shape != own.shape for read in reads):
        return f"{what}its head gives logits of another shape"
    own, *others = comparable(own, *reads)
    off = torch.stack([(own - other).abs() for other in others])
    size = own.abs() + own.square().mean(dim=-1, keepdim=True).sqrt()
    if bool((off <= _TOLERANCE.get(decoder.dtype, _COARSE_TOLERANCE) * size).all()):
        return None
    by = "head" if decoder.final_norm is None else "final norm and head"
    return f"{what}its last layer's output by {by} misses its logits by up to {float(off.max()):.2g}"
