"""Megatron's fine-grained offloading of activations: its own code, and tensors of the CPU that it copies."""

from __future__ import annotations

from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from harness import run_function

from jreg_megatron import JRegConfig, UserError
from jreg_megatron.selftest.compare import Comparison, compare_step
from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.stream.support import refuse_unsupported

MODULES = ["qkv_linear", "core_attn", "attn_proj", "mlp_norm"]
EXPERTS = {"model": "moe", "data": 2, "expert": 2}

LAYOUTS = [
    Layout(methods="all"),
    Layout(pipeline=2, virtual=2, num_microbatches=4, final_state="post_norm"),
    Layout(**EXPERTS, overlap=True, num_microbatches=4, methods="all"),
]


@pytest.mark.parametrize("layout", [pytest.param(layout, id=layout.name) for layout in LAYOUTS])
def test_a_step_of_offloaded_activations_equals_the_reference_at(layout: Layout) -> None:
    comparison, freed, reloaded = run_function(offloaded, layout.world_size, layout, MODULES, timeout=120)[0]
    assert not comparison.found.exceeds(comparison.limit), comparison.found
    assert freed > 0 and reloaded > 0


def test_offloading_frees_a_layers_input_before_its_end_only_with_attn_norm_which_is_refused() -> None:
    config = SimpleNamespace(fine_grained_activation_offloading=True, offload_modules=["attn_norm"])
    with pytest.raises(UserError, match="offload_modules attn_norm"):
        refuse_unsupported(config, JRegConfig())
    found = [run_function(sizes_of_inputs, 1, modules)[0] for modules in (MODULES, ["attn_norm"])]
    assert min(found[0]) > 0
    assert max(found[1]) == 0


def test_offloading_the_norm_of_an_mlp_with_which_a_layer_begins_is_refused() -> None:
    layout = Layout(model="hybrid", layers="sub-layers as layers")
    assert "offload_modules mlp_norm" in run_function(refusal_of, 1, layout)[0]


def refusal_of(layout: Layout) -> str:
    try:
        offloaded(layout, ["mlp_norm"])
    except UserError as error:
        return str(error)
    return ""


def offload(modules: list[str]) -> SimpleNamespace:
    """Make Megatron offload tensors of the CPU. Returns their counter."""
    import megatron.core.extensions.transformer_engine as extension
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offloading
    from megatron.core.transformer import transformer_config

    counts = SimpleNamespace(freed=0, reloaded=0)
    extension.cpu_offload = ModuleType("cpu_offload")
    chunk = offloading.ChunkOffloadHandler
    chunk._can_manage_tensor_for_offload = staticmethod(lambda x: not isinstance(x, torch.nn.Parameter))
    commit, reload = chunk.bulk_offload, chunk.reload

    def counted_commit(self: Any, name: str, tensors: list[torch.Tensor]) -> None:
        commit(self, name, tensors)
        counts.freed += sum(tensor.untyped_storage().size() == 0 for tensor in tensors)

    def counted_reload(self: Any, *args: Any, **named: Any) -> Any:
        counts.reloaded += 1
        return reload(self, *args, **named)

    chunk.bulk_offload, chunk.reload = counted_commit, counted_reload
    options = {"fine_grained_activation_offloading": True, "offload_modules": modules}
    transformer_config.TransformerConfig = partial(
        transformer_config.TransformerConfig, **options, min_offloaded_tensor_size=0
    )
    return counts


def offloaded(layout: Layout, modules: list[str]) -> tuple[Comparison, int, int]:
    torch.set_num_threads(1)
    counts = offload(modules)
    comparison = compare_step(layout)
    return comparison, counts.freed, counts.reloaded


def sizes_of_inputs(modules: list[str]) -> list[int]:
    """Of the memory of each layer's input where the layer's last sum is made."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from jreg_megatron.selftest import step

    torch.set_num_threads(1)
    offload(modules)
    sizes = []
    attention = TransformerLayer._forward_attention
    mlp = TransformerLayer._forward_mlp

    def noted_attention(self: Any, hidden_states: torch.Tensor, *args: Any, **named: Any) -> Any:
        self._given = hidden_states
        return attention(self, hidden_states, *args, **named)

    def noted_mlp(self: Any, *args: Any, **named: Any) -> Any:
        output = mlp(self, *args, **named)
        sizes.append(self._given.untyped_storage().size())
        return output

    TransformerLayer._forward_attention, TransformerLayer._forward_mlp = noted_attention, noted_mlp
    step.attach = lambda *_, **__: SimpleNamespace(
        captured="",
        reduce_training_metrics=lambda: SimpleNamespace(
            displacement=torch.zeros(4), jreg_loss=0.0, jump_rate=0.0
        ),
    )
    compare_step(Layout(num_microbatches=1))
    return sizes
