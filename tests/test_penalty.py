"""The autograd node adds the regularizer's gradient and nothing else."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from jreg_megatron import JRegConfig, UserError
from jreg_megatron.methods.jreg.kernels import Kernels, eager
from jreg_megatron.methods.jreg.penalty import Strength, add_displacement_gradient, add_input_gradient

COEFFICIENT, FACTOR = 0.7, 0.3


def strength(
    coefficient: torch.Tensor | None = None, weights: torch.Tensor | None = None, factor: float = FACTOR
) -> Strength:
    """The regularizer of most tests."""
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
        # The precision of float32 states: the gradient's direction is the difference of two unit vectors.
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


def test_the_effect_of_leaving_out_light_layers_is_within_the_stated_bound() -> None:
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


@dataclass(frozen=True)
class Recorded(eager.TorchKernels):
    """Notes for each call whether something came from above and whether something goes down."""

    calls: list[tuple[bool, bool]] = field(default_factory=list)

    def gradients(self, *given: Any, **named: Any) -> Any:
        self.calls.append((named["above"] is not None, named["hands_down"]))
        return super().gradients(*given, **named)


LINKED = [(False, True), (True, True), (True, True), (True, False)]
"""The notes of four stacked layers, from the top."""


class Chain:
    """Layers ``h -> h * (1 + scale)`` with one vector of scales each. Some of them are regularized.

    Args:
        factors: of each layer; 0 for one without a node.
        between: a function of each state on its way to the next layer.
        dtypes: the types of the layers' outputs, in turn.
    """

    def __init__(
        self,
        factors: Sequence[float] = (0.3, 0.5, 0.2, 0.4),
        between: Callable[[torch.Tensor], torch.Tensor] = lambda h: h,
        kernels: Sequence[Kernels] | None = None,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.factors, self.between = factors, between
        self.recorded = Recorded()
        self.kernels = kernels or [self.recorded] * len(factors)
        self.dtypes = [dtypes[number % len(dtypes)] for number in range(len(factors))]
        self.x = torch.randn(6, 2, 16, requires_grad=True)
        self.scales = [(0.5 * torch.randn(16)).requires_grad_() for _ in factors]
        self.upstream = torch.randn(6, 2, 16)
        self.token_weights = [None if number % 2 else torch.rand(6, 2) for number in range(len(factors))]
        self.coefficient = torch.tensor([COEFFICIENT])
        self.states: list[torch.Tensor] = []
        self.raw: list[weakref.ref[torch.Tensor]] = []
        self.psi: dict[int, torch.Tensor] = {}

    def layer(self, number: int, h: torch.Tensor) -> torch.Tensor:
        out = (h + h * self.scales[number]).to(self.dtypes[number])
        self.raw.append(weakref.ref(out))
        if self.factors[number] == 0:
            return out
        given = Strength(
            self.kernels[number], self.coefficient, self.factors[number], self.token_weights[number]
        )
        return add_displacement_gradient(h, out, given, lambda psi: self.psi.update({number: psi}))

    def loss(self, run: Callable[..., Any] = lambda function, h: function(h), block: int = 1) -> torch.Tensor:
        """The upstream loss, which is linear in the output; ``run`` runs so many layers at a time."""
        h = self.x * 1.0
        self.states = [h]

        def layers(first: int, h: torch.Tensor) -> torch.Tensor:
            for number in range(first, first + block):
                h = self.between(self.layer(number, h))
            return h

        for first in range(0, len(self.factors), block):
            h = run(functools.partial(layers, first), h)
            self.states.append(h)
        return (self.upstream * h).sum()

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.x, *self.scales]

    def gradients(self, loss: torch.Tensor | None = None, **how: Any) -> list[torch.Tensor]:
        """Of all leaves, by a pass that goes everywhere."""
        for leaf in self.leaves:
            leaf.grad = None
        (self.loss() if loss is None else loss).backward(**how)
        return [leaf.grad for leaf in self.leaves]  # type: ignore[misc]

    def reference(self) -> list[torch.Tensor]:
        """By autograd in float64 on the textbook formula, of all leaves and of each layer's input."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        h, loss, states = leaves[0] * 1.0, torch.zeros((), dtype=torch.float64), []
        states.append(h)
        for scale, factor, weights in zip(leaves[1:], self.factors, self.token_weights, strict=True):
            out = h + h * scale
            psi = (1 - F.cosine_similarity(h, out, dim=-1)) / 2
            loss = (
                loss
                + float(self.coefficient)
                * factor
                * (psi if weights is None else psi * weights.double()).sum()
            )
            h = out
            states.append(h)
        loss = loss + (self.upstream.double() * h).sum()
        return list(torch.autograd.grad(loss, [*leaves, *states[:-1]]))


