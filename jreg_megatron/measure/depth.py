"""Metrics of a decoder's use of depth. Attention and MLP are found by their function in a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from jreg_megatron.data.windows import Batch
from jreg_megatron.decoder.decoder import Decoder, is_state, stream_in, stream_out
from jreg_megatron.methods.depth.formulas import (
    CONTRIBUTIONS,
    contributions,
    curvature,
    matrix_entropy,
    voids,
)
from jreg_megatron.methods.norms.formulas import norms
from jreg_megatron.runtime.output import note

OF_STATES = ("matrix_entropy", "curvature")
"""Figures of a sequence's states h_0 .. h_L."""
OF_LAYERS = ("void_share", *CONTRIBUTIONS)
"""Figures of tokens in layers 1..L."""

_LENGTH = 12
"""Number of tokens in each of the two rows of a short forward pass. The rows differ in the first half."""
_ROUNDINGS = 16
"""Allowed error of a token's sum of states, in units of the type's precision, relative to its norm."""
_MIXED = 1e-4
"""A relative change above this is not fp32 rounding."""


@dataclass(frozen=True)
class Parts:
    """The two modules of a layer whose outputs it adds to its input, times ``scale``."""

    attention: nn.Module
    mlp: nn.Module
    scale: float


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    given: list[Tensor]  # the state, if any
    made: Tensor


