"""Layers and iterations in CUDA graphs: Megatron's own code around stand-ins for the graphs."""

from __future__ import annotations

import functools
import gc
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ITERATIONS
from harness import read_scalars, run_function, run_ranks
from reference_training import train
from test_attach import build_model, forward, step
from test_layouts import ALPHA, BEFORE_LAST, COEFF, FIRST, LAST

from jreg_megatron import AttenuationConfig, JRegConfig, UserError, attach
from jreg_megatron.examples.own_method import ShortConfig
from jreg_megatron.methods.depth.settings import DepthConfig
from jreg_megatron.methods.let.settings import LETConfig
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.methods.slowqk.settings import SlowQKConfig
from jreg_megatron.selftest.compare import Comparison, compare_step
from jreg_megatron.selftest.layouts import Layout, layouts_for
from jreg_megatron.stream.meter import Meter
from jreg_megatron.stream.reruns import Reruns
from jreg_megatron.stream.settings import Settings
from jreg_megatron.stream.support import refuse_unsupported

# Where experts leave tokens out, a micro-batch has few sequences, of which no two begin with the same token:
# these would tie.
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
    Layout(graphs="attn moe_router", model="moe", data=2, expert=2, pipeline=2, methods="blocks"),
    Layout(graphs="layers", model="mtp"),
    Layout(graphs="layers", model="hybrid", pipeline=2, virtual=2, num_microbatches=4, methods="all"),
    Layout(graphs="layers", model="hybrid", layers="Mamba", tensor=2, sequence_parallel=True),
    Layout(graphs="attn", model="hybrid", layers="Mamba", methods="all"),
    Layout(graphs="mamba mlp", model="hybrid", layers="Mamba", pipeline=2, final_state="post_norm"),
    Layout(
        graphs="attn moe_router",
        model="hybrid",
        layers="experts",
        methods="all",
        data=2,
        expert=2,
        pipeline=2,
    ),
    Layout(graphs="moe", model="hybrid", layers="experts", capacity=0.5, num_microbatches=8),
    Layout(graphs="mamba moe_router", model="hybrid", layers="lone sub-layers", methods="all"),
    Layout(
        graphs="layers",
        model="hybrid",
        layers="sub-layers as layers",
        capacity=0.5,
        num_microbatches=8,
        methods="all",
    ),
    Layout(local_graphs=True, graphs="layers"),
    Layout(local_graphs=True, graphs="layers", tensor=2, sequence_parallel=True, methods="all"),
    Layout(local_graphs=True, graphs="layers", pipeline=2, num_microbatches=4, final_state="post_norm"),
    Layout(local_graphs=True, graphs="layers", pipeline=2, virtual=2, num_microbatches=4, methods="all"),
    Layout(
        **{"local_graphs": True, "graphs": "layers", "recompute": "selective", "masked": True},
        tokens="unmasked",
        token_stride=4,
    ),
    Layout(local_graphs=True, graphs="layers", methods="blocks", data=2, distributed_optimizer=True),
    Layout(local_graphs=True, graphs="layers", model="mtp"),
    Layout(
        **{"local_graphs": True, "graphs": "mamba attn", "model": "hybrid", "layers": "Mamba"},
        pipeline=2,
        final_state="post_norm",
        methods="all",
    ),
    Layout(
        **{"local_graphs": True, "graphs": "moe_router", "model": "hybrid", "layers": "lone sub-layers"},
        methods="all",
    ),
    Layout(
        **{"local_graphs": True, "graphs": "attn moe_router", "model": "hybrid", "layers": "experts"},
        **{"data": 2, "expert": 2, "pipeline": 2, "num_microbatches": 4},
        recompute="selective",
        methods="all",
    ),
    Layout(
        **{"local_graphs": True, "graphs": "layers", "model": "hybrid", "layers": "sub-layers as layers"},
        **{"capacity": 0.5, "num_microbatches": 8},
        methods="all",
    ),
    Layout(local_graphs=True, graphs="layers", model="hybrid", methods="all"),
    Layout(local_graphs=True, graphs="layers", model="hybrid", layers="latent attention"),
    Layout(
        **{"local_graphs": True, "graphs": "layers", "model": "moe", "capacity": 0.5, "balanced": True},
        **{"data": 2, "expert": 2, "num_microbatches": 4},
        methods="all",
    ),
    Layout(
        **{"local_graphs": True, "graphs": "layers", "context": 2, "per_token_loss": True, "masked": True},
        tokens="unmasked",
        methods="all",
    ),
    Layout(local_graphs=True, graphs="layers", token_stride=2, methods="all", precision="fp16"),
]