def assert_close(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], error: float = 1e-6) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other.double()).norm() <= error * other.double().norm()


def test_stacked_layers_hand_down_and_get_the_gradients_of_float64_autograd() -> None:
    chain = Chain()
    gradients = chain.gradients()
    assert chain.recorded.calls == LINKED
    assert_close(gradients, chain.reference()[:5])
    without = [
        one - other for one, other in zip(gradients, Chain(factors=(0, 0, 0, 0)).gradients(), strict=True)
    ]
    assert all(
        added.norm() > 1e-3 * gradient.norm() for added, gradient in zip(without[:4], gradients, strict=False)
    )
    assert sorted(chain.psi) == [0, 1, 2, 3]


def test_handed_down_gradients_equal_those_of_autograd_up_to_rounding() -> None:
    linked, plain = Chain(), Chain(between=torch.clone)
    assert_close(linked.gradients(), plain.gradients(), 3e-7)
    assert plain.recorded.calls == [(False, False)] * 4
    assert all(torch.equal(linked.psi[number], plain.psi[number]) for number in range(4))


def test_states_of_several_types_hand_down_too() -> None:
    chain = Chain(dtypes=(torch.bfloat16, torch.float32))
    assert_close(chain.gradients(), chain.reference()[:5], 2e-2)
    assert chain.recorded.calls == LINKED


@pytest.mark.parametrize(
    ("factors", "calls"),
    [
        ((0.3, 0, 0.2, 0.4), [(False, True), (True, False), (False, False)]),
        ((0, 0.5, 0, 0.4), [(False, False)] * 2),
        ((0.3, 0.5, 0, 0), [(False, True), (True, False)]),
    ],
    ids=str,
)
def test_a_layer_without_a_node_ends_the_handing_down_and_nothing_is_lost(
    factors: tuple[float, ...], calls: list[tuple[bool, bool]]
) -> None:
    chain = Chain(factors)
    assert_close(chain.gradients(), chain.reference()[:5])
    assert chain.recorded.calls == calls