def find_parts(decoder: Decoder, ids: Any) -> list[Parts] | None:
    """The parts of each layer, from a short forward pass; None, and a note, if a layer has none.

    A layer is ``out = x + c (a + m)``. Two of its modules compute a and m. Attention is the module that mixes
    tokens. If a later module gets ``x + c a``, m is computed from this sum. Else both are computed from x in
    parallel, and the MLP does not mix tokens.

    Args:
        decoder: the model.
        ids: tokens of a text, ``[s]``; repeated if there are few.
    """
    length = min(_LENGTH, decoder.max_length or _LENGTH)
    rows = torch.as_tensor(ids)[:length].repeat(length)[:length].repeat(2, 1)
    rows[1, : length // 2] = (rows[1, : length // 2] + 1) % decoder.vocab_size
    found: list[Parts | None] = []
    calls: list[_Call] = []
    given: dict[nn.Module, list[Tensor]] = {}
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = decoder.batch_first(stream_in(args, kwargs))
        # Make the second halves equal. If they differ after a module, this module mixes tokens.
        state[1, length // 2 :] = state[0, length // 2 :]
        entered[:] = [state.to(torch.float64, copy=True)]  # the layer may write to it
        calls.clear()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[module] = [each.clone() for each in (*args, *kwargs.values()) if is_state(each)][:1]

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if (made := _made(output)) is not None:
            calls.append(_Call(module, given[module], made))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        found.append(_parts(decoder, entered[0], decoder.batch_first(stream_out(output)), calls))

    with ExitStack() as hooks, torch.inference_mode():
        for layer in decoder.layers:
            hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
            # Before a method changes the output.
            hooks.enter_context(layer.register_forward_hook(leave, prepend=True))
            for child in layer.children():
                hooks.enter_context(child.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(child.register_forward_hook(after))
        decoder.run(rows)
    parts = [each for each in found if each is not None]
    if len(parts) == len(found):
        return parts
    missing = found.index(None)
    note(
        f"layer {missing + 1} of {decoder.name} ({type(decoder.layers[missing]).__name__}) has no "
        "state between attention and MLP that can be found, so their contributions are left out"
        + ("" if decoder.dtype == torch.float32 else "; try --dtype float32")
    )
    return None


def _made(output: Any) -> Tensor | None:
    """A copy of the state that a module returns, plus the bias if it also returns one (Megatron)."""
    state, *more = output if isinstance(output, tuple | list) and output else (output,)
    if not is_state(state):
        return None
    is_bias = bool(more) and isinstance(more[0], Tensor) and more[0].ndim == 1
    return state + more[0] if is_bias else state.clone()  # later modules may write to it


def _parts(decoder: Decoder, before: Tensor, after: Tensor, calls: Sequence[_Call]) -> Parts | None:
    added, eps = after.to(before) - before, torch.finfo(decoder.dtype).eps
    # Per token: in trained models the first token's norm is often far above the others.
    room = _ROUNDINGS * eps * torch.maximum(before.norm(dim=-1), after.to(before).norm(dim=-1))

    def is_near(one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and bool(((one - other).norm(dim=-1) <= room).all())

    def wide(state: Tensor) -> Tensor:
        return decoder.batch_first(state).to(before)

    def mixes(made: Tensor) -> bool:
        same, changed = made[:, made.shape[1] // 2 :]
        least = max(_MIXED, 4 * eps) * same.norm(dim=-1)
        return bool(((same - changed).norm(dim=-1) > least).any())

    outputs = [(at, made) for at, call in enumerate(calls) if (made := wide(call.made)).shape == before.shape]
    for (first, one), (second, other) in combinations(outputs, 2):
        both = one + other
        scale = float((added * both).sum() / both.square().sum().clamp(min=1e-300))
        if not (scale > 0 and is_near(added, scale * both)):
            continue
        scale = round(scale, 3) if abs(scale - round(scale, 3)) < 1e-5 else scale  # of rounded states
        states = (wide(state) for call in calls[first + 1 :] for state in call.given)
        is_given = any(is_near(state, before + scale * one) for state in states)
        if mixes(one) and (is_given or not mixes(other)):
            return Parts(calls[first].module, calls[second].module, scale)
        if mixes(other) and not (is_given or mixes(one)):
            return Parts(calls[second].module, calls[first].module, scale)
    return None


class DepthSums:
    """The figures of each sequence of a batch. :meth:`observing` observes a decoder's forward pass."""

    def __init__(self, batch: Batch, decoder: Decoder, parts: Sequence[Parts] | None) -> None:
        self._lengths, self._decoder, self._parts = batch.lengths.tolist(), decoder, parts
        self._made: dict[nn.Module, Tensor] = {}
        self._norms: list[Tensor] = []
        self._contributions: list[Tensor] = []
        self._of_states: list[Tensor] = []

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Observe every forward pass inside the block."""

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            made = _made(output)
            assert made is not None, "attention or MLP did not return a state"
            self._made[module] = self._decoder.batch_first(made)

        with ExitStack() as hooks:
            hooks.enter_context(self._decoder.observed(self))
            for parts in self._parts or ():
                for module in (parts.attention, parts.mlp):
                    hooks.enter_context(module.register_forward_hook(keep))
            yield

    def __call__(self, number: int, before: Tensor, after: Tensor) -> None:
        """Add layer ``number``; states are ``[b, s, h]``."""
        if number == 1:
            self._add_state(before)
        self._add_state(after)
        if number <= self._decoder.num_layers and self._parts is not None:
            parts = self._parts[number - 1]
            # A model may be on several GPUs. Then a layer's input is on the GPU of the previous layer.
            state = before.to(after.device, torch.promote_types(before.dtype, torch.float32))
            # Not the layer's output, which a method may have changed.
            middle = state + parts.scale * self._made.pop(parts.attention)
            self._contributions.append(
                contributions(state, middle, middle + parts.scale * self._made.pop(parts.mlp)).cpu()
            )

    def _add_state(self, state: Tensor) -> None:
        self._norms.append(norms(state).cpu())
        rows = [row[:length] for row, length in zip(state, self._lengths, strict=True)]
        self._of_states.append(
            torch.stack([_of_sequence(row[first:]).cpu() for first in (0, 1) for row in rows], dim=-1)
        )

    def table(self) -> Tensor:
        """For each sequence, with and without its first token: the means of :data:`OF_LAYERS` in layers 1..L,
        then :data:`OF_STATES` at the places 0..L and after the final norm, ``[7 L + 2 P, 2, b]`` float64. NaN
        if the sequence is too short, and for unknown contributions."""
        void = voids(torch.stack(self._norms)[: self._decoder.num_layers + 1])[None].double()
        parts = torch.full((len(CONTRIBUTIONS), *void.shape[1:]), torch.nan, dtype=torch.float64)
        if self._contributions:
            parts = torch.stack(self._contributions, dim=1).double()
            parts = torch.where(parts.isnan(), torch.inf, parts)  # 0 / 0 is no number, but it is known
        of_tokens = torch.cat((void, parts)).flatten(0, 1)
        means = [
            of_tokens[:, row, first:length].mean(dim=-1)
            for first in (0, 1)
            for row, length in enumerate(self._lengths)
        ]
        of_states = torch.stack(self._of_states, dim=1).flatten(0, 1)
        return torch.cat((torch.stack(means, dim=-1), of_states)).view(-1, 2, len(self._lengths))


def _of_sequence(states: Tensor) -> Tensor:
    if not len(states):
        return torch.full((len(OF_STATES),), torch.nan, dtype=torch.float64)
    return torch.stack((matrix_entropy(states), curvature(states))).double()


def depth_figures(means: Tensor, num_layers: int) -> dict[str, Any]:
    """Means over texts of :meth:`DepthSums.table`'s first dimension, for JSON.

    They are :data:`OF_LAYERS` of layers 1..L, before the final norm, and :data:`OF_STATES` of h_0 .. h_L; for
    h_L also after the norm. A number that no text has, or that is not finite, is None. A row of only such
    numbers is None too.
    """
    of_layers, of_states = means.tensor_split([len(OF_LAYERS) * num_layers])
    found: dict[str, Any] = {}
    for name, row in zip(OF_LAYERS, of_layers.view(-1, num_layers), strict=True):
        found[name] = {"pre_norm": _known(row)}
    for name, row in zip(OF_STATES, of_states.view(len(OF_STATES), -1), strict=True):
        found[name] = {"pre_norm": _known(row[: num_layers + 1])}
        if len(row) > num_layers + 1:
            found[name]["post_norm"] = _known(torch.cat((row[:num_layers], row[num_layers + 1 :])))
    return found


def _known(row: Tensor) -> list[float | None] | None:
    values = finite(row)
    return None if values.count(None) == len(values) else values


def finite(row: Tensor) -> list[float | None]:
    """The numbers for JSON; None for a number that is not finite."""
    return [value if math.isfinite(value) else None for value in row.tolist()]
