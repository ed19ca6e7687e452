"""At every layout the loss, each layer's displacement and every parameter's gradient are the reference's."""

from __future__ import annotations

import itertools
import random
from importlib.metadata import version

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from layout_rows import MAX_RANKS, VALUES, few_rows, rows
from layout_step import on_ranks
from layout_table import listed_layouts
from packaging.version import Version

from jreg_megatron.selftest import toy
from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.selftest.toy import draw_batch, draw_weights, reference_step, shape_of

CORE, NEWEST = Version(version("megatron-core")), Version("0.19")


def runs_here(layout: Layout) -> bool:
    """Whether this version of Megatron-Core, perhaps an older one, itself computes the same."""
    if layout.model == "hybrid" and Version("0.18") > CORE:
        return False  # there was no HybridModel
    if layout.megatron_fsdp != "none" and NEWEST > CORE:
        return False  # in fp32 it calls the model without its hooks
    if layout.layers == "latent attention" and NEWEST > CORE:
        return False  # no hybrid model had it
    if layout.model == "mtp" and layout.per_token_loss and Version("0.17") > CORE:
        return False  # its loss was divided by other tokens
    is_0_18 = Version("0.18") <= CORE < Version("0.19")
    # In 0.18 recompute of a layer of multi-token prediction fails: unexpected keyword 'padding_mask'.
    return not (layout.model == "mtp" and layout.recompute in ("uniform", "block") and is_0_18)


FAST = rows() if CORE >= NEWEST else few_rows()  # the others: make test-versions ARGS="-m ''"
HERE = [
    pytest.param(layout, id=layout.name, marks=() if layout in FAST else pytest.mark.slow)
    for layout in rows()
    if runs_here(layout)
]


@pytest.mark.parametrize("layout", HERE)
def test_step_equals_the_reference_at(layout: Layout) -> None:
    difference, limit = on_ranks(layout)
    assert not difference.exceeds(limit), f"{difference} exceeds {limit}"


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.builds(Layout, **{name: st.sampled_from(values) for name, values in VALUES.items()}))
def test_step_equals_the_reference_at_a_random_layout(layout: Layout) -> None:
    assume(layout.world_size <= MAX_RANKS and layout.refusal() is None)
    difference, limit = on_ranks(layout)
    assert not difference.exceeds(limit), f"{layout}: {difference} exceeds {limit}"


def test_the_readme_lists_the_layouts_that_are_compared() -> None:
    assert listed_layouts() == [layout.name for layout in rows()]


def pairs_of(layout: Layout) -> set[tuple[tuple[str, object], ...]]:
    return set(itertools.combinations(((name, getattr(layout, name)) for name in VALUES), 2))


def test_every_pair_of_values_that_a_layout_can_have_is_in_some_row() -> None:
    covered = set().union(*map(pairs_of, rows()))
    draw = random.Random(0)
    for _ in range(30_000):
        layout = Layout(**{name: draw.choice(values) for name, values in VALUES.items()})
        if layout.world_size <= MAX_RANKS and layout.refusal() is None:
            assert pairs_of(layout) <= covered


def test_the_regularizers_gradient_is_as_large_as_cross_entropys_and_the_model_jumps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Guards the tests above: a penalty lost in the digits would prove nothing.
    layout = Layout()
    weights, batch = draw_weights(shape_of(layout)), draw_batch(masked=False)
    step = reference_step(layout, weights, batch, torch.float64)
    monkeypatch.setattr(toy, "COEFF", 0.0)
    plain = reference_step(layout, weights, batch, torch.float64)
    for (name, place, whole), (*_, without) in zip(step.gradients, plain.gradients, strict=True):
        if name.startswith("decoder.layers."):
            assert (whole - without).norm() > 0.1 * without.norm(), (name, place)
    assert step.jump_rate > 1
    assert step.displacement.diff().abs().min() > 1e-3
