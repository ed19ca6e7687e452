"""How a loss on the residual stream is scaled, so that its coefficient means the same at every layout.

In the backward pass a method adds the gradient of ``coeff * sum_l w_l * f_l`` to the gradients of the
layers' states. ``f_l`` is a function of layer l's states at one token, and ``w_l`` the layer's weight. The
result must be the gradient of

    mean over tokens of (CE + coeff * sum_l w_l * f_l).

Megatron scales the loss on its way to the parameters. So the gradient that a method adds must have the same
factors. Let

- ``n`` be the number of this rank's tokens in the micro-batch,
- ``S`` the number of ranks that split a sequence by sequence parallelism (the tensor-parallel size with
  ``sequence_parallel``, else 1),
- ``C`` the context-parallel size,
- ``D`` the data-parallel size,
- ``M`` the number of micro-batches,
- ``g`` the loss scale of fp16 training (else 1), by which the optimizer divides again.

*Averaged loss (the default).* The schedule scales by ``g / M``; DDP averages over ``D * C`` ranks. A
micro-batch of a data-parallel replica has ``n * S * C`` tokens and the whole batch ``n * S * C * D * M``.
A rank that adds ``k * (sum of f over its tokens)`` contributes ``k / (D * C)`` of that sum, and this
must be ``g * coeff * w_l / (n * S * C * D * M)``. Hence

    k = g * coeff * w_l / (n * S * M);

The context-parallel size cancels. Without sequence parallelism every tensor-parallel rank holds all tokens.
Its gradient is already the whole one, like that of cross-entropy: ``S = 1``, no averaging.

*``calculate_per_token_loss``.* DDP sums, and ``finalize_model_grads`` divides by the number of tokens that
the loss mask keeps in the whole batch. So ``k = g * coeff * w_l``. Every token counts, also masked tokens.
With a mask, the effective ``coeff`` is larger by all/unmasked.

*Unmasked tokens only.* A loss can be averaged as Megatron averages cross-entropy: over the ``m`` unmasked
tokens of a context-parallel rank's part of a micro-batch, and over these parts. Each unmasked token gets
``g * coeff * w_l / (m * M)``, with ``m = 1`` and ``M = 1`` for per-token loss. All ranks that split this
part by sequence parallelism hold its whole mask, so each can count ``m``. But a padding mask may be split
among them, as experts need it on later pipeline stages. Then they sum ``m``, the only collective here.

With per-token loss and a padding mask, Megatron still divides by the loss mask's tokens, so the effective
``coeff`` is larger by unpadded/unmasked.

Every rank knows all of these numbers. The first step checks that the loss is scaled in this way
(:mod:`jreg_megatron.stream.first_step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class AddedLoss:
    """The scale of a loss that a method adds to the cross-entropy."""

    coeff: float
    """The loss's coefficient, > 0."""
    loss_weight: float = 1.0
    """The factor by which the script multiplies its cross-entropy, > 0."""
    loss_weight_flag: str = ""
    """The flag of that setting, if the method has one."""


class Scaling:
    """The factors of the derivation above, for one model."""

    def __init__(self, chunk: Any, num_microbatches: Callable[[], int]) -> None:
        """Megatron's process groups must exist.

        Args:
            chunk: an unwrapped model chunk.
            num_microbatches: returns ``M`` of the current step.
        """
        self._config = chunk.config
        self._num_microbatches = num_microbatches
        self._sharing = _group(chunk, "tp") if chunk.config.sequence_parallel else None
        # Each of these ranks has an early and a late piece of each sequence.
        self._context = _group(chunk, "cp") if chunk.config.context_parallel_size > 1 else None
        self._size = 1 if self._sharing is None else self._sharing.size()

    @property
    def is_per_token(self) -> bool:
        """Whether Megatron divides gradients by the number of tokens, those of an added loss too."""
        return bool(self._config.calculate_per_token_loss)

    def fill(self, coefficient: Tensor, coeff: float) -> None:
        """Set ``coefficient`` ``[1]`` to the factor that all layers share: ``g * coeff / M``, or for
        per-token loss ``g * coeff``. No host synchronisation."""
        coefficient.fill_(coeff if self.is_per_token else coeff / self._num_microbatches())
        grad_scale = self._config.grad_scale_func
        if grad_scale is not None:
            coefficient.copy_(grad_scale(coefficient.clone()))

    def is_whole_in_strides(self, state: Tensor, stride: int) -> bool:
        """Whether the ranks' every stride-th tokens of ``state`` ``[s, b, h]`` are together every stride-th
        token of the whole sequence. A context-parallel rank has two pieces of a sequence."""
        length, pieces = state.shape[0], 2 if self._config.context_parallel_size > 1 else 1
        return length % stride == 0 and length * self._size % (pieces * stride) == 0

    def of_all_tokens(self, state: Tensor) -> float:
        """The factor besides the coefficient and ``w_l`` if all tokens of ``state`` ``[s, b, h]`` count."""
        if self.is_per_token:
            return 1.0
        return 1.0 / (state.shape[0] * state.shape[1] * self._size)

    def of_unmasked_tokens(self, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The same if only the unmasked tokens count. Collective if the mask is split.

        Args:
            mask: ``[s, b]`` float32, for all tokens of the ranks that split a sequence, or only for the
                tokens of ``state``.
            state: ``[s, b, h]`` of this rank.

        Returns:
            This rank's part of the mask, and the factor of each token, both ``[s, b]``.
        """
        count, is_cut = mask.sum(), self._sharing is not None and len(mask) == len(state)
        if not is_cut:
            mask = self._shard(mask)
        if self.is_per_token:
            return mask, mask
        if is_cut:
            dist.all_reduce(count, group=self._sharing)
        return mask, mask / count.clamp(min=1)

    def whole_sequences(self, tokens: Tensor) -> Tensor:
        """Gather the whole sequences from the context-parallel ranks. Collective under context parallelism.

        Args:
            tokens: ids, ``[b, s]`` of this rank.

        Returns:
            ``[b, s * C]``, in the order of the sequence.
        """
        if (group := self._context) is None:
            return tokens
        parts = [torch.empty_like(tokens) for _ in range(group.size())]
        dist.all_gather(parts, tokens.contiguous(), group=group)
        early, late = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
        return torch.cat((*early, *reversed(late)), dim=1)

    def own_part(self, whole: Tensor) -> Tensor:
        """This rank's part ``[s, ...]`` of a tensor ``[s * C * S, ...]`` for whole sequences."""
        if (group := self._context) is not None:
            pieces = whole.chunk(2 * group.size())
            whole = torch.cat((pieces[group.rank()], pieces[-1 - group.rank()]))
        return self._shard(whole)

    def _shard(self, whole: Tensor) -> Tensor:
        return whole if self._sharing is None else whole.chunk(self._size)[self._sharing.rank()]


def _group(chunk: Any, name: str) -> Any:
    """The ranks of tensor parallelism, ``tp``, or of context parallelism, ``cp``."""
    group = getattr(getattr(chunk, "pg_collection", None), name, None)
    if group is None:
        from megatron.core import parallel_state as state

        of = {"tp": state.get_tensor_model_parallel_group, "cp": state.get_context_parallel_group}
        group = of[name]()
    return group
