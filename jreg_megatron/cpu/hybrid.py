"""A hybrid model's stack of sub-layers without Transformer Engine: attention, latent attention, MLP, experts.

Megatron's own specs need Transformer Engine. ``--spec jreg_megatron.cpu.hybrid stack_spec`` is the same stack
in torch, for Megatron-Core 0.16 or later.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models import backends
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from jreg_megatron.runtime.errors import UserError

stack: Any
submodules: Any
try:
    from megatron.core.models.hybrid import hybrid_block

    stack, submodules = hybrid_block.HybridStack, hybrid_block.HybridStackSubmodules
except ImportError:  # before 0.18
    from megatron.core.ssm import mamba_block

    stack, submodules = mamba_block.MambaStack, mamba_block.MambaStackSubmodules


class LocalStack(stack):  # type: ignore[misc]
    """Megatron's stack with torch's final norm. Megatron's own is Transformer Engine's with any spec."""

    def __init__(self, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        if config.multi_latent_attention and hasattr(submodules, "mla_layer"):
            submodules = replace(submodules, mla_layer=_latent_attention(config.qk_layernorm))
        super().__init__(config, submodules, *args, **{**kwargs, "post_layer_norm": False})
        if any(isinstance(layer, IdentityOp) for layer in self.layers):
            raise UserError(
                f"{__name__} has attention ('*'), MLP ('-'), experts ('E') and, from "
                "Megatron-Core 0.19 on, latent attention ('+') only; leave others out of the hybrid "
                "layer pattern"
            )
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = WrappedTorchNorm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def _mlp() -> Any:
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=parts)
    return ModuleSpec(module=MLP, submodules=parts)  # before 0.18


def attention_layer(attention: Any, **more: Any) -> Any:
    """The spec of a sub-layer with this attention after a norm. ``more`` are further submodules."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            **more,
        ),
    )


def _latent_attention(normed: bool) -> Any:
    """The spec of a sub-layer of latent attention, with or without norms of queries and keys."""
    layer = get_gpt_layer_local_spec(multi_latent_attention=True, qk_layernorm=normed).submodules
    return attention_layer(layer.self_attention)


stack_spec = ModuleSpec(
    module=LocalStack,
    submodules=submodules(
        attention_layer=attention_layer(
            ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=backends.LocalSpecProvider().core_attention(),
                    linear_proj=RowParallelLinear,
                ),
            ),
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=_mlp(),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    ),
)
"""Its weights have the same names as with Transformer Engine's spec, so checkpoints fit both."""
