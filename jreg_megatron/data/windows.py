"""Texts cut into sequences that a model can take, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import batched

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from jreg_megatron.data.texts import Text
from jreg_megatron.runtime.errors import UserError


@dataclass(frozen=True)
class Window:
    """A sequence of token ids.

    Attributes:
        text: number of the text among all, from 0.
        ids: int64 ``[n]``, n >= 1.
        is_last: whether it is the last one of its text.
    """

    text: int
    ids: numpy.ndarray
    is_last: bool


@dataclass(frozen=True)
class Batch:
    """Sequences side by side.

    Attributes:
        windows: the sequences.
        tokens: int64 ``[b, s]``, padded behind their ends, where a causal model's other states do not see it.
        lengths: how long each is, ``[b]``.
    """

    windows: tuple[Window, ...]
    tokens: Tensor
    lengths: Tensor


def windows(
    texts: Iterable[Text],
    encode: Callable[[str], list[int]] | None,
    vocab_size: int,
    max_tokens: int | None,
    length: int | None,
) -> Iterator[Window]:
    """Cut texts into sequences, in order. A text without a token gives none.

    Args:
        texts: documents, as text or ids.
        encode: the ids of a text; None if the model has no tokenizer.
        vocab_size: every id must be below it.
        max_tokens: only so many first tokens of each text; None for all.
        length: longest sequence; what is behind it starts a new one. None for no limit.

    Raises:
        UserError: for a text where there is no tokenizer, or an id that the model does not have.
    """
    for number, text in enumerate(texts):
        ids = _ids(text, encode)[:max_tokens]
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise UserError(
                f"{text.name} holds the id {wrong}, and the model has {vocab_size} tokens; give it the text "
                "itself, or what its own tokenizer made"
            )
        step = length or max(1, ids.size)
        for start in range(0, ids.size, step):
            yield Window(number, ids[start : start + step], start + step >= ids.size)


def batches(sequences: Iterable[Window], size: int) -> Iterator[Batch]:
    """Put up to ``size`` sequences side by side."""
    for some in batched(sequences, size):
        ids = [torch.from_numpy(window.ids) for window in some]
        yield Batch(some, pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids]))


def _ids(text: Text, encode: Callable[[str], list[int]] | None) -> numpy.ndarray:
    content: object = text.content
    if isinstance(content, str):
        if encode is None:
            raise UserError(
                f"{text.name} is text, and the model came without a tokenizer; give token ids (.bin/.idx)"
            )
        content = encode(content)
    return numpy.asarray(content, dtype=numpy.int64).reshape(-1)
