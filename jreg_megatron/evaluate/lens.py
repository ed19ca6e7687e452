"""A fitted lens: for each layer the affine map of its states that comes nearest to the last layer's.

Read out by final norm and head as they are, a middle layer may look poor only since its states lie otherwise
than the last layer's. The map takes that away; what is left is what a layer does not know. It is the
least-squares fit of Din et al. (arXiv 2303.09435), with a bias: no step size, the same each time.

A token weighs ``1 / |h_L|^2``, since norms read a direction: else a few tokens with huge states, such as the
first of a text, would decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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
    sums = _Sums(decoder)
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


@dataclass
class _Sums:
    """Of products of states, in float64: all that least squares needs of them."""

    decoder: Decoder
    kept: Tensor | None = None
    """``[b, s - 1]``, the positions of this batch that predict a token."""
    tokens: int = 0
    _states: list[Tensor] = field(default_factory=list)
    _squares: list[Tensor] = field(default_factory=list)
    _products: list[Tensor] = field(default_factory=list)

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        for states in (layer_input, layer_output) if number == 1 else (layer_output,):
            assert self.kept is not None
            self._states.append(states[:, :-1][self.kept.to(states.device)].double())

    def final_norm(self, normed: Tensor) -> None:
        pass

    def add(self) -> None:
        *before, last = self._states
        self._states = []
        size = last.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        self.tokens += len(last)
        for number, states in enumerate(before):
            weighted = torch.cat((states, torch.ones_like(size)), dim=-1) / size.to(states.device)
            square, product = weighted.T @ weighted, weighted.T @ (last / size).to(states.device)
            if number == len(self._squares):
                self._squares.append(square)
                self._products.append(product)
            else:
                self._squares[number] += square
                self._products[number] += product

    def solve(self) -> Tensor:
        maps = []
        for square, product in zip(self._squares, self._products, strict=True):
            square.diagonal()[:-1] += _RIDGE * square.diagonal()[:-1].mean()
            maps.append(torch.linalg.solve(square, product).float().cpu())
        return torch.stack(maps)
