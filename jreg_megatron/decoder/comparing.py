"""When two runs of a model gave the same: logits, and states of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

_REACH = 32
"""Logits are clipped so many median distances from their position's median: some 20 standard deviations."""


def comparable(logits: Tensor, *others: Tensor) -> list[Tensor]:
    """Logits ``[..., V]`` without what would drown their differences, in fp32 or wider.

    An offset of all logits of a position says nothing, so its median is taken away. Ids that a model masks
    (-Inf or the type's least number) and those with a bias of their own are clipped to a range that the
    first argument's other logits give. NaN counts as 0, for it is found in the states, and named.
    """
    centred = []
    for each in (logits, *others):
        wide = each.to(torch.promote_types(each.dtype, torch.float32))
        masked = ~wide.isfinite() | (wide.abs() >= torch.finfo(each.dtype).max / 2)
        median = wide.masked_fill(masked, torch.nan).nanmedian(dim=-1, keepdim=True).values
        centred.append((wide - median, masked))
    away, masked = centred[0]
    reach = _REACH * away.masked_fill(masked, torch.nan).abs().nanmedian().nan_to_num(0.0)
    return [away.clamp(-reach, reach).nan_to_num(0.0) for away, _ in centred]


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two states hold the same, perhaps rounded to the type of the other or copied to its device."""
    if a.shape != b.shape:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()  # one that is not finite is found elsewhere, and named
    return torch.equal(a.to(b), b) or torch.equal(a, b.to(a))


def is_same_or_scaled(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` is ``a``, perhaps times a positive number, which changes neither cosines nor a norm."""
    if is_same(a, b):
        return True
    if a.shape != b.shape:
        return False
    eps = max(torch.finfo(each.dtype).eps for each in (a, b))
    a, b = (each.nan_to_num().to(b.device, torch.promote_types(each.dtype, torch.float32)) for each in (a, b))
    factor = float((a * b).sum() / a.square().sum())
    is_scale = factor > 0 and abs(factor - 1) > 2 * eps
    return is_scale and bool((b - factor * a).norm() <= eps * b.norm())
