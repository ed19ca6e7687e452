"""The first step checks the assumptions of ``attach``: a difference is refused before the optimizer's step.

The models are from the custom loop's example, the layers from ``unknown_layers``.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import run_function, run_ranks

from jreg_megatron import JRegConfig, UserError, attach
from jreg_megatron.stream import first_step
from jreg_megatron.stream.support import LAYER_NOT_SEEN

M = 4  # micro-batches of the example
COEFF = 0.1


def start(tensor: int = 1, pipeline: int = 1) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor, pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(3)


def build(kind: str | None = None, **settings: Any) -> Any:
    """The example's model, of layers of a kind."""
    from megatron.core.models.gpt import gpt_layer_specs

    from jreg_megatron.examples import custom_loop

    local = gpt_layer_specs.get_gpt_layer_local_spec
    if kind is not None:
        import unknown_layers

        gpt_layer_specs.get_gpt_layer_local_spec = lambda **_: unknown_layers.spec_of(kind)
    (model,) = custom_loop.build_model()
    gpt_layer_specs.get_gpt_layer_local_spec = local
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


Loss = Callable[[Any, Any], Any]
"""The schedule's loss, as a function of the tokens' losses and their mask."""


def sums(losses: Any, mask: Any) -> Any:
    return (losses * mask).sum(), mask.sum().int(), {}


def mean(losses: Any, mask: Any) -> Any:
    return (losses * mask).sum() / mask.sum(), {}


def schedule(model: Any, loss: Loss = sums, count: int = M, mask: Callable[[int], Any] | None = None) -> None:
    """Megatron's forward and backward passes over ``count`` micro-batches."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from jreg_megatron.examples import custom_loop

    def batches() -> Iterator[Any]:
        for number, batch in enumerate(custom_loop.made_up_text()):
            yield batch if mask is None else batch | {"loss_mask": mask(number)}

    def forward_step(batches: Iterator[Any], model: Any) -> Any:
        batch = next(batches)
        positions = torch.arange(custom_loop.LENGTH).expand_as(batch["tokens"])
        losses = model(batch["tokens"], positions, None, labels=batch["labels"])
        return losses, lambda losses: loss(losses, batch["loss_mask"])

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(),
        model=model,
        num_microbatches=count,
        seq_length=custom_loop.LENGTH,
        micro_batch_size=custom_loop.MICRO_BATCH_SIZE,
        forward_only=not torch.is_grad_enabled(),
    )


def refusal(run: Callable[..., Any], *args: Any, **named: Any) -> str:
    """The error line of a call; empty if there is no error."""
    try:
        run(*args, **named)
    except UserError as error:
        return str(error)
    return ""


def step(model: Any, handle: Any, iteration: int = 1, **named: Any) -> None:
    """A training step without an optimizer."""
    schedule(model, **named)
    handle.end_iteration(iteration)


# -- layers ------------------------------------------------------------------------------------------


def refused_and_detached(forward: Callable[[Any], Any], model: Any) -> str:
    """The error of the first forward pass. After detach it runs as if nothing had been attached."""
    handle = attach(model, JRegConfig(), num_microbatches=1)
    said = refusal(forward, model)
    handle.detach()
    forward(model)
    return said


def unknown_layers_without_a_schedule() -> dict[str, str]:
    import test_attach  # its model of two layers
    import unknown_layers

    start()
    return {
        kind: refused_and_detached(test_attach.forward, build(kind).module) for kind in unknown_layers.UNKNOWN
    }


def test_a_layer_that_treats_the_stream_otherwise_is_refused_by_its_class_in_the_first_forward_pass() -> None:
    (said,) = run_function(unknown_layers_without_a_schedule)
    import unknown_layers

    for kind, (layer, why) in unknown_layers.UNKNOWN.items():
        assert said[kind].startswith(f"layer 1 ({layer.__name__}) {why}"), kind


def unknown_sublayers() -> dict[str, str]:
    import hybrid_toy
    import unknown_layers

    return {
        kind: refused_and_detached(hybrid_toy.losses, hybrid_toy.build("M*M*-", **{kind.split()[0]: module}))
        for kind, (module, _) in unknown_layers.UNKNOWN_SUBLAYERS.items()
    }


def test_a_sub_layer_of_a_hybrid_model_that_treats_the_stream_otherwise_is_refused_by_its_class() -> None:
    (said,) = run_function(unknown_sublayers)
    import unknown_layers

    for kind, (module, why) in unknown_layers.UNKNOWN_SUBLAYERS.items():
        assert module.__name__ in said[kind] and why in said[kind], kind


def unknown_layers_on_one_stage(kind: str) -> list[str]:
    """A pipeline in which only the second stage has such layers: in training, and only in evaluation."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads

    start(pipeline=2)
    finished = []

    def finalize(*args: Any, **named: Any) -> None:
        finished.append(True)
        finalize_model_grads(*args, **named)

    model = build(kind if dist.get_rank() == 1 else None, finalize_model_grads_func=finalize)
    handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)
    said = [refusal(schedule, model)]
    assert not finished, "the optimizer may follow"
    handle.detach()
    assert model.config.finalize_model_grads_func is finalize
    handle = attach(model, JRegConfig(), num_microbatches=M)
    model.eval()
    with torch.no_grad():
        schedule(model)
    said.append(refusal(handle.reduce_validation_metrics))
    return said


