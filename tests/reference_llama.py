"""An independent Llama with JREG in plain PyTorch, one process, for comparison. Nothing of ours is imported.

Weights come from a Megatron ``torch_dist`` checkpoint, read with torch alone. The regularizer is written
down with autograd, as in the paper. The optimizer is torch's AdamW with a global gradient-norm clip.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor

NUM_LAYERS, WIDTH, HEADS, EPS, ROPE_BASE = 4, 64, 4, 1e-5, 10000.0


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All model tensors of a checkpoint; those of the layers are stacked along a first axis."""
    reader = dcp.FileSystemReader(checkpoint)
    names = {
        name: torch.empty(entry.size, dtype=torch.float32)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size") and not name.startswith(("optimizer", "rng_state", "rerun_state"))
    }
    dcp.load(names, storage_reader=reader)
    return names


class ReferenceLlama:
    """Pre-norm RMSNorm, rotary attention, SwiGLU, untied head, no biases."""

    def __init__(self, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.parameters: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if name.startswith("decoder.layers."):
                for layer in range(NUM_LAYERS):
                    self.parameters[name.replace("layers.", f"layers.{layer}.")] = (
                        tensor[layer].to(dtype).clone()
                    )
            else:
                self.parameters[name] = tensor.to(dtype).clone()
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    def states(self, tokens: Tensor) -> list[Tensor]:
        """``h_0..h_L`` for token ids ``[b, s]``, each ``[b, s, h]``."""
        h = self.parameters["embedding.word_embeddings.weight"][tokens]
        states = [h]
        for layer in range(NUM_LAYERS):
            h = h + self._attention(layer, h)
            h = h + self._mlp(layer, h)
            states.append(h)
        return states

    def final_norm(self, h: Tensor) -> Tensor:
        return _rms_norm(h, self.parameters["decoder.final_layernorm.weight"])

    def cross_entropy(self, h: Tensor, labels: Tensor) -> Tensor:
        logits = self.final_norm(h) @ self.parameters["output_layer.weight"].T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def _parameter(self, layer: int, name: str) -> Tensor:
        return self.parameters[f"decoder.layers.{layer}.{name}"]

    def _attention(self, layer: int, h: Tensor) -> Tensor:
        batch, length, _ = h.shape
        size = WIDTH // HEADS
        normed = _rms_norm(h, self._parameter(layer, "self_attention.linear_qkv.layer_norm_weight"))
        # One group per head: query, key and value of a head stand together.
        qkv = (normed @ self._parameter(layer, "self_attention.linear_qkv.weight").T).view(
            batch, length, HEADS, 3, size
        )
        query, key, value = (qkv[:, :, :, part].transpose(1, 2) for part in range(3))
        scores = _rotate(query) @ _rotate(key).transpose(-1, -2) / math.sqrt(size)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        return (
            mixed.transpose(1, 2).reshape(batch, length, WIDTH)
            @ self._parameter(layer, "self_attention.linear_proj.weight").T
        )

    def _mlp(self, layer: int, h: Tensor) -> Tensor:
        normed = _rms_norm(h, self._parameter(layer, "mlp.linear_fc1.layer_norm_weight"))
        gate, up = (normed @ self._parameter(layer, "mlp.linear_fc1.weight").T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self._parameter(layer, "mlp.linear_fc2.weight").T


def layer_displacements(states: list[Tensor]) -> Tensor:
    """Mean over tokens of Psi_1..Psi_L."""
    turned = [(1 - F.cosine_similarity(a, b, dim=-1)) / 2 for a, b in pairwise(states)]
    return torch.stack([psi.mean() for psi in turned])


def train(
    model: ReferenceLlama,
    steps: list[list[tuple[Tensor, Tensor]]],
    *,
    coeff: float,
    alpha: float,
    post_norm: bool = False,
    lr: float = 1e-3,
    clip: float = 1.0,
) -> dict[str, list[float]]:
    """Train on ``steps``, each a list of micro-batches (tokens, labels); returns what a log would show."""
    weights = torch.softmax(alpha * torch.arange(1.0, NUM_LAYERS + 1, dtype=torch.float64), 0).float()
    parameters = list(model.parameters.values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    log: dict[str, list[float]] = {"lm loss": [], "jreg loss": [], "jump rate": [], "grad-norm": []}
    for micro_batches in steps:
        psi = torch.zeros(NUM_LAYERS)
        cross_entropy = torch.zeros(())
        for tokens, labels in micro_batches:
            states = model.states(tokens)
            ce = model.cross_entropy(states[-1], labels)
            if post_norm:
                states[-1] = model.final_norm(states[-1])
            turned = layer_displacements(states)
            ((ce + coeff * (weights * turned).sum()) / len(micro_batches)).backward()
            psi += turned.detach() / len(micro_batches)
            cross_entropy += ce.detach() / len(micro_batches)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        log["lm loss"].append(cross_entropy.item())
        log["jreg loss"].append((weights * psi).sum().item())
        log["jump rate"].append(100 * max(0.0, (psi[-1] - psi[-2]).item()))
        log["grad-norm"].append(norm.item())
    return log


def _rms_norm(h: Tensor, weight: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * weight


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions on ``[b, heads, s, d]``, the first half of d paired with the second."""
    length, size = x.shape[-2:]
    frequency = ROPE_BASE ** (-torch.arange(0, size, 2) / size)
    angle = (torch.arange(length)[:, None] * frequency).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()
