"""``attach`` on a built Megatron model: what it changes, what it does not change, what it refuses."""

from __future__ import annotations

import functools
import gc
import re
import weakref
from argparse import Namespace
from importlib.metadata import version
from typing import Any

import pytest
from harness import run_function
from packaging.version import Version

from jreg_megatron import AttenuationConfig, JRegConfig, UserError, prepare
from jreg_megatron.selftest.compare import compare_step
from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.stream.attachment import place_of
from jreg_megatron.stream.support import REFUSED, refuse_fsdp

CORE = Version(version("megatron-core"))


def build_model(recompute: str = "none", **options: Any) -> Any:
    """A two-layer GPTModel on one rank, in this process; ``options`` are of its configuration."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    full: Any = {"recompute_granularity": "full", "recompute_method": recompute, "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **{"num_attention_heads": 2, **options, **({} if recompute == "none" else full)},
    )
    return GPTModel(config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=8)


def forward(model: Any, loss_mask: Any = None) -> Any:
    """Loss of one micro-batch."""
    import torch

    tokens = torch.arange(16).view(2, 8)
    positions = torch.arange(8).expand(2, 8)
    causal = torch.ones(2, 1, 8, 8, dtype=torch.bool).triu(1)
    labels = tokens.roll(-1, dims=1)
    return model(tokens, positions, causal, labels=labels, loss_mask=loss_mask).mean()


def step(model: Any) -> tuple[Any, dict[str, Any]]:
    """Loss and gradients of one micro-batch."""
    model.zero_grad()
    loss = forward(model)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def leaves_the_model_as_it_was() -> None:
    import torch

    from jreg_megatron import attach

    model = build_model()
    keys = list(model.state_dict())
    loss, gradients = step(model)
    attributes = [dict(vars(layer)) for layer in model.decoder.layers]
    handle = attach(model, JRegConfig(coeff=1.0, alpha=0.0), num_microbatches=1)
    regularized_loss, regularized = step(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(loss, regularized_loss)
    assert any(not torch.equal(gradients[name], regularized[name]) for name in gradients)
    metrics = handle.reduce_training_metrics()
    assert metrics is not None
    assert 0 < metrics.jreg_loss < 1
    handle.detach()
    assert [dict(vars(layer)) for layer in model.decoder.layers] == attributes
    _, after = step(model)
    assert all(torch.equal(gradients[name], after[name]) for name in gradients)


def frees_a_dropped_model() -> None:
    from megatron.core.rerun_state_machine import RerunStateMachine

    from jreg_megatron import attach

    model, megatrons = build_model(), RerunStateMachine.should_run_forward_backward

    def dropped() -> weakref.ref[Any]:
        """A model that has run a step, and whose handle nobody keeps."""
        dropped = build_model_like(model)
        attach(dropped, JRegConfig(coeff=1.0, alpha=0.0), num_microbatches=1)
        step(dropped)
        return weakref.ref(dropped)

    references = [dropped() for _ in range(3)]
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    attach(model, JRegConfig(coeff=1.0), num_microbatches=1).detach()
    assert RerunStateMachine.should_run_forward_backward is megatrons


def detaches_in_any_order() -> None:
    from megatron.core.rerun_state_machine import RerunStateMachine

    from jreg_megatron import attach

    model = build_model()
    other = build_model_like(model)
    megatrons = RerunStateMachine.should_run_forward_backward
    first, second = (attach(one, JRegConfig(coeff=1.0), num_microbatches=1) for one in (model, other))
    first.detach()
    second.detach()
    assert RerunStateMachine.should_run_forward_backward is megatrons

    first = attach(model, JRegConfig(coeff=1.0), num_microbatches=1)
    ours, calls = RerunStateMachine.should_run_forward_backward, []

    @functools.wraps(ours)
    def of_another_program(*args: Any) -> Any:
        calls.append(args)
        return ours(*args)

    RerunStateMachine.should_run_forward_backward = of_another_program
    first.detach()
    second = attach(other, JRegConfig(coeff=1.0), num_microbatches=1)
    machine = RerunStateMachine()
    assert machine.should_run_forward_backward([]) and len(calls) == 1
    second.detach()
    assert RerunStateMachine.should_run_forward_backward is of_another_program


def only_measures_with_coeff_zero() -> None:
    import torch

    from jreg_megatron import attach

    model = build_model()
    _, gradients = step(model)
    handle = attach(model, JRegConfig(coeff=0.0), num_microbatches=1)
    _, measured = step(model)
    assert all(torch.equal(gradients[name], measured[name]) for name in gradients)
    assert handle.reduce_training_metrics() is not None
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None], None)
    assert handle.reduce_validation_metrics() is not None
    assert handle.reduce_validation_metrics() is None, "a second call starts from nothing"


def says_that_lambda_counts_other_tokens_than_the_loss() -> list[bool]:
    from jreg_megatron import attach

    model = build_model()
    said = []
    for per_token, settings in (
        (True, JRegConfig(coeff=1.0)),
        (False, JRegConfig(coeff=1.0)),
        (True, JRegConfig(coeff=0.0)),
        (True, JRegConfig(coeff=1.0, tokens="unmasked")),
    ):
        model.config.calculate_per_token_loss = per_token
        handle = attach(model, settings, num_microbatches=1)
        said.append("--jreg-tokens unmasked" in handle.describe())
        handle.detach()
    return said


def works_where_there_is_work(recompute: str) -> None:
    import torch

    from jreg_megatron import attach
    from jreg_megatron.methods.jreg.kernels import eager

    called: list[str] = []

    class Recorded(eager.TorchKernels):
        def displacement(self, *states: Any) -> Any:
            called.append("displacement")
            return super().displacement(*states)

        def gradients(self, *given: Any, **named: Any) -> Any:
            called.append("gradients")
            return super().gradients(*given, **named)

    eager.KERNELS = Recorded()
    model = build_model(recompute)
    own_adds = adds_of(model)
    now = {"iteration": 0}
    # Of two layers at alpha 20 the first one weighs 2e-9.
    config = JRegConfig(coeff=1.0, alpha=20.0, measure_interval=10)
    handle = attach(model, config, num_microbatches=1, iteration=lambda: now["iteration"])
    assert "gradient in 1 of them" in handle.describe()
    for iteration in (9, 10, 11, 20):
        in_forward = ["displacement"] if iteration % 10 == 0 else []
        now["iteration"] = iteration
        called.clear()
        loss = forward(model)
        # Under full recompute the run that counts is in the backward pass.
        assert called == (in_forward if recompute == "none" else []), iteration
        if recompute == "none" and iteration > 9:  # the first step compares every layer
            runs_as_it_is = [adds == own for adds, own in zip(adds_of(model), own_adds, strict=True)]
            assert runs_as_it_is == [not in_forward, False], iteration
            assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.decoder.layers)
        loss.backward()
        assert sorted(called) == [*in_forward, "gradients"], iteration
        handle.end_iteration(iteration, is_interval_end=False)
    assert handle.reduce_training_metrics() is not None
    handle.detach()
    handle = attach(model, JRegConfig(coeff=1.0, alpha=20.0, negligible_weight=0.0), num_microbatches=1)
    called.clear()
    step(model)
    assert called == ["gradients"] * 2, "measured with the gradient, in one go"
    metrics = handle.reduce_training_metrics()
    assert metrics is not None and torch.isfinite(metrics.displacement).all()
    handle.detach()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if recompute == "none":
        handle = attach(model, JRegConfig(coeff=1.0), num_microbatches=1)
        forward(model)
        assert handle.reduce_training_metrics() is not None, "what is frozen is measured all the same"


def adds_of(model: Any) -> list[list[Any]]:
    """The bias-dropout-adds of each layer."""
    return [[layer.self_attn_bda, layer.mlp_bda] for layer in model.decoder.layers]


def regularizes_layers_in_evaluation(final_state: str) -> None:
    import torch

    from jreg_megatron import attach

    model = build_model("uniform")
    model.config.recompute_num_layers = 2
    handle = attach(model, JRegConfig(coeff=20.0, alpha=1.0, final_state=final_state), num_microbatches=1)
    _, expected = step(model)
    model.decoder.layers[-1].eval()  # without dropout it computes the same
    _, found = step(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert handle.end_iteration(1) is not None


def goes_on_after_a_probe() -> None:
    import torch

    from jreg_megatron import attach

    model = build_model()
    now = {"iteration": 1}
    config = JRegConfig(coeff=20.0, alpha=0.0, measure_interval=1000)
    handle = attach(model, config, num_microbatches=1, iteration=lambda: now["iteration"])
    _, first = step(model)
    with torch.no_grad():
        forward(model)  # a loss is looked at, in training mode
    handle.end_iteration(1)
    now["iteration"] = 2
    _, second = step(model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    handle.detach()
    _, plain = step(model)
    assert any(not torch.equal(first[name], plain[name]) for name in first)


def refuses_means_over_different_tokens() -> None:
    from jreg_megatron import attach

    model = build_model()
    # Of two layers only the last one has a gradient.
    handle = attach(model, JRegConfig(coeff=1.0, alpha=20.0), num_microbatches=1)
    step(model)
    loss = forward(model)
    with pytest.raises(UserError, match=r"reset_training_metrics\(\)"):
        handle.reduce_training_metrics()
    loss.backward()
    assert handle.reduce_training_metrics() is not None
    forward(model)
    handle.reset_training_metrics()
    step(model)
    assert handle.reduce_training_metrics() is not None


def refuses_a_mask_of_other_tokens() -> None:
    import torch

    from jreg_megatron import attach

    model = build_model()
    attach(model, JRegConfig(coeff=1.0, tokens="unmasked"), num_microbatches=1)
    for shape, told in (
        ((1, 8), r"\[8, 1\] .*\[8, 2\]"),
        ((16,), r"\[16\]"),
        ((8, 2), r"\[2, 8\]"),
    ):
        with pytest.raises(UserError, match="--jreg-tokens is 'unmasked'.* " + told):
            forward(model, torch.ones(shape))


def counts_only_unmasked_tokens() -> None:
    import math

    import torch

    from jreg_megatron import attach

    model = build_model()
    handle = attach(model, JRegConfig(coeff=1.0, tokens="unmasked"), num_microbatches=1)
    tokens, positions = torch.arange(16).view(2, 8), torch.arange(8).expand(2, 8)
    mask = torch.ones(2, 8)
    mask[0, :5] = 0
    loss = model(tokens, positions, None, labels=tokens, loss_mask=mask).mean()
    mask.fill_(1)  # a caller may use its buffer again before the backward pass
    loss.backward()
    assert handle.methods[0].training_meter.totals()[0][:, 1].tolist() == [11, 11]
    handle.reset_training_metrics()
    # A micro-batch without any token is no error and adds no gradient.
    _, plain = step(build_model_like(model))
    loss = forward(model, torch.zeros(2, 8))
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, plain[name]), name
    metrics = handle.reduce_training_metrics()
    assert metrics is not None and math.isnan(metrics.jreg_loss)
    # Text may be generated in between, without a mask.
    model.eval()
    with torch.no_grad():
        model(tokens, positions, None)
    assert handle.reduce_validation_metrics() is None


def samples_tokens() -> str:
    from jreg_megatron import attach

    model = build_model()
    _, without = step(model)

    def added(iteration: int, **settings: Any) -> dict[str, Any]:
        config = JRegConfig(coeff=1.0, weights="uniform", **settings)
        handle = attach(model, config, num_microbatches=1, iteration=lambda: iteration)
        _, gradients = step(model)
        metrics = handle.end_iteration(iteration)
        handle.detach()
        assert metrics is not None
        displacements.append(metrics.displacement)
        return {name: gradients[name] - without[name] for name in without}

    displacements: list[Any] = []
    whole = added(1)
    parts = [added(iteration, token_share=0.25) for iteration in range(1, 6)]
    for name, gradient in whole.items():
        mean = sum(part[name] for part in parts[:4]) / 4
        assert (mean - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
        assert (parts[0][name] - parts[4][name]).norm() <= 1e-5 * gradient.norm() + 1e-9, (
            "every fourth step alike"
        )
    assert any((parts[0][name] - gradient).norm() > 0.1 * gradient.norm() for name, gradient in whole.items())
    assert all((found - displacements[0]).abs().max() <= 1e-6 for found in displacements), "all are measured"
    with pytest.raises(UserError) as caught:
        added(1, token_share=1 / 3)
    return str(caught.value)


def test_a_share_of_the_tokens_rotates_and_gives_the_whole_gradient_on_average() -> None:
    (refusal,) = run_function(samples_tokens)
    assert "--jreg-token-share is 0.333333" in refusal and "multiple of 3" in refusal and "8" in refusal


def measures_a_rerun_once() -> None:
    import torch
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    from jreg_megatron import attach

    def displacement(reruns: bool) -> Any:
        model = build_model_like(first)
        handle = attach(model, JRegConfig(coeff=1.0), num_microbatches=1)
        machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
        for iteration, runs in ((1, 1), (2, 2 if reruns else 1)):
            ran = 0
            while machine.should_run_forward_backward(None):
                step(model)
                ran += 1
                machine.rerun_requested = machine.continue_requested = reruns and iteration == 2
            assert ran == runs
            metrics = handle.end_iteration(iteration, is_interval_end=iteration == 2)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
        handle.detach()
        assert metrics is not None
        return metrics.readings[0].of.displacement

    first = build_model()
    assert torch.equal(displacement(reruns=True), displacement(reruns=False))


def refuses_what_is_sharded_unseen() -> list[str]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from jreg_megatron import attach

    def said(is_wrapped_first: bool, per_token: bool, wrap: Any) -> str:
        model = build_model_like(first)
        model.config.calculate_per_token_loss = per_token
        if is_wrapped_first:
            wrap(model)
        try:
            handle = attach(model, JRegConfig(coeff=1.0), num_microbatches=1)
            if not is_wrapped_first:
                wrap(model)
            handle.begin_microbatch(True, {})
        except UserError as error:
            return str(error)
        return ""

    def by_torch(model: Any) -> None:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    def by_megatron(model: Any) -> None:
        next(model.parameters()).__fsdp_param__ = True  # Megatron-FSDP marks each so

    first = build_model()
    return [
        said(is_wrapped_first, per_token, wrap)
        for is_wrapped_first, per_token, wrap in (
            (False, False, by_torch),
            (False, False, by_megatron),
            (True, False, by_megatron),
            (True, True, by_torch),
            (True, False, by_torch),
        )
    ]


def build_model_like(model: Any, **options: Any) -> Any:
    """A copy of the model without JREG; ``options`` as it was built with."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    copy = build_model(**options)
    copy.load_state_dict(model.state_dict())
    return copy


