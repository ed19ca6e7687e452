"""Metrics of depth in plain torch; used in training, by ``measure`` and by ``evaluate``.

All take states of any floating type, compute in float32 (float64 for float64 states) and return that type,
without a graph. README.md in this folder compares them with the authors' code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jreg_megatron.methods.norms.formulas import norms

VOID_SHARE = 0.8
"""The a of :func:`voids`, as published."""

CONTRIBUTIONS = (
    *("attention_ratio", "mlp_ratio", "layer_ratio"),
    *("attention_cosine", "mlp_cosine", "layer_cosine"),
)
"""What :func:`contributions` returns, in order."""

_NO_SPREAD = 1e-12
"""A centred state below this share of the largest state is rounding, and counts as 0."""


def voids(norm: Tensor) -> Tensor:
    """Layers that are void for a token: LAC, *Void in Language Models* (arXiv 2505.14467).

    With ``d_l = |h_l| - |h_{l-1}|``, layer l is void if ``d_l < 0.8 * (max_{j<l} d_j - min_{j<l} d_j)``.
    Layer 1 has no earlier layer. For it we use the threshold 0, which the formula gives for layer 2. So it is
    void if the norm shrinks.

    Args:
        norm: ``|h_l|`` of the states h_0 .. h_L, ``[L + 1, ...]``.

    Returns:
        1.0 where a layer is void and 0.0 elsewhere, ``[L, ...]`` in the type of ``norm``. Once a token's norm
        is NaN, NaN for this layer and all later ones.
    """
    change = norm.detach().diff(dim=0)
    spread = change.cummax(dim=0).values - change.cummin(dim=0).values
    threshold = VOID_SHARE * torch.cat((torch.zeros_like(change[:1]), spread[:-1]))
    return torch.where((change - threshold).isnan(), torch.nan, (change < threshold).to(change.dtype))


def contributions(layer_input: Tensor, middle: Tensor, layer_output: Tensor) -> Tensor:
    """What attention and MLP add to each token, *Do Language Models Use Their Depth Efficiently?*
    (arXiv 2505.13898).

    With h the layer's input, a what attention adds and m what the MLP adds: the ratios ``|a| / |h|``,
    ``|m| / |h + a|`` and ``|a + m| / |h|``, and the cosines of the same pairs. A negative cosine erases, a
    positive one amplifies.

    Args:
        layer_input: h, ``[..., h]``.
        middle: ``h + a``, same shape.
        layer_output: ``h + a + m``, same shape.

    Returns:
        ``[6, ...]``, by :data:`CONTRIBUTIONS`. A ratio is infinite or NaN for a token whose state has norm 0;
        the cosine of a vector of norm 0 is 0.
    """
    h, between, out = (_wide(state) for state in (layer_input, middle, layer_output))
    pairs = ((between - h, h), (out - between, between), (out - h, h))
    ratios = [norms(added) / norms(state) for added, state in pairs]
    cosines = [torch.nn.functional.cosine_similarity(added, state, dim=-1) for added, state in pairs]
    return torch.stack(ratios + cosines)


def matrix_entropy(states: Tensor) -> Tensor:
    """Entropy of the Gram matrix of a sequence's states, *Layer by Layer* (arXiv 2502.02013).

    With p the eigenvalues of K above 0, divided by their sum, it is

        -sum p log p / min(log n, log h).

    The mean over tokens is subtracted from each state, and the result is divided by its norm: the n rows of
    Z. K is ``Z Z^T``, or ``Z^T Z`` if n > h. Entries of K below 0 become 0. The subtraction, the division by
    the norm and the entries below 0 are from the authors' code. The order of the entropy is 1 (von Neumann).

    Args:
        states: of one sequence each, ``[..., n, h]``.

    Returns:
        ``[...]`` in [0, 1]; 0 if all states are equal; NaN if n is 1 or a state is not finite. Computed in
        float64.
    """
    rows = _directions(states)
    count, width = rows.shape[-2:]
    if min(count, width) < 2:
        return torch.full_like(_wide(states)[..., 0, 0], torch.nan)
    gram = rows.mT @ rows if count > width else rows @ rows.mT
    gram = gram.clamp(min=0)
    finite = gram.isfinite().all(dim=-1).all(dim=-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], gram, 0.0)).clamp(min=0)
    shares = values / values.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -torch.xlogy(shares, shares).sum(dim=-1) / math.log(min(count, width))
    return torch.where(finite, entropy, torch.nan).to(_wide(states).dtype)


def curvature(states: Tensor) -> Tensor:
    """How sharply a sequence's states turn from token to token, *Layer by Layer* (arXiv 2502.02013).

    The mean of ``arccos |cos(v_k, v_{k+1})|`` over the differences ``v_k = z_{k+1} - z_k`` of the states
    ``z``, which are centred and of norm 1 as in :func:`matrix_entropy`. The absolute value and the norm of 1
    are those of the authors' code. A difference of 0 counts as an angle of 0.

    Args:
        states: of one sequence each, ``[..., n, h]``.

    Returns:
        ``[...]`` in radians, in [0, pi / 2]; NaN if n < 3 or a state is not finite. Computed in float64.
    """
    step = _directions(states).diff(dim=-2)
    size = step.norm(dim=-1)
    product = (step[..., 1:, :] * step[..., :-1, :]).sum(dim=-1).abs()
    scale = size[..., 1:] * size[..., :-1]
    angle = torch.where(scale == 0, 0.0, (product / scale).clamp(max=1).arccos())
    return angle.mean(dim=-1).to(_wide(states).dtype)


def _directions(states: Tensor) -> Tensor:
    """States ``[..., n, h]`` less their mean over tokens, divided by their norms, in float64."""
    states = states.detach().double()
    centred = states - states.mean(dim=-2, keepdim=True)
    size = centred.norm(dim=-1, keepdim=True)
    largest = states.norm(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    return torch.where(size <= _NO_SPREAD * largest, 0.0, centred / size)


def _wide(state: Tensor) -> Tensor:
    return state.detach().to(torch.promote_types(state.dtype, torch.float32))
