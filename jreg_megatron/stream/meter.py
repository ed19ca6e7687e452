"""Means over tokens for each layer, equal at every layout; one collective for the meters of all methods.

Each rank adds what it saw: for every layer the sums of some values over tokens, and the number of tokens.
All are summed over *all* ranks and then divided. Ranks that hold copies of the same tokens (tensor
parallelism without sequence parallelism) count alike above and below the line, shards (sequence, context,
data parallelism) add up, and a layer that a pipeline stage does not hold has zeros there. So the mean is the
same at every layout, and every rank takes part with a buffer of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from jreg_megatron.runtime.errors import UserError

LAYERS_SEEN_UNEQUALLY = (
    "jreg_megatron saw some layers in more micro-batches than others, so their means would be over other "
    "tokens: a regularized layer is measured in the backward pass, the others in the forward pass; ask for "
    "metrics between steps, and after a forward pass without a backward pass, or a step that was broken off, "
    "call reset_training_metrics() of the handle"
)


@dataclass(frozen=True)
class LayerValues:
    """What a meter has seen on all ranks: one row for each layer, float64 on the CPU."""

    means: Tensor
    """``[rows, values]``: the mean over tokens; NaN if no token counted."""
    largest: Tensor
    """``[rows, largest values]``: over tokens; NaN where a token's value is NaN."""


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
        """Nothing is seen yet.

        Args:
            num_layers: of the whole model.
            device: where the values are.
            num_values: how many values a token of a layer has.
            num_largest: of how many values the largest is wanted too.
            first_row: 1; or 0 to have a row for the embedding's output, ``h_0``, before those of the layers.
        """
        self._first_row = first_row
        rows = num_layers + 1 - first_row
        # For each row the sums, the number of tokens, and how often the row was seen.
        self._sums = torch.zeros(rows, num_values + 2, dtype=torch.float64, device=device)
        self._largest = torch.empty(rows, num_largest, dtype=torch.float64, device=device)
        self._sums_of = [row[:num_values].unbind() for row in self._sums]
        self._counts_of = self._sums[:, num_values:].unbind()
        self._largest_of = [row.unbind() for row in self._largest]
        self._whole_counts: dict[int, Tensor] = {}
        self.reset()

    def add(
        self, row: int, *values: Tensor, largest: Sequence[Tensor] = (), mask: Tensor | None = None
    ) -> None:
        """Add what one micro-batch has in a layer; no host synchronisation.

        Args:
            row: the layer's number, 1-based over the whole model; 0 for the embedding's output.
            values: of this rank's tokens, ``[s, b]`` each.
            largest: the values of which the largest is kept, ``[s, b]`` each.
            mask: ``[s, b]``, 1 for the tokens that count and 0 for the others; by default all count.
        """
        at = row - self._first_row
        counts = self._counts_of[at]
        if mask is None:
            counts += self._counts(values[0].numel())
        else:
            # What is left out may be NaN.
            values = tuple(torch.where(mask > 0, value * mask, 0.0) for value in values)
            largest = [torch.where(mask > 0, value, -torch.inf) for value in largest]
            counts += torch.stack((mask.sum(dtype=torch.float64), mask.new_ones((), dtype=torch.float64)))
        for total, value in zip(self._sums_of[at], values, strict=True):
            total.add_(value.sum(dtype=torch.float64))
        for most, value in zip(self._largest_of[at], largest, strict=True):
            torch.maximum(most, value.max().double(), out=most)

    def _counts(self, num_tokens: int) -> Tensor:
        """A micro-batch's tokens, seen once, on the device; a run has few sizes of micro-batches."""
        if num_tokens not in self._whole_counts:
            counts = self._sums.new_ones(2)
            counts[0] = num_tokens  # fills on the device; a tensor made of both would be copied to it
            self._whole_counts[num_tokens] = counts
        return self._whole_counts[num_tokens]

    def reset(self) -> None:
        """Forget everything added so far."""
        self._sums.zero_()
        self._largest.fill_(-torch.inf)

    def _values(self, sums: Tensor, largest: Tensor) -> LayerValues | None:
        """Of the whole model's sums, ``[rows, ..]``; None if some row was not seen."""
        values, (num_tokens, times_seen) = sums[:, :-2], sums[:, -2:].unbind(dim=1)
        if (times_seen == 0).any():
            return None
        if times_seen.min() != times_seen.max():
            raise UserError(LAYERS_SEEN_UNEQUALLY)
        return LayerValues(values / num_tokens[:, None], largest)


def reduce_meters(
    meters: Sequence[Meter], group: dist.ProcessGroup | None = None
) -> list[LayerValues | None]:
    """What any rank has added to each meter since its last reset. A collective call, one for all of them.

    It is an all-reduce. Where a largest value is wanted it is an all-gather instead, since an all-reduce
    cannot sum some numbers and take the largest of others.

    Args:
        meters: alike on every rank.
        group: the ranks that hold the model together; by default all.

    Returns:
        For each meter its values, the same on every rank; None if some layer was not seen.

    Raises:
        UserError: if some layers were seen more often than others, so that they stand for other tokens.
    """
    if not meters:
        return []
    sums = torch.cat([meter._sums.flatten() for meter in meters])
    largest = torch.cat([meter._largest.flatten() for meter in meters])
    if dist.is_available() and dist.is_initialized():
        if largest.numel() == 0:
            dist.all_reduce(sums, group=group)
        else:
            own = torch.cat((sums, largest))
            every = own.new_empty(dist.get_world_size(group) * own.numel())
            dist.all_gather_into_tensor(every, own, group=group)
            ranks = every.view(-1, own.numel())
            sums, largest = ranks[:, : sums.numel()].sum(0), ranks[:, sums.numel() :].amax(0)
    every_sum = torch.split(sums.cpu(), [meter._sums.numel() for meter in meters])
    every_largest = torch.split(largest.cpu(), [meter._largest.numel() for meter in meters])
    return [
        meter._values(own_sums.view_as(meter._sums), own_largest.view_as(meter._largest))
        for meter, own_sums, own_largest in zip(meters, every_sum, every_largest, strict=True)
    ]
