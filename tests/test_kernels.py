"""Triton's kernels and the torch path give the numbers of float64 autograd on the textbook formula.

The kernels run in Triton's interpreter, see ``interpreted.py``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interpreted import InterpretedKernels, call_guarded, chosen, in_interpreter
from torch import Tensor

from jreg_megatron import UserError
from jreg_megatron.methods.jreg.kernels import Above, Gradients, Kernels, Rows, choose, eager

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = "random near parallel opposite tiny huge tiny_in zero_in zero_out zero_both zero_above nan".split()
SMALL_TILE = (2, 16)  # rows and columns: rows wider than 16 take the way of those wider than 8192
TRITON = InterpretedKernels()

both_ways = pytest.mark.parametrize("kernels", [eager.KERNELS, TRITON], ids=["torch", "triton"])


@dataclass
class Case:
    """The arguments of the kernels; ``strength`` is coefficient times factor."""

    h_in: Tensor
    h_out: Tensor
    grad_out: Tensor
    coefficient: float = 0.7
    factor: float = 0.3
    weights: Tensor | None = None
    needs_grad_in: bool = True
    h_above: Tensor | None = None
    """The output of a layer above, which hands its part down; its factor and weights are others."""
    weights_above: Tensor | None = None
    factor_above: float = 0.2

    def handed(self, kernels: Kernels) -> Above | None:
        if self.h_above is None:
            return None
        coefficient = torch.tensor([self.coefficient])
        given_ = (self.h_out, self.h_above, self.h_above, coefficient, self.factor_above, self.weights_above)
        found = kernels.gradients(*given_, hands_down=True)
        assert found.grad_in is None
        return found.handed

    def gradients(self, kernels: Kernels) -> tuple[Tensor | None, Tensor, Tensor]:
        coefficient = torch.tensor([self.coefficient])
        given_ = (self.h_in, self.h_out, self.grad_out, coefficient, self.factor, self.weights)
        grad_in, total, psi, handed = kernels.gradients(
            *given_, needs_grad_in=self.needs_grad_in, above=self.handed(kernels)
        )
        assert psi is not None and handed is None
        return grad_in, total, psi


def make_case(
    kinds: list[str],
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    layouts: tuple[str, str, str] = ("contiguous",) * 3,
    seed: int = 0,
    with_above: bool = False,
    **rest: Any,
) -> Case:
    """States of ``shape`` whose row number r is of kind ``kinds[r % len(kinds)]``.

    The state of the layer above has the type and the layout of ``h_in``.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = (-1, shape[-1])
    a, turned, grad, turned_above = (
        torch.randn(shape, generator=generator, dtype=FP64).reshape(rows) for _ in range(4)
    )
    b = a + turned
    extreme = 1e2 if FP16 in dtypes else 1e18  # representable in the type
    for row in range(a.shape[0]):
        kind = kinds[row % len(kinds)]
        factors = {"near": (1, 1), "tiny": (1 / extreme, 1 / extreme), "huge": (extreme, extreme)}
        factors |= {"tiny_in": (1 / extreme, 1), "zero_in": (0, 1), "zero_out": (1, 0), "zero_both": (0, 0)}
        if kind in ("tiny", "huge", "tiny_in"):
            a[row], b[row] = (h[row] / h[row].norm() for h in (a, b))
        if kind == "near":
            b[row] = a[row] + 1e-3 * turned[row]
        if kind in ("parallel", "opposite"):
            b[row] = a[row] * (2 if kind == "parallel" else -0.5)
        for h, factor in zip((a, b), factors.get(kind, (1, 1)), strict=True):
            h[row] *= factor
        if kind == "nan":
            (a if row % 2 else b)[row, -1] = torch.nan
    size = b.norm(dim=-1, keepdim=True) / b.shape[-1] ** 0.5
    above = b + torch.where(size > 0, size, 1.0) * turned_above
    for row in range(a.shape[0]):
        kind = kinds[row % len(kinds)]
        if kind in ("near", "zero_above", "nan"):
            above[row] = {"near": 1.001 * b[row] + 1e-3 * turned_above[row], "nan": turned_above[row]}.get(
                kind, 0
            )
    dtypes_of_all = (*dtypes, dtypes[1], dtypes[0])
    states = [
        laid_out(h.reshape(shape).to(dtype), layout)
        for h, dtype, layout in zip((a, b, grad, above), dtypes_of_all, (*layouts, layouts[0]), strict=True)
    ]
    return Case(*states[:3], h_above=states[3] if with_above else None, **rest)


