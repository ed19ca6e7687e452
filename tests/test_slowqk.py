"""Slower queries and keys: which weights, how much, and at every layout the same as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ITERATIONS
from harness import read_scalars, run_function, run_ranks
from reference_training import load_weights, train
from test_attach import build_model, forward

from jreg_megatron import SlowQKConfig, UserError, attach
from jreg_megatron.methods.slowqk.slowqk import rows_of_q_and_k

FLAGS = ("--slowqk-multiplier", 0.25, "--slowqk-hold-iterations", 4, "--slowqk-ramp-iterations", 3)
MULTIPLIERS = [0.25, 0.25, 0.25, 0.25, 0.5, 0.75, 1.0]
"""The settings of these flags, written out."""

TENSOR, DISTRIBUTED = ("--tensor-model-parallel-size", 2), ("--use-distributed-optimizer",)
LAYOUTS = {
    "one rank": (1, ()),
    "TP2 with SP and DP2 with the distributed optimizer": (4, (*TENSOR, "--sequence-parallel", *DISTRIBUTED)),
    # The shard of a rank begins within a weight.
    "DP4 with the distributed optimizer": (4, DISTRIBUTED),
    "PP2 with two virtual stages each": (
        2,
        ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
    ),
}


def log_of(folder: Path, *argv: object, ranks: int = 1) -> dict[str, list[float]]:
    run_ranks([*argv, "--tensorboard-dir", folder], ranks)
    return read_scalars(folder)


Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def references(initial_weights: Path, toy_steps: Any) -> list[tuple[Weights, dict[str, list[float]]]]:
    """With it and without: the weights after ten steps, and the log."""
    how = {"coeff": 0.5, "alpha": 0.5, "adam_eps": 1e-6}
    weights: list[Weights] = [{}, {}]
    logs = [
        train(initial_weights / "iter_0000001", toy_steps, **how, slow=slow, trained=trained)
        for slow, trained in zip((MULTIPLIERS, ()), weights, strict=True)
    ]
    return list(zip(weights, logs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_with_jreg_equal_the_independent_reference_at(
    layout: str, toy_arguments: list[str], initial_weights: Path, references: Any, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[layout]
    start = ("--load", initial_weights, "--finetune", "--no-load-optim", "--no-load-rng")
    saved = ("--save", tmp_path / "saved", "--save-interval", ITERATIONS)
    argv = (*toy_arguments, *start, *saved, "--train-iters", ITERATIONS, *flags, *FLAGS, "--adam-eps", 1e-6)
    log = log_of(tmp_path, *argv, "--jreg-coeff", 0.5, "--jreg-alpha", 0.5, ranks=ranks)
    (expected, expected_log), (without, _) = references
    for name in ("lm loss", "jreg loss", "grad-norm"):
        np.testing.assert_allclose(log[name], expected_log[name], rtol=1e-5, err_msg=name)
    first = load_weights(initial_weights / "iter_0000001")
    trained = load_weights(tmp_path / "saved" / f"iter_{ITERATIONS:07}")
    apart = {}
    for name, weight in expected.items():
        learned = (weight - first[name]).norm()
        apart[name] = float((trained[name] - weight).norm() / learned)
        makes_a_difference = (without[name] - weight).norm() > 0.1 * learned
        assert makes_a_difference == ("linear_qkv.weight" in name), name
    print(f"{layout}: {max(apart.values()):.1e} of what a weight has learned")
    assert max(apart.values()) <= 1e-4, apart


@pytest.mark.slow
def test_a_run_that_ends_while_it_rises_is_resumed_to_the_bit_also_where_weights_are_rounded(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    saved = ("--save", tmp_path / "saved", "--load", tmp_path / "saved", "--save-interval", 5)
    heads = ("--group-query-attention", "--num-query-groups", 2)
    argv = (*toy_arguments, *FLAGS, *heads, "--bf16", "--lr", 0.01, "--train-iters", ITERATIONS)
    whole = log_of(tmp_path / "whole", *argv, *DISTRIBUTED, ranks=2)
    log_of(tmp_path / "half", *argv, *DISTRIBUTED, *saved, "--exit-interval", 5, ranks=2)
    resumed = log_of(tmp_path / "resumed", *argv, *DISTRIBUTED, *saved, ranks=2)
    replicated = log_of(tmp_path / "replicated", *argv, ranks=2)
    plain = log_of(tmp_path / "plain", *argv, *DISTRIBUTED, "--slowqk-multiplier", 1, ranks=2)
    none = log_of(tmp_path / "none", *(word for word in argv if word not in FLAGS), *DISTRIBUTED, ranks=2)
    for name in ("lm loss", "grad-norm"):
        assert resumed[name] == whole[name][5:], name
        assert replicated[name] == pytest.approx(whole[name], rel=1e-5), "where each rank has whole weights"
        assert plain[name] == none[name] != whole[name], "a multiplier of 1 changes no bit"


def finds_the_rows() -> None:
    model = build_model(num_attention_heads=4, num_query_groups=2)
    attention = model.decoder.layers[0].self_attention
    weight = attention.linear_qkv.weight
    query, key, value = attention.get_query_key_value_tensors(torch.randn(8, 2, 16))
    (of_both,) = torch.autograd.grad(query.square().sum() + key.square().sum(), weight, retain_graph=True)
    (of_value,) = torch.autograd.grad(value.square().sum(), weight)
    found = torch.zeros(weight.numel(), dtype=torch.bool)
    for begin, end in rows_of_q_and_k(attention, "slow Q/K"):
        found[begin:end] = True
    assert torch.equal(found.view_as(weight), of_both != 0)
    assert torch.equal(~found.view_as(weight), of_value != 0)


def test_queries_and_keys_are_found_in_megatrons_fused_weight() -> None:
    run_function(finds_the_rows)


def slows_torchs_optimizer() -> list[str]:
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config = SlowQKConfig(multiplier=0.0, share=0.5, hold_iterations=1)
    lines = []
    handle = attach(model, config, num_microbatches=1, iteration=lambda: 1)
    with pytest.raises(UserError) as caught:
        forward(model)
    lines.append(str(caught.value))
    handle.detach()
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(UserError) as caught:
        attach(model, config, num_microbatches=1, iteration=lambda: 1, optimizer=other)
    lines.append(str(caught.value))
    handle = attach(model, config, num_microbatches=1, iteration=lambda: 1, optimizer=optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def step() -> dict[str, torch.Tensor]:
        """Which elements of each weight stay."""
        forward(model).backward()
        optimizer.step()
        return {name: parameter == before[name] for name, parameter in model.named_parameters()}

    stays = step()
    rows = torch.zeros(48, dtype=torch.bool).view(2, 3, 8)
    rows[:, :2] = True
    name = "decoder.layers.{}.self_attention.linear_qkv.weight"
    assert torch.equal(stays[name.format(1)], rows.view(48, 1).expand(48, 16)), "the last layer's Q and K"
    assert not stays[name.format(0)].any() and not stays["decoder.layers.1.mlp.linear_fc1.weight"].any()
    handle.detach()
    assert not step()[name.format(1)].any(), "taken off, it does nothing"
    halved = SlowQKConfig(multiplier=0.5, hold_iterations=1)
    handle = attach(model, halved, num_microbatches=1, iteration=lambda: 1, optimizer=optimizer)
    optimizer.step()  # an empty one, before the first micro-batch
    handle.use_optimizer(optimizer)
    weight = model.decoder.layers[1].self_attention.linear_qkv.weight
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.state.clear()
    old, rate = weight.detach().clone(), optimizer.param_groups[0]["lr"]
    step()  # the first one of Adam is as long as its rate
    moved = (weight - old).abs()[: weight.shape[0] // 3]
    assert moved.median().item() == pytest.approx(rate / 2, rel=1e-2), "given twice, it is halved once"
    handle.detach()
    weight.requires_grad_(False)
    with pytest.raises(UserError, match="linear_qkv"):
        attach(model, halved, num_microbatches=1, iteration=lambda: 1)
    return lines


def test_an_update_that_is_held_back_wholly_changes_nothing_and_only_there() -> None:
    ((no_optimizer, unknown),) = run_function(slows_torchs_optimizer)
    assert "attach(..., optimizer=)" in no_optimizer
    assert "AdamW" in unknown and "0 of 1" in unknown


def test_the_schedule_is_as_published_where_it_is_left_out() -> None:
    config = SlowQKConfig(hold_iterations=8)
    assert [config.multiplier_at(iteration) for iteration in (1, 8, 9, 10, 11)] == [0.25, 0.25, 0.625, 1, 1]
    assert [layer for layer in range(1, 6) if config.is_slow(layer, 5)] == [3, 4, 5], "above the middle"
    at_once = SlowQKConfig(hold_iterations=2, ramp_iterations=0)
    assert [at_once.multiplier_at(iteration) for iteration in (2, 3)] == [0.25, 1]
