"""Means over tokens for each layer, equal at every layout; one collective for the meters of all methods.

For every layer, each rank has the sums of some values over its tokens, and the number of tokens. Both are
summed over *all* ranks, then divided. Copies of the same tokens (tensor parallelism without sequence
parallelism) multiply both by the same number. Shards (sequence, context, data parallelism) add up. A layer of
another pipeline stage has zeros. So the mean is the same at every layout, and every rank has a buffer of the
same shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jreg_megatron.runtime.errors import UserError

LAYERS_SEEN_UNEQUALLY = (
    "jreg_megatron saw some layers in more micro-batches than others, so their means would be of different "
    "tokens: a layer with an added gradient is measured in the backward pass, the others in the forward "
    "pass. Check: metrics are read only between steps; after a step without its whole backward pass, the "
    "handle's reset_training_metrics() is called first"
)
OTHER_TOKENS = (
    "jreg_megatron saw different tokens in different layers: the pipeline stages got different masks; call "
    "the model on every stage with the same loss_mask= or padding_mask="
)


@dataclass(frozen=True)
class LayerValues:
    """A meter's values over all ranks: one row for each layer, float64 on the CPU."""

    means: Tensor
    """``[rows, values]``: the mean over tokens; NaN if no token counted."""
    largest: Tensor
    """``[rows, largest values]``: the maximum over tokens; NaN if a token's value is NaN."""


class Meter:
    """Sums values over tokens for each layer, on the device, without a host synchronisation."""

    def __init__(
        self,
        num_layers: int,
        device: torch.device,
        num_values: int = 1,
        num_largest: int = 0,
        first_row: int = 1,
    ) -> None:
        """Make an empty meter.

        Args:
            num_layers: number of layers of the whole model.
            device: the device of the values.
            num_values: number of values per token and layer.
            num_largest: the maximum is kept too for the first ``num_largest`` of them.
            first_row: 1; or 0 to have a row for the embedding's output, ``h_0``, before those of the layers.
        """
        self._first_row = first_row
        rows = num_layers + 1 - first_row
        # For each row the sums, the number of tokens, and how often the row was seen.
        self._sums = torch.zeros(rows, num_values + 2, dtype=torch.float64, device=device)
        self._largest = torch.full((rows, num_largest), -torch.inf, dtype=torch.float64, device=device)
        # Values of one micro-batch that are not summed yet, by row; and their common shape, type and masking.
        self._waiting: dict[int, tuple[tuple[Tensor, ...], Tensor | None]] = {}
        self._kind: tuple[Any, ...] = ()
        self.crosses_streams = False
        """Whether values come from several CUDA streams."""
        self.is_paused = False
        """Whether added values are ignored."""
        self._streams: set[Any] = set()
        self._numbers = torch.arange(rows, device=device).unbind()
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def add(self, row: int, *values: Tensor, mask: Tensor | None = None) -> None:
        """Add the values of one layer and micro-batch. No host synchronisation.

        The values wait for those of the other layers, so that one operation sums them all.

        Args:
            row: the layer's number, 1-based over the whole model; 0 for the embedding's output.
            values: of this rank's tokens, ``[s, b]`` each, in one floating type. Do not write into them
                later. The maximum is kept for the first ``num_largest``.
            mask: ``[s, b]``, 1 for the tokens that count and 0 for the others; by default all count.
        """
        if self.is_paused:
            return
        kind = (values[0].shape, values[0].dtype, mask is None)
        at = row - self._first_row
        if at in self._waiting or kind != self._kind:  # of the next micro-batch
            self._sum()
            self._kind = kind
        self._waiting[at] = (tuple(value.detach() for value in values), mask)
        if self.crosses_streams:
            self._streams.add(torch.cuda.current_stream())
        if len(self._waiting) == len(self._sums):
            self._sum()

    @torch.no_grad()
    def _sum(self) -> None:
        if not self._waiting:
            return
        rows = tuple(self._waiting)
        values, masks = zip(*self._waiting.values(), strict=True)
        if self.crosses_streams:
            self._join([*itertools.chain(*values), *(mask for mask in masks if mask is not None)])
        self._waiting.clear()
        at = self._index(rows)
        # [layers, values, tokens]
        each = torch.stack([torch.stack(of_layer) for of_layer in values]).flatten(2)
        largest = each[:, : self._largest.shape[1]]
        if masks[0] is None:
            counts = each.new_ones(len(rows), 2, dtype=torch.float64)
            counts[:, 0] = each.shape[-1]
        else:
            mask = torch.stack(masks).flatten(1)[:, None]
            # Masked values may be NaN.
            largest = torch.where(mask > 0, largest, -torch.inf)
            each = torch.where(mask > 0, each * mask, 0.0)
            tokens = mask.sum(dim=2, dtype=torch.float64)
            counts = torch.cat((tokens, torch.ones_like(tokens)), dim=1)
        sums = torch.cat((each.sum(dim=2, dtype=torch.float64), counts), dim=1)
        self._sums.index_add_(0, at, sums)
        if largest.shape[1]:
            self._largest[at] = torch.maximum(self._largest[at], largest.amax(dim=2).double())

    def _join(self, tensors: Iterable[Tensor]) -> None:
        """Let the current stream wait for all streams that added values, and keep ``tensors`` until it has
        read them."""
        current = torch.cuda.current_stream()
        self._streams.add(current)
        for stream in self._streams:
            current.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(current)

    def _index(self, rows: tuple[int, ...]) -> Tensor:
        """The rows as a tensor on the device, without a copy from the host. Cached: few orders occur."""
        if rows not in self._indices:
            self._indices[rows] = torch.stack([self._numbers[row] for row in rows])
        return self._indices[rows]

    def totals(self) -> tuple[Tensor, Tensor]:
        """This rank's totals. They are the meter's own tensors, not copies.

        Call it between schedules: Megatron's later work waits for the current stream, and a capture in a CUDA
        graph must not wait for another stream.

        Returns:
            The sums, the number of tokens and how often each row was seen, ``[rows, values + 2]``; and the
            maxima, ``[rows, largest values]``.
        """
        self._sum()
        self._streams.clear()
        return self._sums, self._largest

    def reset(self) -> None:
        """Discard everything added so far."""
        self._waiting.clear()
        self._sums.zero_()
        self._largest.fill_(-torch.inf)