def refuses_by_name() -> list[str]:
    from torch import nn

    from jreg_megatron import attach

    model = build_model()

    def refusal(*args: Any, **named: Any) -> str:
        with pytest.raises(UserError) as caught:
            attach(*args, **named)
        return str(caught.value)

    lines = [
        refusal([], JRegConfig(), num_microbatches=1),
        refusal(nn.Linear(2, 2), JRegConfig(), num_microbatches=1),
        refusal(model, JRegConfig()),
        refusal(model, JRegConfig(weights=(1, 2, 3)), num_microbatches=1),
        refusal(model, JRegConfig(coeff=1.0, warmup_iterations=5), num_microbatches=1),
    ]
    lines.append(refusal(model, JRegConfig(), num_microbatches=0))
    lines.append(refusal(model, JRegConfig(), num_microbatches=2.5))
    for holder, name, value in (
        (model.decoder.layers[1], "layer_number", 1),
        (model.config, "num_layers", 3),
    ):
        right = getattr(holder, name)
        setattr(holder, name, value)
        lines.append(refusal(model, JRegConfig(), num_microbatches=1))
        setattr(holder, name, right)
    handle = attach(model, JRegConfig(tokens="unmasked"), num_microbatches=1)
    with pytest.raises(UserError) as caught:
        step(model)
    lines.append(str(caught.value))
    handle.detach()
    handle.detach()
    attach(model, JRegConfig(), num_microbatches=1)
    lines.append(refusal(model, JRegConfig(), num_microbatches=1))
    return lines


