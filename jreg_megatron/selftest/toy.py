"""The toy model's weights and batch, the same on every rank, and what the reference computes from them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from jreg_megatron.methods.attenuation.settings import AttenuationConfig
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.methods.lns.settings import LayerNormScalingConfig
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.methods.periln.settings import PeriLNConfig
from jreg_megatron.selftest.layouts import BATCH, LENGTH, NUM_EXPERTS, NUM_HEADS, NUM_LAYERS, Layout
from jreg_megatron.selftest.reference import ReferenceLlama, Shape, displacements, shifted
from jreg_megatron.stream.settings import Settings

VOCABULARY = 64
MTP_LOSS_SCALING_FACTOR = 0.5
AUXILIARY_COEFF = 0.5

STACKED = "decoder.layers."
"""Parameters whose names begin with this are stacked along the layers."""

ITERATION = 3
"""The number of the compared step in its training. It chooses the tokens of a token share."""

COEFF, ALPHA = 20.0, 0.7
"""They make the regularizer's gradient about as large as that of cross-entropy."""


def settings_of(layout: Layout) -> list[Settings]:
    """The settings of a layout's methods."""
    rule = "sublayer" if layout.layers == "sub-layers as layers" else "mixer"
    # Lambda is 0 before the capture and smaller in it. Only ITERATION measures.
    starts_later = layout.graphs == "iteration" or layout.local_graphs
    jreg = JRegConfig(
        start_iteration=2 if starts_later else 1,
        warmup_iterations=ITERATION - 1 if starts_later else 0,
        measure_interval=ITERATION if starts_later else 1,
        token_share=1 / layout.token_stride,
        untested_cuda_graphs=layout.graphs != "none",
        untested_overlap=layout.overlap,
        coeff=COEFF,
        alpha=ALPHA,
        final_state=layout.final_state,
        tokens=layout.tokens,
        layer=rule,
    )
    if layout.methods == "jreg":
        return [jreg]
    if layout.methods == "blocks":
        return [LayerNormScalingConfig(), PeriLNConfig(), jreg]
    return [AttenuationConfig(learned=0.5, layer=rule), NormsConfig(layer=rule), jreg]


def shape_of(layout: Layout) -> Shape:
    """Sizes of a layout's toy model."""
    return Shape(
        layers=layout.sublayers,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=NUM_HEADS,
        vocab_size=VOCABULARY,
        num_experts=NUM_EXPERTS if layout.has_experts else 0,
        top_k=2 if layout.precision == "fp32" else NUM_EXPERTS,  # rounding would change the choice
        capacity=layout.capacity,
        mtp_num_layers=1 if layout.model == "mtp" else 0,
        tied=layout.tied,
        blocks=layout.methods == "blocks",
        gated=layout.methods == "all",
    )


def draw_weights(shape: Shape) -> dict[str, Tensor]:
    """Float32 weights on the CPU, random by name, large enough that layers turn their input."""
    weights = {}
    for name, size in shape.parameters().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(size, generator=generator)
        weights[name] = 1 + 0.1 * drawn if "norm" in name else 0.12 * drawn
    last = weights["decoder.layers.self_attention.linear_proj.weight"]
    last[-1] *= 4  # a jump at the last layer
    return weights


@dataclass(frozen=True)
class Batch:
    """Sequences of one training step, ``[BATCH, LENGTH]`` each."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    """1.0 where a token's loss counts, else 0.0."""
    padding_mask: Tensor
    """True at padding, which has no loss."""

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(change(getattr(self, field.name)) for field in fields(self)))

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return self._each(lambda field: field.to(device))

    def part(self, layout: Layout, data_rank: int, micro_batch: int, context_rank: int) -> Batch:
        """A rank's part of a micro-batch, ``[micro batch, LENGTH / context]``."""
        rows = self.rows(layout, data_rank, micro_batch)
        columns = positions(layout, context_rank)
        shape = (1, -1) if layout.packed else (layout.micro_batch_size, -1)
        return self._each(lambda field: field[rows][:, columns].reshape(shape))

    @staticmethod
    def rows(layout: Layout, data_rank: int, micro_batch: int) -> slice:
        """The sequences of a replica's micro-batch."""
        first = (data_rank * layout.num_microbatches + micro_batch) * layout.micro_batch_size
        return slice(first, first + layout.micro_batch_size)


