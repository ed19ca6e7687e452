"""Small hybrid models of any sub-layers on one rank, and their layers' numbers by plain hooks and autograd.

The modules are Megatron's, and the gated delta net and sparse attention run its own torch code. Stand-ins are
Mamba's mixer (``jreg_megatron.selftest.mixer``), and the linear layers that sparse attention takes from
Transformer Engine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import multi_token_prediction as mtp
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import (
    AbsorbedMLASelfAttention,
    AbsorbedMLASelfAttentionSubmodules,
)
from megatron.core.transformer.experimental_attention_variant.dsa import (
    DSAIndexer,
    DSAIndexerSubmodules,
    DSAttention,
    DSAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from jreg_megatron.cpu.hybrid import attention_layer
from jreg_megatron.methods.jreg.formulas import displacement
from jreg_megatron.selftest.mixer import stack_spec
from jreg_megatron.selftest.step import LATENT

VOCABULARY, LENGTH = 32, 8
SPARSE = {
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 16,
    "dsa_indexer_topk": 4,
    "dsa_indexer_rotate_activation": False,
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_ffn_hidden_size": 48,
}


def build(pattern: str, **modules: type[Any]) -> Any:
    """A model with the sub-layers of a pattern.

    Args:
        pattern: without stages; after a slash the sub-layers of multi-token prediction.
        modules: by the name of a slot of Megatron's, the class that takes it.
    """
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    common.HAVE_FLA, common.l2norm = True, partial(F.normalize, dim=-1)  # its kernels are not used else
    is_latent = "+" in pattern or "D" in pattern
    config = (MLATransformerConfig if is_latent else TransformerConfig)(
        num_layers=len(pattern.partition("/")[0]),
        mtp_num_layers=1 if "/" in pattern else None,
        is_hybrid_model=True,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.2,
        use_cpu_initialization=True,
        deterministic_mode="G" in pattern,
        linear_conv_kernel_dim=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        **(LATENT if is_latent else {}),
        **(EXPERTS if "E" in pattern else {}),
        **(SPARSE if "D" in pattern else {}),
    )
    slots = {
        "gdn_layer": attention_layer(GATED_DELTA_NET),
        "dsa_layer": attention_layer(SPARSE_ATTENTION),
        "mtp_block_spec": PREDICTS_AHEAD,
    } | {
        name: dataclasses.replace(getattr(stack_spec.submodules, name), module=module)
        for name, module in modules.items()
    }
    spec = ModuleSpec(
        module=stack_spec.module, submodules=dataclasses.replace(stack_spec.submodules, **slots)
    )
    return HybridModel(
        config,
        spec,
        hybrid_layer_pattern=pattern,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
    )


class Duplicated(torch.nn.Linear):
    """A linear layer that all ranks have whole, as Transformer Engine's."""

    def __init__(self, size_in: int, size_out: int, **_: Any) -> None:
        super().__init__(size_in, size_out, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


GATED_DELTA_NET = ModuleSpec(
    module=GatedDeltaNet,
    submodules=GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
    ),
)
SPARSE_ATTENTION = ModuleSpec(
    module=AbsorbedMLASelfAttention,
    params={"attn_mask_type": AttnMaskType.causal},
    submodules=AbsorbedMLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=ColumnParallelLinear,
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=ColumnParallelLinear,
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=ModuleSpec(
            module=DSAttention,
            submodules=DSAttentionSubmodules(
                indexer=ModuleSpec(
                    module=DSAIndexer,
                    submodules=DSAIndexerSubmodules(
                        linear_wq_b=Duplicated,
                        linear_wk=Duplicated,
                        k_norm=WrappedTorchNorm,
                        linear_weights_proj=Duplicated,
                    ),
                )
            ),
        ),
        linear_proj=RowParallelLinear,
        q_layernorm=WrappedTorchNorm,
        kv_layernorm=WrappedTorchNorm,
    ),
)


PREDICTS_AHEAD = ModuleSpec(
    module=mtp.MultiTokenPredictionBlock,
    submodules=mtp.MultiTokenPredictionBlockSubmodules(
        layer_specs=[
            ModuleSpec(
                module=mtp.MultiTokenPredictionLayer,
                submodules=mtp.MultiTokenPredictionLayerSubmodules(
                    enorm=WrappedTorchNorm,
                    hnorm=WrappedTorchNorm,
                    eh_proj=ColumnParallelLinear,
                    mtp_model_layer=None,
                    layer_norm=WrappedTorchNorm,
                ),
            )
        ]
    ),
)


def losses(model: Any) -> Tensor:
    """Each token's loss of one micro-batch, ``[b, s]``."""
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    positions = torch.arange(LENGTH).expand_as(tokens)
    out: Tensor = model(tokens, positions, None, labels=tokens.roll(-1, dims=1))
    return out


def written_out(
    model: Any, layers: Sequence[str], coeff: float, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Displacement of each layer ``[L]`` from plain hooks, and gradients by autograd.

    Args:
        model: with nothing attached.
        layers: each layer's sub-layers.
        coeff: lambda.
        weights: of the layers, ``[L]``.
    """
    states: list[Tensor] = []

    def see(_: Any, __: Any, named: dict[str, Any], out: Any) -> None:
        states.extend([named["hidden_states"]] if not states else [])
        states.append(out[0] if isinstance(out, tuple) else out)

    hooks = [module.register_forward_hook(see, with_kwargs=True) for module in model.decoder.layers]
    model.zero_grad()
    loss = losses(model).mean()
    ends = [states[at] for at in itertools.accumulate(map(len, layers), initial=0)]
    psi = torch.stack([displacement(*pair).mean() for pair in itertools.pairwise(ends)])
    (loss + coeff * (weights.to(psi) * psi).sum()).backward()
    for hook in hooks:
        hook.remove()
    return psi.detach(), gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    """By name, of the parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
