"""The definition of a layer, and models that are refused by name before anything runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_function
from torch import nn

from jreg_megatron import JRegConfig, UserError, attach
from jreg_megatron.methods.jreg import kernels
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.stream import attachment
from jreg_megatron.stream.anatomy import (
    define_layers,
    last_stage_has_a_layer,
    num_layers,
    residual_layers,
)


class IdentityFuncOp:
    """Megatron's name for a bias-dropout-add that does nothing."""


class HybridModel(nn.Module):
    """The attributes of Megatron's that are read: a stage's sub-layers, with their numbers."""

    def __init__(self, pattern: str, first: int = 1, count: int | None = None, **settings: Any) -> None:
        super().__init__()
        self.hybrid_layer_pattern = pattern
        kinds = pattern.partition("/")[0].replace("|", "")
        self.config = SimpleNamespace(
            **{
                "num_layers": len(kinds),
                "hidden_size": 8,
                "params_dtype": torch.float32,
                "fp32_residual_connection": False,
                "recompute_granularity": None,
                "recompute_method": None,
                "recompute_num_layers": None,
                "sequence_parallel": False,
                "context_parallel_size": 1,
            }
            | settings
        )
        held = range(first, first + (len(kinds) if count is None else count))
        self.decoder = SimpleNamespace(layers=[self._layer(kinds[number - 1], number) for number in held])

    @staticmethod
    def _layer(kind: str, number: int) -> Any:
        if kind == "M":
            return SimpleNamespace(layer_number=number, mamba_bda=print)
        nothing = IdentityFuncOp()
        adds = (nothing, print) if kind in "-E" else (print, nothing)
        return SimpleNamespace(layer_number=number, self_attn_bda=adds[0], mlp_bda=adds[1])


def kinds_of(model: HybridModel, rule: str = "mixer") -> list[str]:
    """A model's layers, by the numbers of the modules at their ends."""
    define_layers([model], rule)
    kinds = model.hybrid_layer_pattern.replace("|", "")
    return [kinds[layer.first.layer_number - 1 : layer.last.layer_number] for layer in residual_layers(model)]


@pytest.mark.parametrize(
    "layers",
    ["*- *- *-", "+- +E", "D- G-", "M M- M *-", "* *-", "*-- *", "- *-", "-E M-E- *", "M", "--"],
)
def test_a_layer_of_a_hybrid_model_is_a_mixer_with_the_feed_forward_after_it_or_each_sub_layer(
    layers: str,
) -> None:
    model = HybridModel(layers.replace(" ", ""))
    assert kinds_of(model) == layers.split()
    assert num_layers(model) == len(layers.split())
    assert kinds_of(model, "sublayer") == list(layers.replace(" ", ""))
    assert num_layers(model) == len(layers.replace(" ", ""))


def test_the_layers_of_a_hybrid_model_are_numbered_over_all_stages() -> None:
    second_stage = HybridModel("*-*-|*M*E/*-/*-", first=5, count=4)
    assert num_layers(second_stage) == 5
    layers = residual_layers(second_stage)
    assert [layer.number for layer in layers] == [3, 4, 5]
    ends = [(layer.first.layer_number, layer.last.layer_number) for layer in layers]
    assert ends == [(5, 5), (6, 6), (7, 8)]
    adds = [[name for _, name in layer.adds] for layer in layers]
    assert adds == [["self_attn_bda"], ["mamba_bda"], ["self_attn_bda", "mlp_bda"]]


def test_a_layer_that_a_pipeline_stage_cuts_is_refused_unless_each_sub_layer_is_one() -> None:
    for first, count in ((1, 2), (3, 2)):
        model = HybridModel("M*|-*", first, count)
        with pytest.raises(UserError, match=r"layer 2, '\*-'"):
            kinds_of(model)
        assert len(kinds_of(model, "sublayer")) == 2


def test_a_hybrid_model_that_is_not_built_as_its_pattern_says_is_refused() -> None:
    with pytest.raises(UserError, match="X or Y"):
        residual_layers(HybridModel("*X*Y"))
    model = HybridModel("*-*-")
    model.decoder.layers[1] = model._layer("*", 2)
    with pytest.raises(UserError, match=r"sub-layer 2 is '-' .*self_attn_bda"):
        residual_layers(model)
    model.decoder.layers[1] = model._layer("-", 3)
    with pytest.raises(UserError, match=r"layer_number.* 1 3 3 4\b"):
        residual_layers(model)
    model.decoder.layers[1] = SimpleNamespace(layer_number=2, mlp_bda=IdentityFuncOp())
    with pytest.raises(UserError, match="self_attn_bda, mamba_bda, mlp_bda"):
        residual_layers(model)


