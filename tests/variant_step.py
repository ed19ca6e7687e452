"""The step of ``layout_step`` with layers of other kinds, beside a reference.

Where the kind computes something else than the self-test's model, the reference is written out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import run_function
from megatron.core import distributed, tensor_parallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.models import backends
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import transformer_block, transformer_config
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from jreg_megatron.methods.attenuation.settings import AttenuationConfig
from jreg_megatron.selftest import compare, reference, step, toy
from jreg_megatron.selftest.compare import Comparison, Difference
from jreg_megatron.selftest.layouts import NUM_LAYERS, Layout

WINDOW = 5
"""Tokens that a query looks back."""

PREFIX = "self_attention."


class WindowLlama(reference.ReferenceLlama):
    """Attention that sees its own token and the ``WINDOW`` before it."""

    def _attention(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        batch, length, width = normed.shape
        heads = self.shape.num_attention_heads
        qkv = (normed @ layer[f"{PREFIX}linear_qkv.weight"].T).view(batch, length, heads, 3, -1)
        query, key, value = (qkv[:, :, :, part].transpose(1, 2) for part in range(3))
        rows = []
        for at in range(length):
            seen = slice(max(0, at - WINDOW), at + 1)
            scores = reference.rotate(query)[:, :, at : at + 1] @ reference.rotate(key)[:, :, seen].mT
            rows.append((scores / math.sqrt(width // heads)).softmax(-1) @ value[:, :, seen])
        joined = torch.cat(rows, dim=2).transpose(1, 2).reshape(batch, length, width)
        return joined @ layer[f"{PREFIX}linear_proj.weight"].T


GROUPS = 2
"""Of queries that share their key and value."""

OFFSET = f"{PREFIX}core_attention.softmax_offset"


class SinkShape(reference.Shape):
    """Heads that share keys and values, and attention that may look at nothing: a number for each head."""

    is_learnable = True

    def _parameters_of(self, kind: str) -> dict[str, tuple[int, ...]]:
        shapes, heads = super()._parameters_of(kind), self.num_attention_heads
        if kind == "*":
            width = self.hidden_size // heads
            shapes[f"{PREFIX}linear_qkv.weight"] = ((heads + 2 * GROUPS) * width, self.hidden_size)
            shapes |= {OFFSET: (heads,)} if self.is_learnable else {}
        return shapes


class SinkLlama(reference.ReferenceLlama):
    """``exp(score) / (exp(offset) + sum of exp(score))``, as in gpt-oss; the offset is learnt, or 0."""

    def _attention(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        heads = self.shape.num_attention_heads
        qkv = (normed @ layer[f"{PREFIX}linear_qkv.weight"].T).unflatten(
            -1, (GROUPS, heads // GROUPS + 2, -1)
        )
        queries, keys, values = qkv.tensor_split((heads // GROUPS, heads // GROUPS + 1), dim=3)
        query, key, value = (x.permute(0, 2, 3, 1, 4) for x in (queries, keys, values))  # b, group, head, s
        scores = reference.rotate(query) @ reference.rotate(key).mT / math.sqrt(query.shape[-1])
        raised = scores.masked_fill(reference.future(normed), -math.inf).exp()
        offset = layer.get(OFFSET, normed.new_zeros(heads)).view(GROUPS, -1, 1, 1)
        mixed = raised / (offset.exp() + raised.sum(-1, keepdim=True)) @ value
        return mixed.flatten(1, 2).transpose(1, 2).flatten(2) @ layer[f"{PREFIX}linear_proj.weight"].T


WIDER, EMBEDDED = 4, 3.0
"""The model's width relative to that of MuP's hyperparameters, and the embedding's factor."""