@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.name) for layout in LAYOUTS])
def test_a_step_of_replayed_graphs_equals_the_reference_at(layout: Layout) -> None:
    comparison = run_function(with_graphs, layout.world_size, layout, timeout=120)[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found


def with_graphs(layout: Layout, **options: Any) -> Comparison:
    """Compare a step of replays; ``options`` are of Megatron's configuration, for its own graphs."""
    import graph_stand_in
    import local_graph_stand_in
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.transformer_config import TransformerConfig

    from jreg_megatron.selftest import step

    torch.set_num_threads(1)
    step.capture_graphs = graph_stand_in.capture
    if layout.local_graphs:
        local_graph_stand_in.install()
        # The first run of a layer that is no step is captured.
        config: Any = transformer_config
        options["cuda_graph_warmup_steps"] = 0
        config.TransformerConfig = lambda **named: TransformerConfig(**named | options)
    comparison = compare_step(layout)
    replays = local_graph_stand_in.REPLAYS if layout.local_graphs else graph_stand_in.REPLAYS
    assert len(replays) >= layout.num_microbatches
    return comparison


@pytest.mark.parametrize(
    ("graphs", "precision"), [("transformer_engine", "bf16"), ("local", "bf16"), ("full_iteration", None)]
)
def test_the_self_test_on_one_gpu_has_graphs_with_experts_and_in_hybrid_models(
    graphs: str, precision: str | None
) -> None:
    layouts = layouts_for(1, graphs=graphs, precision=precision)
    assert {"gpt", "hybrid"} <= {layout.model for layout in layouts}
    assert any(layout.has_experts for layout in layouts)
    assert all(layout.graphs != "none" for layout in layouts)
    assert all(layout.local_graphs == (graphs == "local") for layout in layouts)


TAKEN = JRegConfig(coeff=1.0, untested_cuda_graphs=True)
OF_LAYERS = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [], "cuda_graph_warmup_steps": 3}
FULL, LOCAL = {"cuda_graph_impl": "full_iteration"}, {"cuda_graph_impl": "local"}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]}
ANY_BATCH = {"step_batch_size_schedule": "0:4 12:8", "eval_global_batch_size": 4}


def test_graphs_that_nothing_has_compared_are_refused_by_name() -> None:
    run_function(refuses_graphs)


def refuses_graphs() -> None:
    model = build_model()
    for named, changes, settings in (
        ("--jreg-untested-cuda-graphs", {}, [JRegConfig(coeff=1.0)]),
        ("cuda_graph_impl 'transformer_engine'", {}, [NormsConfig()]),
        ("--cuda-graph local .*--jreg-untested-cuda-graphs", LOCAL, [JRegConfig(coeff=1.0)]),
        ("cuda_graph_warmup_steps is 0", {"cuda_graph_warmup_steps": 0}, [TAKEN]),
        ("--cuda-graph full_iteration .*--jreg-untested-cuda-graphs", FULL, [JRegConfig(coeff=1.0)]),
        ("cuda_graph_warmup_steps is 0", FULL | {"cuda_graph_warmup_steps": 0}, [TAKEN]),
        ("fp16 with cuda_graph_impl full_iteration", FULL | {"fp16": True}, [TAKEN]),
        ("num_moe_experts with cuda_graph_impl", FULL | {"num_moe_experts": 2}, [TAKEN]),
        ("not allgather", FULL | {"num_moe_experts": 2, "moe_pad_expert_input_to_capacity": True}, [TAKEN]),
        ("step_batch_size_schedule with", FULL | {"step_batch_size_schedule": "0:8 1B:16"}, [TAKEN]),
        ("metrics has entropy, .* full_iteration", FULL, [TAKEN, DepthConfig(metrics="entropy")]),
        ("--jreg-token-share is 0.5", FULL, [replace(TAKEN, token_share=0.5)]),
        ("--depth-metrics has contributions", {}, [TAKEN, DepthConfig()]),
        ("--depth-metrics has contributions", LOCAL, [TAKEN, DepthConfig()]),
        ("recompute_modules layernorm with .* loses", LOCAL | RECOMPUTED, [TAKEN]),
        ("LET does not support cuda_graph_impl", {}, [TAKEN, LETConfig(teacher="any", stop_iterations=9)]),
    ):
        vars(model.config).update(
            {
                **{"fp16": False, "num_moe_experts": None, "step_batch_size_schedule": None},
                "moe_pad_expert_input_to_capacity": False,
            }
            | OF_LAYERS
            | changes
        )
        with pytest.raises(UserError, match=named):
            attach(model, *settings, num_microbatches=1, iteration=lambda: 1)
    vars(model.config).update(OF_LAYERS)
    with (
        mock.patch("megatron.core.package_info.MINOR", 18),
        pytest.raises(UserError, match=r"0\.19 or later for cuda_graph_impl transformer_engine"),
    ):
        attach(model, TAKEN, num_microbatches=1, iteration=lambda: 1)


