"""A Mamba layer with a stand-in in torch for the mixer, because Mamba's own mixer needs CUDA kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from jreg_megatron.cpu import hybrid
from jreg_megatron.selftest.reference import DECAY


class StandInMixer(MegatronModule):  # type: ignore[misc]
    """Mixes tokens by a state that decays from token to token, like the reference's."""

    def __init__(self, config: Any, d_model: int, pg_collection: Any, **_: Any) -> None:
        super().__init__(config)
        options = {"config": config, "bias": False, "skip_bias_add": True, "tp_group": pg_collection.tp}
        options["init_method"] = config.init_method
        self.in_proj = ColumnParallelLinear(d_model, 2 * d_model, gather_output=False, **options)
        self.out_proj = RowParallelLinear(2 * d_model, d_model, input_is_parallel=True, **options)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` to the same, and no bias."""
        added, _ = self.in_proj(hidden_states)
        at = torch.arange(len(added), device=added.device)
        age = at[:, None] - at
        kept = torch.where(age >= 0, DECAY ** age.clamp(min=0), 0.0).to(added.dtype)
        state = torch.einsum("ts,sbh->tbh", kept, added)
        out: tuple[Tensor, Tensor | None] = self.out_proj(F.silu(state))
        return out


_MAMBA = ModuleSpec(
    module=MambaLayer,
    submodules=MambaLayerSubmodules(
        norm=WrappedTorchNorm, mixer=ModuleSpec(module=StandInMixer), mamba_bda=get_bias_dropout_add
    ),
)

stack_spec = ModuleSpec(
    module=hybrid.LocalStack,
    submodules=dataclasses.replace(hybrid.stack_spec.submodules, mamba_layer=_MAMBA),
)


def transformer_engine_spec() -> Any:
    """Megatron's spec for Transformer Engine with this Mamba. Experts are computed one by one, so their
    weights have the names of local ones."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    parts = hybrid_stack_spec.submodules
    experts = get_moe_module_spec(use_te=True, num_experts=1, moe_grouped_gemm=False)
    moe = dataclasses.replace(parts.moe_layer.submodules, mlp=experts)
    layers = {
        "mamba_layer": _MAMBA,
        "moe_layer": ModuleSpec(module=parts.moe_layer.module, submodules=moe),
    }
    return ModuleSpec(module=hybrid_stack_spec.module, submodules=dataclasses.replace(parts, **layers))
