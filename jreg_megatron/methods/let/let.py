"""LET on a built model: the gradient of a cosine between an early state and the teacher's last one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.methods.let.settings import LETConfig
from jreg_megatron.methods.let.teacher import Teacher, refuse_longer
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.ranks import of_every_rank
from jreg_megatron.stream.anatomy import residual_layers
from jreg_megatron.stream.meter import LayerValues, Meter
from jreg_megatron.stream.method import Call, Method, Place, Readings
from jreg_megatron.stream.scaling import AddedLoss

LOSS_NAME = "let loss"
COEFFICIENT_NAME = "let coefficient"
_EPS = 1e-8
"""The smallest norm to divide by."""
_PADDING = 1024
"""Embeddings usually have fewer rows of padding than this, times the tensor-parallel ranks."""


@dataclass(frozen=True)
class LETMetrics(Readings):
    """Means over the tokens of the iterations in which the teacher has run."""

    let_loss: float
    """``-cos``, in [-1, 1], before the coefficient."""
    let_coefficient: float

    def headline(self) -> dict[str, float]:
        """Both."""
        return {LOSS_NAME: self.let_loss, COEFFICIENT_NAME: self.let_coefficient}


@dataclass(frozen=True)
class _Microbatch:
    """A micro-batch until its layer has run."""

    coeff: float
    tokens: Tensor | None
    """``[b, s]`` of this context-parallel rank."""
    mask: Tensor | None
    """``[b, s]``: the tokens that count; None if all do, or if there is no mask."""
    layers: frozenset[int]


class LET(Method):
    """Adds the gradient of ``coeff(s) * mean over tokens of -cos(h, t)`` at one layer.

    The teacher runs when the backward pass reaches the layer. Until then only token ids are kept.
    """

    def __init__(self, settings: LETConfig, place: Place) -> None:
        super().__init__(settings, place)
        self._named = f"{settings.flag('teacher')} {settings.teacher}"
        self.number = settings.layer_of(place.num_layers)
        # Megatron gives token ids to the chunk with the embedding.
        first = [chunk for chunk in place.chunks if getattr(chunk, "pre_process", True)]
        self._with_tokens = [layer.number for chunk in first for layer in residual_layers(chunk)]
        self._is_here = self.number in self._with_tokens
        self._rows: int | None = getattr(first[0], "vocab_size", None) if first else None
        self._place, self._scaling = place, place.scaling
        self._coefficient = torch.zeros(1, device=place.device)
        self.training_meter = self._meter = Meter(1, place.device, num_values=2)
        begin = 1
        with suppress(Exception):  # a loop may not know it before its first step
            begin = max(1, 1 if place.iteration is None else place.iteration())
        self._is_over = not settings.measures_at(begin)
        if not self._is_over:
            self.added_loss = AddedLoss(settings.coeff)
        # The host checks ids later: waiting for the device would cost time in each micro-batch.
        self._largest_id = torch.zeros((), dtype=torch.int64, device=place.device)
        self._largest_on_host = torch.zeros_like(
            self._largest_id, device="cpu", pin_memory=place.device.type == "cuda"
        )
        self._are_ids_seen = False
        self._known_ids = 0
        self._teacher: Teacher | None = None
        if self._is_here and not self._is_over:
            self._load()

    def _load(self) -> None:
        place, half = self._place, torch.bfloat16
        dtype = half if place.dtype == half else torch.float32
        teacher = Teacher(str(self.settings.teacher), place.hidden_size, place.device, dtype)
        config: Any = place.chunks[0].config
        rows, ranks = self._rows, config.tensor_model_parallel_size
        if rows is not None and abs(rows - teacher.vocab_size) >= _PADDING * ranks:
            raise UserError(
                f"{self._named} has {teacher.vocab_size} tokens, and the trained model {rows}; give a "
                "teacher with the same tokenizer"
            )
        self._teacher, self._known_ids = teacher, teacher.vocab_size

    def agree(self, group: torch.distributed.ProcessGroup | None) -> None:
        """Refuse a layer on a stage that gets no token ids. A collective call."""
        last = max(max(own, default=0) for own in of_every_rank(self._with_tokens, group))
        if not self._is_over and self.number > last:
            flag = self.settings.flag("layer")
            raise UserError(
                f"{flag} is {self.number}, but only the first pipeline stage gets token ids, and its last "
                f"layer is {last}; give a layer up to {last}, or use fewer pipeline stages"
            )

    def describe(self) -> str:
        """One line that says what was attached."""
        settings: LETConfig = self.settings
        if self._is_over:
            return "> LET attached: its coefficient is 0 from here on, so no teacher is loaded"
        return (
            f"> LET attached: layer {self.number} learns from {settings.teacher}, coefficient "
            f"{settings.coeff:g}, falling to 0 at iteration {settings.stop_iterations}"
        )

    def begin_microbatch(self, call: Call) -> _Microbatch | None:
        """Keep what the micro-batch needs; free the teacher when the coefficient is 0."""
        if not call.training:
            return None
        self._refuse_unknown_ids()
        settings: LETConfig = self.settings
        assert call.iteration is not None
        coeff = settings.coeff_at(call.iteration)
        if coeff == 0:
            self._teacher = None
        if coeff == 0 or not self._is_here:
            return None
        if call.is_packed:
            self.refuse(
                f"{settings.name} does not support packed sequences, since the teacher would see several as "
                "one; leave one of the two out"
            )
            return None
        if self._teacher is None:
            self._load()
        self._scaling.fill(self._coefficient, coeff)
        mask = call.token_mask if settings.tokens == "unmasked" else None
        # The caller may use its buffers again.
        tokens, mask = (None if given is None else given.clone() for given in (call.tokens, mask))
        return _Microbatch(coeff, tokens, mask, frozenset((self.number,)))

    def layer(
        self, microbatch: _Microbatch, layer_number: int, layer_input: Tensor, layer_output: Tensor
    ) -> Tensor:
        """Add the gradient at the layer, and measure when the teacher runs."""
        if layer_number != self.number:
            return layer_output
        state = layer_output.detach()  # the pipeline frees an output that it has sent
        try:
            tokens = self._whole_sequences(microbatch)
            mask, share = self._shares(microbatch.mask, state)
        except UserError as error:
            self.refuse(str(error))
            return layer_output

        def add(gradient: Tensor) -> Tensor:
            away = self._away(state, tokens, microbatch.coeff, mask)
            return gradient.add((self._coefficient * share * away).to(gradient.dtype))

        if layer_output.requires_grad:
            layer_output.register_hook(add)  # type: ignore[no-untyped-call]
        else:  # all layers up to here are frozen
            self._away(state, tokens, microbatch.coeff, mask)
        return layer_output

    def _whole_sequences(self, microbatch: _Microbatch) -> Tensor:
        """The token ids of whole sequences, ``[b, s]``. Collective under context parallelism.

        Raises:
            UserError: if there are no ids, or too many for the teacher.
        """
        teacher, name = self._teacher, self.settings.name
        assert teacher is not None
        if microbatch.tokens is None:
            raise UserError(
                f"{name} needs token ids, and the model was called without input_ids; call it with them, or "
                f"leave {name} out"
            )
        tokens = self._scaling.whole_sequences(microbatch.tokens)
        refuse_longer(str(self.settings.teacher), tokens.shape[1], teacher.max_length)
        torch.maximum(self._largest_id, tokens.max(), out=self._largest_id)
        self._largest_on_host.copy_(self._largest_id, non_blocking=self._are_ids_seen)
        if not self._are_ids_seen:  # the first micro-batch waits: in the first step all ranks raise together
            self._refuse_unknown_ids()
            self._are_ids_seen = True
        return tokens.clamp(max=teacher.vocab_size - 1)

    def _refuse_unknown_ids(self) -> None:
        """Refuse an id that the teacher does not have, if it has reached the host."""
        if self._known_ids and (largest := int(self._largest_on_host)) >= self._known_ids:
            self.refuse(
                f"{self._named} has {self._known_ids} tokens, and the data has the id {largest}; give a "
                "teacher with the same tokenizer"
            )

    def _shares(self, given: Tensor | None, state: Tensor) -> tuple[Tensor | None, Tensor | float]:
        """The tokens that count ``[s, b]``, None if all do; and the factor of each. Collective if a mask is
        cut.

        Raises:
            UserError: if there is no mask of these tokens.
        """
        if self.settings.tokens == "all":
            return None, self._scaling.of_all_tokens(state)
        if given is not None and given.dim() == 2:
            mask, weights = self._scaling.of_unmasked_tokens(given.transpose(0, 1).float(), state)
            if mask.shape == state.shape[:2]:
                return mask, weights.unsqueeze(-1)
        raise UserError(
            f"{self.settings.flag('tokens')} is 'unmasked', but the first pipeline stage was called without "
            "a loss mask or padding mask [b, s] of its tokens; call it with one, or use 'all'"
        )

    @torch.inference_mode()
    def _away(self, state: Tensor, tokens: Tensor, coeff: float, mask: Tensor | None) -> Tensor:
        """The gradient of ``-cos`` at each token, ``[s, b, h]`` float32; ``-cos`` itself is measured."""
        assert self._teacher is not None
        own = self._scaling.own_part(self._teacher.states(tokens))
        target = torch.nn.functional.normalize(self._teacher.resized(own), dim=-1, eps=_EPS)
        wide = state.float()
        length = wide.norm(dim=-1, keepdim=True).clamp(min=_EPS)
        unit = wide / length
        cosine = (unit * target).sum(dim=-1, keepdim=True)
        loss = -cosine.squeeze(-1)
        self._meter.add(1, loss, torch.full_like(loss, coeff), mask=mask)
        away: Tensor = (cosine * unit - target) / length
        return away

    def read(self, values: LayerValues) -> LETMetrics:
        """The means."""
        self._refuse_unknown_ids()
        return LETMetrics(*values.means[0].tolist())
