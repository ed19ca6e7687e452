"""Attention of other kinds without Transformer Engine: loss, displacement and gradient are a reference's."""

from __future__ import annotations

import pytest
from attention_step import KINDS, on_ranks

from jreg_megatron.selftest.layouts import Layout


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, pipeline=2, recompute="uniform"),
        Layout(tensor=2, sequence_parallel=True, context=2, distributed_optimizer=True),
    ],
    ids=lambda layout: layout.name,
)
def test_latent_and_window_attention_give_the_references_step_at(layout: Layout) -> None:
    for kind, (difference, limit) in on_ranks(layout, tuple(KINDS)).items():
        assert not difference.exceeds(limit), f"{kind}: {difference} exceeds {limit}"
