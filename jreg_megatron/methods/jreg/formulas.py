"""The paper's formulas in plain torch: displacement, layer weights, jump rate (arXiv 2601.18302).

``h_0`` is the embedding output and ``h_l`` the residual stream after layer ``l = 1..L``, per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def displacement(h_in: Tensor, h_out: Tensor) -> Tensor:
    """How far a layer turns each token: ``Psi = (1 - cos(h_in, h_out)) / 2``.

    Computed as ``|u - v|^2 / 4`` with the unit vectors ``u`` and ``v`` of the two states. That equals
    ``(1 - u.v) / 2`` but does not cancel: where a layer turns its input by 1e-5 only, the textbook form
    is off by 1e-4 relative in float32, and in one direction, so averaging over tokens does not help.

    Differentiable in both states. A row of norm zero has no direction: its cosine counts as 0, as in
    ``torch.nn.functional.cosine_similarity``, so Psi = 0.5, and its gradient is zero.

    Args:
        h_in: the layer's input ``h_{l-1}``, ``[..., h]``, any floating type, row norms in [1e-19, 1e19].
        h_out: the layer's output ``h_l``, same shape; the type may differ.

    Returns:
        ``[...]`` in [0, 1] up to rounding, float32 (float64 for float64 states). NaN where a state has one.

    Raises:
        ValueError: if the shapes differ.
    """
    if h_in.shape != h_out.shape:
        raise ValueError(
            f"h_in and h_out must have one shape, got {list(h_in.shape)} and {list(h_out.shape)}"
        )
    u, _ = unit_rows(h_in)
    v, _ = unit_rows(h_out)
    return displacement_of_units(u, v)


def unit_rows(h: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to norm 1, in float32 or wider; rows of norm zero stay zero.

    Args:
        h: ``[..., h]``.

    Returns:
        The unit rows ``[..., h]`` and the inverse norms ``[..., 1]`` (0 for a row of norm zero).
    """
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    square = h.square().sum(dim=-1, keepdim=True)
    is_zero = square == 0
    # Both branches of `where` are differentiated: the 1 keeps rsqrt's gradient finite in zero rows.
    inverse_norm = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).rsqrt())
    return h * inverse_norm, inverse_norm


def displacement_of_units(u: Tensor, v: Tensor) -> Tensor:
    """Displacement ``[...]`` between rows that :func:`unit_rows` made, ``[..., h]`` each."""
    norm_u, norm_v = (torch.linalg.vector_norm(unit.detach(), dim=-1) for unit in (u, v))
    has_no_direction = torch.minimum(norm_u, norm_v) == 0
    return torch.where(has_no_direction, 0.5, (u - v).square().sum(dim=-1) / 4)


def layer_weights(num_layers: int, alpha: float) -> Tensor:
    """The weights ``w = softmax(alpha * [1, 2, .., L])`` of the regularizer ``sum_l w_l * Psi_l``.

    Args:
        num_layers: ``L >= 1``.
        alpha: sharpness; 0 is uniform, larger puts more on the last layers (a layer k below the top
            weighs ``exp(-alpha * k)`` of the top one).

    Returns:
        ``[L]`` float64, sums to 1; entry ``l - 1`` belongs to layer ``l``.

    Raises:
        ValueError: if ``num_layers < 1``.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    return torch.softmax(alpha * torch.arange(1, num_layers + 1, dtype=torch.float64), dim=0)


def jump_rate(displacements: Tensor, first_layer: int | None = None) -> Tensor:
    """Jump rate ``zeta_l = 100 * sum_{k=l..L} max(0, Psi_k - Psi_{k-1})``; the headline is ``zeta_L``.

    Args:
        displacements: mean displacement of layers 1..L, ``[..., L]`` with L >= 2, each in [0, 1].
        first_layer: ``l`` in 2..L; by default L, the last layer's jump alone. ``Psi_0`` does not exist,
            so ``zeta_1`` is not defined.

    Returns:
        ``[...]``, at least 0, in hundredths of displacement.

    Raises:
        ValueError: if there are fewer than two layers or ``first_layer`` is outside 2..L.
    """
    num_layers = displacements.shape[-1]
    if num_layers < 2:
        raise ValueError(f"the jump rate compares layers, so it needs at least 2, got {num_layers}")
    first_layer = num_layers if first_layer is None else first_layer
    if not 2 <= first_layer <= num_layers:
        raise ValueError(f"first_layer must be in 2..{num_layers}, got {first_layer}")
    rises = displacements.diff(dim=-1)[..., first_layer - 2 :]
    return 100 * rises.clamp(min=0).sum(dim=-1)
