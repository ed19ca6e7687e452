"""Low-rank adapters on a frozen model, as Megatron-Bridge trains it: their gradients beside a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import torch
from harness import run_function
from torch import Tensor, nn

from jreg_megatron import JRegConfig, attach
from jreg_megatron.selftest.layouts import LENGTH, NUM_LAYERS, Layout
from jreg_megatron.selftest.reference import ReferenceLlama, displacements
from jreg_megatron.selftest.step import build
from jreg_megatron.selftest.toy import ALPHA, COEFF, Batch, draw_batch, draw_weights, shape_of

RANK, SCALE = 3, 2.0
LINEARS = (
    *("self_attention.linear_qkv", "self_attention.linear_proj"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
ALL = tuple(range(1, NUM_LAYERS + 1))

Adapter = tuple[int, str]
"""A layer's number and the linear layer in it."""
Gradients = dict[Adapter, tuple[Tensor, Tensor]]
"""Of an adapter's matrices ``[RANK, in]`` and ``[out, RANK]``."""


# -- the model -----------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """Adds ``SCALE * B A x`` to the output of a linear layer of Megatron, as Bridge's ``LoRALinear``."""

    def __init__(self, to_wrap: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.to_wrap = to_wrap
        self.adapter = nn.ParameterDict({"linear_in": down, "linear_out": up})

    def forward(self, x: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = self.to_wrap(x, *given, **named)
        return output + SCALE * (x @ self.adapter["linear_in"].T) @ self.adapter["linear_out"].T, bias


def draw_adapter(number: int, linear: str, sizes: torch.Size) -> tuple[Tensor, Tensor]:
    """Its matrices, of which neither is 0."""
    generator = torch.Generator().manual_seed(100 * number + LINEARS.index(linear))
    out, into = sizes
    return 0.2 * torch.randn(RANK, into, generator=generator), 0.2 * torch.randn(
        out, RANK, generator=generator
    )


def adapt(chunk: Any, adapted: Sequence[int]) -> None:
    """Freeze a chunk and put adapters into some of its layers, with the patch that Bridge then needs."""
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for linear in LINEARS if layer.layer_number in adapted else ():
            inner = layer.get_submodule(linear)
            matrices = draw_adapter(layer.layer_number, linear, inner.weight.shape)
            layer.set_submodule(linear, LowRank(inner, *matrices))
    if chunk.config.recompute_method is not None:
        let_checkpoints_go_backward(chunk.decoder)


def let_checkpoints_go_backward(block: Any) -> None:
    """As ``maybe_enable_recompute_inputs_grad`` of Bridge 0.6.2: torch recomputes nothing where no input
    needs a gradient."""
    forward = block.forward

    @wraps(forward)
    def patched(hidden_states: Tensor, *given: Any, **named: Any) -> Any:
        if torch.is_tensor(hidden_states) and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_(True)
        return forward(hidden_states, *given, **named)

    block.forward = patched


# -- a step --------------------------------------------------------------------------------------------


@dataclass
class Step:
    """The results of a step on a rank."""

    gradients: Gradients
    displacement: list[float]


Adapt = Callable[[Any, Sequence[int]], None]
"""Freezes a chunk and puts adapters into the layers of these numbers."""


def step(layout: Layout, adapted: Sequence[int], adapt: Adapt) -> Step:
    """A training step of Megatron's schedule with JREG."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=layout.pipeline)
    model_parallel_cuda_manual_seed(1)
    config, (chunk,), _ = build(layout, draw_weights(shape_of(layout)), "local")
    adapt(chunk, adapted)
    config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), chunk)
    settings = JRegConfig(coeff=COEFF, alpha=ALPHA, final_state=layout.final_state)
    handle = attach([model], settings, num_microbatches=layout.num_microbatches)
    batch = draw_batch(masked=False)

    def parts() -> Iterator[Batch]:
        for number in range(layout.num_microbatches):
            yield batch.part(layout, 0, number, 0)

    def forward(parts: Iterator[Batch], model: Any) -> Any:
        part = next(parts)
        positions = torch.arange(LENGTH).expand_as(part.tokens)
        return model(part.tokens, positions, None, labels=part.labels), lambda losses: (losses.mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=parts(),
        model=model,
        num_microbatches=layout.num_microbatches,
        seq_length=LENGTH,
        micro_batch_size=layout.micro_batch_size,
        forward_only=False,
    )
    metrics = handle.reduce_training_metrics()
    assert metrics is not None, "JREG saw no state of some layer"
    parallel_state.destroy_model_parallel()
    gradients = {
        (layer.layer_number, linear): tuple(
            parameter.main_grad
            for name, parameter in layer.get_submodule(linear).named_parameters()
            if ".adapter." in f".{name}"
        )
        for layer in chunk.decoder.layers
        for linear in LINEARS
        if layer.layer_number in adapted
    }
    free = sum(parameter.requires_grad for parameter in chunk.parameters())
    assert free == 2 * len(gradients), "all else is frozen"
    return Step(gradients, metrics.displacement.tolist())  # type: ignore[arg-type]


def reference(layout: Layout, adapted: Sequence[int], coeff: float) -> Step:
    """The same step written out in float64 in one process, of a model that keeps every state."""
    shape, wide = shape_of(layout), torch.float64
    weights, batch = draw_weights(shape), draw_batch(masked=False)
    model = ReferenceLlama(shape, weights, wide)
    adapters = {}
    for linear in LINEARS:
        name = f"decoder.layers.{linear}.weight"
        rows = list(weights[name].to(wide))
        for number in adapted:
            matrices = draw_adapter(number, linear, rows[number - 1].shape)
            down, up = adapters[number, linear] = tuple(x.to(wide).requires_grad_() for x in matrices)
            rows[number - 1] = rows[number - 1] + SCALE * up @ down
        model.parameters[name] = torch.stack(rows)
    states = model.states(batch.tokens)
    normed = model.final_norm(states[-1])
    psi = displacements([*states[:-1], normed] if layout.final_state == "post_norm" else states).mean((1, 2))
    losses = model.token_losses(normed, batch.labels)
    shares = (ALPHA * torch.arange(1, shape.num_layers + 1, dtype=wide)).softmax(0)
    (losses.mean() + coeff * shares @ psi).backward()
    gradients = {key: (down.grad, up.grad) for key, (down, up) in adapters.items()}
    return Step(gradients, psi.tolist())  # type: ignore[arg-type]


def distance(found: Gradients, exact: Gradients) -> float:
    """The largest relative difference of a matrix."""
    return max(
        float((own - wanted).norm() / wanted.norm())
        for key in exact
        for own, wanted in zip(found[key], exact[key], strict=True)
    )


CASES = [
    (Layout(), ALL),
    (Layout(), ALL[-2:]),
    (Layout(recompute="uniform"), ALL),
    (Layout(recompute="block"), ALL),
    (Layout(recompute="uniform"), ALL[-2:]),
    (Layout(final_state="post_norm"), ALL[-1:]),
    (Layout(recompute="uniform", final_state="post_norm"), ALL[-1:]),
    (Layout(recompute="block", final_state="post_norm"), ALL),
    (Layout(pipeline=2, num_microbatches=4), ALL),
    (Layout(pipeline=2, num_microbatches=4, recompute="uniform"), ALL),
]


def steps(cases: Sequence[tuple[Layout, Sequence[int]]], adapt: Adapt) -> list[Step]:
    return [step(layout, adapted, adapt) for layout, adapted in cases]


def assert_equal_the_reference(ranks: int, adapt: Adapt) -> None:
    """Compare all cases of so many ranks, with the adapters that ``adapt`` puts in."""
    cases = [case for case in CASES if case[0].world_size == ranks]
    found = run_function(steps, ranks, cases, adapt)
    for (layout, adapted), of_ranks in zip(cases, zip(*found, strict=True), strict=True):
        name = f"{layout.name}, adapters in {adapted}"
        exact, without = (reference(layout, adapted, coeff) for coeff in (COEFF, 0.0))
        gradients = {key: value for step in of_ranks for key, value in step.gradients.items()}
        assert gradients.keys() == exact.gradients.keys(), name
        assert distance(without.gradients, exact.gradients) > 0.1, f"{name}: JREG weighs"
        assert distance(gradients, exact.gradients) < 1e-5, name
        for step_of_rank in of_ranks:
            assert step_of_rank.displacement == pytest.approx(exact.displacement, rel=1e-5), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_on_a_frozen_model_get_the_references_gradients(ranks: int) -> None:
    assert_equal_the_reference(ranks, adapt)