@pytest.mark.parametrize("kind", ["goes on", "adds by itself"])
def test_a_finding_of_one_pipeline_stage_is_refused_on_all_before_the_gradients_are_finished(
    kind: str,
) -> None:
    first, second = run_function(unknown_layers_on_one_stage, 2, kind, timeout=180)
    assert first == second
    assert all(line.startswith("layer 3 (") for line in first)


def test_megatrons_loop_ends_in_one_line_and_saves_nothing(toy_arguments: list[str], tmp_path: Path) -> None:
    argv = [*toy_arguments, "--train-iters", 2, "--pipeline-model-parallel-size", 2]
    argv += ["--save", tmp_path / "saved", "--save-interval", 1, "--jreg-measure-interval", 10]
    argv += ["--spec", "unknown_layers", "goes_on_spec"]
    run = run_ranks(argv, 2, check=False)
    assert 2 in run.status and "Traceback" not in "".join(run.output)
    lines = [line for output in run.output for line in output.splitlines() if "jreg_megatron: error" in line]
    assert lines[0].startswith("jreg_megatron: error: layer 1 (GoesOn) returns another state")
    assert not list(tmp_path.glob("saved/iter*"))


def changes_in(kind: str) -> list[str]:
    """A layer that changes its state only in training, or from the second micro-batch on."""
    import torch
    from megatron.core.distributed import finalize_model_grads

    start()
    model = build(finalize_model_grads_func=finalize_model_grads)
    handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)
    layer = model.module.decoder.layers[1]
    forward, runs = layer.forward, [0]

    def changed(*args: Any, **named: Any) -> Any:
        out, context = forward(*args, **named)
        runs[0] += 1
        is_changed = layer.training if kind == "training" else runs[0] == M
        return (out + out.sin() if is_changed else out), context

    layer.forward = changed
    said = []
    if kind == "training":
        model.eval()
        with torch.no_grad():
            schedule(model)
        said.append(refusal(handle.reduce_validation_metrics))
        model.train()
    return [*said, refusal(schedule, model)]


def test_evaluation_before_the_first_step_and_its_first_microbatch_prove_nothing_for_the_others() -> None:
    ((evaluation, training),) = run_function(changes_in, 1, "training")
    assert not evaluation and training.startswith("layer 2 (TransformerLayer) returns another state")
    (((said),),) = run_function(changes_in, 1, "last micro-batch")
    assert said.startswith("layer 2 (TransformerLayer) returns another state")


def breaks_off() -> str:
    from megatron.core.distributed import finalize_model_grads

    start()
    model = build(finalize_model_grads_func=finalize_model_grads)
    handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)
    layer = model.module.decoder.layers[2]
    forward = layer.forward

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    layer.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        schedule(model)
    layer.forward = forward
    handle.reset_training_metrics()
    return refusal(step, model, handle)


def test_an_aborted_first_step_can_be_repeated() -> None:
    assert run_function(breaks_off) == [""]


