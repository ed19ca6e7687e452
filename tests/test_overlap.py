"""Megatron's overlapped schedule for experts, on gloo: all of it is its own code but the streams."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import full_graph_stand_in
import hybrid_ep_stand_in
import pytest
import stream_stand_in
import torch
import variant_step
from harness import TOY, read_scalars, run_function, run_ranks
from reference_training import load_weights
from test_attach import build_model
from test_cuda_graphs import with_graphs

from jreg_megatron import JRegConfig, UserError, attach
from jreg_megatron.methods.depth.settings import DepthConfig
from jreg_megatron.methods.let.settings import LETConfig
from jreg_megatron.methods.lns.settings import LayerNormScalingConfig
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.methods.periln.settings import PeriLNConfig
from jreg_megatron.selftest.compare import Comparison, compare_step
from jreg_megatron.selftest.layouts import Layout, layouts_for
from jreg_megatron.selftest.toy import ITERATION
from jreg_megatron.stream.meter import Meter
from jreg_megatron.stream.settings import Settings
from jreg_megatron.stream.support import refuse_built, refuse_unsupported

EXPERTS = {"model": "moe", "overlap": True, "data": 2, "expert": 2}
STAGES = {"pipeline": 2, "virtual": 2}

LAYOUTS = [
    Layout(**EXPERTS),
    Layout(**EXPERTS, num_microbatches=4, methods="all"),
    Layout(**EXPERTS, num_microbatches=1, final_state="post_norm", distributed_optimizer=True),
    Layout(**EXPERTS, per_token_loss=True, masked=True, tokens="unmasked"),
    Layout(**EXPERTS, recompute="selective", token_stride=4, padded=True, tokens="unmasked"),
    Layout(**EXPERTS, **STAGES, num_microbatches=4, methods="all"),
    Layout(**EXPERTS, **STAGES, num_microbatches=4, final_state="post_norm", per_token_loss=True),
    Layout(**EXPERTS, **STAGES, num_microbatches=4, methods="blocks"),
    Layout(**EXPERTS | {"data": 1}, tensor=2, sequence_parallel=True, context=2),
]


@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.name) for layout in LAYOUTS])
def test_an_overlapped_step_equals_the_reference_at(layout: Layout) -> None:
    comparison = run_function(overlapped, layout.world_size, layout, timeout=120)[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found


def overlapped(layout: Layout) -> Comparison:
    from megatron.core.models.common import model_chunk_schedule_plan as plans

    torch.set_num_threads(1)
    both = 0
    run = plans.TransformerLayerSchedulePlan.run

    def counted(forward: object, backward: object, *args: object, **named: object) -> object:
        nonlocal both
        both += forward is not None and backward is not None
        return run(forward, backward, *args, **named)

    plans.TransformerLayerSchedulePlan.run = staticmethod(counted)
    comparison = compare_step(layout)
    assert (both > 0) == (layout.num_microbatches > 1)
    return comparison


GRAPHED = [
    Layout(**EXPERTS, graphs="attn", num_microbatches=4, methods="all"),
    Layout(**EXPERTS, **STAGES, graphs="moe_router", num_microbatches=4),
    Layout(**EXPERTS, graphs="attn moe_router", num_microbatches=4, final_state="post_norm"),
    Layout(**EXPERTS, graphs="moe_router", num_microbatches=4, methods="blocks"),
]


@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.name) for layout in GRAPHED])
def test_an_overlapped_step_of_replayed_graphs_equals_the_reference_at(layout: Layout) -> None:
    comparison = run_function(with_graphs, layout.world_size, layout, timeout=120)[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found


GRAPH = {**EXPERTS, "graphs": "iteration"}
PADDED, LIMITED = ({"capacity": share, "num_microbatches": 4} for share in (0.5, 1.0))

OVERFLOWING = 0.9

IN_ONE_GRAPH = [
    (Layout(**GRAPH, **PADDED, balanced=True, methods="all", final_state="post_norm"), None),
    (
        Layout(**GRAPH, **STAGES, **LIMITED, per_token_loss=True, masked=True, tokens="unmasked"),
        OVERFLOWING,
    ),
]
MORE = [
    *IN_ONE_GRAPH,
    (Layout(**EXPERTS, **LIMITED, methods="all"), OVERFLOWING),
    (Layout(**GRAPH, **PADDED, methods="blocks"), None),
    (Layout(**GRAPH, **STAGES, **PADDED, methods="all"), None),
    (Layout(**GRAPH, **LIMITED, methods="all"), 2.0),
    (Layout(**GRAPH, **LIMITED, methods="all"), OVERFLOWING),
    (
        Layout(**GRAPH, **STAGES, **LIMITED, methods="all", recompute="selective", final_state="post_norm"),
        OVERFLOWING,
    ),
]


def name_of(value: Any) -> str:
    """Of a layout, or of the capacity of a rank's experts."""
    return value.name if isinstance(value, Layout) else f"capacity {value}"


