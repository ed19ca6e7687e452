"""Compare logits and states of two runs of a model."""

from __future__ import annotations

import torch
from torch import Tensor

_REACH = 32
"""Logits are clipped at this many median distances from the median of their position: about 20 standard
deviations."""


def comparable(logits: Tensor, *others: Tensor) -> list[Tensor]:
    """Logits ``[..., V]`` whose differences can be compared, in fp32 or wider.

    The median of each position is subtracted, because a common offset has no meaning. Masked ids (-Inf or the
    type's smallest number) and ids with a large bias are clipped to the range of the first argument's other
    logits. NaN counts as 0; NaN in the states gives an error of its own.
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
    """Whether two states are the same, perhaps rounded to the other's type or copied to its device."""
    if a.shape != b.shape:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()  # values that are not finite give an error elsewhere
    return torch.equal(a.to(b), b) or torch.equal(a, b.to(a))


def is_same_or_scaled(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` is ``a`` times a positive number, which changes no cosine and no norm's output."""
    if is_same(a, b):
        return True
    if a.shape != b.shape:
        return False
    eps = max(torch.finfo(each.dtype).eps for each in (a, b))
    a, b = (each.nan_to_num().to(b.device, torch.promote_types(each.dtype, torch.float32)) for each in (a, b))
    factor = float((a * b).sum() / a.square().sum())
    is_scale = factor > 0 and abs(factor - 1) > 2 * eps
    return is_scale and bool((b - factor * a).norm() <= eps * b.norm())
