"""Norms and update ratios of tokens, in plain torch; used in training and by ``measure``."""

from __future__ import annotations

import torch
from torch import Tensor


def norms(h: Tensor) -> Tensor:
    """``|h|`` of every token.

    Args:
        h: ``[..., h]``, any floating type.

    Returns:
        ``[...]`` float32 (float64 for float64 states), without a graph.
    """
    h = h.detach()
    wide = torch.promote_types(h.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(h, dim=-1, dtype=wide)
    return norm


def update_ratios(h_in: Tensor, h_out: Tensor, norm_in: Tensor | None = None) -> Tensor:
    """``|h_out - h_in| / |h_in|`` of every token: how much a layer adds, relative to its input.

    Args:
        h_in: the layer's input, ``[..., h]``, any floating type.
        h_out: the layer's output, same shape.
        norm_in: :func:`norms` of ``h_in``, if they are known.

    Returns:
        ``[...]`` float32 (float64 for float64 states), >= 0, without a graph; infinite or NaN for a token
        whose input has norm 0.
    """
    wide = torch.promote_types(torch.promote_types(h_in.dtype, h_out.dtype), torch.float32)
    update = h_out.detach().to(wide) - h_in.detach().to(wide)
    return norms(update) / (norms(h_in) if norm_in is None else norm_in)