@pytest.mark.parametrize(("layout", "capacity"), IN_ONE_GRAPH, ids=name_of)
def test_an_overlapped_iteration_in_a_graph_equals_the_reference_at(
    layout: Layout, capacity: float | None
) -> None:
    comparison, _ = run_function(in_one_graph, layout.world_size, layout, capacity)[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "capacity"), MORE, ids=name_of)
def test_streams_of_an_overlapped_iteration_are_in_order_in_its_capture_and_where_experts_overflow_at(
    layout: Layout, capacity: float | None
) -> None:
    ranks = run_function(in_one_graph, layout.world_size, layout, capacity, True, timeout=240)
    comparison, _ = ranks[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found
    assert [found for _, found in ranks] == [{}] * len(ranks)


def in_one_graph(
    layout: Layout, capacity: float | None, watches_streams: bool = False
) -> tuple[Comparison, dict[str, int]]:
    """A replayed step, and its streams' errors. With a capacity, a rank's experts take a limited number of
    tokens in total: iterations in which they overflow are run again."""
    torch.set_num_threads(1)
    if watches_streams:
        watch_streams()
    full_graph_stand_in.install(watches_streams)
    if capacity is not None:
        hybrid_ep_stand_in.install(capacity)
    comparison = compare_step(layout)
    iterations = 3 if layout.graphs == "iteration" else 1
    assert len(full_graph_stand_in.REPLAYS) == iterations - 1
    assert len(hybrid_ep_stand_in.RERUNS) == (iterations if capacity == OVERFLOWING else 0)
    return comparison, stream_stand_in.FOUND


FORKED = "norms that fork the residual"


@pytest.mark.parametrize("kind", ["latent", "fp32 residual", "norms recomputed", FORKED])
def test_an_overlapped_step_equals_the_reference_with(kind: str) -> None:
    found, limit = variant_step.on_ranks(Layout(**EXPERTS, num_microbatches=4), (kind,))[kind]
    assert not found.exceeds(limit), found


Step = tuple[dict[str, float], dict[str, torch.Tensor]]
"""Measurements and gradients, by name."""

DEEPSEEK = {
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.1,
}
STRONG = JRegConfig(coeff=20.0, alpha=0.7, untested_overlap=True)
METHODS = [STRONG, NormsConfig(), DepthConfig(metrics="contributions")]
IN_GRAPH = [
    replace(STRONG, untested_cuda_graphs=True, measure_interval=ITERATION),
    NormsConfig(measure_interval=ITERATION),
    DepthConfig(metrics="contributions", measure_interval=ITERATION),
]
SCALED = LayerNormScalingConfig()


@pytest.mark.parametrize(
    ("cut", "options", "methods"),
    [
        ({}, {"mtp_num_layers": 1}, METHODS),
        (STAGES, {}, [SCALED, PeriLNConfig(), *METHODS]),
        pytest.param(GRAPH | LIMITED, {"mtp_num_layers": 1}, IN_GRAPH, marks=pytest.mark.slow),
    ],
    ids=["MTP", "LayerNorm scaling, Peri-LN, PP2, VPP2", "MTP, CUDA graph of the iteration"],
)
def test_dense_layers_shared_experts_and_all_methods_give_the_same_overlapped_and_not(
    cut: dict[str, Any], options: dict[str, Any], methods: list[Settings]
) -> None:
    layout = Layout(**{**EXPERTS, "num_microbatches": 4, **cut})
    plain, overlapped = (
        run_function(other_model, layout.world_size, one, DEEPSEEK | options, methods)
        for one in (replace(layout, overlap=False, graphs="none"), layout)
    )
    for (measured, gradients), (expected, wanted) in zip(overlapped, plain, strict=True):
        assert measured == pytest.approx(expected, rel=1e-5)
        for name, gradient in gradients.items():
            assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize(
    ("layout", "methods"),
    [
        (Layout(**EXPERTS, **STAGES, num_microbatches=4), METHODS),
        (Layout(**GRAPH, **LIMITED), IN_GRAPH),
    ],
    ids=("steps", "graph of the iteration"),
)
def test_with_coeff_zero_an_overlapped_steps_gradients_are_bit_identical_to_those_without_us(
    layout: Layout, methods: list[Any]
) -> None:
    methods = [replace(methods[0], coeff=0.0), *methods[1:]]
    measuring, plain = (
        run_function(other_model, layout.world_size, layout, DEEPSEEK, some) for some in (methods, [])
    )
    for (measured, gradients), (_, wanted) in zip(measuring, plain, strict=True):
        assert measured["jreg loss"] > 0
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())


