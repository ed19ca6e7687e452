"""A fitted lens: for each layer the affine map of its states that is nearest to the last layer's states.

Without a map, a middle layer may have a high loss only because its states lie elsewhere in the space. With
the map, the loss shows what the layer does not know. The fit is the least-squares fit of Din et al. (arXiv
2303.09435) with a bias. It has no step size and gives the same result each time.

A token has the weight ``1 / |h_L|^2``, because a norm reads only the direction. Else a few tokens with huge
states, such as the first of a text, would decide.
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
"""Share of the mean square of a coordinate that is added to each. States may not fill all dimensions."""
_FEWEST = 10
"""Tokens for each row of a map. A fit on fewer tokens does not hold on other texts."""


@dataclass(frozen=True)
class Lens:
    """The maps of layers 0 to L - 1."""

    maps: Tensor
    """``[L, h + 1, h]`` float32; the last row is the bias."""
    tokens: int
    """Number of tokens in the fit."""

    def __call__(self, number: int, states: Tensor) -> Tensor:
        """Map states ``[n, h]`` after layer ``number`` (0: the embedding) to the last layer's."""
        if number == len(self.maps):
            return states
        matrix = self.maps[number].to(states.device)
        return (states.float() @ matrix[:-1] + matrix[-1]).to(states.dtype)


@torch.inference_mode()
def fit_lens(decoder: Decoder, texts: Iterable[Text], options: Options) -> Lens:
    """Fit a lens. It must be tested on other texts.

    Raises:
        UserError: if the texts have too few tokens, or cannot be read.
    """
    # Least squares needs, for each layer but the last, the products of [its states, 1] by [its states, 1, the
    # last layer's states], in float64.
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
            f"--lens has texts of {tokens:,} tokens, but {decoder.name} needs at least {least:,}; give more"
        )
    maps = []
    for products in sums.values():
        square, product = products[:, : len(products)], products[:, len(products) :]
        square.diagonal()[:-1] += _RIDGE * square.diagonal()[:-1].mean()
        maps.append(torch.linalg.solve(square, product).float().cpu())
    return Lens(torch.stack(maps), tokens)