def leaves_nothing_behind() -> tuple[Any, Any]:
    from megatron.core.distributed import finalize_model_grads

    start()
    model = build(finalize_model_grads_func=finalize_model_grads)
    handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)

    def hooks() -> list[int]:
        return [len(module._forward_hooks) for module in model.modules()]

    before = hooks()
    schedule(model)
    return (sum(before) - sum(hooks()), len(model.module.decoder.layers)), (
        model.config.finalize_model_grads_func is finalize_model_grads,
        refusal(step, model, handle),
    )


def test_after_the_first_step_nothing_of_the_checks_is_left() -> None:
    (((removed, layers), (is_restored, said)),) = run_function(leaves_nothing_behind)
    assert removed == layers + 1, "each layer's, and the model's output"
    assert is_restored and not said


# -- the scale of the loss -----------------------------------------------------------------------------


WEIGHTS = {
    "half of the loss, and told": 0.5,
    "half of the loss, another told": 0.25,
    "half of the micro-batches told, and a weight for it": 0.5,
}
"""``loss_weight``, where it is not 1."""
RUNS_OTHERWISE = (
    "half of the micro-batches told",
    "half of the micro-batches, tokens and told",
    "one micro-batch more told",
    "half of the micro-batches told, and a weight for it",
)


def scales() -> dict[str, tuple[str, float]]:
    """The error line for each scale of a loss, and lambda relative to the same loss without JREG."""
    import torch
    from megatron.core.distributed import finalize_model_grads

    start()

    def halves(number: int) -> Any:
        mask = torch.ones(2, 32)
        mask[:, ::2] = 0
        return mask

    ways: dict[str, Any] = {
        # name: number of micro-batches that attach is given, per-token loss, loss, mask
        "sums": (M, False, sums, None),
        "mean": (M, False, mean, None),
        "sums, per token": (M, True, sums, None),
        "mean, per token": (M, True, mean, None),
        "half of the tokens": (M, False, sums, halves),
        "half of the tokens, per token": (M, True, sums, halves),
        "half of the tokens, mean over all": (M, False, lambda x, m: ((x * m).mean(), {}), halves),
        "one micro-batch without tokens": (M, False, sums, lambda n: torch.full((2, 32), float(n > 0))),
        "weighs its tokens": (M, False, lambda x, m: ((1.2 * x).mean(), {}), None),
        "fp16": (M, False, sums, None),
        "half of the micro-batches, tokens and told": (M // 2, False, sums, halves),
        "a prompt that weighs less": (M, False, lambda x, m: ((x * (0.1 + 0.2 * m)).mean(), {}), halves),
        "accumulated twice by the caller": (M, False, lambda x, m: (x.mean() / 2, {}), None),
        "accumulated twice, and told": (2 * M, False, lambda x, m: (x.mean() / 2, {}), None),
        "a sum that nobody divides": (M, False, lambda x, m: (x.sum(), {}), None),
        "half of the micro-batches told": (M // 2, False, sums, None),
        "one micro-batch more told": (M + 1, False, sums, None),
        "half of the micro-batches told, and a weight for it": (M // 2, False, sums, None),
        "half of the loss, and told": (M, False, lambda x, m: (0.5 * x.mean(), {}), None),
        "half of the loss, another told": (M, False, lambda x, m: (0.5 * x.mean(), {}), None),
        "weighs its micro-batches": (M, False, lambda x, m: (x.mean() * next(weight), {}), None),
        "weighs its micro-batches and sums": (M, False, lambda x, m: (x.sum() * next(weight), {}), None),
    }
    weight = itertools.cycle(range(1, M + 1))
    said = {}
    for name, (told, per_token, loss, mask) in ways.items():
        torch.manual_seed(3)
        scale = 1024.0 if name == "fp16" else 1.0
        model = build(
            finalize_model_grads_func=finalize_model_grads,
            calculate_per_token_loss=per_token,
            grad_scale_func=lambda loss, scale=scale: loss * scale,
        )
        config = JRegConfig(coeff=COEFF, loss_weight=WEIGHTS.get(name, 1.0))
        handle = attach(model, config, num_microbatches=told)
        said[name] = refusal(step, model, handle, loss=loss, mask=mask)
        handle.detach()
    return said


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", line)]


def test_a_loss_with_another_scale_is_refused_with_the_lambda_that_it_would_have() -> None:
    (said,) = run_function(scales)
    lambdas = {
        "accumulated twice by the caller": "0.2",
        "a sum that nobody divides": "0.001563",  # of 64 tokens
        "half of the micro-batches told": "0.2",
        "half of the micro-batches, tokens and told": "0.2",
        "one micro-batch more told": "0.08",
        "half of the micro-batches told, and a weight for it": "0.2",
        "half of the loss, another told": "0.05",
        "weighs its micro-batches and sums": "0.000625",  # 64 tokens, a mean weight of 2.5
    }
    for name, line in said.items():
        if name == "mean, per token":
            assert "calculate_per_token_loss" in line and "\n" not in line
        elif name in lambdas:
            wrong = float(lambdas[name])
            assert {COEFF, wrong} <= {*numbers(line)} and "\n" not in line, name
            ratio = next(n for n in numbers(line) if n == pytest.approx(COEFF / wrong, rel=1e-3))
            if name in RUNS_OTHERWISE:
                assert M in numbers(line) and "loss-weight" not in line, name
            else:
                assert f"--jreg-loss-weight {ratio * WEIGHTS.get(name, 1.0):.4g}" in line, name
        else:
            assert not line, name


def waits_for_a_loss() -> list[Any]:
    import torch
    from megatron.core.distributed import finalize_model_grads

    start()
    model = build(finalize_model_grads_func=finalize_model_grads)
    handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)
    nothing = refusal(step, model, handle, mask=lambda _: torch.zeros(2, 32))
    return [nothing, refusal(schedule, model, lambda losses, _: (losses.mean() / 2, {}))]


def test_a_first_step_without_a_token_that_counts_leaves_the_check_to_the_next() -> None:
    ((nothing, halved),) = run_function(waits_for_a_loss)
    assert not nothing
    assert {COEFF, 2 * COEFF} <= {*numbers(halved)}


def batch_ramps_up() -> list[str]:
    from megatron.core.distributed import finalize_model_grads

    start()
    said, now = [], {"count": 0}
    for told in (lambda: now["count"], M):
        model = build(finalize_model_grads_func=finalize_model_grads)
        handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=told)
        for iteration, now["count"] in enumerate((M, M - 1, 2 * M), start=1):
            said.append(refusal(step, model, handle, iteration, count=now["count"]))
    return said


def test_a_fixed_number_of_microbatches_that_grows_is_refused_in_the_step_in_which_it_grows() -> None:
    """Not where it falls short: the last step of an epoch, whose loss is divided as before."""
    (said,) = run_function(batch_ramps_up)
    assert not any(said[:5])
    assert "num_microbatches=" in said[5] and "\n" not in said[5]
    assert {M, 2 * M, COEFF, 2 * COEFF} <= {*numbers(said[5])}


def has_no_loss() -> list[Any]:
    from megatron.core.distributed import finalize_model_grads

    start()
    first_step.MOST_STEPS = 3
    model = build(finalize_model_grads_func=finalize_model_grads)
    handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)
    left = []
    for iteration in range(1, 4):
        step(model, handle, iteration, loss=lambda x, m: (0 * x.mean(), {}))
        hooks = sum(len(module._forward_hooks) for module in model.module.decoder.layers)
        left.append((hooks, model.config.finalize_model_grads_func is finalize_model_grads))
    return left