def other_model(layout: Layout, options: dict[str, Any], methods: list[Settings]) -> Step:
    """A step of a model that the reference does not know, with early release of attention's memory."""
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer import transformer_config

    from jreg_megatron.selftest import step, toy

    torch.set_num_threads(1)
    torch.manual_seed(1)
    if layout.graphs == "iteration":
        full_graph_stand_in.install()
    make, make_layer = transformer_config.TransformerConfig, specs.get_gpt_layer_local_spec
    build, gather, attach_to = step.build_chunk, step.gathered_gradients, step.attach
    transformer_config.TransformerConfig = lambda **given: make(
        **{**given, **options, "perform_initialization": True, "init_method_std": 0.2}
    )
    measured: dict[str, float] = {}
    gradients: dict[str, torch.Tensor] = {}

    def build_chunk(layout: Layout, config: Any, index: int, impl: str) -> Any:
        config.ep_overlap_early_attn_memory_release = layout.overlap
        stage = index if layout.virtual > 1 else None
        specs.get_gpt_layer_local_spec = make_layer
        block = specs.get_gpt_decoder_block_spec(config, False, normalization="RMSNorm", vp_stage=stage)
        specs.get_gpt_layer_local_spec = lambda **_: block
        return build(layout, config, index, impl)

    def attached(wrapped: list[Any], *settings: Settings, **named: Any) -> Any:
        nothing = SimpleNamespace(displacement=torch.zeros(1), jreg_loss=0.0, jump_rate=0.0)
        if not settings:
            return SimpleNamespace(captured="", reduce_training_metrics=lambda: nothing, detach=lambda: None)
        handle = attach_to(wrapped, *settings, **named)
        reduce = handle.reduce_training_metrics

        def noted() -> Any:
            metrics = reduce()
            measured.update(metrics.scalars(per_layer=True))
            return metrics

        handle.reduce_training_metrics = noted
        return handle

    def gathered(wrapped: list[Any]) -> dict[str, torch.Tensor]:
        gradients.update(gather(wrapped))
        return gradients

    step.build_chunk, step.gathered_gradients, step.attach = build_chunk, gathered, attached
    step.settings_of = lambda _: methods
    step.pieces_of, step.parts_of = (lambda *_: iter(())), (lambda *_: [])
    weights, batch = toy.draw_weights(toy.shape_of(layout)), toy.draw_batch(masked=False)
    found = step.run_step(layout, weights, batch, "local", timedelta(minutes=1))
    return {"lm loss": found.lm_loss, **measured}, gradients


def test_memory_of_a_plan_is_freed_as_soon_as_its_backward_pass_is_over() -> None:
    attached, plain = (run_function(left_over, 2, methods) for methods in (METHODS, []))
    assert attached == plain


