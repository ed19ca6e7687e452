"""The autograd node adds the regularizer's gradient and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jreg_megatron import JRegConfig, UserError
from jreg_megatron.methods.jreg.kernels import eager
from jreg_megatron.methods.jreg.penalty import Strength, add_displacement_gradient, add_input_gradient

COEFFICIENT, FACTOR = 0.7, 0.3


def strength(
    coefficient: torch.Tensor | None = None, weights: torch.Tensor | None = None, factor: float = FACTOR
) -> Strength:
    """What most tests add."""
    return Strength(
        eager.KERNELS, torch.tensor([COEFFICIENT]) if coefficient is None else coefficient, factor, weights
    )


def reference_gradients(
    h_in: torch.Tensor, h_out: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor]:
    """Autograd in float64 on the textbook formula, with an upstream loss that is linear in h_out."""
    a, b = (h.detach().double().requires_grad_() for h in (h_in, h_out))
    psi = (1 - F.cosine_similarity(a, b, dim=-1)) / 2
    (COEFFICIENT * FACTOR * psi.sum() + (upstream.double() * b).sum()).backward()
    return [a.grad, b.grad]  # type: ignore[list-item]


def node_gradients(h_in: torch.Tensor, h_out: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    a, b = (h.detach().clone().requires_grad_() for h in (h_in, h_out))
    out = add_displacement_gradient(a, b, strength())
    (upstream * out).sum().backward()
    return [a.grad, b.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("turn", [1e-3, 0.1, 3.0])
def test_gradients_equal_autograd_on_the_textbook_formula(turn: float) -> None:
    torch.manual_seed(0)
    h_in = torch.randn(64, 2, 96)
    h_out = h_in + turn * torch.randn_like(h_in)
    upstream = 0.01 * torch.randn_like(h_in)
    ours, reference = (f(h_in, h_out, upstream) for f in (node_gradients, reference_gradients))
    for got, expected in zip(ours, reference, strict=True):
        # What float32 states can tell: the gradient's direction is the difference of two unit vectors.
        assert (got.double() - expected).norm() / expected.norm() < max(2e-6, 2e-7 / turn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h_in, h_out, upstream = (torch.randn(32, 1, 128).to(dtype) for _ in range(3))
    reference = reference_gradients(h_in, h_out, upstream)
    for got, expected in zip(node_gradients(h_in, h_out, upstream), reference, strict=True):
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_forward_value_is_unchanged_and_psi_of_every_token_comes_in_the_backward_pass() -> None:
    h_in, h_out = torch.randn(4, 2, 8), torch.randn(4, 2, 8, requires_grad=True)
    seen: list[torch.Tensor] = []
    out = add_displacement_gradient(h_in, h_out, strength(), seen.append)
    assert torch.equal(out, h_out) and not seen
    out.sum().backward()
    (psi,) = seen
    expected = (1 - F.cosine_similarity(h_in.double(), h_out.detach().double(), dim=-1)) / 2
    torch.testing.assert_close(psi.double(), expected, rtol=1e-6, atol=0)
    assert psi.dtype is torch.float32 and not psi.requires_grad


def test_the_inputs_gradient_can_come_alone_by_another_tensors_backward_pass() -> None:
    h_in, h_out, upstream = (torch.randn(4, 2, 8) for _ in range(3))
    a, carrier = h_in.clone().requires_grad_(), torch.randn(4, 2, 8, requires_grad=True)
    carried = add_input_gradient(carrier, a, h_out, strength())
    assert torch.equal(carried, carrier)
    (upstream * carried).sum().backward()
    assert torch.equal(carrier.grad, upstream)  # type: ignore[arg-type]
    assert torch.equal(a.grad, node_gradients(h_in, h_out, upstream)[0])  # type: ignore[arg-type]


def test_each_tokens_gradient_is_times_its_weight() -> None:
    h_in, h_out, upstream = (torch.randn(4, 2, 8) for _ in range(3))
    weights = torch.tensor([[0.0, 1.0], [2.0, 0.5], [0.0, 0.0], [1.0, 3.0]])
    a, b = (h.clone().requires_grad_() for h in (h_in, h_out))
    out = add_displacement_gradient(a, b, strength(weights=weights))
    (upstream * out).sum().backward()
    plain_in, plain_out = node_gradients(h_in, h_out, upstream)
    torch.testing.assert_close(a.grad, weights[..., None] * plain_in)
    torch.testing.assert_close(b.grad - upstream, weights[..., None] * (plain_out - upstream))


def test_the_coefficient_is_read_in_the_backward_pass_so_a_buffer_can_be_refilled() -> None:
    buffer = torch.tensor([123.0])
    h_in, h_out = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    out = add_displacement_gradient(h_in, h_out, strength(buffer))
    buffer.fill_(COEFFICIENT)
    upstream = torch.zeros_like(h_in)
    (upstream * out).sum().backward()
    assert torch.equal(h_out.grad, node_gradients(h_in, h_out, upstream)[1])  # type: ignore[arg-type]


def test_rows_of_norm_zero_get_no_gradient_from_the_regularizer() -> None:
    h_in, h_out = torch.randn(3, 8), torch.randn(3, 8)
    h_in[0] = 0
    h_out[1] = 0
    upstream = torch.randn(3, 8)
    grad_in, grad_out = node_gradients(h_in, h_out, upstream)
    assert (grad_in[:2] == 0).all() and (grad_in[2] != 0).any()
    assert torch.equal(grad_out[:2], upstream[:2]) and not torch.equal(grad_out[2], upstream[2])


@pytest.mark.parametrize("coefficient", [COEFFICIENT, 0.0])
def test_a_derivative_of_the_gradient_is_refused_and_not_silently_wrong(coefficient: float) -> None:
    h_in = torch.randn(4, 8, requires_grad=True)
    states = h_in, h_in.square()
    given = strength(torch.tensor([coefficient]))
    for out in (add_displacement_gradient(*states, given), add_input_gradient(states[1], *states, given)):
        with pytest.raises(UserError, match="create_graph"):
            torch.autograd.grad(out.sum(), h_in, create_graph=True)
        torch.autograd.grad(out.sum(), h_in, retain_graph=True)


def test_gradcheck_in_float64() -> None:
    def loss_and_penalty(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return COEFFICIENT * FACTOR * (1 - F.cosine_similarity(a, b, dim=-1)).sum() / 2

    a, b = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(loss_and_penalty(a, b), (a, b))
    coefficient = torch.tensor([COEFFICIENT], dtype=torch.float64)
    out = add_displacement_gradient(a, b, strength(coefficient))
    got = torch.autograd.grad((0 * out).sum(), (a, b))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_what_leaving_light_layers_out_changes_is_within_the_stated_bound() -> None:
    torch.manual_seed(0)
    layers, coeff = 12, 0.7
    states = (
        torch.randn(layers + 1, 40, 24, dtype=torch.float64).cumsum(0) * torch.logspace(-3, 3, 40)[:, None]
    )
    for alpha, share in ((3.0, 1e-6), (1.0, 1e-3), (0.3, 0.2)):
        config = JRegConfig(coeff=coeff, alpha=alpha, negligible_weight=share)
        losses, gradients = [], []
        for weights in (config.layer_weights(layers), config.gradient_weights(layers)):
            leaves = states.clone().requires_grad_()
            psi = (1 - F.cosine_similarity(leaves[:-1], leaves[1:], dim=-1)) / 2
            losses.append(coeff * (weights @ psi))
            gradients.append(torch.autograd.grad(losses[-1].sum(), leaves)[0])
        assert int((config.gradient_weights(layers) == 0).sum()) > 1, "something is left out"
        assert 0 < (losses[0] - losses[1]).max() <= coeff * share
        change = (gradients[0] - gradients[1]).norm(dim=-1)
        assert (change <= coeff * share / (2 * states.norm(dim=-1))).all()