def laid_out(h: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides. The memory between them holds NaN."""
    if layout == "transposed" and h.dim() > 2:
        return h.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        around = torch.full([size + 3 for size in h.shape], torch.nan, dtype=h.dtype)
        inner = around[tuple(slice(1, size + 1) for size in h.shape)]
        return inner.copy_(h)
    if layout == "every second":
        around = torch.full([*h.shape[:-1], 2 * h.shape[-1]], torch.nan, dtype=h.dtype)
        return around[..., ::2].copy_(h)
    if layout == "expanded" and h.numel():  # as the gradient of a sum comes
        return h.flatten()[0].expand(h.shape)
    return h


def reference(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Both gradients and Psi: float64 autograd on the textbook formula; no direction, no gradient."""
    grad_in, grad, psi = reference_of_layer(
        case.h_in, case.h_out, case.coefficient, case.factor, case.weights
    )
    total = case.grad_out.double() + grad
    if case.h_above is not None:
        strength = case.coefficient, case.factor_above, case.weights_above
        total = total + reference_of_layer(case.h_out, case.h_above, *strength)[0]
    return grad_in, total, psi


def reference_of_layer(
    h_in: Tensor, h_out: Tensor, coefficient: float, factor: float, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (h.double().detach().clone().requires_grad_() for h in (h_in, h_out))
    psi = (1 - F.cosine_similarity(a, b, dim=-1, eps=1e-100)) / 2
    weighted = psi if weights is None else psi * weights.double()
    strength = float(torch.tensor(coefficient)) * factor
    grads = torch.autograd.grad(strength * weighted.sum(), (a, b))
    has_no_direction = (a == 0).all(-1) | (b == 0).all(-1)
    grad_in, grad = (grad.masked_fill(has_no_direction.unsqueeze(-1), 0.0) for grad in grads)
    return grad_in, grad, psi.detach().masked_fill(has_no_direction, 0.5)


def assert_right(case: Case, got: tuple[Tensor | None, Tensor, Tensor], truncated: bool = False) -> None:
    """Every number is right up to the error of computing in float32 (float64) and one rounding.

    A gradient is a difference of two unit vectors times ``strength / norm``. In float32 the difference is
    right to 1e-6. Psi is its square, so the error of Psi shrinks with it. ``truncated``: the interpreter
    truncates bfloat16, but a GPU rounds (``test_compiled_kernels.py`` checks that it does).
    """
    grad_in, total, psi = got
    is_double = FP64 in (case.h_in.dtype, case.h_out.dtype)
    unit, least = (1e-14, 2e-15) if is_double else (1e-6, 1e-13)
    expected_in, expected_total, expected_psi = reference(case)
    assert psi.dtype is (FP64 if is_double else FP32) and psi.shape == case.h_in.shape[:-1]
    assert_within(psi, expected_psi, unit * expected_psi.sqrt() + least)
    ones = torch.ones_like(expected_psi)
    strength = abs(case.coefficient * case.factor) * (ones if case.weights is None else case.weights.double())
    both = strength
    if case.h_above is not None:
        weights = ones if case.weights_above is None else case.weights_above.double()
        both = strength + abs(case.coefficient * case.factor_above) * weights
    pairs = [(total, expected_total, case.h_out, both)]
    assert (grad_in is not None) is case.needs_grad_in
    if grad_in is not None:
        pairs.append((grad_in, expected_in, case.h_in, strength))
    for grad, expected, state, of_state in pairs:
        assert grad.dtype is state.dtype and grad.shape == state.shape
        norm = state.double().norm(dim=-1)
        of_units = unit * (of_state / norm).masked_fill(norm == 0, 0.0).unsqueeze(-1)
        type_ = torch.finfo(grad.dtype)
        # In float32 torch rounds with each term that it adds: two of the layer, and one of that above.
        of_fp32 = 1.0 if case.h_above is None else 1.5
        units = {BF16: 1.001 if truncated else 0.501, FP16: 0.501, FP32: of_fp32, FP64: 2.0}[grad.dtype]
        rounding = units * (type_.eps * expected.abs() + type_.smallest_normal * type_.eps)
        assert_within(grad, expected, of_units + rounding)


def assert_within(got: Tensor, expected: Tensor, error: Tensor) -> None:
    """NaN where the reference has it, and nowhere else."""
    assert torch.equal(got.isnan(), expected.isnan())
    excess = ((got.double() - expected).abs() - error).nan_to_num(nan=-1.0)
    assert bool((excess <= 0).all()), f"off by {excess.max():.2g} more than allowed"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width = draw(st.sampled_from([1, 2, 3, 5, 16, 17, 64, 100, 130]))
    shape = draw(
        st.one_of(
            st.just((width,)),
            st.tuples(st.integers(0, 12), st.just(width)),
            st.tuples(st.integers(0, 5), st.integers(1, 4), st.just(width)),
            st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.just(width)),
        )
    )
    types = st.sampled_from([BF16, FP16, FP32, FP32, FP64])
    dtype = draw(types)
    dtypes = (dtype, draw(st.one_of(st.just(dtype), types)))
    assume(set(dtypes) != {BF16, FP64})  # the interpreter knows no way from one to the other
    layouts = st.sampled_from(["contiguous", "transposed", "sliced", "every second"])
    seed = draw(st.integers(0, 2**32))
    weights = None
    if draw(st.booleans()):
        weights = (
            torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed)).mul(2).round(decimals=1)
        )
        weights = (
            laid_out(weights, draw(st.sampled_from(["contiguous", "sliced"]))) if weights.dim() else weights
        )
    with_above = draw(st.booleans())
    weights_above = weights.flip(0) if with_above and weights is not None and weights.dim() else None
    return make_case(
        draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8)),
        shape,
        dtypes,
        (draw(layouts), draw(layouts), draw(st.one_of(layouts, st.just("expanded")))),
        seed,
        coefficient=draw(st.sampled_from([0.0, 0.7, -0.3])),
        factor=draw(st.sampled_from([0.3, 1.0])),
        weights=weights,
        needs_grad_in=draw(st.booleans()),
        with_above=with_above,
        weights_above=weights_above,
    )


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_the_torch_path_gives_the_numbers_of_float64_autograd(case: Case) -> None:
    assert_right(case, case.gradients(eager.KERNELS))