def sees_each_layer_once(recompute: str, is_disorderly: bool = False) -> list[tuple[Any, int, bool]]:
    """An observer's calls in a step of two micro-batches whose backward passes run in order, at the end."""
    import torch

    from jreg_megatron.stream.tap import tap_residual_stream

    model = build_model(recompute)
    told: list[tuple[Any, int, bool]] = []

    class Observer:
        count = 0

        def begin_microbatch(self, training: bool, given: Any) -> int:
            self.count += 1
            return self.count

        def layer(self, microbatch: int, number: int, layer_input: Any, layer_output: Any) -> Any:
            told.append((microbatch, number, layer_output.requires_grad))
            return layer_output

        def final_norm(self, microbatch: int, number: int, layer_input: Any, normed: Any) -> Any:
            told.append((microbatch, -number, normed.requires_grad))
            return normed

    tap = tap_residual_stream([model], Observer())
    if is_disorderly:
        forward(model)  # a backward pass never comes
        told.clear()
        sum(forward(model) for _ in range(2)).backward()  # the last one first
    else:
        losses = [forward(model) for _ in range(2)]
        for loss in losses:
            loss.backward()
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None], None)  # counts for nothing
    tap.remove()
    return told


def refusals_of_settings() -> list[str]:
    """The line for each unsupported setting, in the order of UNSUPPORTED."""
    from torch import nn

    from jreg_megatron import attach

    model = build_model()

    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def __getattr__(self, name: str) -> Any:
            if name in (modules := self.__dict__["_modules"]):
                return modules[name]
            return getattr(modules["module"], name)  # as torch's FSDP1 does

    class TorchFullyShardedDataParallel(FullyShardedDataParallel):
        pass

    lines = []
    for name, value, final_state in UNSUPPORTED:
        before = {part: getattr(model.config, part, None) for part in name.split(" with ")}
        vars(model.config).update(dict.fromkeys(before, value))
        with pytest.raises(UserError) as caught:
            attach(model, JRegConfig(final_state=final_state), num_microbatches=1)
        lines.append(str(caught.value))
        vars(model.config).update(before)
    with pytest.raises(UserError) as caught:
        attach(FullyShardedDataParallel(), JRegConfig(), num_microbatches=1)
    lines.append(str(caught.value))
    model.config.calculate_per_token_loss = True
    with pytest.raises(UserError) as caught:
        attach(TorchFullyShardedDataParallel(), JRegConfig(), num_microbatches=1)
    lines.append(str(caught.value))
    model.config.calculate_per_token_loss = False
    attach(model, JRegConfig(), num_microbatches=1)  # nothing of all this is left
    return lines