def positions(layout: Layout, context_rank: int) -> Tensor:
    """Positions of a context-parallel rank. Megatron gives each rank an early and a late piece."""
    pieces = torch.arange(LENGTH).chunk(2 * layout.context)
    return torch.cat((pieces[context_rank], pieces[2 * layout.context - 1 - context_rank]))


def draw_batch(masked: bool, padded: bool = False) -> Batch:
    """The same random sequences for every layout.

    Args:
        masked: whether some tokens are left out of the loss.
        padded: whether sequences end in padding, each in another number of tokens.
    """
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    loss_mask = torch.ones(BATCH, LENGTH)
    if masked:
        # Unevenly over sequences and positions, so ranks and micro-batches have different numbers.
        share = torch.linspace(0.1, 0.9, BATCH)[:, None] * torch.linspace(0.3, 1.2, LENGTH)
        loss_mask = (torch.rand(BATCH, LENGTH, generator=generator) > share).float()
    lengths = torch.arange(BATCH) * 5 % LENGTH + 1 if padded else torch.full((BATCH,), LENGTH)
    padding_mask = torch.arange(LENGTH) >= lengths[:, None]
    return Batch(drawn[:, :-1], drawn[:, 1:], loss_mask * ~padding_mask, padding_mask)


Place = tuple[int | slice, ...]
"""The place of a piece in its parameter."""


@dataclass(frozen=True)
class Step:
    """The results of a training step."""

    lm_loss: float
    displacement: Tensor
    """Mean over the counted tokens of Psi_l, ``[L]`` float64 on the CPU."""
    jreg_loss: float
    jump_rate: float
    norms: Tensor
    """Of the states h_0..h_L: mean norm over tokens, RMS, largest, and the mean update ratio (0 for h_0);
    ``[L + 1, 4]`` float64 on the CPU; ``[0, 4]`` where they are not measured."""
    gradients: Sequence[tuple[str, Place, Tensor]]
    """The gradient of every parameter, in pieces: its name in a checkpoint, the place, the piece.

    Each layer is at least one piece. A rank has the pieces of its part of the model. All other results are
    the same on every rank."""
    captured: str = ""
    """Where in the model the residual stream was seen."""


