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
from jreg_megatron.evaluate.layers import Options, prediction_batches
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
    sums = _Sums()
    for ids, kept, _, _ in prediction_batches(decoder, texts, options, "lens"):
        sums.kept = kept
        with decoder.observed(sums):
            decoder.run(ids)
        sums.add()
    least = _FEWEST * (decoder.hidden_size + 1)
    if sums.tokens < least:
        raise UserError(
            f"the texts of --lens have {sums.tokens:,} tokens, and {decoder.name} needs at least {least:,}; "
            "give more"
        )
    return Lens(sums.solve(), sums.tokens)


class _Sums:
    """Of products of states, in float64: all that least squares needs of them."""

    kept: Tensor
    """``[b, s - 1]``, the positions of this batch that predict a token."""

    def __init__(self) -> None:
        self.tokens = 0
        self._states: list[Tensor] = []
        self._products: list[Tensor | float] = []
        """For each of layers 0 to L - 1, of its states and a one by these and the last layer's states."""

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        for states in (layer_input, layer_output) if number == 1 else (layer_output,):
            self._states.append(states[:, :-1][self.kept.to(states.device)].double())

    def final_norm(self, normed: Tensor) -> None:
        pass

    def add(self) -> None:
        *before, last = self._states
        self._states = []
        size = last.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        self.tokens += len(last)
        self._products = self._products or [0.0] * len(before)
        for number, states in enumerate(before):
            rows = torch.cat((states, torch.ones_like(states[:, :1])), dim=-1) / size.to(states.device)
            wanted = (last / size).to(states.device)
            self._products[number] += rows.T @ torch.cat((rows, wanted), dim=-1)

    def solve(self) -> Tensor:
        maps = []
        for products in self._products:
            assert isinstance(products, Tensor)
            square, product = products[:, : len(products)], products[:, len(products) :]
            square.diagonal()[:-1] += _RIDGE * square.diagonal()[:-1].mean()
            maps.append(torch.linalg.solve(square, product).float().cpu())
        return torch.stack(maps)
