"""Check the assumptions of ``attach`` in the first step. Later steps have no overhead from this.

``attach`` assumes two things about the model and the job, which may be wrong:

- Which states are a layer's input and output. :mod:`jreg_megatron.stream.layer_watch` compares them.
- How the loss is scaled on its way to the parameters. The gradient at the model's output shows this. The
  output is the losses of a micro-batch's tokens ``[b, s]``. With ``g`` and ``M`` as in ``scaling``, the
  expected gradient is the setting ``loss_weight`` times

    averaged loss     g / M, summed over the tokens of a micro-batch, if any of them counts
    per-token loss    g, for each token that counts

Any later scaling of the gradient also scales a method's gradient.

A rank keeps its finding until all ranks meet before the first optimizer step: when the schedule finishes the
gradients, or when metrics are read. Then all ranks raise the same error. Without pipeline stages all ranks
find the same error in a layer, so they raise it in the forward pass.

Layers are compared in one step. The scale may need more steps: a step may overflow, or have no token that
counts.

The check does not see the scale of a loss that is computed from logits, outside the model. If tokens or
micro-batches have different weights, it misses a divisor that is wrong by less than a factor of 16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.ranks import of_every_rank
from jreg_megatron.stream.overlap import on_passes
from jreg_megatron.stream.scaling import AddedLoss

_MOST = 1.5
"""A ratio up to this passes, because tokens may have weights. A wrong divisor is off by a factor >= 2."""
_MOST_WEIGHED = 16.0
"""The limit if tokens have different weights. A sum that is not divided is off by its number of tokens."""
_EXACT = 0.01
MOST_STEPS = 50
"""The check ends after this many steps without a usable loss scale (fp16 halves its own from 2^32) or without
a token that counts."""

_NO_COUNT = (
    "calculate_per_token_loss is on, and the loss function returns no number of tokens, so Megatron does not "
    "divide a method's gradient by it; return three values from the loss function (sum of the losses, number "
    "of tokens, report), or turn calculate_per_token_loss off"
)


@dataclass(frozen=True)
class _Seen:
    """A rank's observations in a step; gradients without fp16's loss scale. Zeros if the rank has no loss."""

    finding: str
    runs: int = 0
    """Forward passes of training micro-batches, summed over the chunks."""
    told: int = 0
    """The number of micro-batches by which a method divided its loss."""
    losses: int = 0
    """Micro-batches whose backward pass began at the tokens' losses."""
    gradient: float = 0.0
    """The gradient of the tokens' losses, summed over the micro-batches."""
    expected: float = 0.0
    """The expected value, if the loss is a mean over the tokens that count; for per-token loss their sum."""
    expected_of_all: float = 0.0
    """The expected value, if the mean is over all tokens."""
    expected_of_empty: float = 0.0
    """The expected value, if micro-batches without a token that counts get a share of the mean."""
    is_weighted: bool = False
    """Whether tokens of a micro-batch that count, or micro-batches, have different weights."""
    num_tokens: int = 0
    """The number of tokens that the loss function returned, for per-token loss."""