def test_features_that_megatrons_own_graphs_do_wrong_are_refused_by_their_arguments() -> None:
    sizes = {"micro_batch_size": 2, "eval_micro_batch_size": 2}
    sizes |= {"global_batch_size": 8, "eval_global_batch_size": 8}
    allowed = OF_LAYERS | LOCAL | sizes | {"pipeline_model_parallel_size": 2}
    refuse_unsupported(SimpleNamespace(**allowed), TAKEN)
    refuse_unsupported(SimpleNamespace(**allowed | ANY_BATCH | {"pipeline_model_parallel_size": 1}), TAKEN)
    for named, changes in (
        ("perform_rl_step with cuda_graph_impl local", {"perform_rl_step": True}),
        ("gtp_weight_remat_size with cuda_graph_impl local", {"gtp_weight_remat_size": 2}),
        ("hidden_dropout 0.1 with cuda_graph_impl local", {"hidden_dropout": 0.1}),
        ("recompute_modules mla_up_proj with", RECOMPUTED | {"recompute_modules": ["mla_up_proj"]}),
        ("eval_micro_batch_size 1 .* 2 sequences", {"eval_micro_batch_size": 1}),
        ("eval_global_batch_size 6 .* it is not 8", {"eval_global_batch_size": 6}),
        ("step_batch_size_schedule with cuda_graph_impl local", ANY_BATCH),
    ):
        with pytest.raises(UserError, match=named):
            refuse_unsupported(SimpleNamespace(**allowed | changes), TAKEN)
    with mock.patch("megatron.core.package_info.MINOR", 20):
        refuse_unsupported(SimpleNamespace(**allowed | RECOMPUTED), TAKEN)


def test_megatron_itself_loses_gradients_of_recomputed_modules_in_its_own_graphs_which_are_refused() -> None:
    found = run_function(with_a_recomputed_norm)[0].found
    assert found.exceeds(replace(found, gradient=0.5)) == ["gradient"]
    assert "layer_norm_weight" in found.worst_parameter


def with_a_recomputed_norm() -> Comparison:
    from jreg_megatron.stream import support

    support.LOST_IN_LOCAL_GRAPHS = ()
    return with_graphs(Layout(local_graphs=True, graphs="layers"), **RECOMPUTED)


def test_a_layers_own_capture_and_replay_are_restored_after_detach() -> None:
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


OF_THE_ITERATION = [
    Layout(graphs="iteration"),
    Layout(graphs="iteration", num_microbatches=4, masked=True, tokens="unmasked"),
    Layout(graphs="iteration", tensor=2, sequence_parallel=True),
    Layout(graphs="iteration", pipeline=2, num_microbatches=4, methods="all"),
    Layout(graphs="iteration", pipeline=2, virtual=2, num_microbatches=4, recompute="uniform"),
    Layout(graphs="iteration", tensor=2, pipeline=2, sequence_parallel=True, final_state="post_norm"),
    Layout(graphs="iteration", data=2, distributed_optimizer=True, methods="blocks"),
    Layout(graphs="iteration", context=2, per_token_loss=True, masked=True),
    Layout(graphs="iteration", model="mtp"),
    Layout(graphs="iteration", model="hybrid", recompute="selective"),
    Layout(
        graphs="iteration", model="moe", capacity=0.5, balanced=True, data=2, expert=2, num_microbatches=4
    ),
    Layout(
        graphs="iteration",
        model="moe",
        capacity=0.75,
        num_microbatches=4,
        methods="all",
        balanced=True,
        tensor=2,
        sequence_parallel=True,
        data=2,
        expert=2,
    ),
    Layout(
        graphs="iteration",
        model="hybrid",
        layers="experts",
        capacity=0.5,
        pipeline=2,
        data=2,
        expert=2,
        num_microbatches=4,
    ),
]