def reference_step(layout: Layout, weights: dict[str, Tensor], batch: Batch, dtype: torch.dtype) -> Step:
    """The step in plain torch in one process. Of the split it uses only which tokens are averaged together.

    Cross-entropy is a mean for each rank's part of each micro-batch, then the mean of these. With per-token
    loss it is one mean over all unmasked tokens.
    """
    model = ReferenceLlama(shape_of(layout), weights, dtype)
    states = model.states(batch.tokens, _together(layout).to(batch.tokens.device))
    normed = model.final_norm(states[-1])
    losses = model.token_losses(normed, batch.labels)
    wide = losses.dtype
    share = token_shares(layout, batch.loss_mask.to(wide), batch.loss_mask.to(wide))
    loss = (share * losses).sum()
    lm_loss = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()

    ahead = batch.loss_mask.to(wide)
    for losses_ahead in model.predicted_ahead(normed, batch.tokens, batch.labels):
        ahead = shifted(ahead)
        share_ahead = token_shares(layout, ahead, batch.loss_mask.to(wide))
        factor = MTP_LOSS_SCALING_FACTOR / model.shape.mtp_num_layers
        loss = loss + factor * (share_ahead * losses_ahead).sum()

    if layout.balanced:
        parts = [
            model.imbalance(Batch.rows(layout, data_rank, micro_batch))
            for data_rank in range(layout.data)
            for micro_batch in range(layout.num_microbatches)
        ]
        loss = loss + AUXILIARY_COEFF * torch.stack(parts).mean()

    psi = displacements([*states[:-1], normed] if layout.final_state == "post_norm" else states)
    alphas = ALPHA * torch.arange(1, NUM_LAYERS + 1, dtype=torch.float64)
    layer_weights = (alphas.exp() / alphas.exp().sum()).to(wide).to(psi.device)
    if layout.tokens == "unmasked" and not layout.padded:
        counted, psi_share = batch.loss_mask.to(wide), share
    elif layout.tokens == "unmasked":
        counted = (~batch.padding_mask).to(wide)
        psi_share = token_shares(layout, counted, counted)
        if layout.per_token_loss:  # Megatron divides by the number of tokens with a loss
            psi_share = counted / batch.loss_mask.sum()
    else:
        counted = torch.ones_like(losses)
        psi_share = counted / (batch.loss_mask.sum() if layout.per_token_loss else losses.numel())
    if layout.token_stride > 1:
        places = torch.arange(LENGTH, device=psi_share.device) % layout.token_stride
        psi_share = psi_share * layout.token_stride * (places == ITERATION % layout.token_stride)
    loss = loss + COEFF * torch.einsum("l,lbs,bs->", layer_weights, psi.to(wide), psi_share)
    loss.backward()  # type: ignore[no-untyped-call]

    displacement = ((psi.detach() * counted).sum((1, 2)) / counted.sum()).double().cpu()
    return Step(
        lm_loss=lm_loss.item(),
        displacement=displacement,
        jreg_loss=float(layer_weights.double().cpu() @ displacement),
        jump_rate=100 * max(0.0, float(displacement[-1] - displacement[-2])),
        norms=_norms(states) if layout.methods == "all" else torch.empty(0, 4, dtype=torch.float64),
        gradients=[
            (name, place, parameter.grad[place])
            for name, parameter in model.parameters.items()
            if parameter.grad is not None
            for place in _layers(name, parameter)
        ],
    )


def _norms(states: Sequence[Tensor]) -> Tensor:
    every = torch.stack([state.detach().double().cpu() for state in states])
    length = every.square().sum(-1).sqrt().flatten(1)
    added = every.diff(dim=0).square().sum(-1).sqrt().flatten(1)
    ratio = torch.cat((torch.zeros_like(added[:1]), added / length[:-1]))
    columns = (length.mean(1), length.square().mean(1).sqrt(), length.max(1).values, ratio.mean(1))
    return torch.stack(columns, dim=1)


def _layers(name: str, parameter: Tensor) -> list[Place]:
    is_stacked = name.startswith(STACKED)
    return [(layer,) for layer in range(len(parameter))] if is_stacked else [()]


def _together(layout: Layout) -> Tensor:
    """``[BATCH, LENGTH]``: tokens with equal numbers compete for the experts' capacity."""
    number = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    parts = itertools.product(
        range(layout.data), range(layout.num_microbatches), range(layout.context), range(layout.tensor)
    )
    for at, (data_rank, micro_batch, context_rank, tensor_rank) in enumerate(parts):
        columns = positions(layout, context_rank).chunk(layout.tensor)[tensor_rank]
        number[Batch.rows(layout, data_rank, micro_batch), columns] = at
    return number


def token_shares(layout: Layout, mask: Tensor, loss_mask: Tensor) -> Tensor:
    """Each token's weight in the step's loss, ``[BATCH, LENGTH]``.

    Args:
        layout: it decides which tokens are averaged together.
        mask: the tokens of this loss.
        loss_mask: the tokens of cross-entropy. A loss further ahead has fewer, each with the same weight.
    """
    share = torch.zeros_like(mask)
    parts = layout.data * layout.num_microbatches * layout.context
    for data_rank in range(layout.data):
        for micro_batch in range(layout.num_microbatches):
            for context_rank in range(layout.context):
                rows = Batch.rows(layout, data_rank, micro_batch)
                columns = positions(layout, context_rank)
                part, own = mask[rows][:, columns], loss_mask[rows][:, columns]
                mean = part / part.sum().clamp(min=1)
                if layout.per_token_loss:
                    share[rows, columns] = mean * own.sum() / loss_mask.sum()
                else:
                    share[rows, columns] = mean / parts
    return share
