"""What counts as a layer, and which models are refused by name before anything runs."""

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
from jreg_megatron.stream import attachment
from jreg_megatron.stream.anatomy import last_stage_has_a_layer, num_layers, residual_layers


class HybridModel(nn.Module):
    """As much of Megatron's as is looked at: a stage's sub-layers, which know their number."""

    def __init__(self, pattern: str, first: int, count: int, **settings: Any) -> None:
        super().__init__()
        self.hybrid_layer_pattern = pattern
        self.config = SimpleNamespace(
            **{
                "num_layers": sum(pattern.partition("/")[0].count(kind) for kind in "*-EM"),
                "hidden_size": 8,
                "params_dtype": torch.float32,
                "fp32_residual_connection": False,
                "num_layers_in_first_pipeline_stage": None,
                "num_layers_in_last_pipeline_stage": None,
                "pipeline_model_parallel_size": 1,
                "recompute_granularity": None,
                "recompute_method": None,
                "recompute_num_layers": None,
                "sequence_parallel": False,
            }
            | settings
        )
        self.decoder = SimpleNamespace(layers=[self._layer(first + i) for i in range(count)])

    @staticmethod
    def _layer(number: int) -> Any:
        return SimpleNamespace(layer_number=number, self_attn_bda=None, mlp_bda=None)


def test_a_layer_of_a_hybrid_model_is_attention_with_the_mlp_behind_it_numbered_over_all_stages() -> None:
    second_stage = HybridModel("*-*-|*-*E/*-/*-", first=5, count=4)
    layers = residual_layers(second_stage)
    assert num_layers(second_stage) == 4
    assert [layer.number for layer in layers] == [3, 4]
    assert [(layer.first.layer_number, layer.last.layer_number) for layer in layers] == [(5, 6), (7, 8)]


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("M-*-", {}),
        ("**--", {}),
        ("*-*", {}),
        ("*-*|-*-", {"pipeline_model_parallel_size": 2}),
        ("*-*-*-", {"pipeline_model_parallel_size": 2}),  # three sub-layers each
        ("*-*-*-", {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
    ],
)
def test_a_hybrid_pattern_that_is_not_whole_pairs_on_every_stage_is_refused(
    pattern: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        residual_layers(HybridModel(pattern, 1, 2, **settings))
    assert f"hybrid layer pattern {pattern};" in str(caught.value)


@pytest.mark.parametrize(("method", "count"), [("block", 2), ("uniform", 1), ("uniform", 3)])
def test_full_recompute_that_parts_attention_from_mlp_is_refused(method: str, count: int) -> None:
    settings = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}
    with pytest.raises(UserError, match=f"--recompute-method {method} with --recompute-num-layers {count}"):
        residual_layers(HybridModel("*-*-", 1, 4, **settings))
    settings |= {"recompute_method": "uniform", "recompute_num_layers": 2}
    assert len(residual_layers(HybridModel("*-*-", 1, 4, **settings))) == 2


def test_a_hybrid_model_whose_last_stage_is_empty_is_known() -> None:
    assert last_stage_has_a_layer(HybridModel("*-|*-", 1, 2))
    assert not last_stage_has_a_layer(HybridModel("*-*-|", 1, 4))


def test_a_hybrid_model_without_a_pattern_is_refused() -> None:
    # Before 0.17 Megatron can deal out sub-layers by their ratios alone.
    model = HybridModel("*-", 1, 2)
    model.hybrid_layer_pattern = None
    with pytest.raises(UserError, match="HybridModel without a hybrid layer pattern"):
        residual_layers(model)


def attach_where_one_rank_has_another_model() -> str:
    pattern = "*-*-" if dist.get_rank() == 0 else "M-*-"
    with pytest.raises(UserError) as refusal:
        attach(HybridModel(pattern, 1, 4), JRegConfig(), num_microbatches=1)
    return str(refusal.value)


def test_a_model_that_one_rank_refuses_is_refused_on_every_rank() -> None:
    said = run_function(attach_where_one_rank_has_another_model, 2, timeout=180)
    assert len(set(said)) == 1 and "hybrid layer pattern M-*-" in said[0]


def refusal_of_kernels(by_rank: list[Any]) -> str | None:
    """What attaching says where each rank would run its own; None if nothing before the model."""
    kernels.choose = lambda *_: by_rank[dist.get_rank()]  # type: ignore[assignment]
    attachment.Handle = lambda *_: None  # type: ignore[assignment,misc]
    try:
        attach(HybridModel("*-*-", 1, 4), JRegConfig(), num_microbatches=1)
    except UserError as refusal:
        return str(refusal)
    return None


def test_ranks_that_would_run_torch_for_reasons_of_their_own_are_alike() -> None:
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
    assert "rank 0 would run triton 3, and rank 1 torch, as a cache is full, which round" in said[0]


def test_with_nccl_a_model_that_is_not_on_its_gpu_yet_is_refused_and_an_empty_stage_is_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert attachment._device_of([nn.Linear(1, 1)]) == torch.device("cpu")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match=f"still on the {device} device; move it to the GPU before"):
            attachment._device_of([nn.Linear(1, 1, device=device)])
    assert attachment._device_of([nn.Identity()]) == torch.device("cuda", 3)
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    assert attachment._device_of([nn.Identity()]) == torch.device("cuda", 3)
    assert attachment._device_of([nn.Linear(1, 1)]) == torch.device("cpu")


def test_another_kind_of_model_is_refused_although_it_has_layers() -> None:
    class Derived(HybridModel):
        pass

    assert residual_layers(Derived("*-", 1, 2))

    class Vision(nn.Module):
        decoder = SimpleNamespace(layers=[])

    with pytest.raises(UserError, match="does not support a Vision; it must be a Megatron-Core GPTModel"):
        residual_layers(Vision())
