"""Attention under context parallelism without Transformer Engine: keys and values are gathered."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class GatheringDotProductAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's core attention, for a sequence of which each context-parallel rank holds two pieces.

    Of ``2 * C`` equal pieces rank ``r`` of ``C`` holds piece ``r`` and piece ``2 * C - 1 - r``. Queries stay
    where they are. Keys and values of all ranks are gathered and put in order; in the backward pass their
    gradients are summed and scattered.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # The parent knows no context parallelism, and what it does needs none.
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As the parent's: states ``[s / C, b, heads, d]`` to ``[s / C, b, heads * d]``.

        ``attention_mask`` is ``[b, 1, s / C, s]``, True where a query must not look; None means causal.
        """
        group = parallel_state.get_context_parallel_group()
        size = group.size()
        if size > 1:
            everywhere = torch.arange(query.shape[0] * size, device=query.device)
            pieces = everywhere.chunk(2 * size)
            held = [torch.cat((pieces[rank], pieces[2 * size - 1 - rank])) for rank in range(size)]
            in_order = torch.cat(held).argsort()
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=group)[in_order]
                for x in (key, value)
            )
            if attention_mask is None:
                is_later = everywhere > held[group.rank()][:, None]
                attention_mask = is_later[None, None]
        output: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return output


def install() -> None:
    """Let Megatron's layer specs without Transformer Engine take this attention."""
    from megatron.core.models import backends

    backends.DotProductAttention = GatheringDotProductAttention