UNSUPPORTED = [
    ("overlap_moe_expert_parallel_comm", True, "pre_norm"),
    ("enable_hyper_connections", True, "pre_norm"),
    ("enable_mhc_connections", True, "pre_norm"),
    ("inference_fuse_tp_communication", True, "pre_norm"),
    ("hybrid_context_parallel", True, "pre_norm"),
    ("distribute_saved_activations", True, "pre_norm"),
    ("use_torch_fsdp2 with calculate_per_token_loss", True, "pre_norm"),
    ("heterogeneous_block_specs", True, "pre_norm"),
    ("heterogeneous_layers_config_path", "layers.json", "pre_norm"),
    ("heterogeneous_layers_config_encoded_json", "{}", "pre_norm"),
    ("cuda_graph_impl", "local", "pre_norm"),
    ("cuda_graph_impl", "transformer_engine", "pre_norm"),
    ("cuda_graph_impl", "full_iteration", "pre_norm"),
    ("enable_cuda_graph", True, "pre_norm"),
    ("external_cuda_graph", True, "pre_norm"),
    ("pipeline_model_parallel_layout", "Ett|L", "post_norm"),
    ("pipeline_model_parallel_layout", [["embedding", "decoder", "decoder"], ["loss"]], "post_norm"),
]


def test_attach_changes_no_forward_value_and_no_state_dict_and_detach_undoes_it() -> None:
    run_function(leaves_the_model_as_it_was)


