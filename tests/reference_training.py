"""Training of the independent reference model in one process: AdamW, clipping, and the values of a log.

Weights come from a Megatron ``torch_dist`` checkpoint, read with torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from jreg_megatron.selftest.reference import ReferenceLlama, Shape, displacements

SHAPE = Shape(layers=("*-",) * 4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=256)


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All model tensors of a checkpoint. The layers' tensors are stacked along a first axis."""
    reader = dcp.FileSystemReader(checkpoint)
    names = {
        name: torch.empty(entry.size, dtype=torch.float32)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size") and not name.startswith(("optimizer", "rng_state", "rerun_state"))
    }
    dcp.load(names, storage_reader=reader)
    return names


def train(
    checkpoint: Path,
    steps: list[list[tuple[Tensor, Tensor, Tensor]]],
    *,
    coeff: float | Sequence[float],
    alpha: float,
    post_norm: bool = False,
    per_token: bool = False,
    only_unmasked: bool = False,
    adam_eps: float = 1e-8,
    lr: float = 1e-3,
    clip: float = 1.0,
    slow: Sequence[float] = (),
    trained: dict[str, Tensor] | None = None,
) -> dict[str, list[float]]:
    """Train from a checkpoint on ``steps``, each a list of micro-batches (tokens, labels, loss mask).

    Cross-entropy is averaged over each micro-batch's unmasked tokens and then over micro-batches, or with
    ``per_token`` over all unmasked tokens of a step. The regularizer takes part with every token, or with
    ``only_unmasked`` as cross-entropy does. ``coeff`` may be a number for each step. In each step of
    ``slow``, queries and keys of the upper half of the layers learn so many times as fast as the rest.
    ``trained`` gets the weights of the end.
    """
    model = ReferenceLlama(SHAPE, load_weights(checkpoint), torch.float32)
    weights = torch.softmax(alpha * torch.arange(1.0, SHAPE.num_layers + 1, dtype=torch.float64), 0).float()
    parameters = list(model.parameters.values())
    matrices = [p for name, p in model.parameters.items() if "norm" not in name]
    vectors = [p for name, p in model.parameters.items() if "norm" in name]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=adam_eps)
    log: dict[str, list[float]] = {"lm loss": [], "jreg loss": [], "jump rate": [], "grad-norm": []}
    qkv = model.parameters["decoder.layers.self_attention.linear_qkv.weight"]
    strengths = [coeff] * len(steps) if isinstance(coeff, int | float) else coeff
    heads, upper = SHAPE.num_attention_heads, SHAPE.num_layers // 2
    # By layer and head: queries, keys and values.
    queries_and_keys = qkv.detach().unflatten(1, (heads, 3, -1))[upper:, :, :2]
    for number, micro_batches in enumerate(steps):
        all_unmasked = sum(mask.sum() for *_, mask in micro_batches)
        psi_sum, psi_count = torch.zeros(SHAPE.num_layers), 0.0
        cross_entropy = 0.0
        for tokens, labels, mask in micro_batches:
            states = model.states(tokens)
            normed = model.final_norm(states[-1])
            losses = model.token_losses(normed, labels)
            share = mask / all_unmasked if per_token else mask / mask.sum() / len(micro_batches)
            everywhere = torch.ones_like(mask)
            if only_unmasked:
                psi_share, counted = share, mask
            else:
                psi_share = everywhere / (all_unmasked if per_token else mask.numel() * len(micro_batches))
                counted = everywhere
            psi = displacements([*states[:-1], normed] if post_norm else states)
            penalty = (weights * (psi * psi_share).sum((1, 2))).sum()
            ((losses * share).sum() + strengths[number] * penalty).backward()
            psi_sum += (psi.detach() * counted).sum((1, 2))
            psi_count += counted.sum().item()
            cross_entropy += (losses.detach() * mask).sum().item() / float(all_unmasked)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        before = queries_and_keys.clone()
        optimizer.step()
        if number < len(slow):
            queries_and_keys.copy_(before + slow[number] * (queries_and_keys - before))
        optimizer.zero_grad()
        mean = psi_sum / psi_count
        log["lm loss"].append(cross_entropy)
        log["jreg loss"].append((weights * mean).sum().item())
        log["jump rate"].append(100 * max(0.0, (mean[-1] - mean[-2]).item()))
        for layer, displacement in enumerate(mean.tolist(), start=1):
            log.setdefault(f"jreg/displacement_layer_{layer:02d}", []).append(displacement)
        log["grad-norm"].append(norm.item())
    if trained is not None:
        trained.update({name: parameter.detach() for name, parameter in model.parameters.items()})
    return log