def test_a_loss_that_never_shows_its_scale_costs_no_comparison_of_layers_and_at_last_nothing() -> None:
    (left,) = run_function(has_no_loss)
    assert left == [(0, False), (0, False), (0, True)]


def stage_in_evaluation() -> list[Any]:
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads

    start(pipeline=2)
    waits: list[bool] = []  # whether attach has something to do before Megatron finishes the gradients

    def look(*_: Any) -> None:
        waits.append(model.config.finalize_model_grads_func is not finalize)

    def finalize(*args: Any, **named: Any) -> None:
        look()
        finalize_model_grads(*args, **named)

    model = build(finalize_model_grads_func=finalize)
    handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)
    model.register_forward_hook(look)
    if dist.get_rank() == 0:
        model.eval()
    said = refusal(step, model, handle)
    return [said, waits]


def test_a_stage_in_evaluation_mode_still_meets_the_others() -> None:
    first, second = run_function(stage_in_evaluation, 2, timeout=180)
    assert first == second == [LAYER_NOT_SEEN, [True] * M + [False]]


def evaluates() -> list[int]:
    import torch

    from jreg_megatron.stream import layer_watch

    start()
    model = build()
    attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)
    kept, copied = layer_watch._Kept.__init__, [0]

    def count(*args: Any) -> None:
        copied[0] += 1
        kept(*args)

    layer_watch._Kept.__init__ = count  # type: ignore[method-assign]
    model.eval()
    copies = []
    for _ in range(3):
        with torch.no_grad():
            schedule(model, count=1)
        copies.append(copied[0])
    return copies