def test_a_model_that_is_dropped_without_detach_is_freed() -> None:
    run_function(frees_a_dropped_model)


def test_models_are_detached_in_any_order_and_another_programs_change_of_megatron_stays() -> None:
    run_function(detaches_in_any_order)


def test_the_start_says_if_lambda_counts_other_tokens_than_the_loss() -> None:
    assert run_function(says_that_lambda_counts_other_tokens_than_the_loss) == [[True, False, False, False]]


def test_with_coeff_zero_gradients_are_untouched_and_displacement_is_measured() -> None:
    run_function(only_measures_with_coeff_zero)


@pytest.mark.parametrize("recompute", ["none", "uniform"])
def test_a_step_that_does_not_measure_works_for_layers_with_weight_alone_and_in_the_backward_pass(
    recompute: str,
) -> None:
    run_function(works_where_there_is_work, 1, recompute)


@pytest.mark.parametrize("final_state", ["pre_norm", "post_norm"])
def test_a_single_layer_in_evaluation_mode_is_still_recomputed_and_regularized(
    final_state: str,
) -> None:
    run_function(regularizes_layers_in_evaluation, 1, final_state)


def test_a_forward_pass_without_gradients_in_the_first_step_ends_no_regularizing() -> None:
    run_function(goes_on_after_a_probe)


