"""An independent Llama with JREG in plain PyTorch, for one process. Nothing else of this package is imported.

A layer is a sequence of sub-layers, by the symbols of Megatron's hybrid models: attention ``*``, latent
attention ``+``, the stand-in for a Mamba ``M``, MLP ``-``, experts ``E``.
Parameters have the names and shapes of a Megatron checkpoint. The regularizer is the paper's formula, with
autograd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, ROPE_BASE = 1e-5, 10000.0

ATTENTION_NORM = "self_attention.linear_qkv.layer_norm_weight"
GATE = "attenuation_gate.weight"
LATENT_NORM = "input_layernorm.weight"
MLP_NORM = "mlp.linear_fc1.layer_norm_weight"

_NORMS_BEHIND = {
    "*": "post_attention_norm.weight",
    "-": "post_mlp_norm.weight",
    "E": "post_mlp_norm.weight",
}

Q_RANK, KV_RANK, OWN, SHARED, VALUE = 12, 20, 10, 6, 14
"""Latent attention: ranks of queries and of keys and values; widths of a head's own and shared part of a key,
and of its value. No two are equal, and none is the width of a head without it."""

DECAY = 0.7
"""The share of its state that the stand-in for Mamba's mixer keeps from token to token."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model, by the names of Megatron's arguments."""

    layers: tuple[str, ...]
    """Each layer's sub-layers."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    num_experts: int = 0
    top_k: int = 2
    """Experts that a token is sent to."""
    capacity: float = 0.0
    """The largest share of the tokens for one expert; 0: no limit."""
    mtp_num_layers: int = 0
    """Layers of multi-token prediction after the last layer, each of attention and MLP."""
    tied: bool = False
    """Whether the embedding is the output weight too."""
    gated: bool = False
    """Whether each layer keeps a learned part of its input."""
    blocks: bool = False
    """Whether norms of layer l are multiplied by 1 / sqrt(l), and each sub-layer has a norm after it too."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def place(self, name: str, sublayer: int) -> int:
        """The place of a sub-layer's parameter in its stack; sub-layers count from 0 over all layers."""
        if name == GATE:
            return next(at for at, end in enumerate(accumulate(map(len, self.layers))) if sublayer < end)
        if name in _NORMS_BEHIND.values():
            return len(self.layers)
        return sum(name in self._parameters_of(kind) for kind in "".join(self.layers)[:sublayer])

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter. Sub-layers with one name are stacked along the first axis."""
        h = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (self.vocab_size, h)}
        if not self.tied:
            shapes["output_layer.weight"] = (self.vocab_size, h)
        shapes["decoder.final_layernorm.weight"] = (h,)
        kinds = "".join(self.layers)
        of_one = {name: shape for kind in kinds for name, shape in self._parameters_of(kind).items()}
        if self.blocks:
            of_one |= dict.fromkeys(_NORMS_BEHIND.values(), (h,))
        for name, shape in of_one.items():
            shapes[f"decoder.layers.{name}"] = (self.place(name, len(kinds)), *shape)
        if self.gated:
            shapes[f"decoder.layers.{GATE}"] = (self.num_layers, 1)
        for layer in range(self.mtp_num_layers):
            prefix = f"mtp.layers.{layer}"
            for norm in ("enorm", "hnorm", "final_layernorm"):
                shapes[f"{prefix}.{norm}.weight"] = (h,)
            shapes[f"{prefix}.eh_proj.weight"] = (h, 2 * h)
            for name, shape in (self._parameters_of("*") | self._parameters_of("-")).items():
                shapes[f"{prefix}.transformer_layer.{name}"] = shape
        return shapes

    def _parameters_of(self, kind: str) -> dict[str, tuple[int, ...]]:
        h, f, heads = self.hidden_size, self.ffn_hidden_size, self.num_attention_heads
        match kind:
            case "*":
                return {
                    ATTENTION_NORM: (h,),
                    "self_attention.linear_qkv.weight": (3 * h, h),
                    "self_attention.linear_proj.weight": (h, h),
                }
            case "+":
                return {
                    LATENT_NORM: (h,),
                    "self_attention.linear_q_down_proj.weight": (Q_RANK, h),
                    "self_attention.q_layernorm.weight": (Q_RANK,),
                    "self_attention.linear_q_up_proj.weight": (heads * (OWN + SHARED), Q_RANK),
                    "self_attention.linear_kv_down_proj.weight": (KV_RANK + SHARED, h),
                    "self_attention.kv_layernorm.weight": (KV_RANK,),
                    "self_attention.linear_kv_up_proj.weight": (heads * (OWN + VALUE), KV_RANK),
                    "self_attention.linear_proj.weight": (h, heads * VALUE),
                }
            case "M":
                return {
                    "norm.weight": (h,),
                    "mixer.in_proj.weight": (2 * h, h),
                    "mixer.out_proj.weight": (h, 2 * h),
                }
            case "E":
                return {
                    MLP_NORM: (h,),
                    "mlp.router.weight": (self.num_experts, h),
                    "mlp.experts.experts.linear_fc1.weight": (self.num_experts, 2 * f, h),
                    "mlp.experts.experts.linear_fc2.weight": (self.num_experts, h, f),
                }
            case _:
                return {MLP_NORM: (h,), "mlp.linear_fc1.weight": (2 * f, h), "mlp.linear_fc2.weight": (h, f)}


class ReferenceLlama:
    """Pre-norm RMSNorm, rotary attention, SwiGLU (or experts with it), no biases."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.shape = shape
        self._routers: list[
            tuple[Tensor, Tensor]
        ] = []  # probability and choice of each expert, [b, s, experts]
        self.parameters = {
            name: weights[name].detach().to(dtype).clone().requires_grad_() for name in shape.parameters()
        }

    def states(self, tokens: Tensor, together: Tensor | None = None) -> list[Tensor]:
        """``h_0..h_L`` for token ids ``[b, s]``, each ``[b, s, h]``.

        Args:
            tokens: the ids.
            together: ``[b, s]``, equal where tokens compete for the experts' capacity; None if all do.
        """
        self._together = torch.zeros_like(tokens) if together is None else together
        h = self._embed(tokens)
        states, sublayer = [h], 0
        for number, kinds in enumerate(self.shape.layers):
            out = h
            for kind in kinds:
                parameters = self._parameters(kind, sublayer)
                if self.shape.blocks:
                    added = self._added(kind, parameters, out, 1 / math.sqrt(number + 1))
                    norm = f"decoder.layers.{_NORMS_BEHIND[kind]}"
                    added = _rms_norm(added, self.parameters[norm][number])
                else:
                    added = self._added(kind, parameters, out)
                out = out + added
                sublayer += 1
            if self.shape.gated:
                gate = self.parameters[f"decoder.layers.{GATE}"][number]
                out = torch.sigmoid(gate) * h + (out - h)
            h = out
            states.append(h)
        return states

    def imbalance(self, rows: slice) -> Tensor:
        """The auxiliary loss of the routers on some sequences (arXiv:2101.03961, equation 4, for several
        experts a token), summed over layers."""
        shape, losses = self.shape, []
        for probability, chosen in self._routers:
            share = chosen[rows].flatten(0, 1).to(probability.dtype).mean(0) / shape.top_k
            losses.append(shape.num_experts * (share * probability[rows].flatten(0, 1).mean(0)).sum())
        return torch.stack(losses).sum()

    def final_norm(self, h: Tensor) -> Tensor:
        """The final norm's output for the last state ``[b, s, h]``."""
        return _rms_norm(h, self.parameters["decoder.final_layernorm.weight"])

    def token_losses(self, normed: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy ``[b, s]`` of each token for a normed state ``[b, s, h]``."""
        head = "embedding.word_embeddings.weight" if self.shape.tied else "output_layer.weight"
        logits = normed @ self.parameters[head].T
        # In float32 also if the model is not: Megatron does the same.
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
            inner = f"{prefix}transformer_layer."
            own = {name.removeprefix(inner): parameter for name, parameter in self.parameters.items()}
            for kind in "*-":
                h = h + self._added(kind, own, h)
            normed = _rms_norm(h, self.parameters[f"{prefix}final_layernorm.weight"])
            losses.append(self.token_losses(normed, labels))
        return losses

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.parameters["embedding.word_embeddings.weight"][tokens]

    def _parameters(self, kind: str, sublayer: int) -> dict[str, Tensor]:
        shape = self.shape
        return {
            name: self.parameters[f"decoder.layers.{name}"][shape.place(name, sublayer)]
            for name in shape._parameters_of(kind)
        }

    def _added(self, kind: str, layer: Mapping[str, Tensor], h: Tensor, scale: float = 1) -> Tensor:
        """What a sub-layer adds to its input, whose norm is multiplied by ``scale``."""
        norms = {"*": ATTENTION_NORM, "+": LATENT_NORM, "M": "norm.weight"}
        normed = scale * _rms_norm(h, layer[norms.get(kind, MLP_NORM)])
        match kind:
            case "*":
                return self._attention(layer, normed)
            case "+":
                return self._latent_attention(layer, normed)
            case "M":
                return _mixed(layer, normed)
            case "E":
                return self._experts(layer, normed)
        return _swiglu(normed, layer["mlp.linear_fc1.weight"], layer["mlp.linear_fc2.weight"])

    def _attention(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        batch, length, width = normed.shape
        heads = self.shape.num_attention_heads
        size = width // heads
        # One group per head: query, key and value of a head are neighbours.
        qkv = (normed @ layer["self_attention.linear_qkv.weight"].T).view(batch, length, heads, 3, size)
        query, key, value = (qkv[:, :, :, part].transpose(1, 2) for part in range(3))
        scores = rotate(query) @ rotate(key).transpose(-1, -2) / math.sqrt(size)
        mixed = scores.masked_fill(future(normed), -math.inf).softmax(-1) @ value
        joined = mixed.transpose(1, 2).reshape(batch, length, width)
        return joined @ layer["self_attention.linear_proj.weight"].T

    def _latent_attention(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        """As in DeepSeek-V2 (arXiv:2405.04434, section 2.1)."""
        batch, length, _ = normed.shape
        heads = self.shape.num_attention_heads

        def project(x: Tensor, name: str) -> Tensor:
            return x @ layer[f"self_attention.linear_{name}.weight"].T

        def norm(x: Tensor, name: str) -> Tensor:
            return _rms_norm(x, layer[f"self_attention.{name}_layernorm.weight"])

        query = project(norm(project(normed, "q_down_proj"), "q"), "q_up_proj").view(batch, length, heads, -1)
        latent, shared = project(normed, "kv_down_proj").tensor_split((KV_RANK,), -1)
        both = project(norm(latent, "kv"), "kv_up_proj").view(batch, length, heads, -1)
        key, value = both.tensor_split((OWN,), -1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query[..., :OWN], key)
        scores = scores + torch.einsum("bqhd,bkd->bhqk", _turned(query[..., OWN:]), _turned(shared))
        share = (scores / math.sqrt(OWN + SHARED)).masked_fill(future(normed), -math.inf).softmax(-1)
        return project(torch.einsum("bhqk,bkhd->bqhd", share, value).flatten(2), "proj")

    def _experts(self, layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
        logits = normed @ layer["mlp.router.weight"].T
        scores, chosen = logits.topk(self.shape.top_k, dim=-1)
        share = torch.zeros_like(logits).scatter(-1, chosen, scores.softmax(-1))
        self._routers.append((logits.softmax(-1), share.detach() > 0))
        if self.shape.capacity:
            share = share * self._taken(share.detach())
        fc1 = layer["mlp.experts.experts.linear_fc1.weight"]
        fc2 = layer["mlp.experts.experts.linear_fc2.weight"]
        outputs = torch.stack([_swiglu(normed, up, down) for up, down in zip(fc1, fc2, strict=True)], dim=-1)
        return (outputs * share.unsqueeze(-2)).sum(-1)

    def _taken(self, share: Tensor) -> Tensor:
        """``[b, s, experts]``: 1 if an expert has capacity for a token, else 0. Large shares come first."""
        taken = torch.zeros_like(share)
        for number in set(self._together.flatten().tolist()):
            own = self._together == number
            tokens = share[own]
            first = tokens.topk(math.ceil(len(tokens) * self.shape.capacity), dim=0).indices
            taken[own] = torch.zeros_like(tokens).scatter(0, first, 1)
        return taken


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


def _mixed(layer: Mapping[str, Tensor], normed: Tensor) -> Tensor:
    """The stand-in for Mamba's mixer: a state that decays from token to token."""
    added = normed @ layer["mixer.in_proj.weight"].T
    state, outputs = torch.zeros_like(added[:, 0]), []
    for token in added.unbind(dim=1):
        state = DECAY * state + token
        outputs.append(F.silu(state) @ layer["mixer.out_proj.weight"].T)
    return torch.stack(outputs, dim=1)


def future(normed: Tensor) -> Tensor:
    """Which tokens ``[s, s]`` a token must not see."""
    length = normed.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=normed.device).triu(1)


def _turned(x: Tensor) -> Tensor:
    """Rotary positions on ``[b, s, ..., d]``, each pair of neighbours a complex number."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(wide).reshape(*x.shape[:-1], -1, 2))
    frequency = ROPE_BASE ** (-torch.arange(0, x.shape[-1], 2, dtype=wide, device=x.device) / x.shape[-1])
    angle = torch.arange(x.shape[1], device=x.device)[:, None] * frequency
    angle = angle.view(x.shape[1], *(1,) * (x.ndim - 3), -1)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions on ``[b, heads, s, d]``, the first half of d paired with the second."""
    length, size = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = ROPE_BASE ** (-torch.arange(0, size, 2, dtype=wide, device=x.device) / size)
    angle = (torch.arange(length, device=x.device)[:, None] * frequency).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos().to(x.dtype) + torch.cat((-second, first), dim=-1) * angle.sin().to(x.dtype)
