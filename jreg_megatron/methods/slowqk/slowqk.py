"""Slower queries and keys of a built model: a part of the optimizer's update is undone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jreg_megatron.methods.slowqk.settings import SlowQKConfig
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.ranks import of_every_rank
from jreg_megatron.stream.anatomy import residual_layers
from jreg_megatron.stream.method import Call, Method, Place

Held = tuple[Tensor, int]
"""What an optimizer updates of a weight, all of it or a flat shard; and the index of its first element."""


class SlowQK(Method):
    """Multiplies the update of W_Q and W_K in the upper layers.

    The optimizer steps as usual, on the float32 weights that this rank updates, or on its shard of them.
    Before the step the rows of Q and K are kept; after it they are ``old + multiplier * (new - old)``. So
    Adam's moments are those of an ordinary step, and the result is that of a learning rate times the
    multiplier.
    """

    def __init__(self, settings: SlowQKConfig, place: Place) -> None:
        super().__init__(settings, place)
        self._rows: dict[Tensor, list[tuple[int, int]]] = {}
        self._found: list[int] = []
        """The layers, 1-based, whose queries and keys learn more slowly; of all ranks once they have met."""
        for layer in (layer for chunk in place.chunks for layer in residual_layers(chunk)):
            attention: Any = getattr(layer.first, "self_attention", None)
            weight: Any = getattr(getattr(attention, "linear_qkv", None), "weight", None)
            is_there = weight is not None and weight.requires_grad
            if not is_there or not settings.is_slow(layer.number, place.num_layers):
                continue
            if hasattr(weight, "full_tensor"):
                raise UserError(
                    f"{settings.name} does not support weights in FSDP, where each rank has other rows of a "
                    "weight; leave one of the two out"
                )
            self._rows[weight] = rows_of_q_and_k(attention, settings.name)
            self._found.append(layer.number)
        self._iteration: int | None = None
        self._hooks: list[Any] | None = None  # None until there is an optimizer

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Refuse a model without such weights. A collective call."""
        self._found = sorted({number for found in of_every_rank(self._found, group) for number in found})
        if not self._found:
            raise UserError(
                f"{self.settings.name} finds no linear_qkv that is trained in the last "
                f"{self.settings.share:g} of the layers; leave it out"
            )

    def describe(self) -> str:
        """One line that says what was attached."""
        settings: SlowQKConfig = self.settings
        return (
            f"> slow Q/K attached: updates times {settings.multiplier:g} for {settings.hold_iterations} "
            f"iterations, layers {', '.join(map(str, self._found))}"
        )

    def begin_microbatch(self, call: Call) -> None:
        """Note the iteration; refuse to train without the optimizer."""
        if not call.training:
            return
        if self._hooks is None:
            self.refuse(f"{self.settings.name} needs the optimizer; give attach(..., optimizer=) yours")
        if not call.in_full_graph:
            self._iteration = call.iteration

    def before_full_graph(self, iteration: int | None) -> None:
        """Note the iteration. The optimizer steps outside of the graph."""
        self._iteration = iteration

    def use_optimizer(self, optimizer: Any) -> None:
        """Take part in the steps of Megatron's optimizer, or of one of torch's.

        Raises:
            UserError: for an optimizer whose weights are not found.
        """
        self.detached()
        self._hooks = []
        updated: set[Tensor] = set()
        for one in _parts_of(optimizer):
            self.settings.refuse(getattr(one, "config", None))
            inner = one if isinstance(one, torch.optim.Optimizer) else getattr(one, "optimizer", None)
            if not isinstance(inner, torch.optim.Optimizer):
                continue  # a rank without parameters of this kind
            held = _held_by(one, inner, self._rows)
            updated.update(held)
            self._take_part(inner, {weight: found for weight, found in held.items() if found is not None})
        if missing := len(self._rows.keys() - updated):
            raise UserError(
                f"{self.settings.name} does not support a {type(optimizer).__name__}: it finds only "
                f"{len(self._rows) - missing} of {len(self._rows)} weights of queries and keys there; use "
                "Adam, with or without the distributed optimizer"
            )

    def _take_part(self, inner: torch.optim.Optimizer, held: dict[Tensor, Held]) -> None:
        assert self._hooks is not None
        old: list[Tensor] = []

        def multiplier() -> float:
            # torch's checkpoints take an empty step before the first micro-batch.
            return 1.0 if self._iteration is None else float(self.settings.multiplier_at(self._iteration))

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
        self._hooks = None


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
            f"{name} does not support a linear_qkv of {rows} rows: {groups} query groups of {queries} heads "
            f"of {head} have {groups * of_group}; leave output gates out, and give at least as many query "
            "groups as tensor-parallel ranks"
        )
    first_rows = (group * of_group for group in range(groups))
    return [(first * width, (first + (queries + 1) * head) * width) for first in first_rows]


def _parts_of(optimizer: Any) -> list[Any]:
    """The optimizers that one of Megatron's is made of."""
    parts = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if parts is None else [part for one in parts for part in _parts_of(one)]


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
