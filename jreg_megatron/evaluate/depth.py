"""A model's use of depth: the distance of each layer from the output, and the changes without the layer.

*Do Language Models Use Their Depth Efficiently?* (arXiv 2505.13898): KL and top-5 of the read-out, and the
effect of skipping a layer. *Residual Connections and the Causal Shift* (arXiv 2602.14760): alignment.

``options`` are as in :mod:`jreg_megatron.evaluate.layers`. Every token has the same weight.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.evaluate.layers import in_parts, prediction_batches, refuse_not_finite, states_at
from jreg_megatron.methods.norms.formulas import norms
from jreg_megatron.runtime.output import note

_TOP = 5
_LEAST = 1e-6
"""The authors' lower bound for the norm of a layer's contribution, as a divisor."""


@torch.inference_mode()
def depth(decoder: Decoder, texts: Iterable[Text], options: Namespace) -> dict[str, Any]:
    """The metrics, for JSON.

    Over the tokens that predict a next token, by layers 0 (the embedding) to L:

    - ``kl``: KL divergence in nats of the layer's read-out from the whole model's distribution,
      ``sum p_l (log p_l - log p)``. ``top5_overlap``: the share of the five likeliest tokens that both have.
      None without a head.
    - ``cosine_to_token`` and ``cosine_to_next_token``: mean cosine of the state and the input embedding of
      its own token, and of the next token. ``turns_over_at``: the first layer at which the second cosine is
      larger, or None. All three are None if the embeddings do not have the states' width.

    Layer s is skipped for all tokens except the first of a sequence, which is often an attention sink. Over
    the same tokens, ``skip`` has by skipped layer 1..L:

    - ``later_mean`` and ``later_largest`` ``[L][L]``: the relative change of layer j's contribution,
      ``|(h_j - h_{j-1})' - (h_j - h_{j-1})| / |h_j - h_{j-1}|``, for j > s; None for other layers.
    - ``output_mean`` and ``output_largest``: ``|p' - p|``, the norm of the change of the probabilities.

    Raises:
        UserError: as :func:`jreg_megatron.evaluate.layers.read_out`, and for states that are not finite.
    """
    last, embedding = decoder.num_layers, _embedding_of(decoder)
    sums = torch.zeros(last + 1, 4, dtype=torch.float64)
    changes = torch.zeros(2, last, last + 1, dtype=torch.float64)  # the last column is the output
    tokens = 0
    for ids, kept, targets, batch in prediction_batches(decoder, texts, options, "depth"):
        tokens += len(targets)
        sums += _of_states(decoder, ids, kept, targets, embedding)
        counted = torch.arange(ids.shape[1]) < batch.lengths[:, None]
        counted[:, 0] = False
        for number in range(1, last + 1):
            mean, largest = _without(decoder, ids, number, counted)
            changes[0, number - 1, number:] += mean
            changes[1, number - 1, number:] = torch.maximum(changes[1, number - 1, number:], largest)
        refuse_not_finite(decoder, torch.cat((sums.flatten(), changes.flatten())), "states or logits")
    changes[0] /= tokens
    sums[:, 0].clamp_(min=0)  # rounding may make it negative
    kl, overlap, own, following = (sums / tokens).T.tolist()
    turned = [layer for layer in range(last + 1) if following[layer] > own[layer]]

    def later(of_one: Tensor) -> list[list[float | None]]:
        return [[None] * (at + 1) + row[at + 1 : last].tolist() for at, row in enumerate(of_one)]

    return {
        "tokens": tokens,
        "kl": None if decoder.head is None else kl,
        "top5_overlap": None if decoder.head is None else overlap,
        "cosine_to_token": None if embedding is None else own,
        "cosine_to_next_token": None if embedding is None else following,
        "turns_over_at": None if embedding is None else next(iter(turned), None),
        "skip": {
            **{"later_mean": later(changes[0]), "later_largest": later(changes[1])},
            **{"output_mean": changes[0, :, -1].tolist(), "output_largest": changes[1, :, -1].tolist()},
        },
    }


def _of_states(
    decoder: Decoder, ids: Tensor, kept: Tensor, targets: Tensor, embedding: Tensor | None
) -> Tensor:
    """Sums over tokens of KL, overlap and both cosines, by layers 0..L, ``[L + 1, 4]``."""
    found = torch.zeros(decoder.num_layers + 1, 4, dtype=torch.float64)
    final = None if decoder.head is None else decoder.last_states(ids)[1][:, :-1]

    def read(number: int, states: Tensor) -> None:
        if decoder.head is not None and final is not None:
            ends = final[kept.to(final.device)]
            for some, end in in_parts(decoder, states, ends):
                of_layer, whole = (
                    logits[0].float().log_softmax(dim=-1)
                    for logits in (decoder.read_out(some[None]), decoder.head(end[None]))
                )
                share = of_layer.exp()
                terms = share * (of_layer - whole.to(share.device))
                found[number, 0] += float(torch.where(share == 0, 0.0, terms).sum(dtype=torch.float64))
                tops = [each.topk(min(_TOP, each.shape[-1])).indices for each in (of_layer, whole)]
                both = tops[0][:, :, None] == tops[1].to(tops[0].device)[:, None]
                found[number, 1] += float(both.any(dim=-1).double().mean(dim=-1).sum())
        if embedding is not None:
            for column, tokens in ((2, ids[:, :-1][kept]), (3, targets)):
                rows_of = embedding[tokens.to(embedding.device)].to(states.device).float()
                cosines = torch.nn.functional.cosine_similarity(states.float(), rows_of, dim=-1)
                found[number, column] += float(cosines.sum(dtype=torch.float64))

    with decoder.observed(states_at(kept, decoder, read)):
        decoder.run(ids)
    return found


def _without(decoder: Decoder, ids: Tensor, number: int, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The changes of the contributions of layers ``number`` + 1..L, and of the output, without layer
    ``number``: the sum and the maximum over the ``counted`` tokens ``[b, s]``. Both runs are rows of one
    batch."""
    found: list[Tensor] = []
    ends: list[Tensor] = []

    def see(layer: int, before: Tensor, after: Tensor) -> None:
        if number < layer <= decoder.num_layers:
            usual, changed = (after.float() - before.to(after.device).float()).chunk(2)
            found.append((norms(changed - usual) / norms(usual).clamp(min=_LEAST)).cpu()[counted])
        if layer >= decoder.num_layers:
            ends[:] = [after.clone()]  # the model may write to it later

    pairs = torch.cat((ids, ids))
    # A sequence's first token keeps the layer.
    skipped = decoder.without_layer(number, slice(len(ids), None), slice(1, None))
    with skipped, decoder.observed(see):
        if decoder.head is None:
            ends[:] = [decoder.logits(pairs)]
        else:
            decoder.run(pairs)
    head: Callable[[Tensor], Tensor] = decoder.head or (lambda logits: logits)
    usual, changed = ends[0].chunk(2)
    at = counted.to(ends[0].device)
    moved = []
    for pair in in_parts(decoder, usual[at], changed[at]):
        before, without = (head(some[None])[0].float().softmax(dim=-1) for some in pair)
        moved.append(norms(without - before).cpu())
    values = torch.stack([*found, torch.cat(moved)]).double()
    return values.sum(dim=-1), values.amax(dim=-1)


def _embedding_of(decoder: Decoder) -> Tensor | None:
    """The input embedding ``[V, h]``; None, and a note, if it does not have the states' width."""
    model: Any = decoder.model
    get = getattr(model, "get_input_embeddings", None)
    module = get() if callable(get) else getattr(getattr(model, "embedding", None), "word_embeddings", None)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == decoder.hidden_size:
        return weight
    note(f"{decoder.name} has no input embedding as wide as its states; alignment is left out")
    return None
