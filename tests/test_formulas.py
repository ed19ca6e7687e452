"""Displacement, layer weights and jump rate against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from jreg_megatron import displacement, jump_rate, layer_weights

TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def textbook(h_in: torch.Tensor, h_out: torch.Tensor) -> torch.Tensor:
    return (1 - F.cosine_similarity(h_in.double(), h_out.double(), dim=-1)) / 2


@pytest.mark.parametrize("turn", [1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("width", [3, 64, 1000])
def test_displacement_agrees_with_float64_even_where_a_layer_hardly_turns(width: int, turn: float) -> None:
    torch.manual_seed(0)
    h_in = torch.randn(512, 2, width)
    h_out = h_in + turn * torch.randn_like(h_in)
    psi, expected = displacement(h_in, h_out), textbook(h_in, h_out)
    assert psi.dtype is torch.float32 and psi.shape == (512, 2)
    torch.testing.assert_close(psi.double(), expected, rtol=3e-4, atol=1e-10)
    # The mean is logged and penalised. It must have no bias.
    torch.testing.assert_close(psi.double().mean(), expected.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_displacement_accumulates_in_float32_whatever_the_input_type(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    h_in, h_out = (torch.randn(16, 4096).to(dtype) for _ in range(2))
    torch.testing.assert_close(displacement(h_in, h_out).double(), textbook(h_in, h_out), rtol=1e-5, atol=0)


def test_displacement_takes_states_of_two_types() -> None:
    h_in, h_out = torch.randn(8, 64).bfloat16(), torch.randn(8, 64)
    torch.testing.assert_close(displacement(h_in, h_out).double(), textbook(h_in, h_out), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    ("relation", "expected"),
    [("identical", 0.0), ("opposite", 1.0), ("orthogonal", 0.5), ("both zero", 0.5), ("one zero", 0.5)],
)
def test_displacement_and_its_gradient_stay_finite_at_the_edges(
    dtype: torch.dtype, norm: float, relation: str, expected: float
) -> None:
    a, b = torch.zeros(2, 64), torch.zeros(2, 64)
    a[:, 0] = norm
    b[:, 1] = norm
    h_in, h_out = {
        "identical": (a, a.clone()),
        "opposite": (a, -a),
        "orthogonal": (a, b),
        "both zero": (0 * a, 0 * a),
        "one zero": (0 * a, b),
    }[relation]
    h_in, h_out = (h.to(dtype).requires_grad_() for h in (h_in, h_out))
    psi = displacement(h_in, h_out)
    torch.testing.assert_close(psi, torch.full_like(psi, expected), rtol=0, atol=1e-6)
    psi.sum().backward()
    for h in (h_in, h_out):
        assert h.grad is not None and h.grad.isfinite().all()
        if "zero" in relation:
            assert (h.grad == 0).all()


def test_displacement_of_identical_states_is_exactly_zero_and_never_negative() -> None:
    h = torch.randn(1000, 77)
    assert (displacement(h, h) == 0).all()
    assert (displacement(h, h * 1.7) >= 0).all()


def test_displacement_reports_a_nan_instead_of_hiding_it() -> None:
    h_in, h_out = torch.randn(2, 8), torch.randn(2, 8)
    h_in[1, 3] = math.nan
    assert displacement(h_in, h_out).isnan().tolist() == [False, True]


def test_displacement_gradient_is_that_of_its_definition() -> None:
    states = tuple(torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(displacement, states)


def test_displacement_refuses_states_of_two_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        displacement(torch.randn(2, 4), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("alpha", "last_four"),
    [
        (0.5, (0.088, 0.145, 0.239, 0.394)),
        (1.0, (0.032, 0.086, 0.233, 0.632)),
        (2.0, (0.002, 0.016, 0.117, 0.865)),
        (3.0, (0.0001, 0.0024, 0.047, 0.950)),
    ],
)
def test_layer_weights_are_the_papers_softmax(alpha: float, last_four: tuple[float, ...]) -> None:
    weights = layer_weights(24, alpha)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[-4:].tolist() == pytest.approx(last_four, abs=6e-4)


def test_layer_weights_at_alpha_zero_are_uniform() -> None:
    assert layer_weights(5, 0.0).tolist() == pytest.approx([0.2] * 5)


def test_jump_rate_sums_the_rises_from_a_layer_on() -> None:
    psi = torch.tensor([0.30, 0.01, 0.02, 0.015, 0.10], dtype=torch.float64)
    assert jump_rate(psi).item() == pytest.approx(8.5)
    assert jump_rate(psi, first_layer=3).item() == pytest.approx(100 * (0.01 + 0.085))
    assert jump_rate(psi, first_layer=2).item() == pytest.approx(100 * (0.01 + 0.085))
    assert jump_rate(psi.flip(0)).item() == pytest.approx(29.0)
    assert jump_rate(torch.tensor([0.1, 0.05])).item() == 0.0


@pytest.mark.parametrize("first_layer", [0, 1, 6])
def test_jump_rate_is_not_defined_outside_layers_2_to_L(first_layer: int) -> None:
    with pytest.raises(ValueError, match=r"2\.\.5"):
        jump_rate(torch.rand(5), first_layer=first_layer)
    with pytest.raises(ValueError, match="at least 2"):
        jump_rate(torch.rand(1))