def test_metrics_over_other_tokens_in_some_layers_than_in_others_are_refused() -> None:
    run_function(refuses_means_over_different_tokens)


def test_a_loss_mask_of_other_tokens_than_the_ranks_is_refused() -> None:
    run_function(refuses_a_mask_of_other_tokens)


def test_unmasked_tokens_alone_count_however_few_they_are() -> None:
    run_function(counts_only_unmasked_tokens)


def test_an_iteration_that_megatron_runs_again_to_validate_it_is_measured_once() -> None:
    run_function(measures_a_rerun_once)


def test_a_model_that_is_sharded_after_attach_or_without_its_wrapper_is_refused() -> None:
    (lines,) = run_function(refuses_what_is_sharded_unseen)
    named = ("FSDP2", "Megatron-FSDP", "Megatron-FSDP", "calculate_per_token_loss")
    assert len(set(lines)) == 5 and lines.pop() == ""
    assert all(name in line and "\n" not in line for name, line in zip(named, lines, strict=True))


def test_attach_refuses_by_name_what_it_cannot_do() -> None:
    (lines,) = run_function(refuses_by_name)
    for line, named in zip(
        lines,
        (
            ("chunks",),
            ("Linear",),
            ("num_microbatches=)",),
            ("--jreg-weights",),
            ("iteration=",),
            ("num_microbatches=0",),
            ("num_microbatches=2.5",),
            ("layer_number", "1 1", "2 layers"),
            ("layer_number", "1 2", "3 layers"),
            ("--jreg-tokens", "'unmasked'"),
            ("JREG", "detach()"),
        ),
        strict=True,
    ):
        assert not [word for word in named if word not in line], line
        assert "\n" not in line


