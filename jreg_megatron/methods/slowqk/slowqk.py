"""Slower queries and keys of a built model: a part of the optimizer's update is taken back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.methods.slowqk.settings import SlowQKConfig
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.anatomy import residual_layers
from jreg_megatron.stream.method import Call, Method, Place

Held = tuple[Tensor, int]
"""What an optimizer updates of a weight: all of it or, flat, a shard; and the shard's first element."""


class SlowQK(Method):
    """Multiplies the update of W_Q and W_K in the upper layers.

    The optimizer steps as ever, on the float32 weights that this rank updates, or on its shard of them.
    Before the step the rows of Q and K are kept; after it they are ``old + multiplier * (new - old)``. So
    Adam's moments are those of an ordinary step, and the result is that of a learning rate times the
    multiplier.
    """

    def __init__(self, settings: SlowQKConfig, place: Place) -> None:
        super().__init__(settings, place)
        self._num_layers = place.num_layers
        attentions: list[Any] = [
            getattr(layer.first, "self_attention", None)
            for chunk in place.chunks
            for layer in residual_layers(chunk)
            if settings.is_slow(layer.number, place.num_layers)
        ]
        self._rows = {
            attention.linear_qkv.weight: rows_of_q_and_k(attention, settings.name)
            for attention in attentions
            if hasattr(attention, "linear_qkv") and attention.linear_qkv.weight.requires_grad
        }
        self._iteration: int | None = None
        self._hooks: list[Any] | None = None  # None until there is an optimizer

    def describe(self) -> str:
        """One line that says what was attached."""
        settings: SlowQKConfig = self.settings
        first = next(n for n in range(1, self._num_layers + 1) if settings.is_slow(n, self._num_layers))
        return (
            f"> slow Q/K attached: updates times {settings.multiplier:g} in layers {first} to "
            f"{self._num_layers}, for {settings.hold_iterations} iterations"
        )

    def begin_microbatch(self, call: Call) -> None:
        """Note the iteration; refuse to train without the optimizer."""
        if not call.training:
            return
        if self._hooks is None:
            self.refuse(f"{self.settings.name} needs the optimizer; give attach(..., optimizer=) yours")
        self._iteration = call.iteration

    def use_optimizer(self, optimizer: Any) -> None:
        """Take part in the steps of Megatron's optimizer, or of one of torch's.

        Raises:
            UserError: for an optimizer whose weights are not found.
        """
        self._hooks = []
        updated: set[Tensor] = set()
        for one in getattr(optimizer, "chained_optimizers", None) or [optimizer]:
            inner = one if isinstance(one, torch.optim.Optimizer) else getattr(one, "optimizer", None)
            if not isinstance(inner, torch.optim.Optimizer):
                continue  # a rank without parameters of this kind
            held = _held_by(one, inner, self._rows)
            updated.update(held)
            self._take_part(inner, {weight: found for weight, found in held.items() if found is not None})
        if missing := len(self._rows.keys() - updated):
            raise UserError(
                f"{self.settings.name} does not know a {type(optimizer).__name__}, in which it finds "
                f"{len(self._rows) - missing} of {len(self._rows)} weights of queries and keys; take Adam, "
                "with or without the distributed optimizer"
            )

    def _take_part(self, inner: torch.optim.Optimizer, held: dict[Tensor, Held]) -> None:
        assert self._hooks is not None
        old: list[Tensor] = []

        def multiplier() -> float:
            assert self._iteration is not None
            return float(self.settings.multiplier_at(self._iteration))

        def parts() -> list[Tensor]:
            return [
                flat[max(0, begin - start) : max(0, end - start)]
                for weight, (tensor, start) in held.items()
                for flat in [tensor.detach().view(-1)]
                for begin, end in self._rows[weight]
            ]

        def keep(*_: Any) -> None:
            old[:] = [part.clone() for part in parts()] if multiplier() != 1 else []

        def take_back(*_: Any) -> None:
            for before, part in zip(old, parts() if old else [], strict=True):
                part.copy_(before.lerp_(part, multiplier()))
            old.clear()

        self._hooks += [inner.register_step_pre_hook(keep), inner.register_step_post_hook(take_back)]

    def detached(self) -> None:
        """Take part in no more steps."""
        for hook in self._hooks or ():
            hook.remove()


def rows_of_q_and_k(attention: Any, name: str) -> list[tuple[int, int]]:
    """Where Q and K lie in the flat ``linear_qkv.weight`` of a rank: first elements, and ends (excluded).

    Megatron has the rows by query group: those of the group's queries, of its key, of its value.

    Raises:
        UserError: if the weight is not of that kind; ``name`` is the method's.
    """
    rows, width = attention.linear_qkv.weight.shape
    groups, head = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    queries = attention.num_attention_heads_per_partition // groups
    of_group = (queries + 2) * head
    if rows != groups * of_group:
        raise UserError(
            f"{name} does not know a linear_qkv of {rows} rows: {groups} query groups of {queries} heads of "
            f"{head} have {groups * of_group}; take no gates, and at least as many query groups as "
            "tensor-parallel ranks"
        )
    first_rows = (group * of_group for group in range(groups))
    return [(first * width, (first + (queries + 1) * head) * width) for first in first_rows]


def _held_by(one: Any, inner: torch.optim.Optimizer, weights: Iterable[Tensor]) -> dict[Tensor, Held | None]:
    """What an optimizer updates of those weights that are its own; None for one that other ranks update."""
    if not hasattr(one, "model_param_gbuf_map"):
        updated = {parameter for group in inner.param_groups for parameter in group["params"]}
        main = {weight: getattr(weight, "main_param", None) for weight in weights}
        own = {weight: weight if of_weight is None else of_weight for weight, of_weight in main.items()}
        return {weight: (tensor, 0) for weight, tensor in own.items() if tensor in updated}
    # Megatron's DistributedOptimizer
    groups = [
        *zip(one.model_fp32_groups, one.shard_fp32_groups, strict=True),
        *zip(one.model_float16_groups, one.shard_fp32_from_float16_groups, strict=True),
    ]
    shards = {weight: shard for group in groups for weight, shard in zip(*group, strict=True)}
    held: dict[Tensor, Held | None] = {}
    for weight in weights:
        if not any(weight in buffer.param_index_map for buffer in one.buffers):
            continue
        if weight not in shards:
            held[weight] = None
        elif (shard := shards[weight]) is not None:  # else it lies inside of the optimizer
            held[weight] = shard, one._get_model_param_range_map(weight)["param"].start
    return held