class FirstStep:
    """The checks of the first step."""

    def __init__(
        self,
        chunks: Sequence[Any],
        added: AddedLoss | None,
        num_microbatches: Callable[[], int],
        group: dist.ProcessGroup | None,
    ) -> None:
        """The checks begin with :meth:`start`.

        Args:
            chunks: this rank's model chunks, unwrapped; at least one.
            added: the loss that a method adds. With None, the loss's scale does not matter.
            num_microbatches: the divisor of that loss.
            group: the ranks that hold the model together; None for all.
        """
        self._chunks = chunks
        self._config: Any = chunks[0].config
        self._added = added
        self._loss_weight = 1.0 if added is None else added.loss_weight
        self._num_microbatches = num_microbatches
        self._group = group
        self._finding = ""
        self._is_alike = True
        self._runs = self._told = self._steps = 0
        # The gradient of each micro-batch: sum, number of nonzero elements, number of elements, maximum.
        self._gradients: list[Tensor] = []
        self._meeting: Callable[..., Any] | None = None
        self._num_tokens: Tensor | None = None
        self.has_seen_scale = False
        """Whether the loss's gradient has shown the right scale."""
        self._end_watch: Callable[[], None] | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def has_ended(self) -> bool:
        """Whether the checks are over, without an error."""
        return not self._undo

    @property
    def ranks_meet(self) -> bool:
        """Whether a rank with a finding may continue: all ranks will meet before the optimizer's step."""
        return self._finalize is not None or bool(self._config.pipeline_model_parallel_size > 1)

    def start(self, end_watch: Callable[[], None]) -> None:
        """Watch the model's output. Attach the taps of the layers first: hooks run in that order.

        Args:
            end_watch: ends the comparison of the layers' states.
        """
        self._end_watch = end_watch
        for chunk in self._chunks:
            self._undo.append(on_passes(chunk, self._before_chunk, self._after_chunk))

    def end(self) -> None:
        """Remove all hooks from the model."""
        self._end_layers()
        while self._undo:
            self._undo.pop()()

    def _end_layers(self) -> None:
        if self._end_watch is not None:
            self._end_watch()
            self._end_watch = None

    def report(self, finding: str, is_alike: bool) -> None:
        """Keep a finding of this rank, which makes a method's numbers wrong. Only the first finding is shown.

        Args:
            finding: one line, for the user.
            is_alike: whether every rank with the same layers has this finding.
        """
        if not self._finding:
            self._finding, self._is_alike = finding, is_alike

    def forget(self) -> None:
        """Discard this step's observations: it was interrupted, or had other passes. Check the next step."""
        self._runs, self._num_tokens = 0, None
        self._gradients.clear()

    def begin_training_microbatch(self) -> None:
        """A chunk starts the forward pass of a micro-batch that a backward pass will follow."""
        self._runs += 1
        self._told = self._num_microbatches()
        if self._finding and self._finalize is None and self._runs > self._told * len(self._chunks):
            raise UserError(self._finding)  # the next step began before the ranks have met

    def settle(self) -> None:
        """Compare the observations of all ranks. Collective. If they are not enough, the checks continue.

        Raises:
            UserError: if any rank has a finding; the same on every rank.
        """
        ranks = of_every_rank(self._seen(), self._group)
        if finding := next((rank.finding for rank in ranks if rank.finding), ""):
            raise UserError(finding)
        if any(rank.runs for rank in ranks):  # else it was an evaluation
            self._end_layers()
            self._steps += 1
            if self._added is None or self._is_scale_right(self._added, ranks):
                self.end()
            elif self._steps == MOST_STEPS:
                self.end()
                self._say(f"{MOST_STEPS} steps have not shown how the loss is scaled")
        self.forget()

    def _meet_before_the_optimizer(self) -> None:
        finalize = self._finalize
        if finalize is None or finalize is self._meeting:
            return

        @functools.wraps(finalize)
        def settle_first(model: Any, num_tokens: Tensor | None = None, *args: Any, **named: Any) -> Any:
            if not self.has_ended:  # if other code has wrapped this function, it cannot be removed
                self._num_tokens = num_tokens
                self.settle()
            return finalize(model, num_tokens, *args, **named)

        def restore() -> None:
            if self._finalize is settle_first:
                self._config.finalize_model_grads_func = finalize

        self._config.finalize_model_grads_func = self._meeting = settle_first
        self._undo.append(restore)

    @property
    def _finalize(self) -> Callable[..., Any] | None:
        """The function that Megatron's schedules call on every rank after the last backward pass."""
        function: Callable[..., Any] | None = getattr(self._config, "finalize_model_grads_func", None)
        return function

    def _before_chunk(self, *_: Any) -> None:
        if torch.is_grad_enabled():  # the same on all ranks; a single stage may be in evaluation mode
            self._meet_before_the_optimizer()

    def _after_chunk(self, chunk: Any, _: Any, output: Any) -> None:
        if not (chunk.training and torch.is_grad_enabled()):
            return
        is_alone = self._config.pipeline_model_parallel_size == 1
        if self._finding and is_alone and (self._is_alike or self._finalize is None):
            raise UserError(self._finding)
        is_loss = chunk.post_process and isinstance(output, Tensor) and output.dim() == 2
        if is_loss and output.requires_grad and self._added is not None:
            output.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: Tensor) -> None:
        scale = self._config.grad_scale_func  # the current one: fp16 changes it after the step
        if scale is not None:
            gradient = gradient.double() / scale(torch.ones_like(gradient[:1, :1]))
        total, counted = gradient.sum(dtype=torch.float64), gradient.count_nonzero().double()
        size = torch.full_like(total, gradient.numel())
        self._gradients.append(torch.stack((total, counted, size, gradient.abs().max().double())))

    def _seen(self) -> _Seen:
        num_tokens = 0 if self._num_tokens is None else int(self._num_tokens)
        if not self._gradients:
            return _Seen(self._finding, self._runs, self._told, num_tokens=num_tokens)
        total, counted, size, largest = torch.stack(self._gradients).cpu().unbind(dim=1)
        if self._config.calculate_per_token_loss:
            of_all = of_empty = float(counted.sum())
            expected = of_all if self._num_tokens is None else float(num_tokens)
        else:
            expected = float((counted > 0).sum()) / self._told
            of_all = float((counted / size).sum()) / self._told
            of_empty = len(total) / self._told
        is_weighted = bool((largest * counted - total > _EXACT * total.abs()).any())
        has_loss = counted > 0
        return _Seen(
            finding=self._finding,
            runs=self._runs,
            told=self._told,
            losses=len(total),
            gradient=float(total.sum()),
            expected=expected,
            expected_of_all=of_all,
            expected_of_empty=of_empty,
            is_weighted=is_weighted or _differ(total[has_loss], counted[has_loss]),
            num_tokens=num_tokens,
        )

    def _is_scale_right(self, added: AddedLoss, ranks: Sequence[_Seen]) -> bool:
        """Whether the loss has the expected scale; False also if this step does not show it.

        Raises:
            UserError: if it has another scale.
        """
        gradient, *amounts = (
            sum(getattr(rank, name) for rank in ranks)
            for name in ("gradient", "expected", "expected_of_all", "expected_of_empty")
        )
        expected, of_all, of_empty = (amount * self._loss_weight for amount in amounts)
        has_loss = any(rank.losses for rank in ranks)
        is_uncounted = self._num_tokens is not None and not any(rank.num_tokens for rank in ranks)
        if self._config.calculate_per_token_loss and is_uncounted and (gradient or not has_loss):
            raise UserError(_NO_COUNT)
        if not has_loss:
            return True  # the loss is computed from logits, outside of the model
        if not gradient or not math.isfinite(gradient):
            return False  # no token counts, or fp16 has overflowed

        def is_near(wanted: float) -> bool:
            return bool(abs(gradient - wanted) <= _EXACT * wanted)

        ran, told = max(rank.runs for rank in ranks) / len(self._chunks), max(rank.told for rank in ranks)
        ratio, as_told = gradient / expected, ran == told
        is_right = (is_near(expected) and (as_told or self._loss_weight == 1)) or (
            as_told and (is_near(of_all) or is_near(of_empty) or 1 / _MOST <= ratio <= _MOST)
        )
        is_weighted = as_told and any(rank.is_weighted for rank in ranks)
        if not is_right and is_weighted and 1 / _MOST_WEIGHED <= ratio <= _MOST_WEIGHED:
            self._say(
                f"tokens have different weights; on average the loss is {ratio:.3g} times the expected one, "
                f"because of these weights or a wrong divisor; lambda {added.coeff:g} is not multiplied"
            )
            is_right = True
        if is_right:
            self.has_seen_scale = True
            return True
        if not as_told:
            ratio *= self._loss_weight
        remedy = (
            f"the model ran {ran:g} times in a step of {told}; call it once in each micro-batch "
            "(--global-batch-size sets their number), or in your own loop give attach(..., "
            "num_microbatches=) the number by which the mean loss of each run is divided"
        )
        if as_told:
            remedy = (
                "if the loss is a sum, return it and its number of tokens from the loss function; if your "
                "own loop accumulates steps, give attach(..., num_microbatches=) the number by which the "
                "mean loss of a micro-batch is divided"
            )
            if weight := added.loss_weight_flag:
                found = f"{ratio * self._loss_weight:.4g}"
                remedy += f"; if the script multiplies its loss by {found}, give {weight} {found}"
        raise UserError(
            f"the loss is {ratio:.4g} times the expected one with {told} micro-batches, so lambda "
            f"{added.coeff:g} would act as {added.coeff / ratio:.4g}; {remedy}"
        )

    def _say(self, line: str) -> None:
        if not dist.is_initialized() or dist.get_rank(self._group) == 0:
            print(f"> jreg_megatron: {line}", flush=True)


def _differ(total: Tensor, counted: Tensor) -> bool:
    """Whether micro-batches ``[n]`` differ both in their sum and in their mean over the tokens that count."""
    return all(
        bool(((values - values[:1]).abs() > _EXACT * values[:1].abs()).any())
        for values in (total, total / counted)
    )