@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.name) for layout in OF_THE_ITERATION])
def test_a_replayed_iteration_equals_the_reference_at(layout: Layout) -> None:
    comparison = run_function(with_a_graph_of_the_iteration, layout.world_size, layout, timeout=120)[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found


def with_a_graph_of_the_iteration(layout: Layout) -> Comparison:
    import full_graph_stand_in

    torch.set_num_threads(1)
    full_graph_stand_in.install()
    comparison = compare_step(layout)
    assert len(full_graph_stand_in.REPLAYS) == 2
    return comparison


START, WARMUP, STOP = 3, 4, 9
CUT = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel")


@pytest.mark.parametrize(
    ("graphs", "entry", "replays"),
    [
        # Of 10 steps of training, and of 8 of evaluation, two run before the capture.
        ("full_iteration --cuda-graph-warmup-steps 2", "full_graph_stand_in", "8 6"),
        # Of 10 steps of training the first runs before the capture, and no evaluation. A rank has two layers,
        # and a step four micro-batches.
        ("local", "local_graph_stand_in", f"{(9 + 8) * 2 * 4} {9 * 2 * 4}"),
    ],
    ids=("iteration", "local"),
)
def test_ten_steps_of_replays_equal_the_reference_while_lambda_changes(
    toy_arguments: list[str],
    initial_weights: Path,
    toy_steps: Any,
    tmp_path: Path,
    graphs: str,
    entry: str,
    replays: str,
) -> None:
    # lambda begins, rises and ends in replays of earlier captures. Each second step measures, and a
    # log has the mean of four.
    strengths = [
        COEFF * min(1.0, max(0, i - START + 1) / WARMUP) * (i < STOP) for i in range(1, ITERATIONS + 1)
    ]
    expected = train(initial_weights / FIRST, toy_steps, coeff=strengths, alpha=ALPHA)
    argv = [
        *(*toy_arguments, *CUT, "--train-iters", ITERATIONS, "--load", initial_weights, "--finetune"),
        *"--no-load-optim --no-load-rng --no-check-for-nan-in-loss-and-grad".split(),
        *"--log-interval 4 --eval-interval 3 --eval-iters 2 --norms-measure-interval 3".split(),
        *f"--jreg-coeff {COEFF} --jreg-alpha {ALPHA} --jreg-log-per-layer".split(),
        *f"--jreg-start-iteration {START} --jreg-warmup-iterations {WARMUP}".split(),
        *f"--jreg-stop-iteration {STOP} --jreg-measure-interval 2 --tensorboard-dir".split(),
    ]
    in_graph = f"--jreg-untested-cuda-graphs --cuda-graph-impl {graphs}".split()
    run = run_ranks([*argv, tmp_path / "graph", *in_graph], 4, entry=f"{entry}:train")
    run_ranks([*argv, tmp_path / "eager"], 4)
    assert [re.findall("replays: .*", output) for output in run.output] == [[f"replays: {replays}"]] * 4
    graph, eager = read_scalars(tmp_path / "graph"), read_scalars(tmp_path / "eager")
    for name in ("lm loss", "grad-norm"):
        np.testing.assert_allclose(graph[name], expected[name], rtol=1e-5, err_msg=name)
    for name in ("jreg loss", BEFORE_LAST, LAST):
        each = expected[name]
        means = [np.mean([each[i - 1] for i in some]) for some in ((2, 4), (6, 8), (10,))]
        np.testing.assert_allclose(graph[name], means, rtol=1e-5, err_msg=name)
    assert {*graph} == {*eager}
    for name in graph:
        if "norms/" in name or "validation" in name or "jump" in name:
            np.testing.assert_allclose(graph[name], eager[name], rtol=1e-5, err_msg=name)


def test_a_batch_that_grows_and_steps_that_are_run_again_are_in_megatrons_own_graphs_as_without(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    at = toy_arguments.index("--global-batch-size")
    argv = [
        *(*toy_arguments[:at], *toy_arguments[at + 2 :], "--step-batch-size-schedule", "0:4 384:8"),
        *"--eval-global-batch-size 8 --train-iters 6 --eval-interval 3 --eval-iters 1".split(),
        *"--rerun-mode validate_results --no-check-for-nan-in-loss-and-grad".split(),
        *f"--jreg-coeff {COEFF} --jreg-log-per-layer --attenuation-learned 0.5 --tensorboard-dir".split(),
    ]
    in_graphs = "--jreg-untested-cuda-graphs --cuda-graph-impl local".split()
    run = run_ranks([*argv, tmp_path / "graph", *in_graphs], entry="local_graph_stand_in:train")
    run_ranks([*argv, tmp_path / "eager"])
    assert "replays: " in run.output[0]
    graph, eager = read_scalars(tmp_path / "graph"), read_scalars(tmp_path / "eager")
    assert {*graph} == {*eager} and {*eager["batch-size"]} == {4.0, 8.0}
    for name in eager:
        np.testing.assert_allclose(graph[name], eager[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_graph_of_the_iteration_is_captured_anew_for_what_is_attached_and_detached() -> None:
    run_function(follows_what_is_attached)


def follows_what_is_attached() -> None:
    from megatron.core import parallel_state

    other, _ = graphed_model()
    parallel_state.destroy_model_parallel()
    model, step_of = graphed_model()
    gradients: list[dict[str, torch.Tensor]] = []

    def steps() -> None:
        for _ in range(3):
            step_of(1)
        gradients.append(gradients_of(model))

    plain = step(model)[1]
    steps()  # captured before anything is attached
    attach(other, TAKEN, num_microbatches=1)  # and never run or detached
    handle = attach(model, TAKEN, num_microbatches=1)
    step_of(1)
    handle.end_iteration(1)
    steps()
    handle.detach()
    steps()
    before, attached, after = gradients
    for name, gradient in plain.items():
        assert torch.equal(before[name], gradient) and torch.equal(after[name], gradient), name
    assert any(not torch.equal(attached[name], plain[name]) for name in plain)


def test_features_that_a_captured_graph_cannot_repeat_correctly_are_refused() -> None:
    run_function(refuses_what_a_graph_cannot)


def refuses_what_a_graph_cannot() -> None:
    model, step_of = graphed_model()
    handle = attach(model, TAKEN, num_microbatches=1)
    step_of(1)
    with pytest.raises(UserError, match=r"cuda_graph_warmup_steps is 1, .* give more"):
        step_of(1)  # nobody has read the first step's finding
    handle.end_iteration(1)
    step_of(1)
    with pytest.raises(UserError, match=r"\b1 micro-batches.* 2\b"):
        step_of(2)


def test_measurements_and_optimizer_steps_are_the_same_in_a_graph_of_the_iteration() -> None:
    run_function(steps_as_without_a_graph)


def steps_as_without_a_graph() -> None:
    from megatron.core import parallel_state

    found: list[list[torch.Tensor]] = []
    for in_graph in (False, True):
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        model, step_of = graphed_model(None if in_graph else lambda _, wrapper: wrapper.forward_backward_func)
        model.config.cuda_graph_impl = "full_iteration" if in_graph else "none"
        methods = replace(TAKEN, measure_interval=2), DepthConfig(metrics="voids,contributions,curvature")
        found.append(five_steps(model, lambda _, step_of=step_of: step_of(1), methods))  # type: ignore[misc]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def five_steps(
    model: Any,
    run_step: Callable[[Any], Any],
    methods: tuple[Settings, ...],
    look: Callable[[Any, Any], list[torch.Tensor]] = lambda *_: [],
) -> list[torch.Tensor]:
    """Metrics of depth and parameters after each step with slow queries and keys too, and the results of
    ``look`` at model and handle before and after each step."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    now = [0]
    slow = SlowQKConfig(hold_iterations=2, ramp_iterations=3)
    handle = attach(model, *methods, slow, num_microbatches=1, iteration=lambda: now[0], optimizer=optimizer)
    found = look(model, handle)
    for now[0] in range(1, 6):
        run_step(model)
        optimizer.step()
        metrics = handle.end_iteration(now[0])
        assert metrics is not None
        found += [*metrics.depth.values(), *(p.detach().clone() for p in model.parameters())]
        found += look(model, handle)
    handle.detach()
    return found


@pytest.mark.parametrize("in_graph", [False, True])
def test_an_iteration_that_megatron_runs_again_since_experts_overflowed_is_measured_once(
    in_graph: bool,
) -> None:
    run_function(forgets_what_is_run_again, 1, in_graph)


def forgets_what_is_run_again(in_graph: bool) -> None:
    from megatron.core.transformer.moe.paged_stash import PagedStashRunner

    flag = torch.zeros(1, dtype=torch.bool)

    def under_runner(model: Any, wrapper: Any) -> Any:
        """Experts whose tokens do not fit in an iteration. The tokens that are left out change the states."""
        layer = model.decoder.layers[0].mlp

        def fit() -> None:
            flag.zero_()
            with torch.no_grad():
                layer.linear_fc1.weight /= 2

        layer.token_dispatcher = SimpleNamespace(
            config=model.config,
            check_over_budget=lambda: flag,
            reset_over_budget=fit,
            _comm_manager=SimpleNamespace(moe_expert_rank_capacity_factor=1.0),
        )
        model.zero_grad_buffer = lambda: model.zero_grad(set_to_none=False)
        inner = wrapper if in_graph else wrapper.forward_backward_func
        return PagedStashRunner(model.config, False, [model], None, inner)

    megatrons = PagedStashRunner.data_read, PagedStashRunner.prepare_for_rerun
    model, step_of = graphed_model(under_runner)
    model.config.moe_expert_rank_capacity_factor = 1.0
    if not in_graph:
        model.config.cuda_graph_impl = "none"
    handle = attach(model, TAKEN, NormsConfig(), num_microbatches=1)

    def metrics_of(overflowing: int | None) -> tuple[Any, Any]:
        for iteration in range(1, 5):
            if iteration == overflowing:
                flag.fill_(True)
                with torch.no_grad():
                    model.decoder.layers[0].mlp.linear_fc1.weight *= 2
            step_of(1)
            metrics = handle.end_iteration(iteration, is_interval_end=iteration == 4)
        assert metrics is not None
        return torch.stack((metrics.displacement, metrics.norm_mean[1:])), gradients_of(model)

    expected, gradients = metrics_of(None)
    for overflowing in (3, 4):
        found, of_this = metrics_of(overflowing)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(of_this[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    handle.detach()
    assert megatrons == (PagedStashRunner.data_read, PagedStashRunner.prepare_for_rerun)


def test_a_model_of_graphs_that_is_dropped_without_detach_is_freed() -> None:
    run_function(frees_a_dropped_model_of_graphs)


def frees_a_dropped_model_of_graphs() -> None:
    from megatron.core import parallel_state
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper
    from megatron.core.transformer.moe.paged_stash import PagedStashRunner

    def replaced() -> list[Any]:
        runner = PagedStashRunner
        return [runner.data_read, runner.prepare_for_rerun, FullCudaGraphWrapper.__call__]

    def attached() -> tuple[Any, Any]:
        model = build_model()
        vars(model.config).update(FULL | {"moe_expert_rank_capacity_factor": 1.0})
        handle = attach(model, TAKEN, num_microbatches=1)
        parallel_state.destroy_model_parallel()
        return model, handle

    megatrons = replaced()
    references = [weakref.ref(attached()[0]) for _ in range(3)]
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    _, handle = attached()
    ours: Any = FullCudaGraphWrapper.__call__
    assert all(now is not before for now, before in zip(replaced(), megatrons, strict=True))

    @functools.wraps(ours)
    def of_another_program(*args: Any, **named: Any) -> Any:
        return ours(*args, **named)

    FullCudaGraphWrapper.__call__ = of_another_program
    handle.detach()
    _, handle = attached()
    handle.detach()
    assert replaced() == [*megatrons[:2], of_another_program]


def test_values_that_a_pipeline_stage_has_still_to_sum_belong_to_the_repeated_iteration() -> None:
    run_function(forgets_what_waits)


def forgets_what_waits() -> None:
    from megatron.core.transformer.moe.paged_stash import PagedStashRunner

    meter = Meter(2, torch.device("cpu"), 1)
    reruns = Reruns([meter], lambda: None)
    runner = PagedStashRunner(SimpleNamespace(moe_paged_stash=False), False, [], None, None)
    for count in (1, 2):
        runner.data_read([], [], True, 0)
        meter.add(1, torch.ones(3, 1))  # and not row 2, another stage's
        runner.prepare_for_rerun()
        runner.data_read([], [], True, 0)
        meter.add(1, torch.ones(3, 1))
        assert meter.totals()[0][0].tolist() == [3.0 * count, 3.0 * count, count]
    reruns.end()


def test_steps_of_megatrons_own_graphs_and_evaluations_between_them_are_as_without_graphs() -> None:
    run_function(steps_and_evaluations_as_without_graphs)


def steps_and_evaluations_as_without_graphs() -> None:
    from megatron.core import parallel_state

    def evaluated(model: Any, handle: Any) -> list[torch.Tensor]:
        model.eval()
        with torch.no_grad():
            forward(model)
        model.train()
        return [handle.reduce_validation_metrics().displacement]

    found: list[list[torch.Tensor]] = []
    for in_graphs in (False, True):
        model, run_step = locally_graphed_model() if in_graphs else (unbiased(), step)
        methods = (
            ShortConfig(coeff=1.0),  # by a hook on each layer's output
            replace(TAKEN, measure_interval=2, start_iteration=3),
            DepthConfig(metrics="voids,curvature,entropy"),
        )
        found.append(five_steps(model, run_step, methods, evaluated))
        parallel_state.destroy_model_parallel()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_megatrons_own_graphs_can_be_attached_to_until_they_are_recorded_and_copy_no_state() -> None:
    run_function(attaches_before_the_first_step_alone)


def attaches_before_the_first_step_alone() -> None:
    model, run_step = locally_graphed_model()
    layer = model.decoder.layers[0]
    before = dict(vars(layer)), type(layer.cudagraph_manager)
    handle = attach(model, TAKEN, NormsConfig(), num_microbatches=1)
    assert before != (dict(vars(layer)), type(layer.cudagraph_manager))
    handle.detach()
    assert before == (dict(vars(layer)), type(layer.cudagraph_manager))
    handle = attach(model, TAKEN, num_microbatches=1)
    run_step(model)
    run_step(model)  # nobody has read the first step's finding
    assert handle.end_iteration(2) is not None
    handle.detach()
    # The second layer's graph reads the first one's output in place.
    first, second = (layer.cudagraph_manager.cudagraph_runners[0] for layer in model.decoder.layers)
    assert first.fwd_graph_output_surface[0].data_ptr() == second.fwd_graph_input_surface[0].data_ptr()
    with pytest.raises(UserError, match=r"\battach\b.*cuda_graph_impl local"):
        attach(model, TAKEN, num_microbatches=1)


@pytest.mark.parametrize("scope", ["layer", "block"])
def test_text_is_generated_in_megatrons_own_graphs_as_without_them_and_is_not_measured(scope: str) -> None:
    run_function(generates_as_without_graphs, 1, scope)


def generates_as_without_graphs(scope: str) -> None:
    import local_graph_stand_in
    from megatron.core.inference.contexts.static_context import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.transformer import attention

    attention.flash_attn_with_kvcache = flash_attention
    model, run_step = locally_graphed_model(scope)
    model.config.flash_decode = True
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    methods = TAKEN, NormsConfig(), AttenuationConfig(factor=0.3, layers=(1, 2))
    handle = attach(model, *methods, num_microbatches=1)
    tokens, positions = torch.arange(16).view(2, 8) * 7 % 32, torch.arange(8).expand(2, 8)
    causal = torch.ones(2, 1, 8, 8, dtype=torch.bool).triu(1)
    model.eval()
    with torch.no_grad():
        expected = model(tokens, positions, causal)
    assert handle.reduce_validation_metrics() is not None
    handle.detach()

    # The first pass that generates text runs layers to warm up, and is captured.
    handle = attach(model, *methods, num_microbatches=1)
    context, found = StaticInferenceContext(2, 8), []

    def generate(begin: int, end: int, mask: Any) -> None:
        context.sequence_len_offset = begin
        given = tokens[:, begin:end], positions[:, begin:end], mask
        found.append(model(*given, inference_context=context, runtime_gather_output=True).clone())

    with torch.inference_mode(), InferenceMode.active():
        generate(0, 4, causal[:, :, :4, :4])
        context.enable_decode_mode()
        for at in range(4, 8):
            generate(at, at + 1, None)
    torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 3:], rtol=1e-5, atol=1e-5)
    assert len(local_graph_stand_in.REPLAYS) == 4 * (2 if scope == "layer" else 1)
    assert handle.reduce_validation_metrics() is None
    model.train()
    if scope == "layer":
        run_step(model)
        assert handle.end_iteration(1) is not None
    else:
        handle.detach()
        with pytest.raises(UserError, match=r"\battach\b.*cuda_graph_impl local"):
            attach(model, *methods, num_microbatches=1)


def flash_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_seqlens: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Replaces the kernel of this name in flash-attn, for one token ``[b, 1, heads, dim]``."""
    at = cache_seqlens.long().view(-1, 1, 1, 1).expand_as(k)
    k_cache.scatter_(1, at, k)
    v_cache.scatter_(1, at, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k_cache) / q.shape[-1] ** 0.5
    later = torch.arange(k_cache.shape[1], device=q.device) > cache_seqlens.view(-1, 1)
    weights = scores.masked_fill(later[:, None, None], -torch.inf).softmax(-1)
    values = v_cache.masked_fill(later[..., None, None], 0.0)  # nothing was written there
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


def test_megatrons_own_graphs_that_still_contain_a_methods_changes_are_refused_after_detach() -> None:
    run_function(runs_behind_detach, 1, ())
    run_function(runs_behind_detach, 1, (AttenuationConfig(factor=0.3),), "detached")


def runs_behind_detach(changes: tuple[AttenuationConfig, ...], refusal: str = "") -> None:
    model, run_step = locally_graphed_model()
    handle = attach(model, TAKEN, *changes, num_microbatches=1)
    run_step(model)
    handle.detach()
    with pytest.raises(UserError, match=refusal) if refusal else nullcontext():
        forward(model)


def test_transformer_engines_graphs_that_still_contain_a_methods_changes_are_refused_after_detach() -> None:
    run_function(captures_and_detaches)


def captures_and_detaches() -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import CudaGraphModule

    for modules, attenuation, is_held in (([], 0.3, True), (["attn"], 0.3, False), ([], 1.0, False)):
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        model = build_model()
        vars(model.config).update(OF_LAYERS, cuda_graph_modules=[CudaGraphModule[name] for name in modules])
        handle = attach(model, TAKEN, AttenuationConfig(factor=attenuation), num_microbatches=1)
        for layer in model.decoder.layers:
            layer._te_cuda_graph_capture(torch.randn(8, 1, 16), attention_mask=None)
        handle.detach()
        model.config.cuda_graph_impl = "none"  # Megatron looks for graphs that its helper would have made
        with pytest.raises(UserError, match="keep it attached") if is_held else nullcontext():
            forward(model)


def test_a_step_of_more_micro_batches_is_refused_where_a_pipelines_graphs_are_in_their_first_order() -> None:
    run_function(refuses_another_count, 1, 1)
    run_function(refuses_another_count, 1, 2)


def refuses_another_count(stages: int) -> None:
    model, run_step = locally_graphed_model()
    count = [1]
    model.config.pipeline_model_parallel_size = stages
    attach(model, JRegConfig(untested_cuda_graphs=True), num_microbatches=lambda: count[0])
    run_step(model)
    run_step(model)
    count[0] = 2
    refusal = pytest.raises(UserError, match=r"\b1 micro-batches.* 2\b")
    with refusal if stages > 1 else nullcontext():
        run_step(model)


def test_a_layer_of_two_graphs_is_as_before_after_detach() -> None:
    run_function(runs_a_hybrid_behind_detach)


def runs_a_hybrid_behind_detach() -> None:
    import local_graph_stand_in
    from hybrid_toy import build, losses
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.cuda_graphs import create_cudagraphs

    local_graph_stand_in.install()
    model = build("*-*-")
    expected = losses(model)
    model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=True, force_reset_rng=True)
    vars(model.config).update(OF_LAYERS | LOCAL)
    for layer in model.decoder.layers:
        layer.create_mcore_cudagraph_manager(model.config)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    handle = attach(model, TAKEN, AttenuationConfig(factor=0.3), num_microbatches=1)
    losses(model).mean().backward()
    create_cudagraphs()
    with torch.no_grad():
        assert not torch.allclose(losses(model), expected)
        handle.detach()
        torch.testing.assert_close(losses(model), expected)
    assert len(local_graph_stand_in.REPLAYS) == 2 * 4


def locally_graphed_model(scope: str = "layer") -> tuple[Any, Callable[[Any], None]]:
    """A model whose layers have Megatron's own graphs, or where text is generated the whole block of them;
    and a step of one micro-batch."""
    import local_graph_stand_in
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.cuda_graphs import CudaGraphManager, create_cudagraphs
    from megatron.core.transformer.enums import InferenceCudaGraphScope

    local_graph_stand_in.install()
    model = unbiased()
    model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=True, force_reset_rng=True)
    vars(model.config).update(OF_LAYERS | LOCAL | {"enable_cuda_graph": True})  # its old name
    model.config.inference_cuda_graph_scope = InferenceCudaGraphScope[scope]
    for layer in model.decoder.layers:
        layer.create_mcore_cudagraph_manager(model.config)
    if scope == "block":
        model.decoder.cudagraph_manager = CudaGraphManager(model.config)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)

    def run_step(model: Any) -> None:
        for parameter in model.parameters():
            parameter.main_grad.zero_()
        step(model)
        create_cudagraphs()
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad + (0 if parameter.grad is None else parameter.grad)

    return model, run_step


