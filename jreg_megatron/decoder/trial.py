"""Whether a text's states are its own: a trial of the first text, for what a few tokens cannot show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.runtime.errors import UserError

_MAX_LOGITS = 1 << 27
"""Of the whole model's run: 512 MiB in fp32."""
_EARLY, _BESIDE, _PADDING = 8, 3, 3
"""Tokens that must not see the others; rows in a batch; tokens of padding behind them."""
_SHARE = 0.05
"""Of tokens that may be off, since an expert may be chosen by rounding."""


class LastStates:
    """Keeps the states behind the last layer, and those that the head takes."""

    layer_output: Tensor
    state: Tensor

    def __init__(self, decoder: Decoder) -> None:
        self._last = decoder.num_layers

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        """Keep the last layer's output as it is now, for it may be written to later."""
        if number == self._last:
            self.layer_output = self.state = layer_output.clone()

    def final_norm(self, normed: Tensor) -> None:
        """Keep what the head takes."""
        self.state = normed


def refuse_dependence(decoder: Decoder, ids: Any, batch_size: int) -> None:
    """Run a text by the whole model, and as it will be run: in a batch, with padding and by its layers alone.

    Args:
        decoder: the model.
        ids: of the text, one at least.
        batch_size: rows that will run side by side.

    Raises:
        UserError: if a token's state depends on what runs beside it, or on the tokens behind it.
    """
    row = torch.as_tensor(ids)[None, : max(1, _MAX_LOGITS // decoder.vocab_size)]
    length = row.shape[1]
    early = min(_EARLY, length - 1)
    other = torch.cat((row[:, :early], (row[:, early:] + 1) % decoder.vocab_size), dim=1)
    rows = torch.cat((row, *[other] * max(1, min(_BESIDE, batch_size) - 1)))
    if batch_size > 1:
        room = _PADDING if decoder.max_length is None else min(_PADDING, decoder.max_length - length)
        rows = torch.nn.functional.pad(rows, (0, room))
    whole = _states(decoder, decoder.logits, row)[0]
    first, second = torch.cat(
        [_states(decoder, decoder.run, some) for some in torch.split(rows, batch_size)]
    )[:2]
    eps = max(torch.finfo(dtype).eps for dtype in (decoder.dtype, whole.dtype))
    if _is_other(whole, first[:length], eps):
        beside = "in a batch with padding than alone; give --batch-size 1"
        inside = "in the part around its layers than in the whole model; give another model"
        raise UserError(
            f"{decoder.name} gives the same text other states {beside if batch_size > 1 else inside}"
        )
    if _is_other(whole[:early], second[:early], eps):
        raise UserError(
            f"{decoder.name} looks at tokens to come in a longer text; give a causal language model"
        )


def _states(decoder: Decoder, run: Callable[[Tensor], Any], tokens: Tensor) -> Tensor:
    seen = LastStates(decoder)
    with torch.inference_mode(), decoder.observed(seen):
        run(tokens)
    return seen.layer_output


def _is_other(a: Tensor, b: Tensor, eps: float) -> bool:
    off = (a - b).float().norm(dim=-1) > 2 * eps**0.5 * a.float().norm(dim=-1)
    return int(off.sum()) > _SHARE * len(off)
