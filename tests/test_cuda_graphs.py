"""Layers in CUDA graphs of Transformer Engine: Megatron's own code around a stand-in for the graphs."""

from __future__ import annotations

import pytest
import torch
from harness import run_function
from test_attach import build_model

from jreg_megatron import JRegConfig, UserError, attach
from jreg_megatron.methods.depth.settings import DepthConfig
from jreg_megatron.methods.let.settings import LETConfig
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.methods.periln.settings import PeriLNConfig
from jreg_megatron.selftest.compare import Comparison, compare_step
from jreg_megatron.selftest.layouts import Layout

LAYOUTS = [
    Layout(graphs="layers"),
    Layout(graphs="layers", pipeline=2, num_microbatches=4, methods="all"),
    Layout(graphs="layers", tensor=2, sequence_parallel=True, pipeline=2, virtual=2, num_microbatches=4),
    Layout(graphs="attn", pipeline=2, final_state="post_norm", methods="all"),
    Layout(graphs="attn", tensor=2, recompute="selective", masked=True, tokens="unmasked"),
    Layout(graphs="mlp", data=2, distributed_optimizer=True, methods="all"),
    Layout(graphs="moe_router", model="moe", data=2, expert=2, pipeline=2, num_microbatches=4),
    Layout(graphs="attn moe_router", model="moe", methods="all"),
    Layout(graphs="layers", methods="blocks"),
    Layout(graphs="layers", model="mtp"),
]


@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.name) for layout in LAYOUTS])
def test_a_step_of_replayed_graphs_equals_the_reference_at(layout: Layout) -> None:
    comparison = run_function(with_graphs, layout.world_size, layout, timeout=120)[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found


def with_graphs(layout: Layout) -> Comparison:
    import graph_stand_in

    from jreg_megatron.selftest import step

    torch.set_num_threads(1)
    step.capture_graphs = graph_stand_in.capture
    comparison = compare_step(layout)
    assert len(graph_stand_in.REPLAYS) >= layout.num_microbatches
    return comparison


TAKEN = JRegConfig(coeff=1.0, untested_cuda_graphs=True)
OF_LAYERS = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [], "cuda_graph_warmup_steps": 3}
ROUTER = {"cuda_graph_modules": ["moe_router"]}


def test_graphs_that_nothing_has_compared_are_refused_by_name() -> None:
    run_function(refuses_graphs)


def refuses_graphs() -> None:
    model = build_model()
    for named, changes, settings in (
        ("--jreg-untested-cuda-graphs", {}, [JRegConfig(coeff=1.0)]),
        ("cuda_graph_impl 'transformer_engine'", {}, [NormsConfig()]),
        ("cuda_graph_impl 'local'", {"cuda_graph_impl": "local"}, [TAKEN]),
        ("cuda_graph_impl 'full_iteration'", {"cuda_graph_impl": "full_iteration"}, [TAKEN]),
        ("cuda_graph_warmup_steps is 0", {"cuda_graph_warmup_steps": 0}, [TAKEN]),
        ("moe_router", ROUTER, [TAKEN, PeriLNConfig()]),
        ("--depth-metrics has contributions", {}, [TAKEN, DepthConfig()]),
        ("LET does not support cuda_graph_impl", {}, [TAKEN, LETConfig(teacher="any", stop_iterations=9)]),
    ):
        vars(model.config).update(OF_LAYERS | changes)
        with pytest.raises(UserError, match=named):
            attach(model, *settings, num_microbatches=1, iteration=lambda: 1)


def test_a_layers_own_capture_and_replay_are_its_own_again_behind_detach() -> None:
    run_function(leaves_layers_as_they_were)


def leaves_layers_as_they_were() -> None:
    model = build_model()
    vars(model.config).update(OF_LAYERS)
    layer = model.decoder.layers[0]
    before = dict(vars(layer))
    handle = attach(model, TAKEN, NormsConfig(), num_microbatches=1)
    assert vars(layer) != before
    handle.detach()
    assert vars(layer) == before
