"""An independent Llama with JREG in plain PyTorch, for one process. Nothing else of this package is imported.

Parameters go by the names and shapes that a Megatron checkpoint gives them. The regularizer is written down
with autograd, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, ROPE_BASE = 1e-5, 10000.0

ATTENTION_NORM = "self_attention.linear_qkv.layer_norm_weight"
MLP_NORM = "mlp.linear_fc1.layer_norm_weight"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model, by the names of Megatron's arguments."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    num_experts: int = 0
    """Experts per layer; 0 for one dense MLP."""
    top_k: int = 2
    """Experts that a token is sent to."""
    mtp_num_layers: int = 0
    """Layers of multi-token prediction behind the last layer."""
    tied: bool = False
    """Whether the embedding is the output weight too."""

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter; those of the layers are stacked along a first axis."""
        h, layers = self.hidden_size, self.num_layers
        shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (self.vocab_size, h)}
        if not self.tied:
            shapes["output_layer.weight"] = (self.vocab_size, h)
        shapes["decoder.final_layernorm.weight"] = (h,)
        for name, shape in self._layer_parameters().items():
            shapes[f"decoder.layers.{name}"] = (layers, *shape)
        for layer in range(self.mtp_num_layers):
            prefix = f"mtp.layers.{layer}"
            for norm in ("enorm", "hnorm", "final_layernorm"):
                shapes[f"{prefix}.{norm}.weight"] = (h,)
            shapes[f"{prefix}.eh_proj.weight"] = (h, 2 * h)
            for name, shape in self._layer_parameters().items():
                shapes[f"{prefix}.transformer_layer.{name}"] = shape
        return shapes

    def _layer_parameters(self) -> dict[str, tuple[int, ...]]:
        h, f, experts = self.hidden_size, self.ffn_hidden_size, self.num_experts
        shapes: dict[str, tuple[int, ...]] = {
            ATTENTION_NORM: (h,),
            "self_attention.linear_qkv.weight": (3 * h, h),
            "self_attention.linear_proj.weight": (h, h),
            MLP_NORM: (h,),
        }
        if experts:
            return shapes | {
                "mlp.router.weight": (experts, h),
                "mlp.experts.experts.linear_fc1.weight": (experts, 2 * f, h),
                "mlp.experts.experts.linear_fc2.weight": (experts, h, f),
            }
        return shapes | {
            "mlp.linear_fc1.weight": (2 * f, h),
            "mlp.linear_fc2.weight": (h, f),
        }


