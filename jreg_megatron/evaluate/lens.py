"""A fitted lens: for each layer the affine map of its states that comes nearest to the last layer's.

Read out by final norm and head as they are, a middle layer may look poor only since its states lie otherwise
than the last layer's. The map takes that away; what is left is what a layer does not know. It is the
least-squares fit of Din et al. (arXiv 2303.09435), with a bias: no step size, the same each time.

A token weighs ``1 / |h_L|^2``, since norms read a direction: else a few tokens with huge states, such as the
first of a text, would decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.evaluate.layers import Options, StatesAt, prediction_batches
from jreg_megatron.runtime.errors import UserError

_RIDGE = 1e-6
"""Of the mean square of a coordinate, added to each: states may not fill all their dimensions."""
_FEWEST = 10
"""Tokens for each row of a map; fitted on fewer, it is too good on them and too bad on others."""


@dataclass(frozen=True)
class Lens:
    """The maps of layers 0 to L - 1."""

    maps: Tensor
    """``[L, h + 1, h]`` float32; the last row is the bias."""
    tokens: int
    """How many the fit has seen."""

    def __call__(self, number: int, states: Tensor) -> Tensor:
        """States ``[n, h]`` behind layer ``number`` (0: the embedding) as the last layer would have them."""
        if number == len(self.maps):
            return states
        matrix = self.maps[number].to(states.device)
        return (states.float() @ matrix[:-1] + matrix[-1]).to(states.dtype)


@torch.inference_mode()
def fit_lens(decoder: Decoder, texts: Iterable[Text], options: Options) -> Lens:
    """Fit a lens on texts, which must be others than those that it will be tested on.

    Raises:
        UserError: if the texts have too few tokens, or cannot be read.
    """
    # All that least squares needs, in float64: for each layer but the last the products of its states and a
    # one by these and the last layer's states.
    sums: dict[int, Tensor] = {}
    tokens = 0
    for ids, kept, _, _ in prediction_batches(decoder, texts, options, "lens"):
        states: dict[int, Tensor] = {}
        with decoder.observed(StatesAt(kept, states.__setitem__)):
            decoder.run(ids)
        last = states.pop(decoder.num_layers).double()
        size = last.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        tokens += len(last)
        for number, state in states.items():
            rows = torch.cat((state.double(), torch.ones_like(state[:, :1])), dim=-1) / size.to(state.device)
            products = rows.T @ torch.cat((rows, (last / size).to(state.device)), dim=-1)
            sums[number] = sums.get(number, 0) + products
    least = _FEWEST * (decoder.hidden_size + 1)
    if tokens < least:
        raise UserError(
            f"the texts of --lens have {tokens:,} tokens, and {decoder.name} needs at least {least:,}; "
            "give more"
        )
    maps = []
    for products in sums.values():
        square, product = products[:, : len(products)], products[:, len(products) :]
        square.diagonal()[:-1] += _RIDGE * square.diagonal()[:-1].mean()
        maps.append(torch.linalg.solve(square, product).float().cpu())
    return Lens(torch.stack(maps), tokens)
