"""LET: the gradient of the teacher's pull at every layout, its schedule, its teacher, and what it refuses."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_function
from small_models import small_model

from jreg_megatron import LETConfig, attach
from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.selftest.toy import ITERATION, VOCABULARY

STOP = 12
COEFF = 20.0
"""So strong that the teacher's pull is about as large as cross-entropy's gradient."""


def save_teacher(folder: Path, vocabulary: int, **more: Any) -> Path:
    """A tiny Llama, narrower than the models that are trained here."""
    small_model("llama", hidden_size=24, vocab_size=vocabulary, **more).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), VOCABULARY)


# -- one step at a layout --------------------------------------------------------------------------

SHARDED = {"tensor": 2, "sequence_parallel": True}
UNMASKED = {"masked": True, "tokens": "unmasked"}
LAYOUTS: dict[int, list[tuple[int, Layout]]] = {
    1: [
        (2, Layout()),
        (4, Layout(num_microbatches=4, **UNMASKED)),
        (3, Layout(model="hybrid", recompute="uniform")),
        (2, Layout(precision="fp16")),
    ],
    2: [
        (2, Layout(tensor=2, masked=True, per_token_loss=True)),
        (1, Layout(pipeline=2, recompute="uniform")),
        (1, Layout(pipeline=2, virtual=2, recompute="block", final_state="post_norm")),
        (2, Layout(model="moe", data=2, expert=2, distributed_optimizer=True)),
        (3, Layout(context=2, recompute="selective", **UNMASKED)),
        (2, Layout(data=2, fsdp=True)),
    ],
    4: [
        (3, Layout(**SHARDED, data=2, distributed_optimizer=True, recompute="uniform")),
        (2, Layout(**SHARDED, context=2, **UNMASKED, per_token_loss=True)),
        (2, Layout(**SHARDED, pipeline=2, padded=True, tokens="unmasked")),
    ],
}
"""By the number of ranks: the layer that learns from the teacher, and the layout."""


def compares_steps(number_of_ranks: int, teacher: Path) -> list[tuple[str, float, float, float]]:
    """Of each layout: its name, how far the gradient and the logged loss are from the reference, how far
    they may be."""
    torch.set_num_threads(1)
    return [_compare(layer, layout, teacher) for layer, layout in LAYOUTS[number_of_ranks]]


def _compare(layer: int, layout: Layout, teacher: Path) -> tuple[str, float, float, float]:
    import torch.distributed as dist

    from jreg_megatron.selftest import step, toy
    from jreg_megatron.selftest.compare import _expected, difference

    config = LETConfig(
        teacher=str(teacher), coeff=COEFF, layer=layer, stop_iterations=STOP, tokens=layout.tokens
    )
    handles: list[Any] = []

    def attached(*args: Any, **named: Any) -> Any:
        handles.append(attach(*args, **named))
        return handles[-1]

    step.settings_of = lambda of: [*toy.settings_of(of), config]  # type: ignore[attr-defined]
    step.attach = attached  # type: ignore[attr-defined]
    weights = toy.draw_weights(toy.shape_of(layout))
    batch = toy.draw_batch(layout.masked, layout.padded)
    exact, limit = _expected(layout, weights, batch)
    loss = add_reference(exact, layout, weights, batch, layer, teacher)
    found = step.run_step(layout, weights, batch, "local", timedelta(minutes=1))
    metrics = handles[0].reduce_training_metrics()
    assert metrics.let_coefficient == pytest.approx(COEFF * (STOP - ITERATION) / STOP)
    apart = difference(found, exact, dist.all_reduce)
    return layout.name, apart.gradient, abs(metrics.let_loss / loss - 1), limit.gradient


def add_reference(exact: Any, layout: Layout, weights: Any, batch: Any, layer: int, teacher: Path) -> float:
    """Add LET's gradient to that of the reference, in one process in float64; returns the mean of -cos."""
    from transformers import AutoModelForCausalLM

    from jreg_megatron.selftest import toy
    from jreg_megatron.selftest.reference import ReferenceLlama

    model = ReferenceLlama(toy.shape_of(layout), weights, torch.float64)
    state = model.states(batch.tokens)[layer]
    with torch.no_grad():
        big = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
        last = big(batch.tokens, output_hidden_states=True).hidden_states[-1]
        target = torch.nn.functional.interpolate(last, size=state.shape[-1], mode="linear")
    away = -torch.nn.functional.cosine_similarity(state, target, dim=-1)
    counted = torch.ones_like(away)
    if layout.tokens == "unmasked":
        counted = (~batch.padding_mask if layout.padded else batch.loss_mask).double()
        share = toy._token_shares(layout, counted, counted)
    else:
        share = counted / (batch.loss_mask.sum() if layout.per_token_loss else counted.numel())
    (COEFF * (STOP - ITERATION) / STOP * (share * away).sum()).backward()
    for name, place, gradient in exact.gradients:
        if (added := model.parameters[name].grad) is not None:
            gradient.add_(added[place])
    return float((away.detach() * counted).sum() / counted.sum())


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_with_jreg_the_gradient_is_that_of_the_loss_at_every_layout_on(ranks: int, teacher: Path) -> None:
    for name, gradient, loss, limit in run_function(compares_steps, ranks, ranks, teacher)[0]:
        print(f"{name}: gradient {gradient:.1e}, loss {loss:.1e}, limit {limit:.1e}")
        assert gradient <= limit, f"{name}: {gradient:.1e}"
        assert loss <= limit, f"{name}: {loss:.1e}"