def test_before_the_first_step_one_evaluation_is_compared_and_no_more() -> None:
    ((first, *others),) = run_function(evaluates)
    assert first > 0 and others == [first, first]


def is_wrapped_by_another() -> int:
    from megatron.core.distributed import finalize_model_grads

    start()
    model = build(finalize_model_grads_func=finalize_model_grads)
    handle = attach(model, JRegConfig(coeff=COEFF), num_microbatches=M)
    outer = []

    def wrap(*_: Any) -> None:
        if not outer:
            outer.append(model.config.finalize_model_grads_func)
            model.config.finalize_model_grads_func = functools.partial(outer[0])

    model.module.register_forward_hook(wrap)
    step(model, handle)
    asked = []
    first_step.of_every_rank = lambda own, group: asked.append(own) or [own]
    step(model, handle, 2)
    return len(asked)


def test_a_check_that_other_code_has_wrapped_has_no_collective_after_the_first_step() -> None:
    assert run_function(is_wrapped_by_another) == [0]


# -- a mask that is missing on some stage ------------------------------------------------------------------


def mask_on_the_second_rank() -> str:
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads

    start()
    model = build(finalize_model_grads_func=finalize_model_grads)
    forward = model.forward
    if dist.get_rank() == 1:
        model.forward = lambda *a, **n: forward(*a, loss_mask=torch.ones(2, 32), **n)
    attach(model, JRegConfig(coeff=COEFF, tokens="unmasked"), num_microbatches=M)
    return refusal(schedule, model)


def mask_on_the_last_stage() -> str:
    from megatron.core.distributed import finalize_model_grads

    start(pipeline=2)
    model = build(finalize_model_grads_func=finalize_model_grads)
    forward = model.forward
    if model.module.post_process:
        import torch

        model.forward = lambda *a, **n: forward(*a, loss_mask=torch.ones(2, 32), **n)
    attach(model, JRegConfig(coeff=COEFF, tokens="unmasked"), num_microbatches=M)
    return refusal(schedule, model)


def other_masks_on_two_stages() -> str:
    import torch
    from megatron.core.distributed import finalize_model_grads

    start(pipeline=2)
    model = build(finalize_model_grads_func=finalize_model_grads)
    forward, mask = model.forward, torch.ones(2, 32)
    mask[0, 20:] = 0
    given = {"padding_mask": mask == 0} if model.module.pre_process else {"loss_mask": torch.ones(2, 32)}
    model.forward = lambda *a, **n: forward(*a, **given, **n)
    handle = attach(model, JRegConfig(coeff=COEFF, tokens="unmasked"), num_microbatches=M)
    return refusal(step, model, handle)


def test_stages_that_get_masks_of_other_tokens_are_refused_after_the_first_step() -> None:
    first, second = run_function(other_masks_on_two_stages, 2, timeout=180)
    assert first == second and "loss_mask=" in first and "padding_mask=" in first


def test_a_loss_mask_that_one_stage_or_one_rank_lacks_is_refused_on_all() -> None:
    for where in (mask_on_the_last_stage, mask_on_the_second_rank):
        first, second = run_function(where, 2, timeout=180)
        assert first == second
        assert all(named in first for named in ("--jreg-tokens is 'unmasked'", "loss mask", "'all'"))