def test_fsdp2_in_a_cuda_graph_of_the_iteration_is_refused_by_its_name() -> None:
    from torch import nn

    class TorchFullyShardedDataParallel(nn.Module):
        module = None

    config = Namespace(cuda_graph_impl="none")
    refuse_fsdp(TorchFullyShardedDataParallel(), config)
    config.cuda_graph_impl = "full_iteration"
    with pytest.raises(UserError, match="TorchFullyShardedDataParallel with cuda_graph_impl full_iteration"):
        refuse_fsdp(TorchFullyShardedDataParallel(), config)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"cuda_graph_impl": "transformer_engine"}, "cuda_graph_impl transformer_engine"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm"),
        ({"num_distributed_optimizer_instances": 2}, "num_distributed_optimizer_instances"),
        ({"moe_expert_rank_capacity_factor": 1.5}, "moe_expert_rank_capacity_factor"),
    ],
)
def test_features_not_compared_in_megatron_fsdp_are_refused_by_name(
    changed: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    monkeypatch.setattr("megatron.core.package_info.MINOR", 19)

    config = Namespace(
        cuda_graph_impl="none",
        overlap_moe_expert_parallel_comm=False,
        moe_expert_rank_capacity_factor=None,
        num_moe_experts=None,
        expert_model_parallel_size=1,
        num_distributed_optimizer_instances=1,
        data_parallel_sharding_strategy="optim",
    )

    class MegatronFSDP(nn.Module):
        module = None

    class FullyShardedDataParallel(nn.Module):
        ddp_config = config
        megatron_fsdp_dist_index = Namespace(get_fsdp_group=lambda **_: None)
        module = MegatronFSDP()

    refuse_fsdp(FullyShardedDataParallel(), config)
    vars(config).update(changed)
    with pytest.raises(UserError, match=f"FullyShardedDataParallel with {named} yet"):
        refuse_fsdp(FullyShardedDataParallel(), config)
    monkeypatch.setattr("megatron.core.package_info.MINOR", 18)
    with pytest.raises(UserError, match="FullyShardedDataParallel with Megatron-Core before"):
        refuse_fsdp(FullyShardedDataParallel(), config)


def type_of_states_in_megatron_fsdp() -> str:
    """A method's description of the states of a model in bf16."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.transformer.module import Float16Module

    model = build_model(bf16=True, params_dtype=torch.bfloat16)
    shards = DistributedDataParallelConfig(use_megatron_fsdp=True, use_distributed_optimizer=True)
    wrapped = FullyShardedDataParallel(model.config, shards, Float16Module(model.config, model))
    assert next(wrapped.parameters()).dtype == torch.float32, "the optimizer's are in their place"
    return str(place_of([model], lambda: 1).dtype)


@pytest.mark.skipif(Version("0.19") > CORE, reason="Megatron-FSDP is refused")
def test_a_method_gets_the_type_of_states_and_not_of_the_optimizers_parameters() -> None:
    assert run_function(type_of_states_in_megatron_fsdp) == ["torch.bfloat16"]


def refusal_of_a_model_without_memory() -> str:
    """How a method is refused whose parameter would be lost with the meta device."""
    with pytest.raises(UserError) as caught:
        prepare([build_model().to("meta")], [AttenuationConfig(learned=0.8)])
    return str(caught.value)


def test_a_parameter_that_the_meta_device_would_lose_is_refused() -> None:
    (said,) = run_function(refusal_of_a_model_without_memory)
    assert "--init-model-with-meta-device" in said and "--attenuation-learned 0.8" in said


def refusal_in_megatron_fsdp(shards: str) -> str:
    """How the step of a model is refused whose experts are each on one of two ranks; empty if it is right."""
    layout = Layout(data=2, expert=2, model="moe", megatron_fsdp=shards)
    try:
        comparison = compare_step(layout)
    except UserError as refused:
        return str(refused)
    return ", ".join(comparison.found.exceeds(comparison.limit))


@pytest.mark.skipif(Version("0.19") > CORE, reason="Megatron-FSDP is refused")
def test_experts_whose_gradients_megatron_fsdp_divides_too_often_or_clips_apart_are_refused() -> None:
    by = r"FullyShardedDataParallel\w* with "  # from 0.20 on its name ends in V1
    for said in run_function(refusal_in_megatron_fsdp, 2, "optim_grads_params"):
        assert re.search(by + "optim_grads_params and experts", said)
    for said in run_function(refusal_in_megatron_fsdp, 2, "no_shard"):
        assert re.search(by + "no_shard and expert_model_parallel_size", said)


def test_every_unsupported_setting_is_refused_by_its_name() -> None:
    (lines,) = run_function(refusals_of_settings)
    assert {*REFUSED} <= {name for name, *_ in UNSUPPORTED}
    names = [name for name, *_ in UNSUPPORTED] + ["FullyShardedDataParallel", "calculate_per_token_loss"]
    for line, name in zip(lines, names, strict=True):
        named = {"pipeline_model_parallel_layout": "final_state 'post_norm'"}.get(name, name)
        assert named in line and "\n" not in line


@pytest.mark.parametrize("recompute", ["none", "uniform", "block"])
def test_each_layer_is_seen_once_per_microbatch_and_as_part_of_its_own(recompute: str) -> None:
    (told,) = run_function(sees_each_layer_once, 1, recompute)
    # Layers 1 and 2, and the final norm as -2: each once for each micro-batch, on the run with a graph.
    assert sorted(told) == [(microbatch, number, True) for microbatch in (1, 2) for number in (-2, 1, 2)]
    if recompute == "uniform":
        recomputed = [microbatch for microbatch, number, _ in told if number > 0]
        assert recomputed == [1, 1, 2, 2], "in the backward pass, micro-batch by micro-batch"


def test_a_recomputed_layer_belongs_to_its_own_microbatch_in_any_order_and_after_an_abandoned_forward() -> (
    None
):
    (told,) = run_function(sees_each_layer_once, 1, "uniform", True)
    assert [microbatch for microbatch, number, _ in told if number > 0] == [3, 3, 2, 2]
