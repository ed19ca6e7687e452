"""The loss after each layer (early exit), also through a fitted lens, and the loss without each layer.

``options`` are the command's ``max_tokens`` (per text; 0 for all), ``batch_size`` and ``quiet``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from jreg_megatron.data.texts import Text
from jreg_megatron.data.windows import Batch, Window, batches
from jreg_megatron.decoder.decoder import Decoder, See, comparable, refuse_dependence
from jreg_megatron.evaluate.paired import Floats
from jreg_megatron.runtime.errors import UserError

Scores = tuple[Tensor, Tensor]
"""For n predicted tokens: cross-entropy ``[n]`` in nats, fp32, and the most likely ids ``[n]``."""

MAX_LOGITS = 1 << 25
"""Number of logits in memory at a time: 128 MiB in fp32."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 2e-2  # bf16 and fp16
_CHECKED_TOKENS = 32

_NOTHING = "no text has two or more tokens, so there is nothing to predict; give longer texts with --text"
_RIDGE = 1e-6
"""This share of the coordinates' mean square is added to each (ridge). Without it, states that do not fill
all dimensions give no unique map."""
_FEWEST = 10
"""Minimum number of tokens per row of a lens's map. A fit on fewer tokens fails on other texts."""


@dataclass(frozen=True)
class PerText:
    """Sums over the predicted tokens of each of T texts, for each of C readings of the model."""

    tokens: Floats  # [T], the number of predicted tokens
    ids: list[int]  # [T], a hash of each text's tokens; models can be compared only if the hashes are equal
    loss: Floats  # [T, C] in nats
    correct: Floats  # [T, C], number of tokens for which the most likely token was right
    agreed: Floats  # [T, C], number of tokens for which it was the whole model's

    def mean(self, sums: Floats) -> list[float]:
        """Means per token, ``[C]``."""
        values: list[float] = (sums.sum(0) / self.tokens.sum()).tolist()
        return values


@dataclass(frozen=True)
class Lens:
    """For each layer 0..L-1, the affine map that brings its states nearest to the last layer's states."""

    maps: Tensor  # [L, h + 1, h] float32; the last row is the bias
    tokens: int  # in the fit

    def __call__(self, number: int, states: Tensor) -> Tensor:
        """Map states ``[n, h]`` after layer ``number`` (0: the embedding) to the last layer's."""
        if number == len(self.maps):
            return states
        matrix = self.maps[number].to(states.device)
        return (states.float() @ matrix[:-1] + matrix[-1]).to(states.dtype)


def checked_texts(decoder: Decoder, texts: Iterable[Text], options: Namespace) -> list[Text]:
    """Read all texts into token ids, and run the first text, before the long runs.

    Raises:
        UserError: for a text that cannot be read, ids outside the vocabulary, texts without a token to
            predict, and a model whose states of a text depend on anything else.
    """
    ids: dict[int, list[NDArray[np.int64]]] = {}
    for window in decoder.windows(texts, options.max_tokens or None):
        ids.setdefault(window.text, []).append(window.ids)
    read = [Text(f"text {number + 1}", np.concatenate(parts)) for number, parts in ids.items()]
    first = next(_predictable(decoder, read, options), None)
    if first is None:
        raise UserError(_NOTHING)
    refuse_dependence(decoder, first.ids, options.batch_size)
    return read


def read_out(
    decoder: Decoder, texts: Iterable[Text], options: Namespace, lens: Lens | None = None
) -> PerText:
    """Predict each text from the states after layers 0 (the embedding) to L, through final norm and head.

    With a lens, the states go through it first. Final norm and head must give the model's own logits.

    Raises:
        UserError: for texts that are too short, ids outside the vocabulary, and logits that are not finite.
    """

    def readings(ids: Tensor, kept: Tensor, targets: Tensor) -> list[Scores]:
        scores: list[Scores] = []

        def read(number: int, states: Tensor) -> None:
            if lens is not None:
                states = lens(number, states)
            scores.append(score(decoder.read_out, states, targets, decoder))

        with decoder.observed(states_at(kept, decoder, read)):
            decoder.run(ids)
        return scores

    return _measure(decoder, texts, options, readings, "read-out" if lens is None else "lens")


def layer_drop(decoder: Decoder, texts: Iterable[Text], options: Namespace) -> PerText:
    """Predict each text without layer 1, ... without layer L, and with the whole model. Raises as
    :func:`read_out`."""

    def readings(ids: Tensor, kept: Tensor, targets: Tensor) -> list[Scores]:
        scores, at = [], kept.nonzero(as_tuple=True)
        for number in range(1, decoder.num_layers + 1):
            with decoder.without_layer(number):
                scores.append(score_own(decoder, ids, at, targets))
        return [*scores, score_own(decoder, ids, at, targets)]

    return _measure(decoder, texts, options, readings, "layer drop")


@torch.inference_mode()
def fit_lens(decoder: Decoder, texts: Iterable[Text], options: Namespace) -> Lens:
    """Fit a lens. Test it on other texts.

    Without a map, a middle layer may have a high loss only because its states have other directions than the
    last layer's states. With the map, the loss shows which information the layer lacks. The fit is the
    least-squares fit of Din et al. (arXiv 2303.09435) with a bias. A token has the weight ``1 / |h_L|^2``,
    because a norm reads only the direction. Else a few tokens with huge states, such as the first of a text,
    would dominate the fit.

    Raises:
        UserError: if the texts have too few tokens, or cannot be read.
    """
    # For each layer except the last, least squares needs the products of [its states, 1] and [its states, 1,
    # the last layer's states], in float64.
    sums: dict[int, Tensor] = {}
    tokens = 0
    for ids, kept, _, _ in prediction_batches(decoder, texts, options, "lens"):
        states: dict[int, Tensor] = {}
        with decoder.observed(states_at(kept, decoder, states.__setitem__)):
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