@settings(max_examples=40, deadline=None)
@given(case=cases(), tile=st.sampled_from([None, SMALL_TILE, (4, 4)]))
def test_the_triton_kernels_give_the_numbers_of_float64_autograd(
    case: Case, tile: tuple[int, int] | None
) -> None:
    assert_right(case, case.gradients(InterpretedKernels(tile)), truncated=True)


@both_ways
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, BF16), (FP32, FP32)], ids=str)
@pytest.mark.parametrize(
    "width",
    [768, 8193, 12288, *(pytest.param(width, marks=pytest.mark.slow) for width in (3200, 4160, 8192))],
)
def test_wide_rows_of_every_kind_are_right(
    kernels: Kernels, width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = make_case(KINDS, (len(KINDS), width), dtypes, with_above=True)
    assert_right(case, case.gradients(kernels), truncated=kernels is TRITON)


@both_ways
@pytest.mark.parametrize(("rows", "width"), [(2100, 1), (700, 3), (33, 65)])
def test_more_rows_than_a_tile_holds_are_right(kernels: Kernels, rows: int, width: int) -> None:
    case = make_case(KINDS, (rows, width), with_above=True)
    assert_right(case, case.gradients(kernels))


@both_ways
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "every second"])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (5, 3, 24), (0, 3, 24), (0, 24)], ids=str)
def test_the_displacement_alone_is_that_which_comes_with_the_gradients(
    kernels: Kernels, shape: tuple[int, ...], layout: str
) -> None:
    if isinstance(kernels, InterpretedKernels) and layout == "sliced":
        kernels = InterpretedKernels(SMALL_TILE)
    case = make_case(KINDS, shape, layouts=(layout, "contiguous", layout))
    psi = kernels.displacement(case.h_in, case.h_out)
    assert psi.shape == shape[:-1]
    other = case.gradients(kernels)[2].double()
    # The torch path takes another way to the same number, as it may use up its copies.
    assert_within(psi, other, 1e-6 * other.sqrt() + 1e-13 if kernels is eager.KERNELS else 0 * other)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nan"])