@pytest.mark.parametrize(
    ("pattern", "method", "count", "is_refused"),
    [
        ("*-*-", "uniform", 1, True),
        ("*-*-", "uniform", 3, True),
        ("*-*-", "block", 2, True),
        ("*-*-", "uniform", 2, False),
        ("M*-M", "uniform", 2, True),
        ("M*-M", "uniform", 3, False),
        ("M*-M", "uniform", 9, False),
        ("M*M", "uniform", 1, False),
        ("M*M", "block", 2, False),
    ],
)
def test_full_recompute_that_parts_a_layer_is_refused_unless_each_sub_layer_is_one(
    pattern: str, method: str, count: int, is_refused: bool
) -> None:
    settings = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}
    model = HybridModel(pattern, **settings)
    if is_refused:
        said = f"--recompute-method {method} with --recompute-num-layers {count} "
        with pytest.raises(UserError, match=said):
            residual_layers(model)
    else:
        assert residual_layers(model)
    assert len(kinds_of(model, "sublayer")) == len(pattern)


def test_methods_on_a_model_must_agree_on_what_a_layer_is() -> None:
    model = HybridModel("*-*-")
    with pytest.raises(UserError, match="--jreg-layer is sublayer and --norms-layer is mixer; give all"):
        attach(model, JRegConfig(layer="sublayer"), NormsConfig(), num_microbatches=1)
    with pytest.raises(UserError, match=r"--jreg-layer \(.*\) is block; .*mixer.*sublayer"):
        JRegConfig(layer="block")
    own = NormsConfig()
    object.__setattr__(own, "layer", "block")  # as a method may have it that does not check
    with pytest.raises(UserError, match=r"--norms-layer \(.*\) is block; .*mixer.*sublayer"):
        attach(model, own, num_microbatches=1)
    # Explicit weights are one for each layer, whatever that is.
    with pytest.raises(UserError, match=r"--jreg-weights .*\b2 numbers.* not 4"):
        attach(model, JRegConfig(weights=(0, 0, 0, 1)), num_microbatches=1)


def test_a_hybrid_model_whose_last_stage_is_empty_is_known() -> None:
    assert last_stage_has_a_layer(HybridModel("*-|*-"))
    assert not last_stage_has_a_layer(HybridModel("*-*-|"))


def test_a_hybrid_model_without_a_pattern_is_refused() -> None:
    # Before 0.17 Megatron can distribute sub-layers only by their ratios.
    model = HybridModel("*-")
    model.hybrid_layer_pattern = None
    with pytest.raises(UserError, match="HybridModel"):
        residual_layers(model)


def attach_where_one_rank_has_another_model() -> str:
    pattern = "*-*-" if dist.get_rank() == 0 else "X-*-"
    with pytest.raises(UserError) as refusal:
        attach(HybridModel(pattern), JRegConfig(), num_microbatches=1)
    return str(refusal.value)


def test_a_model_that_one_rank_refuses_is_refused_on_every_rank() -> None:
    said = run_function(attach_where_one_rank_has_another_model, 2, timeout=180)
    assert len(set(said)) == 1 and "hybrid layer pattern X-*-" in said[0]


def refusal_of_kernels(by_rank: list[Any]) -> str | None:
    """The error of attach if each rank would run its own; None if there is none before the model."""
    kernels.choose = lambda *_: by_rank[dist.get_rank()]  # type: ignore[assignment]
    attachment.Handle = lambda *_: None  # type: ignore[assignment,misc]
    try:
        attach(HybridModel("*-*-"), JRegConfig(), num_microbatches=1)
    except UserError as refusal:
        return str(refusal)
    return None


def test_ranks_that_run_torch_for_different_reasons_are_accepted() -> None:
    by_rank = [kernels.eager.TorchKernels(f"there is no /tmp/rank{rank}") for rank in range(2)]
    assert run_function(refusal_of_kernels, 2, by_rank, timeout=180) == [None, None]


def test_ranks_that_would_run_different_kernels_are_refused() -> None:
    by_rank = [
        SimpleNamespace(kind="triton 3", name="triton 3"),
        kernels.eager.TorchKernels("a cache is full"),
    ]
    said = run_function(refusal_of_kernels, 2, by_rank, timeout=180)
    assert len(set(said)) == 1
    assert "--jreg-kernels" in said[0]
    assert "rank 0 would run triton 3, and rank 1 torch, as a cache is full: they round" in said[0]


def test_with_nccl_a_model_that_is_not_on_its_gpu_yet_is_refused_and_an_empty_stage_is_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert attachment.device_of([nn.Linear(1, 1)]) == torch.device("cpu")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match=rf"\b{device} device.* GPU"):
            attachment.device_of([nn.Linear(1, 1, device=device)])
    assert attachment.device_of([nn.Identity()]) == torch.device("cuda", 3)
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    assert attachment.device_of([nn.Identity()]) == torch.device("cuda", 3)
    assert attachment.device_of([nn.Linear(1, 1)]) == torch.device("cpu")


def test_another_kind_of_model_is_refused_although_it_has_layers() -> None:
    class Derived(HybridModel):
        pass

    assert residual_layers(Derived("*-"))

    class Vision(nn.Module):
        decoder = SimpleNamespace(layers=[])

    with pytest.raises(UserError, match=r"\bVision; .*GPTModel"):
        residual_layers(Vision())