def reduce_meters(
    meters: Sequence[Meter], group: dist.ProcessGroup | None = None
) -> list[LayerValues | None]:
    """Combine the ranks' totals of each meter since its last reset, with one collective for all meters.

    The collective is an all-reduce. If a meter keeps a maximum it is an all-gather, because an all-reduce
    cannot sum some numbers and take the maximum of others.

    Args:
        meters: the same on every rank.
        group: the ranks that hold the model together; by default all.

    Returns:
        For each meter its values, the same on every rank; None if some layer was not seen.

    Raises:
        UserError: if some layers were seen more often than others, or with more tokens.
    """
    if not meters:
        return []
    totals = [meter.totals() for meter in meters]
    sums, largest = (
        torch.cat([of_meter.flatten() for of_meter in kind]) for kind in zip(*totals, strict=True)
    )
    if dist.is_available() and dist.is_initialized():
        if largest.numel() == 0:
            dist.all_reduce(sums, group=group)
        else:
            own = torch.cat((sums, largest))
            every = own.new_empty(dist.get_world_size(group) * own.numel())
            dist.all_gather_into_tensor(every, own, group=group)
            ranks = every.view(-1, own.numel())
            sums, largest = ranks[:, : sums.numel()].sum(0), ranks[:, sums.numel() :].amax(0)
    every_sum = torch.split(sums.cpu(), [own.numel() for own, _ in totals])
    every_largest = torch.split(largest.cpu(), [own.numel() for _, own in totals])
    return [
        _values_of(of_sums.view_as(own_sums), of_largest.view_as(own_largest))
        for of_sums, of_largest, (own_sums, own_largest) in zip(every_sum, every_largest, totals, strict=True)
    ]


def _values_of(sums: Tensor, largest: Tensor) -> LayerValues | None:
    """The values from the whole model's totals; None if some row was not seen."""
    values, (num_tokens, times_seen) = sums[:, :-2], sums[:, -2:].unbind(dim=1)
    if (times_seen == 0).any():
        return None
    if times_seen.min() != times_seen.max():
        raise UserError(LAYERS_SEEN_UNEQUALLY)
    if not torch.allclose(num_tokens, num_tokens[:1], rtol=1e-6, atol=0):
        raise UserError(OTHER_TOKENS)
    return LayerValues(values / num_tokens[:, None], largest)
