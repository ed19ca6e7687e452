"""The layers of ``--transformer-impl local`` in pure torch, also on a GPU.

If Transformer Engine or Apex is installed, Megatron uses parts of it for these layers too. Without both,
Megatron lacks context parallelism and sequence-parallel norms.
"""

from __future__ import annotations

import copy
from functools import cache, wraps
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models import backends
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import multi_latent_attention, transformer_block
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from jreg_megatron.runtime.errors import UserError

_SUMS_THE_GRADIENT = "copy_to_tensor_model_parallel_region"
"""Name that ``multi_latent_attention`` imports in versions of Megatron that sum the gradient themselves."""


class GatheringDotProductAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's core attention in torch, with features that Megatron has only with Transformer Engine.

    - Context parallelism: a sequence has ``2 * C`` equal pieces. Rank ``r`` of ``C`` holds pieces ``r`` and
      ``2 * C - 1 - r``. Queries stay on their rank. Keys and values of all ranks are gathered and put in
      order. In the backward pass their gradients are summed and scattered.
    - Different widths of keys and values, as in latent attention.
    - A causal window; unlimited if its first number is negative.
    - Packed sequences, without context parallelism.
    """

    def __init__(
        self,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        plain = copy.copy(config)
        plain.context_parallel_size = 1  # the parent refuses more, and its own code does not need it
        plain.masked_softmax_fusion = False  # the fused kernel ignores the mask
        if k_channels is not None:
            plain.kv_channels = k_channels
        super().__init__(plain, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        # Latent attention's heads share the rotated end of their keys. Under tensor parallelism Megatron's
        # local layers lose the gradient from other ranks' heads (NVIDIA/Megatron-LM#1699).
        is_unsummed = k_channels is not None and not hasattr(multi_latent_attention, _SUMS_THE_GRADIENT)
        self._width_shared = config.qk_pos_emb_head_dim if is_unsummed else 0
        self._looks_back: int | None = None
        if self.attn_mask_type == AttnMaskType.causal and self.scale_mask_softmax.window_size is not None:
            # The parent's window assumes that the queries are the last ones, looks ahead, drops other masks.
            self._looks_back = self.scale_mask_softmax.window_size[0]
            self.scale_mask_softmax.window_size = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the parent's: states ``[s / C, b, heads, d]`` to ``[s / C, b, heads * d]``.

        ``attention_mask`` is ``[b, 1, s / C, s]``, True for keys that a query must not see; None means
        causal. States of packed sequences have no dimension ``b``.
        """
        if packed_seq_params is not None:
            query, key, value = (x[:, None] for x in (query, key, value))
        if self._width_shared:
            own, shared = key.tensor_split((-self._width_shared,), dim=-1)
            key = torch.cat((own, copy_to_tensor_model_parallel_region(shared, group=self.tp_group)), dim=-1)
        group = parallel_state.get_context_parallel_group()
        size = group.size()
        if packed_seq_params is not None and size > 1:  # each sequence would be cut on its own
            raise UserError(
                f"packed sequences come with context parallelism over {size} ranks, which torch-only layers "
                "do not support; set the context-parallel size to 1"
            )
        everywhere = torch.arange(key.shape[0] * size, device=query.device)
        here = everywhere[-query.shape[0] :]
        if size > 1:
            pieces = everywhere.chunk(2 * size)
            held = [torch.cat((pieces[rank], pieces[2 * size - 1 - rank])) for rank in range(size)]
            here = held[group.rank()]
            in_order = torch.cat(held).argsort()
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=group)[in_order]
                for x in (key, value)
            )
        if self._looks_back is not None or (size > 1 and attention_mask is None):
            distance = here[:, None] - everywhere
            is_hidden = distance < 0
            if self._looks_back is not None and self._looks_back >= 0:
                is_hidden |= distance > self._looks_back
            attention_mask = is_hidden[None, None] if attention_mask is None else attention_mask | is_hidden
        if packed_seq_params is not None:
            sequence = torch.bucketize(everywhere, packed_seq_params.cu_seqlens_q, right=True)
            is_hidden = (sequence[:, None] != sequence) | (here[:, None] < everywhere)
            attention_mask = is_hidden[None, None] if attention_mask is None else attention_mask | is_hidden
        output: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return output


@cache
def _let_torch_norms_be_sequence_parallel() -> None:
    """Let Megatron use torch's norms with sequence parallelism, which it refuses.

    Sequence parallelism works with any norm of single tokens. The parameters only need the mark with which
    Megatron finds gradients that the ranks must sum.
    """
    build = WrappedTorchNorm.__new__

    @wraps(build)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm: torch.nn.Module = build(cls, plain, *args, **kwargs)
        if config.fp32_residual_connection:
            norm.register_forward_hook(lambda _, __, normed: normed.to(config.params_dtype))
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            if config.multi_latent_attention and not config.sequence_parallel:
                # Latent attention's norms run before the split into heads, so all ranks have the whole
                # gradient. Megatron would sum that of q_layernorm, by its name; the mean changes nothing.
                parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new)


def install() -> None:
    """Make Megatron's layers without Transformer Engine run in pure torch, until the process ends."""
    backends.DotProductAttention = GatheringDotProductAttention
    gpt_layer_specs.LNImpl = backends.LNImpl = transformer_block.LayerNormImpl = WrappedTorchNorm
    _let_torch_norms_be_sequence_parallel()
    moe_utils.te_general_gemm = None  # 0.16 lacks this name without Transformer Engine