class ReferenceLlama:
    """Pre-norm RMSNorm, rotary attention, SwiGLU (or experts with it), no biases."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.shape = shape
        self.parameters = {
            name: weights[name].detach().to(dtype).clone().requires_grad_() for name in shape.parameters()
        }

    def states(self, tokens: Tensor, kept: Mapping[int, float] | None = None) -> list[Tensor]:
        """``h_0..h_L`` for token ids ``[b, s]``, each ``[b, s, h]``.

        Args:
            tokens: the ids.
            kept: the part of its input that a layer keeps, by the layer's number, 1-based; all by default.
        """
        h = self._embed(tokens)
        states = [h]
        for layer in range(self.shape.num_layers):
            layer_parameters = self._layer("decoder.layers.", layer)
            added = self._transform(layer_parameters, h) - h
            h = (kept or {}).get(layer + 1, 1) * h + added
            states.append(h)
        return states

    def final_norm(self, h: Tensor) -> Tensor:
        """The final norm's output for the last state ``[b, s, h]``."""
        return _rms_norm(h, self.parameters["decoder.final_layernorm.weight"])

    def token_losses(self, normed: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy ``[b, s]`` of each token for a normed state ``[b, s, h]``."""
        head = "embedding.word_embeddings.weight" if self.shape.tied else "output_layer.weight"
        logits = normed @ self.parameters[head].T
        # In float32 also where the model is not, as Megatron has it.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def predicted_ahead(self, normed: Tensor, tokens: Tensor, labels: Tensor) -> list[Tensor]:
        """Cross-entropy ``[b, s]`` of each layer of multi-token prediction, one token further ahead each."""
        losses = []
        for layer in range(self.shape.mtp_num_layers):
            prefix = f"mtp.layers.{layer}."
            tokens, labels = shifted(tokens), shifted(labels)
            embedded = _rms_norm(self._embed(tokens), self.parameters[f"{prefix}enorm.weight"])
            carried = _rms_norm(normed, self.parameters[f"{prefix}hnorm.weight"])
            h = torch.cat((embedded, carried), -1) @ self.parameters[f"{prefix}eh_proj.weight"].T
            h = self._transform(self._layer(f"{prefix}transformer_layer."), h)
            normed = _rms_norm(h, self.parameters[f"{prefix}final_layernorm.weight"])
            losses.append(self.token_losses(normed, labels))
        return losses

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.parameters["embedding.word_embeddings.weight"][tokens]

    def _layer(self, prefix: str, index: int | None = None) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): parameter if index is None else parameter[index]
            for name, parameter in self.parameters.items()
            if name.startswith(prefix)
        }

    def _transform(self, layer: Mapping[str, Tensor], h: Tensor) -> Tensor:
        h = h + self._attention(layer, _rms_norm(h, layer[ATTENTION_NORM]))
        normed = _rms_norm(h, layer[MLP_NORM])
        if self.shape.num_experts:
            return h + self._experts(layer, normed)
        return h + _swiglu(normed, layer["mlp.linear_fc1.weight"], layer["mlp.linear_fc2.weight"])

    def _attention(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        batch, length, width = normed.shape
        heads = self.shape.num_attention_heads
        size = width // heads
        # One group per head: query, key and value of a head stand together.
        qkv = (normed @ layer["self_attention.linear_qkv.weight"].T).view(batch, length, heads, 3, size)
        query, key, value = (qkv[:, :, :, part].transpose(1, 2) for part in range(3))
        scores = _rotate(query) @ _rotate(key).transpose(-1, -2) / math.sqrt(size)
        future = torch.ones(length, length, dtype=torch.bool, device=normed.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        joined = mixed.transpose(1, 2).reshape(batch, length, width)
        return joined @ layer["self_attention.linear_proj.weight"].T

    def _experts(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        scores, chosen = (normed @ layer["mlp.router.weight"].T).topk(self.shape.top_k, dim=-1)
        share = torch.zeros(*normed.shape[:-1], self.shape.num_experts, dtype=normed.dtype).to(normed.device)
        share = share.scatter(-1, chosen, scores.softmax(-1))
        fc1 = layer["mlp.experts.experts.linear_fc1.weight"]
        fc2 = layer["mlp.experts.experts.linear_fc2.weight"]
        outputs = torch.stack([_swiglu(normed, up, down) for up, down in zip(fc1, fc2, strict=True)], dim=-1)
        return (outputs * share.unsqueeze(-2)).sum(-1)


def displacements(states: Sequence[Tensor]) -> Tensor:
    """Psi of each layer and token, ``[L, b, s]``, in the textbook's form, for float32 states or wider."""
    cosines = [
        F.cosine_similarity(before.to(wide), after.to(wide), dim=-1)
        for before, after in pairwise(states)
        for wide in [torch.promote_types(before.dtype, torch.float32)]
    ]
    return (1 - torch.stack(cosines)) / 2


def shifted(tokens: Tensor) -> Tensor:
    """Every row of ``[b, s]`` moved one place to the left, 0 at its end."""
    return F.pad(tokens[:, 1:], (0, 1))


def _swiglu(h: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (h @ up.T).chunk(2, dim=-1)
    return (F.silu(gate) * value) @ down.T


def _rms_norm(h: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(h, (h.shape[-1],), weight, EPS)


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions on ``[b, heads, s, d]``, the first half of d paired with the second."""
    length, size = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = ROPE_BASE ** (-torch.arange(0, size, 2, dtype=wide, device=x.device) / size)
    angle = (torch.arange(length, device=x.device)[:, None] * frequency).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos().to(x.dtype) + torch.cat((-second, first), dim=-1) * angle.sin().to(x.dtype)