def test_both_ways_agree_to_1e_6_or_the_types_rounding(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    case = make_case([kind], (3, 2, 192), dtypes)
    ours, torchs = case.gradients(TRITON), case.gradients(eager.KERNELS)
    # The bound for a row of norm 1. Of a parallel row's gradient only rounding is left.
    strength = case.coefficient * case.factor
    for got, expected, state in zip(ours, torchs, (case.h_in, case.h_out, None), strict=True):
        assert got is not None and expected is not None and got.dtype is expected.dtype
        norm = torch.ones(1) if state is None else state.double().norm(dim=-1, keepdim=True)
        of_units = (strength / norm).masked_fill(norm == 0, 0.0)
        type_ = torch.finfo(got.dtype)
        error = 1e-6 * of_units + type_.eps * (expected.double().abs() + type_.smallest_normal)
        assert_within(got, expected.double(), error)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_a_layer_that_changes_nothing_has_displacement_zero_and_no_gradient_exactly(
    dtype: torch.dtype,
) -> None:
    state, grad_out = (torch.randn(5, 100).to(dtype) for _ in range(2))
    case = Case(state, state, grad_out)
    grad_in, total, psi = case.gradients(TRITON)
    assert psi is not None and (psi == 0).all() and grad_in is not None and (grad_in == 0).all()
    assert torch.equal(total, grad_out)
    assert_right(case, case.gradients(eager.KERNELS))  # up to the rounding of a unit vector


@both_ways
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("width", [16, 40])
def test_rows_of_norm_zero_have_displacement_a_half_and_no_gradient_exactly(
    kernels: Kernels, dtype: torch.dtype, width: int
) -> None:
    if isinstance(kernels, InterpretedKernels):
        kernels = InterpretedKernels(SMALL_TILE)
    case = make_case(["zero_in", "zero_out", "zero_both"], (6, width), (dtype, dtype))
    grad_in, total, psi = case.gradients(kernels)
    assert (psi == 0.5).all() and grad_in is not None and (grad_in == 0).all()
    assert torch.equal(total, case.grad_out)


@both_ways
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_nan_or_inf_has_nan_and_leaves_every_other_row_as_it_was_to_the_bit(
    kernels: Kernels, value: float
) -> None:
    case = make_case(["random"], (8, 50))
    clean = case.gradients(kernels)
    case.h_in[2, 7] = case.h_out[5, 0] = value
    others = [0, 1, 3, 4, 6, 7]
    for before, after in zip(clean, case.gradients(kernels), strict=True):
        assert before is not None and after is not None
        assert torch.equal(before[others], after[others])
        assert after[[2, 5]].isnan().all()


@both_ways
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_at_coefficient_zero_the_incoming_gradient_passes_unchanged(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    case = make_case(["random", "tiny", "huge"], (6, 50), (dtype, dtype), coefficient=0.0)
    grad_in, total, _ = case.gradients(kernels)
    assert grad_in is not None and (grad_in == 0).all()
    assert torch.equal(total, case.grad_out)


@both_ways
def test_without_the_inputs_gradient_the_rest_is_the_same_to_the_bit(kernels: Kernels) -> None:
    if isinstance(kernels, InterpretedKernels):
        kernels = InterpretedKernels(SMALL_TILE)
    for width in (16, 50):
        case = make_case(KINDS[:-1], (10, width))
        _, *whole = case.gradients(kernels)
        case.needs_grad_in = False
        none, *rest = case.gradients(kernels)
        assert none is None
        assert all(map(torch.equal, whole, rest))


@both_ways
@pytest.mark.parametrize("width", [16, 50])
def test_where_some_rows_have_a_gradient_the_others_stay_as_they_were_to_the_bit(
    kernels: Kernels, width: int
) -> None:
    if isinstance(kernels, InterpretedKernels):
        kernels = InterpretedKernels(SMALL_TILE)
    layouts = ("transposed", "sliced", "contiguous")
    case = make_case(KINDS[:-1], (7, 2, width), layouts=layouts, with_above=True)
    assert case.h_above is not None
    upper, lower = (case.h_out, case.h_above, case.grad_out), (case.h_in, case.h_out, case.grad_out)
    chosen = torch.tensor([0.0, 1, 0, 0, 1, 0, 0])[:, None].expand(7, 2)
    drawn = torch.rand(7, 2, generator=torch.Generator().manual_seed(1))

    def found(weights: Tensor | None, rows: Rows | None) -> tuple[Gradients, Gradients]:
        how = torch.tensor([case.coefficient]), case.factor, weights
        above = kernels.gradients(*upper, *how, hands_down=True, rows=rows)
        return above, kernels.gradients(*lower, *how, above=above.handed, rows=rows)

    for weights in (None, drawn):
        # A row of weight 0 has no gradient either.
        expected = found(chosen if weights is None else chosen * weights, None)
        for got, wanted in zip(found(weights, Rows(3, 1)), expected, strict=True):
            assert got.psi is None
            torch.testing.assert_close(got.total, wanted.total, rtol=1e-6, atol=0)
            assert torch.equal(got.total[chosen == 0], case.grad_out[chosen == 0])
        assert got.grad_in is not None and wanted.grad_in is not None
        torch.testing.assert_close(got.grad_in, wanted.grad_in, rtol=1e-6, atol=0)
        assert (got.grad_in[chosen == 0] == 0).all() and (got.grad_in[chosen == 1] != 0).any()


@both_ways
def test_two_runs_give_the_same_bits(kernels: Kernels) -> None:
    case = make_case(KINDS[:-1], (30, 100), (BF16, FP32))
    runs = [case.gradients(kernels) for _ in range(2)]
    assert all(map(torch.equal, *runs))  # type: ignore[arg-type]


@both_ways
@pytest.mark.parametrize("columns", [2, 4])
def test_gradcheck_of_a_loss_made_of_both_kernels(kernels: Kernels, columns: int) -> None:
    if isinstance(kernels, InterpretedKernels):
        kernels = InterpretedKernels((2, columns))
    weights = torch.tensor([[0.5, 1.0], [2.0, 0.0]], dtype=FP64)

    class MeanDisplacement(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h_in: Tensor, h_out: Tensor) -> Tensor:
            ctx.save_for_backward(h_in, h_out)
            return 0.7 * (weights * kernels.displacement(h_in, h_out)).sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
            h_in, h_out = ctx.saved_tensors
            nothing = torch.zeros_like(h_out)
            return kernels.gradients(h_in, h_out, nothing, grad.reshape(1), 0.7, weights)[:2]

    torch.manual_seed(0)
    states = [torch.randn(2, 2, 3, dtype=FP64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(MeanDisplacement.apply, states)


@pytest.mark.parametrize(
    ("width", "tile"), [(1, None), (15, SMALL_TILE), (50, SMALL_TILE), (50, (8, 64))], ids=str
)
def test_no_kernel_writes_outside_of_its_rows_or_leaves_one_unwritten(
    width: int, tile: tuple[int, int] | None
) -> None:
    case = make_case(["random"], (7, width), (BF16, FP32), ("sliced", "sliced", "sliced"))
    states = (case.h_in, case.h_out)
    given_all = (*states, case.grad_out, torch.ones(1), 0.3)
    for method, given_, named, tensors in (
        ("displacement", states, {}, 1),
        ("gradients", given_all, {}, 3),
        ("gradients", given_all, {"needs_grad_in": False}, 2),
        ("gradients", given_all, {"hands_down": True}, 2),
    ):
        untouched, written = in_interpreter(call_guarded, tile, method, given_, named)
        assert untouched == written == [True] * tensors


@both_ways
def test_arguments_are_not_changed(kernels: Kernels) -> None:
    case = make_case(["random"], (2, 3, 20), weights=torch.rand(2, 3))
    assert case.weights is not None
    tensors = (case.h_in, case.h_out, case.grad_out, case.weights)
    before = [tensor.clone() for tensor in tensors]
    case.gradients(kernels)
    kernels.displacement(case.h_in, case.h_out)
    assert all(map(torch.equal, before, tensors))


def test_a_cpu_takes_the_torch_path_and_refuses_triton_in_one_line() -> None:
    cpu = torch.device("cpu")
    assert choose("auto", cpu, 64, BF16).name == choose("torch", cpu, 64, BF16).name == "torch"
    with pytest.raises(UserError, match=r"--jreg-kernels is 'triton', but .* cpu; use 'torch'"):
        choose("triton", cpu, 64, BF16)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("width", [64, 100])
def test_the_kernels_pass_the_check_before_a_training(width: int, dtype: torch.dtype) -> None:
    assert in_interpreter(chosen, "triton", width, dtype).startswith("triton ")


def test_without_triton_the_torch_path_is_taken_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jreg_megatron.methods.jreg.kernels.fused", None)
    monkeypatch.delattr("jreg_megatron.methods.jreg.kernels.fused", raising=False)
    name = choose("auto", torch.device("cuda"), 64, BF16).name
    assert name.startswith("torch, as Triton does not run here (ModuleNotFoundError")
    with pytest.raises(UserError, match=r"--jreg-kernels is 'triton', .*ModuleNotFoundError"):
        choose("triton", torch.device("cuda"), 64, BF16)