def left_over(methods: list[Settings]) -> int:
    """How many of a step's nodes only the garbage collector would free."""
    from megatron.core.models.common.utils import TransformerLayerNode

    gc.collect()
    gc.disable()
    other_model(Layout(**EXPERTS), {}, methods)
    return sum(isinstance(kept, TransformerLayerNode) for kept in gc.get_objects())


TAKEN, IN_GRAPHS = (
    JRegConfig(coeff=1.0, **{flag: True}) for flag in ("untested_overlap", "untested_cuda_graphs")
)
BOTH = replace(TAKEN, untested_cuda_graphs=True)
FULL = {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": [], "cuda_graph_warmup_steps": 1}
OVERLAP = {"overlap_moe_expert_parallel_comm": True}


def test_features_not_compared_in_the_overlapped_schedule_are_refused_by_name() -> None:
    for named, more, settings in (
        ("--overlap on your GPUs, .*--jreg-untested-overlap", {}, [JRegConfig(coeff=1.0)]),
        ("overlap_moe_expert_parallel_comm yet", {}, [NormsConfig()]),
        ("LET with overlap_moe", {}, [TAKEN, LETConfig(teacher="any", stop_iterations=9)]),
        ("is_hybrid_model with", {"is_hybrid_model": True}, [TAKEN]),
        ("use_megatron_fsdp with", {"use_megatron_fsdp": True}, [TAKEN]),
        ("cuda_graph_impl local with overlap", {"cuda_graph_impl": "local"}, [BOTH]),
        ("--cuda-graph full_iteration --overlap .*--jreg-untested-cuda-graphs", FULL, [TAKEN]),
        ("--overlap --cuda-graph full_iteration .*--jreg-untested-overlap", FULL, [IN_GRAPHS]),
        ("num_moe_experts with cuda_graph_impl full", FULL | {"num_moe_experts": 4}, [BOTH]),
    ):
        with pytest.raises(UserError, match=named):
            refuse_unsupported(SimpleNamespace(**OVERLAP, **more), *settings)
    refuse_unsupported(SimpleNamespace(**OVERLAP), TAKEN, NormsConfig())
    limited = {"num_moe_experts": 4, "moe_expert_rank_capacity_factor": 1.5}
    refuse_unsupported(SimpleNamespace(**OVERLAP, **FULL, **limited), BOTH, NormsConfig())
    with pytest.raises(UserError, match="overlap_moe_expert_parallel_comm in a SimpleNamespace"):
        refuse_built(SimpleNamespace(config=SimpleNamespace(**OVERLAP)))
    with mock.patch("megatron.core.package_info.MINOR", 18), pytest.raises(UserError) as caught:
        refuse_unsupported(SimpleNamespace(**OVERLAP), JRegConfig(coeff=1.0))
    assert "self-test" not in str(caught.value)


def test_the_self_test_on_two_gpus_has_overlapped_iterations_in_graphs() -> None:
    layouts = layouts_for(2, graphs="full_iteration", overlap=True)
    assert all(layout.overlap and layout.graphs == "iteration" for layout in layouts)
    assert {"jreg", "all"} <= {layout.methods for layout in layouts}


def test_a_model_makes_its_own_plans_again_after_detach() -> None:
    run_function(makes_its_own_plans)


def makes_its_own_plans() -> None:
    model = build_model()
    vars(model.config).update(OVERLAP)
    before = dict(vars(model))
    handle = attach(model, TAKEN, num_microbatches=1)
    assert vars(model) != before
    handle.detach()
    assert vars(model) == before


@pytest.mark.parametrize("in_graph", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ten_overlapped_steps_of_megatrons_loop_are_those_without_the_schedule(
    tmp_path: Path, in_graph: bool
) -> None:
    argv = [
        *(*TOY, "--mock-data", "--train-iters", 10, "--bf16", "--num-experts", 4, "--moe-router-topk", 2),
        *"--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --eval-interval 5".split(),
        *"--eval-iters 1 --jreg-coeff 0.5 --jreg-log-per-layer --norms-measure-interval 1".split(),
        *"--slowqk-multiplier 0 --slowqk-share 0.5 --slowqk-hold-iterations 10".split(),
    ]
    on = ["--overlap-moe-expert-parallel-comm", "--jreg-untested-overlap"]
    entry, measured = "jreg_megatron.pretrain:main", 10
    if in_graph:
        argv += "--moe-expert-capacity-factor 2 --moe-pad-expert-input-to-capacity".split()
        argv += "--jreg-start-iteration 2 --jreg-warmup-iterations 6 --jreg-measure-interval 2".split()
        on += "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 1".split()
        on += "--no-check-for-nan-in-loss-and-grad --jreg-untested-cuda-graphs".split()
        entry, measured = "full_graph_stand_in:train", 5
    saved = ["--save", tmp_path / "saved", "--save-interval", 5]
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "plain"], 2)
    run = run_ranks([*argv, *on, *saved, "--tensorboard-dir", tmp_path / "overlapped"], 2, entry=entry)
    # The first of ten steps of training and of four of evaluation is run before the capture.
    replays = [re.findall("replays: .*", output) for output in run.output]
    assert replays == [["replays: 9 3"] if in_graph else []] * 2
    plain, overlapped = (read_scalars(tmp_path / name) for name in ("plain", "overlapped"))
    assert {*overlapped} == {*plain}
    assert len(overlapped["jreg loss"]) == measured
    for name in plain:
        if "jreg" in name or "loss" in name:
            assert overlapped[name] == pytest.approx(plain[name], rel=0.02), name
    name = "decoder.layers.self_attention.linear_qkv.weight"
    half, end = (load_weights(tmp_path / "saved" / f"iter_{number:07}")[name] for number in (5, 10))
    stays = (half == end).view(4, 4, 3, 16, 64).float().mean((1, 3, 4))  # of each layer's Q, K and V
    assert (stays[2:, :2] == 1).all(), "held back"
    assert (stays[:2] < 0.1).all() and (stays[:, 2] < 0.1).all()


