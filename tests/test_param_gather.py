"""Parameters that are gathered while the step runs: a stand-in shows which ones were not waited for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from harness import run_function

from jreg_megatron.selftest.compare import Comparison, compare_step
from jreg_megatron.selftest.layouts import Layout

SHARDS: dict[str, Any] = {"data": 2, "distributed_optimizer": True}
EXPERTS: dict[str, Any] = {**SHARDS, "model": "moe", "expert": 2}
LAYOUTS = [
    Layout(**SHARDS, methods="all"),
    Layout(**EXPERTS, graphs="attn moe_router"),
    Layout(**SHARDS, graphs="layers", methods="blocks"),
    Layout(**SHARDS, graphs="attn", methods="blocks"),
    Layout(**SHARDS, graphs="mlp", methods="all"),
    Layout(**EXPERTS, graphs="attn moe_router", methods="blocks"),
    Layout(**EXPERTS, overlap=True, methods="all"),
    Layout(**EXPERTS, overlap=True, methods="blocks"),
]


@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.name) for layout in LAYOUTS])
def test_a_parameter_that_a_method_added_is_waited_for_where_it_is_gathered_in_the_step(
    layout: Layout,
) -> None:
    comparison = run_function(gathered_late, layout.world_size, layout, timeout=120)[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found


def gathered_late(layout: Layout) -> Comparison:
    """A step with ``overlap_param_gather``, one bucket a parameter, which is NaN until it is waited for."""
    import graph_stand_in
    from megatron.core import distributed

    from jreg_megatron.selftest import step

    torch.set_num_threads(1)
    distributed.DistributedDataParallelConfig = functools.partial(
        distributed.DistributedDataParallelConfig,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size=1,
    )
    wrap = step.wrap

    def wrapped(*given: Any) -> list[Any]:
        models = wrap(*given)
        hide(models)
        return models

    def captured(models: list[Any], *given: Any) -> None:
        graph_stand_in.capture(models, *given)
        hide(models)

    step.wrap, step.capture_graphs = wrapped, captured
    return compare_step(layout)


def hide(models: list[Any]) -> None:
    """The optimizer's step is over: the buckets are still to be gathered."""
    for model in models:
        for bucket in model.bucket_groups + model.expert_parallel_bucket_groups:
            gathered = {parameter: parameter.detach().clone() for parameter in bucket.params}
            assert len(gathered) == 1
            bucket.finish_param_sync = functools.partial(gather, gathered)
            for parameter in gathered:
                parameter.data.fill_(float("nan"))


def gather(gathered: dict[torch.nn.Parameter, torch.Tensor], **_: bool) -> None:
    for parameter, value in gathered.items():
        parameter.data.copy_(value)
    gathered.clear()