def unbiased() -> Any:
    """A model without the bias of keys. Its gradient is only rounding, which Adam would scale up."""
    return build_model(add_bias_linear=False)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def graphed_model(
    around: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, Callable[[int], None]]:
    """A model, and a step of so many micro-batches by Megatron's wrapper, with one to warm up."""
    import full_graph_stand_in
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    full_graph_stand_in.install()
    model = build_model()
    vars(model.config).update(OF_LAYERS | FULL)

    # Made here, on the device: a tensor that is made in a capture is the host's.
    tokens, causal = torch.arange(16).view(2, 8), torch.ones(2, 1, 8, 8, dtype=torch.bool).triu(1)
    given, labels = (tokens, torch.arange(8).expand(2, 8), causal), tokens.roll(-1, dims=1)

    def schedule(num_microbatches: int, **_: Any) -> None:
        for _ in range(num_microbatches):
            model(*given, labels=labels).mean().backward()

    wrapper = FullCudaGraphWrapper(schedule, cuda_graph_warmup_steps=1)
    if around is not None:
        wrapper = around(model, wrapper)

    def step_of(num_microbatches: int) -> None:
        model.zero_grad(set_to_none=False)
        named = {"data_iterator": None, "seq_length": 8, "forward_only": False}
        wrapper(model=model, num_microbatches=num_microbatches, **named)

    return model, step_of


def test_the_stand_in_for_a_graph_of_the_iteration_keeps_the_rules_of_a_real_one() -> None:
    run_function(keeps_the_rules_of_a_graph)


def keeps_the_rules_of_a_graph() -> None:
    import full_graph_stand_in

    full_graph_stand_in.install()
    given, total = torch.ones(2), torch.zeros(2)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = given * 2
        total += doubled.square()
        assert torch.full((2,), 3).tolist() == [3, 3]  # of the host
    assert total.tolist() == [0, 0] and doubled.isnan().all()  # nothing was computed
    for number in (3.0, 4.0):
        given.fill_(number)
        graph.replay()
        assert doubled.tolist() == [2 * number] * 2
    assert total.tolist() == [36 + 64] * 2
    for what_a_graph_cannot in (given.tolist, lambda: torch.tensor(1.0, device="cuda"), given.nonzero):
        with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            what_a_graph_cannot()
    del given, what_a_graph_cannot
    with pytest.raises(AssertionError, match="freed since its capture"):
        graph.replay()
