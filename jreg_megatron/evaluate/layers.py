"""The loss after each layer (early exit), and the loss without each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from jreg_megatron.data.texts import Text
from jreg_megatron.data.windows import Batch, Window, batches
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.trial import refuse_dependence
from jreg_megatron.evaluate.paired import Floats
from jreg_megatron.evaluate.scoring import Scores, score, score_own
from jreg_megatron.runtime.errors import UserError

_NOTHING = "there is no text with a second token, so none to predict; give longer texts"


@dataclass(frozen=True)
class Options:
    """Of a run over texts."""

    max_tokens: int | None
    """First tokens of each text, in windows of the model's length; None for all."""
    batch_size: int
    """Sequences at a time."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True)
class PerText:
    """Sums over the predicted tokens of each of T texts, for each of C readings of the model."""

    tokens: Floats
    """``[T]``, the number of predicted tokens."""
    ids: list[int]
    """``[T]``, a hash of each text's tokens. Models with the same hashes can be compared token by token."""
    loss: Floats
    """``[T, C]`` in nats."""
    correct: Floats
    """``[T, C]``, how often the most likely token was right."""
    agreed: Floats
    """``[T, C]``, how often the most likely token was the whole model's."""

    def mean(self, sums: Floats) -> list[float]:
        """Means per token, ``[C]``."""
        values: list[float] = (sums.sum(0) / self.tokens.sum()).tolist()
        return values


def checked_texts(decoder: Decoder, texts: Iterable[Text], options: Options) -> list[Text]:
    """Read all texts into token ids, and try the first, before the long runs.

    Raises:
        UserError: for a text that cannot be read, ids that are not the model's, nothing to predict, and a
            model whose states of a text depend on anything else.
    """
    ids: dict[int, list[NDArray[np.int64]]] = {}
    for window in decoder.windows(texts, options.max_tokens):
        ids.setdefault(window.text, []).append(window.ids)
    read = [Text(f"text {number + 1}", np.concatenate(parts)) for number, parts in ids.items()]
    first = next(_predictable(decoder, read, options), None)
    if first is None:
        raise UserError(_NOTHING)
    refuse_dependence(decoder, first.ids, options.batch_size)
    return read


def read_out(
    decoder: Decoder,
    texts: Iterable[Text],
    options: Options,
    lens: Callable[[int, Tensor], Tensor] | None = None,
) -> PerText:
    """Predict each text from the states after layers 0 (the embedding) to L, through final norm and head.

    Args:
        decoder: its final norm and head must give its own logits.
        texts: to predict.
        options: of the runs.
        lens: maps the states ``[n, h]`` after a layer, given its number, before they are read out.

    Raises:
        UserError: for texts that are too short or not this model's, and logits that are not finite.
    """

    def readings(ids: Tensor, kept: Tensor, targets: Tensor) -> list[Scores]:
        scores: list[Scores] = []

        def read(number: int, states: Tensor) -> None:
            if lens is not None:
                states = lens(number, states)
            scores.append(score(decoder.read_out, states, targets, decoder))

        with decoder.observed(StatesAt(kept, read)):
            decoder.run(ids)
        return scores

    return _measure(decoder, texts, options, readings, "read-out" if lens is None else "lens")


def layer_drop(decoder: Decoder, texts: Iterable[Text], options: Options) -> PerText:
    """Predict each text without layer 1, ... without layer L, and by the whole model; raises as
    :func:`read_out`."""

    def final(ids: Tensor, kept: Tensor, targets: Tensor) -> Scores:
        return score_own(decoder, ids, kept.nonzero(as_tuple=True), targets)

    def readings(ids: Tensor, kept: Tensor, targets: Tensor) -> list[Scores]:
        scores = []
        for number in range(1, decoder.num_layers + 1):
            with decoder.without_layer(number):
                scores.append(final(ids, kept, targets))
        return [*scores, final(ids, kept, targets)]

    return _measure(decoder, texts, options, readings, "layer drop")


@dataclass(frozen=True)
class StatesAt:
    """Observes a decoder: passes on the states after layers 0 (the embedding) to L while the model runs."""

    kept: Tensor
    """``[b, s - 1]``, the positions whose states are passed on."""
    see: Callable[[int, Tensor], None]
    """Gets a layer's number and the states ``[n, h]`` after it."""

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        if number == 1:
            self.see(0, layer_input[:, :-1][self.kept.to(layer_input.device)])
        self.see(number, layer_output[:, :-1][self.kept.to(layer_output.device)])

    def final_norm(self, normed: Tensor) -> None:
        pass


Readings = Callable[[Tensor, Tensor, Tensor], list[Scores]]
"""From ids ``[b, s]``, the predicting positions ``[b, s - 1]`` and the tokens ``[n]`` to predict: the scores
of each reading of the model, the whole model last."""


def prediction_batches(
    decoder: Decoder, texts: Iterable[Text], options: Options, what: str, total: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Batch]]:
    """Batches of texts on the model's device, with a progress bar; raises as :meth:`Decoder.windows`.

    Yields:
        Ids ``[b, s]``, the predicting positions ``[b, s - 1]``, the tokens ``[n]`` to predict, and the batch.
    """
    sequences, hidden = _predictable(decoder, texts, options), options.quiet or None
    with tqdm(total=total, desc=f"{decoder.name}: {what}", unit=" texts", leave=False, disable=hidden) as bar:
        for batch in batches(sequences, options.batch_size):
            ids, lengths = batch.tokens.to(decoder.device), batch.lengths.to(decoder.device)
            kept = torch.arange(1, ids.shape[1], device=decoder.device) < lengths[:, None]
            yield ids, kept, ids[:, 1:][kept], batch
            bar.update(batch.windows[-1].text + 1 - bar.n)


def _predictable(decoder: Decoder, texts: Iterable[Text], options: Options) -> Iterator[Window]:
    """The sequences that have a second token."""
    return (window for window in decoder.windows(texts, options.max_tokens) if len(window.ids) > 1)


@torch.inference_mode()
def _measure(
    decoder: Decoder, texts: Iterable[Text], options: Options, readings: Readings, what: str
) -> PerText:
    windows: list[Window] = []
    sums: list[Floats] = []
    total = len(texts) if isinstance(texts, Sized) else None
    for ids, kept, targets, batch in prediction_batches(decoder, texts, options, what, total):
        scores = readings(ids, kept, targets)
        whole = scores[-1].top
        table = torch.stack(
            [torch.stack([s.loss.double(), s.top == targets, s.top == whole]) for s in scores]
        )
        windows += batch.windows
        parts = torch.split(table, (batch.lengths - 1).tolist(), dim=-1)
        sums += [part.sum(-1).cpu().numpy() for part in parts]
    if not sums:
        raise UserError(_NOTHING)
    hashes: dict[int, int] = {}
    for window in windows:
        hashes[window.text] = hash((hashes.get(window.text, 0), *window.ids.tolist()))
    # The windows of a text are neighbors.
    first = np.unique([window.text for window in windows], return_index=True)[1]
    loss, correct, agreed = np.moveaxis(np.add.reduceat(sums, first), -1, 0)
    tokens = np.add.reduceat([len(window.ids) - 1.0 for window in windows], first)
    return PerText(tokens, list(hashes.values()), loss, correct, agreed)