def states_at(kept: Tensor, decoder: Decoder, read: Callable[[int, Tensor], None]) -> See:
    """An observer that passes to ``read`` the states ``[n, h]`` after layers 0 to L at the positions ``kept``
    ``[b, s - 1]``."""

    def see(number: int, before: Tensor, after: Tensor) -> None:
        if number == 1:
            read(0, before[:, :-1][kept.to(before.device)])
        if number <= decoder.num_layers:
            read(number, after[:, :-1][kept.to(after.device)])

    return see


def prediction_batches(
    decoder: Decoder, texts: Iterable[Text], options: Namespace, what: str
) -> Iterator[tuple[Tensor, Tensor, Tensor, Batch]]:
    """Batches of texts on the model's device, with a progress bar. Raises as :meth:`Decoder.windows`.

    Yields:
        Ids ``[b, s]``, the predicting positions ``[b, s - 1]``, the tokens ``[n]`` to predict, and the batch.
    """
    sequences, hidden = _predictable(decoder, texts, options), options.quiet or None
    total, about = len(texts) if isinstance(texts, Sized) else None, f"{decoder.name}: {what}"
    with tqdm(total=total, desc=about, unit=" texts", leave=False, disable=hidden) as bar:
        for batch in batches(sequences, options.batch_size):
            ids, lengths = batch.tokens.to(decoder.device), batch.lengths.to(decoder.device)
            kept = torch.arange(1, ids.shape[1], device=decoder.device) < lengths[:, None]
            yield ids, kept, ids[:, 1:][kept], batch
            bar.update(batch.windows[-1].text + 1 - bar.n)


def _predictable(decoder: Decoder, texts: Iterable[Text], options: Namespace) -> Iterator[Window]:
    """The sequences of at least two tokens."""
    return (window for window in decoder.windows(texts, options.max_tokens or None) if len(window.ids) > 1)


@torch.inference_mode()
def _measure(
    decoder: Decoder,
    texts: Iterable[Text],
    options: Namespace,
    readings: Callable[[Tensor, Tensor, Tensor], list[Scores]],
    what: str,
) -> PerText:
    """Sum scores over texts. ``readings`` returns the scores of each reading, the whole model's last."""
    windows: list[Window] = []
    sums: list[Floats] = []
    for ids, kept, targets, batch in prediction_batches(decoder, texts, options, what):
        scores = readings(ids, kept, targets)
        whole = scores[-1][1]
        table = torch.stack(
            [torch.stack([loss.double(), top == targets, top == whole]) for loss, top in scores]
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


def in_parts(decoder: Decoder, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors ``[n, ...]`` in parts whose logits fit into memory."""
    size = max(1, MAX_LOGITS // decoder.vocab_size)
    return zip(*(torch.split(each, size) for each in rows), strict=True)


def score(to_logits: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, decoder: Decoder) -> Scores:
    """Score the ids ``targets`` ``[n]`` by the logits ``to_logits(states)`` of ``states`` ``[n, h]``.

    Raises:
        UserError: if a logit is NaN, or a target has probability 0.
    """
    losses, tops = [], []
    for some, wanted in in_parts(decoder, states, targets):
        logits = to_logits(some[None])[0].to(wanted.device).float()
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        tops.append(logits.argmax(-1))
    loss = torch.cat(losses)
    refuse_not_finite(decoder, loss)
    return loss, torch.cat(tops)


def refuse_not_finite(decoder: Decoder, values: Tensor, what: str = "logits") -> None:
    """Raise a UserError unless all ``values``, which come from the model's ``what``, are finite."""
    if not bool(values.isfinite().all()):
        raise UserError(
            f"{decoder.name} gives {what} that are not finite with {decoder.dtype}; give --dtype float32, "
            "and if that does not help, check the weights"
        )


def score_own(decoder: Decoder, ids: Tensor, at: Sequence[Tensor], targets: Tensor) -> Scores:
    """Score the ids ``targets`` ``[n]`` by the whole model's logits of ids ``[b, s]`` at n rows and columns.
    Raises as :func:`score`."""
    rows, columns = at
    if decoder.head is None:
        return score(lambda logits: logits, decoder.logits(ids)[rows, columns], targets, decoder)
    return score(decoder.head, decoder.last_states(ids)[1][rows, columns], targets, decoder)


@torch.inference_mode()
def read_out_error(decoder: Decoder) -> str | None:
    """The reason why no layer can be read out; None if final norm and head give the model's own logits."""
    ids = (
        torch.arange(_CHECKED_TOKENS, device=decoder.device)[None, : decoder.max_length] % decoder.vocab_size
    )
    what = f"{decoder.name} ({type(decoder.model).__name__}) cannot be read out: "
    if decoder.head is None:
        return f"{what}its head was not found"
    last, state = decoder.last_states(ids)
    own = decoder.logits(ids)
    try:
        # The first is how layers are read out, the second how the whole model is scored.
        reads = (decoder.read_out(last), decoder.head(state))
    except RuntimeError:  # such as a projection between layers and head
        return f"{what}its head does not take the last layer's states"
    if any(read.shape != own.shape for read in reads):
        return f"{what}its head gives logits of another shape"
    own, *others = comparable(own, *reads)
    off = torch.stack([(own - other).abs() for other in others])
    size = own.abs() + own.square().mean(dim=-1, keepdim=True).sqrt()
    if bool((off <= _TOLERANCE.get(decoder.dtype, _COARSE_TOLERANCE) * size).all()):
        return None
    by = "head" if decoder.final_norm is None else "final norm and head"
    return f"{what}its last layer's output through {by} misses its logits by up to {float(off.max()):.2g}"
