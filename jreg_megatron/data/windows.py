"""Sequences of token ids, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import batched

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Window:
    """A sequence of token ids."""

    text: int  # index of its text, from 0
    ids: numpy.ndarray  # int64 [n], n >= 1
    is_last: bool  # whether it is the last window of its text


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass."""

    windows: tuple[Window, ...]
    tokens: Tensor  # int64 [b, s], padded at the end, where padding does not affect a causal model's states
    lengths: Tensor  # [b]


def batches(sequences: Iterable[Window], size: int) -> Iterator[Batch]:
    """Batches of up to ``size`` sequences."""
    for some in batched(sequences, size):
        ids = [torch.from_numpy(window.ids) for window in some]
        yield Batch(some, pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids]))
