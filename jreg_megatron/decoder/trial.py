"""Try the first text: do its states depend on anything else?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.runtime.errors import UserError

_MAX_LOGITS = 1 << 27
"""In the whole model's run: 512 MiB in fp32."""
_EARLY, _BESIDE, _PADDING = 8, 3, 3
"""First tokens that must not see the others; rows in a batch; tokens of padding."""
_SHARE = 0.05
"""Share of tokens that may differ, because rounding may choose another expert."""


class LastStates:
    """Keeps the last layer's output, and the head's input."""

    layer_output: Tensor
    state: Tensor

    def __init__(self, decoder: Decoder) -> None:
        self._last = decoder.num_layers

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        """Copy the last layer's output, because the model may write to it later."""
        if number == self._last:
            self.layer_output = self.state = layer_output.clone()

    def final_norm(self, normed: Tensor) -> None:
        """Keep the head's input."""
        self.state = normed


def refuse_dependence(decoder: Decoder, ids: Any, batch_size: int) -> None:
    """Run a text through the whole model, and as in a measurement: in a batch, with padding, without head.

    Raises:
        UserError: if a token's state depends on the other rows of a batch, or on later tokens.
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
        inside = "without its head than in the whole model; give another model"
        raise UserError(f"{decoder.name} gives a text other states {beside if batch_size > 1 else inside}")
    if _is_other(whole[:early], second[:early], eps):
        raise UserError(
            f"{decoder.name} looks at later tokens in a longer text; give a causal language model"
        )


def _states(decoder: Decoder, run: Callable[[Tensor], Any], tokens: Tensor) -> Tensor:
    seen = LastStates(decoder)
    with torch.inference_mode(), decoder.observed(seen):
        run(tokens)
    return seen.layer_output


def _is_other(a: Tensor, b: Tensor, eps: float) -> bool:
    off = (a - b).float().norm(dim=-1) > 2 * eps**0.5 * a.float().norm(dim=-1)
    return int(off.sum()) > _SHARE * len(off)