def test_layers_with_kernels_of_their_own_do_not_read_each_others_numbers() -> None:
    first, second = Recorded(), Recorded()
    chain = Chain(kernels=[first, first, second, second])
    assert_close(chain.gradients(), chain.reference()[:5])
    assert first.calls == second.calls == [(False, True), (True, False)]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_under_recompute_the_gradients_are_the_same_to_the_rounding_of_a_sum(
    block: int, use_reentrant: bool
) -> None:
    chain = Chain()
    loss = chain.loss(functools.partial(checkpoint, use_reentrant=use_reentrant), block)
    assert_close(chain.gradients(loss), Chain().gradients(), 3e-7)
    handed = sum(goes_down for _, goes_down in chain.recorded.calls)
    # A block that is recomputed begins with a leaf if it has a backward pass of its own.
    assert handed == (4 - 4 // block if use_reentrant else 3)
    assert len(chain.recorded.calls) == 4


def test_a_state_whose_gradient_is_asked_for_gets_all_of_it_and_nothing_stays_for_the_next_pass() -> None:
    chain = Chain()
    loss = chain.loss()
    expected = chain.reference()
    whole = chain.gradients(loss, retain_graph=True)
    for number in (3, 2, 1, 0):
        # Its own node, if it has one, is below: the requested gradient is above it.
        own = torch.autograd.grad(loss, chain.states[number], retain_graph=True)[0]
        at_node = Chain((*[0.0] * number, *chain.factors[number:]))
        at_node.token_weights = chain.token_weights
        assert_close([own], [at_node.reference()[5 + number]])
    together = torch.autograd.grad(loss, [*chain.leaves, chain.states[2]], retain_graph=True)
    assert_close(together[:5], whole, 3e-7)
    assert torch.equal(together[5], torch.autograd.grad(loss, chain.states[2], retain_graph=True)[0])
    torch.autograd.grad(loss, chain.scales[3], retain_graph=True)
    assert all(map(torch.equal, chain.gradients(loss), whole))
    assert_close(whole, expected[:5])


@pytest.mark.parametrize("look", ["retain_grad", "register_hook"])
def test_a_state_whose_gradient_is_kept_or_hooked_gets_all_of_it(look: str) -> None:
    chain, other = Chain(), Chain()
    loss = chain.loss()
    seen: list[torch.Tensor] = []
    chain.states[2].retain_grad() if look == "retain_grad" else chain.states[2].register_hook(seen.append)
    assert_close(chain.gradients(loss), chain.reference()[:5])
    found = [chain.states[2].grad] if look == "retain_grad" else seen
    assert_close(found, torch.autograd.grad(other.loss(), other.states[2]), 3e-7)  # type: ignore[arg-type]


def test_two_passes_through_one_graph_and_micro_batches_in_any_order_give_the_same_bits() -> None:
    chains = [Chain(seed=seed) for seed in (0, 1)]
    losses = [chain.loss() for chain in chains]
    first = [chain.gradients(loss, retain_graph=True) for chain, loss in zip(chains, losses, strict=True)]
    for number in (1, 0):
        assert all(map(torch.equal, chains[number].gradients(losses[number]), first[number]))


def test_two_layers_with_one_input_both_count() -> None:
    def gradients(kernels: Kernels, between: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        chain = Chain(kernels=[kernels] * 4)
        h = between(chain.layer(0, chain.x * 1.0))
        (chain.upstream * (chain.layer(1, h) + chain.layer(2, h))).sum().backward()
        return [leaf.grad for leaf in chain.leaves[:4]]  # type: ignore[misc]

    kernels = Recorded()
    assert_close(gradients(kernels, lambda h: h), gradients(Recorded(), torch.clone), 3e-7)
    assert kernels.calls == [(False, True), (False, False), (True, False)]


def test_gradients_that_an_aborted_pass_handed_down_are_not_used_by_the_next() -> None:
    chain = Chain()
    h = chain.layer(0, chain.x * 1.0)

    def fail(_: torch.Tensor) -> None:
        raise InterruptedError

    # Another way down, where the pass is aborted. It is older than the node above, so that node runs first.
    scaled = h + h * chain.scales[1]
    scaled.register_hook(fail)
    out = chain.layer(1, h) + scaled
    with pytest.raises(InterruptedError):
        out.sum().backward(retain_graph=True)
    assert chain.recorded.calls == [(False, True)]
    (got,) = torch.autograd.grad(h.sum(), chain.scales[0], retain_graph=True)
    h.sum().backward()
    alone = Chain()
    alone.layer(0, alone.x * 1.0).sum().backward()
    assert torch.equal(chain.scales[0].grad, alone.scales[0].grad)  # type: ignore[arg-type]
    assert torch.equal(got, alone.scales[0].grad)  # type: ignore[arg-type]


def test_the_state_above_is_held_no_longer_than_until_the_node_below_has_run() -> None:
    chain = Chain()
    alive: list[list[bool]] = []

    def look(_: object) -> None:
        alive.append([state() is not None for state in chain.raw])

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
            return h.view_as(h)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            look(grad)
            return grad

    h = chain.x * 1.0
    for number in range(4):
        scale = chain.scales[number]
        out = Look.apply(h) + h * scale
        chain.raw.append(weakref.ref(out))
        h = add_displacement_gradient(h, out, Strength(chain.recorded, chain.coefficient, 0.3))
    loss = (chain.upstream * h).sum()
    del h, out
    loss.backward()
    assert chain.recorded.calls == LINKED
    # When a layer's own backward pass runs, of the states above its output only the next one may be there.
    for number, states in zip((3, 2, 1, 0), alive, strict=True):
        assert not any(states[number + 1 :]), (number, states)