class MupLlama(reference.ReferenceLlama):
    """Scores over the head's width, not its root, and scaled embedding and logits (arXiv:2203.03466)."""

    def _embed(self, tokens: Tensor) -> Tensor:
        return EMBEDDED * super()._embed(tokens)

    def _attention(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        heads, qkv = self.shape.num_attention_heads, layer[f"{PREFIX}linear_qkv.weight"]
        factor = qkv.new_tensor([math.sqrt(heads / normed.shape[-1]), 1, 1]).view(3, 1, 1)
        scaled = (qkv.unflatten(0, (heads, 3, -1)) * factor).flatten(0, 2)
        return super()._attention({**layer, f"{PREFIX}linear_qkv.weight": scaled}, normed)

    def token_losses(self, normed: Tensor, labels: Tensor) -> Tensor:
        return super().token_losses(normed / WIDER, labels)


KEPT, ATTENUATED = 0.3, (2, NUM_LAYERS)
"""The factor of the residual, and the layers that have it."""


class AttenuatedLlama(reference.ReferenceLlama):
    """Some layers keep a part of their input, ``h_l = KEPT * h_(l-1) + F_l(h_(l-1))``."""

    def __init__(self, shape: reference.Shape, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(shape, weights, dtype)
        self.shape = replace(shape, gated=True)
        kept = [KEPT if number in ATTENUATED else 1.0 for number in range(1, NUM_LAYERS + 1)]
        self.parameters[f"decoder.layers.{reference.GATE}"] = torch.tensor(kept, dtype=dtype)[:, None].logit()


class LossInPlace(torch.autograd.Function):
    """Cross-entropy ``[s, b]`` that keeps its gradient in the logits' memory, as Liger's does."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *_: Any) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        ctx.kept = logits.detach().copy_(logits.softmax(-1) - F.one_hot(target, logits.shape[-1]))
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kept.mul_(grad[..., None]), None, None


def apply_liger() -> None:
    """Put stand-ins where ``apply_liger_kernel_to_megatron`` of liger-kernel 0.8.5 puts its classes."""

    class RMSNorm(torch.nn.Module):
        def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(hidden_size)), eps
            self.weight.sequence_parallel = config.sequence_parallel

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    backends.LocalSpecProvider.layer_norm = lambda *_, **__: RMSNorm
    transformer_block.LayerNormImpl = RMSNorm
    tensor_parallel.vocab_parallel_cross_entropy = lambda logits, target, **_: LossInPlace.apply(
        logits, target
    )


class NormAndFork(torch.autograd.Function):
    """A norm that returns its input too, by one node, as Transformer Engine's fused one does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps), x.clone()

    @staticmethod
    def backward(ctx: Any, of_normed: Tensor, of_residual: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            normed = F.rms_norm(x, weight.shape, weight, ctx.eps)
        of_x, of_weight = torch.autograd.grad(normed, (x, weight), of_normed)
        return of_x + of_residual, of_weight, None


def fork_residuals() -> None:
    """Have the norms of each layer return the residual too."""

    class Norm(torch.nn.Module):
        def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(hidden_size)), eps

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return NormAndFork.apply(x, self.weight, self.eps)

    backends.LocalSpecProvider.layer_norm = lambda *_, **__: Norm


def shard_by_another_wrapper() -> None:
    """Have another wrapper call torch's FSDP2, as AMD's Primus does: copies of shards, types by a policy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class OtherTorchFullyShardedDataParallel(_BaseDataParallel):
        def __init__(self, config: Any, ddp_config: Any, module: torch.nn.Module) -> None:
            super().__init__(config=config, module=module)
            self.ddp_config = ddp_config
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
            policy = MixedPrecisionPolicy(param_dtype=config.params_dtype, reduce_dtype=torch.float32)
            for part in module.modules():
                if isinstance(part, TransformerLayer | LanguageModelEmbedding):
                    fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

        def finish_grad_sync(self, **_: Any) -> None:
            pass

    distributed.TorchFullyShardedDataParallel = OtherTorchFullyShardedDataParallel


KINDS: dict[str, tuple[type[reference.ReferenceLlama], dict[str, Any]]] = {
    "latent": (reference.ReferenceLlama, step.LATENT),
    "window": (WindowLlama, {"window_size": (WINDOW, 0)}),
    # Transformer Engine lets a causal window look ahead nowhere either.
    "window that would look ahead": (WindowLlama, {"window_size": (WINDOW, 2)}),
    "window without an end": (reference.ReferenceLlama, {"window_size": (-1, 0)}),
    "MuP": (
        MupLlama,
        {"use_mup": True, "mup_base_hidden_size": 32 // WIDER, "mup_embedding_mult": EMBEDDED},
    ),
    "learnable sinks": (SinkLlama, {"num_query_groups": GROUPS, "softmax_type": "learnable"}),
    "fixed sinks": (SinkLlama, {"num_query_groups": GROUPS, "softmax_type": "off-by-one"}),
    "Liger": (reference.ReferenceLlama, {}),
    "another's FSDP2": (reference.ReferenceLlama, {}),
    "fixed attenuation": (AttenuatedLlama, {}),
    "norms that fork the residual": (reference.ReferenceLlama, {"fused_residual_rmsnorm": True}),
    "fp32 residual": (reference.ReferenceLlama, {"fp32_residual_connection": True}),
    "tokens exchanged": (reference.ReferenceLlama, {"moe_token_dispatcher_type": "alltoall"}),
    "norms recomputed": (
        reference.ReferenceLlama,
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    ),
}


def on_ranks(layout: Layout, kinds: tuple[str, ...]) -> dict[str, tuple[Difference, Difference]]:
    """For each kind how far a step at the layout is from the reference, and how far it may be."""
    found = run_function(_compare, layout.world_size, layout, kinds, timeout=120)[0]
    return {kind: (comparison.found, comparison.limit) for kind, comparison in found.items()}


def _compare(layout: Layout, kinds: tuple[str, ...]) -> dict[str, Comparison]:
    torch.set_num_threads(1)
    return {kind: _compare_kind(layout, kind) for kind in kinds}


_CONFIGS = transformer_config.TransformerConfig, transformer_config.MLATransformerConfig
_local_spec, _shape_of = gpt_layer_specs.get_gpt_layer_local_spec, toy.shape_of
_ATTENUATION = AttenuationConfig(factor=KEPT, layers=ATTENUATED)


def _compare_kind(layout: Layout, kind: str) -> Comparison:
    model, options = KINDS[kind]
    is_latent = kind == "latent"
    if kind == "Liger":
        apply_liger()
    if kind == "another's FSDP2":
        shard_by_another_wrapper()
    if kind == "norms that fork the residual":
        fork_residuals()
    transformer_config.TransformerConfig = lambda **given: _CONFIGS[is_latent](**{**given, **options})
    gpt_layer_specs.get_gpt_layer_local_spec = partial(
        _local_spec, **dict.fromkeys(("multi_latent_attention", "qk_layernorm"), is_latent)
    )
    toy.ReferenceLlama = model  # type: ignore[misc]
    added = [_ATTENUATION] if kind == "fixed attenuation" else []
    step.settings_of = lambda of: [*added, *toy.settings_of(of)]  # type: ignore[attr-defined]
    for module in (toy, step, compare):
        module.shape_of = partial(_shape_for, kind)  # type: ignore[assignment]
    return compare.compare_step(layout)


def _shape_for(kind: str, layout: Layout) -> reference.Shape:
    shape = _shape_of(layout)
    if kind == "latent":
        return replace(shape, layers=tuple(f"+{kinds[1:]}" for kinds in shape.layers))
    if "sinks" in kind:
        shape = SinkShape(**vars(shape))
        object.__setattr__(shape, "is_learnable", kind == "learnable sinks")
    return shape
