"""JREG on a built model: which layers get a gradient, how strong it is, and what is measured."""

from __future__ import annotations

import functools
from collections.abc import Set
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from jreg_megatron.methods.jreg import kernels
from jreg_megatron.methods.jreg.formulas import jump_rate
from jreg_megatron.methods.jreg.kernels import Rows
from jreg_megatron.methods.jreg.penalty import Strength, add_displacement_gradient, add_input_gradient
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.ranks import first_that_differs, of_every_rank
from jreg_megatron.stream.meter import LayerValues, Meter
from jreg_megatron.stream.method import Call, Method, Place, Readings, by_layer, layer_name, not_finite
from jreg_megatron.stream.scaling import AddedLoss

LOSS_NAME = "jreg loss"
RATE_NAME = "jump rate"
_DISPLACEMENT = "jreg/displacement"

_MASK_OF_OTHER_TOKENS = (
    f"{JRegConfig.flag('tokens')} is 'unmasked', and the mask is for {{}} tokens, while this rank has {{}}; "
    "call the model with a loss mask or a padding mask [b, s] that has one number per token"
)
_NO_MASK = (
    f"{JRegConfig.flag('tokens')} is 'unmasked', but the model was called without a loss mask or padding "
    "mask on some pipeline stage; call it on every stage with the same one, or leave the setting at 'all'"
)

_COUNTS_ALL = (
    "\n> calculate_per_token_loss: the loss is the mean over the tokens that have one, and JREG counts all "
    "tokens. If one token in ten has a loss, lambda acts ten times as strong; "
    f"{JRegConfig.flag('tokens')} unmasked prevents that"
)

_MOST_STRENGTHS = 1024
"""Most jobs have one per layer. With many sequence lengths they are sometimes all made again."""


def displacement_name(layer_number: int, num_layers: int) -> str:
    """The name under which a layer's displacement is logged; equally long for all layers of a model."""
    return layer_name(_DISPLACEMENT, layer_number, num_layers)


@dataclass(frozen=True)
class JRegMetrics(Readings):
    """Displacement of the whole model over the measured tokens. Unscaled: no lambda, no loss scale."""

    displacement: Tensor
    """Mean over tokens of Psi_l for layers 1..L, ``[L]`` float64 on the CPU, each in [0, 1]."""
    jreg_loss: float
    """``sum_l w_l * Psi_l``, before lambda."""
    jump_rate: float
    """zeta_L, the last layer's jump, in hundredths of displacement; NaN for a model of one layer."""

    def headline(self) -> dict[str, float]:
        """The regularizer's value and the jump rate."""
        return {LOSS_NAME: self.jreg_loss, RATE_NAME: self.jump_rate}

    def per_layer(self) -> dict[str, float]:
        """Each layer's displacement."""
        return by_layer(_DISPLACEMENT, self.displacement)

    def remarks(self) -> list[str]:
        """The layers whose displacement is not a number."""
        return not_finite("displacement", self.displacement)


@dataclass
class _Microbatch:
    """Decisions for a micro-batch, made in its forward pass and kept for the recompute of its layers."""

    meter: Meter | None
    """The meter that measures it; None if it is not measured."""
    is_regularizing: bool
    given: Tensor | None
    """``[s, b]``: the mask that the model was called with; None if all tokens count."""
    mask: Tensor | None = None
    """``[s, b]``: which tokens of this rank count; set by the first layer."""
    token_weights: Tensor | None = None
    """``[s, b]``: the factor of each token in the loss; set by the first layer."""
    layers: Set[int] | None = None
    """The regularized layers, if no others are measured; else None."""
    rows: Rows | None = None
    """The tokens of a sequence that have a gradient in this step; None if all have."""
    normed: Tensor | None = None
    """The final norm's output, kept if the last layer will be recomputed, for its input's gradient."""


