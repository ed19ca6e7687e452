"""In CPU mode layers of other kinds give a reference's loss, displacement and gradient too."""

from __future__ import annotations

from dataclasses import replace

import pytest
from variant_step import KINDS, on_ranks

from jreg_megatron.selftest.layouts import Layout

ATTENTION = tuple(kind for kind in KINDS if "latent" in kind or "window" in kind)
TP_SP_CP = Layout(tensor=2, sequence_parallel=True, context=2, distributed_optimizer=True)
TP_SP_EP = Layout(tensor=2, sequence_parallel=True, data=2, model="moe", expert=2)


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        (Layout(tensor=2, pipeline=2, recompute="uniform"), (*ATTENTION, "fixed attenuation")),
        (TP_SP_CP, (*ATTENTION, "norms recomputed", "fixed attenuation")),
        (TP_SP_EP, ("tokens exchanged",)),
        (
            replace(TP_SP_CP, pipeline=2, per_token_loss=True, masked=True),
            ("MuP", "learnable sinks", "fixed sinks"),
        ),
        (Layout(pipeline=2, recompute="uniform", final_state="post_norm"), ("Liger",)),
        (Layout(pipeline=2, precision="bf16"), ("fp32 residual",)),
        (Layout(data=4, fsdp=True), ("another's FSDP2",)),
        (Layout(data=4, fsdp=True, precision="bf16"), ("another's FSDP2",)),
    ],
    ids=lambda value: value.name if isinstance(value, Layout) else "",
)
def test_step_equals_the_reference_at(layout: Layout, kinds: tuple[str, ...]) -> None:
    for kind, (difference, limit) in on_ranks(layout, kinds).items():
        print(f"{kind}: gradient {difference.gradient:.1e}")
        assert not difference.exceeds(limit), f"{kind}: {difference} exceeds {limit}"