@pytest.mark.parametrize("case", ["all methods", "masks", "dense layer"])
def test_no_stream_uses_memory_that_another_one_may_still_write_or_get(case: str) -> None:
    assert run_function(in_order, 2, case, timeout=240) == [{}, {}]


def watch_streams() -> None:
    """Look at the streams of the self-test's steps in this process."""
    from jreg_megatron.selftest import compare, step

    torch.set_num_threads(1)
    order, run = stream_stand_in.install(), step.run_step

    def watched(*args: Any) -> Any:
        with order:
            return run(*args)

    step.run_step = compare.run_step = watched


def in_order(case: str) -> dict[str, int]:
    watch_streams()
    if case == "dense layer":
        other_model(Layout(**EXPERTS, num_microbatches=4), DEEPSEEK, METHODS)
    else:
        compare_step(LAYOUTS[1] if case == "all methods" else LAYOUTS[3])
    return stream_stand_in.FOUND


def test_a_meter_sums_what_two_streams_have_added_when_both_have_written_it() -> None:
    assert run_function(sums_two_streams) == [{}]


def test_a_captured_sum_waits_for_no_stream_that_added_before_the_capture() -> None:
    [(found, of_another)] = run_function(sums_in_a_capture)
    assert found == {}
    assert [*of_another] == ["a captured stream waits for work outside of the capture, "]


def sums_in_a_capture() -> tuple[dict[str, int], dict[str, int]]:
    order = stream_stand_in.install()
    meter = Meter(num_layers=2, device=torch.device("cpu"))
    meter.crosses_streams = True
    added = torch.ones(4, 1)
    with order:
        meter.add(1, added)
        meter.totals()
        with stream_stand_in.captured(torch.cuda.Stream()):
            meter.add(1, added)
            meter.add(2, added)
        found = dict(stream_stand_in.FOUND)
        before = torch.cuda.current_stream()
        with stream_stand_in.captured(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(before)
    return found, stream_stand_in.FOUND


def sums_two_streams() -> dict[str, int]:
    order = stream_stand_in.install()
    meter = Meter(num_layers=2, device=torch.device("cpu"))
    meter.crosses_streams = True
    with order:
        for row in (1, 2):
            with torch.cuda.stream(torch.cuda.Stream()):
                meter.add(row, torch.ones(4, 1))
    assert meter.totals()[0][:, 0].tolist() == [4, 4]
    return stream_stand_in.FOUND