class Regularizer(Method):
    """The jump-suppressing regularizer, or at lambda 0 the measuring of displacement alone."""

    def __init__(self, settings: JRegConfig, place: Place) -> None:
        super().__init__(settings, place)
        self.weights = settings.layer_weights(place.num_layers)
        """Layer weights ``w_1..w_L``, ``[L]`` float64 on the CPU."""
        self.training_meter = Meter(place.num_layers, place.device)
        self.validation_meter = Meter(place.num_layers, place.device)
        if settings.coeff > 0:
            self.added_loss = AddedLoss(settings.coeff, settings.loss_weight, JRegConfig.flag("loss_weight"))
        self._weight_of = settings.gradient_weights(place.num_layers).tolist()
        self._normed_layer = place.num_layers if settings.final_state == "post_norm" else None
        self._strengths: dict[tuple[int, ...], Strength] = {}
        self._stride = settings.token_stride
        self._regularized = frozenset(n for n in place.layer_numbers if self._weight_of[n - 1] > 0)
        self._scaling = place.scaling
        # The factor that all layers share in a step: a fixed buffer, read by the backward pass (penalty.py).
        self._coefficient = torch.zeros(1, device=place.device)
        self.kernels = kernels.choose(settings.kernels, place.device, place.hidden_size, place.dtype)

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Refuse kernels of different kinds. A collective call."""
        ranks = of_every_rank((self.kernels.kind, self.kernels.name), group)
        if found := first_that_differs([kind for kind, _ in ranks], group):
            at, first, other = found
            raise UserError(
                f"{JRegConfig.flag('kernels')} is {self.settings.kernels!r}, but rank {first} would run "
                f"{ranks[0][1]}, and rank {other} {ranks[at][1]}: they round differently and differ in "
                "speed; install the same on all ranks, or set it to 'torch'"
            )

    def describe(self) -> str:
        """What was attached, and what makes lambda stronger than its number."""
        settings, weights = self.settings, self.weights.tolist()
        doing = f"lambda {settings.coeff:g}" if settings.coeff > 0 else "measuring only (lambda 0)"
        rule = f"alpha {settings.alpha:g}" if settings.weights == "softmax" else f"{settings.weights} weights"
        regularized = sum(weight > 0 for weight in self._weight_of)
        is_partly = settings.coeff > 0 and regularized < len(weights)
        counts_all = settings.coeff > 0 and settings.tokens == "all" and self._scaling.is_per_token
        partly = f"gradient in {regularized} of them, " if is_partly else ""
        return (
            f"> JREG attached: {doing}, {rule}, last state {settings.final_state}, {len(weights)} layers, "
            f"weights of the last {min(4, len(weights))}: {' '.join(f'{w:.3g}' for w in weights[-4:])}, "
            f"{partly}kernels {self.kernels.name}"
            f"{_COUNTS_ALL if counts_all else ''}"
        )

    def begin_microbatch(self, call: Call) -> _Microbatch | None:
        """Decide whether to regularize and to measure this micro-batch, how strongly, and which tokens."""
        settings, iteration = self.settings, call.iteration
        given = call.token_mask if settings.tokens == "unmasked" else None
        if settings.tokens == "unmasked":
            if given is None and not call.training:
                return None  # text is being generated
            if given is None or given.dim() != 2:
                self.refuse(
                    _NO_MASK if given is None else _MASK_OF_OTHER_TOKENS.format([*given.shape], "[s, b]")
                )
                return None
            given = given.transpose(0, 1).float().clone()  # the caller may use its buffer again
        coeff = self._coeff_at(iteration)
        is_regularizing = call.training and coeff > 0 and bool(self._regularized)
        if is_regularizing and not call.in_full_graph:
            self._scaling.fill(self._coefficient, coeff)
        meter = None
        if iteration is None or settings.measures_at(iteration):
            meter = self.training_meter if call.training else self.validation_meter
        if meter is None and not is_regularizing:
            return None
        wanted, rows = self._regularized if meter is None else None, None
        if is_regularizing and self._stride > 1:
            assert iteration is not None
            rows = Rows(self._stride, iteration % self._stride)
        return _Microbatch(meter, is_regularizing, given, layers=wanted, rows=rows)

    def before_full_graph(self, iteration: int | None) -> None:
        """Fill the buffer of the coefficient. The graph regularizes in each iteration, where it is 0 too."""
        self._scaling.fill(self._coefficient, self._coeff_at(iteration))

    def _coeff_at(self, iteration: int | None) -> float:
        coeff: float = self.settings.coeff if iteration is None else self.settings.coeff_at(iteration)
        return coeff

    def layer(
        self, microbatch: _Microbatch, layer_number: int, layer_input: Tensor, layer_output: Tensor
    ) -> Tensor:
        """Measure and regularize a layer; the last one only with ``pre_norm``."""
        if layer_number != self._normed_layer:
            return self._observe(microbatch, layer_number, layer_input, layer_output)
        if microbatch.normed is None:
            return layer_output
        (normed, microbatch.normed) = microbatch.normed, None
        strength = self._strength(microbatch, layer_number, layer_output)
        return add_input_gradient(layer_output, layer_input, normed, strength)

    def final_norm(
        self, microbatch: _Microbatch, layer_number: int, layer_input: Tensor, normed: Tensor
    ) -> Tensor:
        """Measure and regularize the last layer with ``post_norm``."""
        if layer_number != self._normed_layer:
            return normed
        is_regularized = microbatch.is_regularizing and layer_number in self._regularized
        if is_regularized and not layer_input.requires_grad:
            microbatch.normed = normed.detach()
        return self._observe(microbatch, layer_number, layer_input, normed)

    def _observe(self, microbatch: _Microbatch, layer_number: int, h_in: Tensor, h_out: Tensor) -> Tensor:
        if microbatch.given is not None:
            if microbatch.mask is None:
                found = self._scaling.of_unmasked_tokens(microbatch.given, h_out)
                microbatch.mask, microbatch.token_weights = found
            if microbatch.mask.shape != h_out.shape[:2]:
                self.refuse(_MASK_OF_OTHER_TOKENS.format([*microbatch.mask.shape], [*h_out.shape[:2]]))
                return h_out
        if microbatch.rows is not None and not self._scaling.is_whole_in_strides(h_out, self._stride):
            self.refuse(
                f"{JRegConfig.flag('token_share')} is {self.settings.token_share:g}, so each part of a "
                f"sequence on a rank must be a multiple of {self._stride} tokens; here a rank has "
                f"{h_out.shape[0]}: take another sequence length, or leave the setting at 1"
            )
            return h_out
        on_psi = None
        if microbatch.meter is not None:
            on_psi = functools.partial(microbatch.meter.add, layer_number, mask=microbatch.mask)
        # If everything up to here is frozen, no backward pass comes here.
        if microbatch.is_regularizing and layer_number in self._regularized and h_out.requires_grad:
            strength = self._strength(microbatch, layer_number, h_out)
            if microbatch.rows is None:
                return add_displacement_gradient(h_in, h_out, strength, on_psi)
            if on_psi is not None:  # every token is measured
                on_psi(self.kernels.displacement(h_in, h_out))
            return add_displacement_gradient(h_in, h_out, strength)
        if on_psi is not None:
            on_psi(self.kernels.displacement(h_in, h_out))
        return h_out

    def _strength(self, microbatch: _Microbatch, layer_number: int, state: Tensor) -> Strength:
        """``k`` of the derivation in scaling.py: coefficient (of the step), factor and weights of tokens."""
        weight, rows = self._stride * self._weight_of[layer_number - 1], microbatch.rows
        if microbatch.token_weights is not None:
            return Strength(self.kernels, self._coefficient, weight, microbatch.token_weights, rows)
        key = (layer_number, *state.shape, *(rows or ()))
        if key not in self._strengths:
            if len(self._strengths) >= _MOST_STRENGTHS:
                self._strengths.clear()
            factor = weight * self._scaling.of_all_tokens(state)
            self._strengths[key] = Strength(self.kernels, self._coefficient, factor, rows=rows)
        return self._strengths[key]

    def read(self, values: LayerValues) -> JRegMetrics:
        """Displacement per layer, and what follows from it."""
        mean = values.means[:, 0]
        rate = float(jump_rate(mean)) if len(mean) > 1 else float("nan")
        return JRegMetrics(mean, float(self.weights @ mean), rate)
