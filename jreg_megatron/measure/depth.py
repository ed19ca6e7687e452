"""Metrics of depth of a decoder: the states between attention and MLP are found by what the modules do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from jreg_megatron.data.windows import Batch, Window
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
_ROUNDINGS = 16
"""So many times the type's precision, of its norm, a token's sum of states may be off."""


@dataclass(frozen=True)
class Middle:
    """Where a layer has the sum of its input and attention."""

    module: nn.Module
    scale: float | None
    """None if the sum is this module's input. Else it is the layer's input, and this times its output."""


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    given: list[Tensor]  # the state, if any
    made: Tensor  # states, as the module has them


def find_middles(decoder: Decoder, ids: Any) -> tuple[Middle, ...] | None:
    """The middle of each layer, from a short forward pass; None, and a note, if a layer has none.

    A layer ``out = x + a + m`` adds attention a first. Either one of its modules is given ``x + a``, and a
    later one makes m. Or both are computed from x at the same time; then attention is the one that cannot run
    on one token alone.

    Args:
        decoder: the model.
        ids: tokens of a text, ``[s]``; repeated if they are few.
    """
    row = torch.as_tensor(ids)[:_LENGTH]
    row = row.repeat(_LENGTH)[:_LENGTH]
    rows = torch.stack((row, row))
    rows[1, 0] = (rows[1, 0] + 1) % decoder.vocab_size
    found: dict[int, Middle | None] = {}
    calls: list[_Call] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[module] = [each.clone() for each in (*args, *kwargs.values()) if is_state(each)][:1]

    def after(module: nn.Module, _: Any, output: Any) -> None:
        if (made := _made(output)) is not None:
            calls.append(_Call(module, given[module], made))

    def see(number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        if number <= decoder.num_layers:
            found[number] = _middle(decoder, layer_input, own.pop(number), calls, is_first=number == 1)
            calls.clear()

    given: dict[nn.Module, list[Tensor]] = {}
    with ExitStack() as hooks, torch.inference_mode():
        for module in (child for layer in decoder.layers for child in layer.children()):
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        own = hooks.enter_context(_own_outputs(decoder))
        with decoder.observed(see):
            decoder.run(rows)
    missing = [number for number, middle in sorted(found.items()) if middle is None]
    if missing:
        note(
            f"layer {missing[0]} of {decoder.name} ({type(decoder.layers[missing[0] - 1]).__name__}) has no "
            "state between attention and MLP that can be found, so what each adds is left out"
            + ("" if decoder.dtype == torch.float32 else "; try --dtype float32")
        )
        return None
    return tuple(middle for _, middle in sorted(found.items()) if middle is not None)


@contextmanager
def _own_outputs(decoder: Decoder) -> Iterator[dict[int, Tensor]]:
    """By number, what each layer returns itself ``[b, s, h]``, before a method changes it."""
    own: dict[int, Tensor] = {}

    def keep(number: int, _: nn.Module, __: Any, output: Any) -> None:
        state = stream_out(output)
        own[number] = state.transpose(0, 1) if decoder.sequence_first else state

    with ExitStack() as hooks:
        for number, layer in enumerate(decoder.layers, start=1):
            hooks.enter_context(layer.register_forward_hook(partial(keep, number), prepend=True))
        yield own


def _made(output: Any) -> Tensor | None:
    """A copy of the state that a module returns, with its bias if that is returned beside it (Megatron)."""
    state, *more = output if isinstance(output, tuple | list) and output else (output,)
    if not is_state(state):
        return None
    is_bias = bool(more) and isinstance(more[0], Tensor) and more[0].ndim == 1
    return state + more[0] if is_bias else state.clone()  # later modules may write to it


def _middle(
    decoder: Decoder, before: Tensor, after: Tensor, calls: Sequence[_Call], is_first: bool
) -> Middle | None:
    before, after = before.double(), after.double()
    # Of each token: in trained models the first one's norm is often far above the others.
    room = torch.finfo(decoder.dtype).eps * torch.maximum(before.norm(dim=-1), after.norm(dim=-1))

    def is_near(one: Tensor, other: Tensor) -> bool:
        return bool(((one - other).norm(dim=-1) <= _ROUNDINGS * room).all())

    def wide(state: Tensor) -> Tensor:
        return (state.transpose(0, 1) if decoder.sequence_first else state).to(before)

    def scale_of(wanted: Tensor, part: Tensor) -> float | None:
        """The positive number by which ``part`` is ``wanted``; None if it is not."""
        scale = float((wanted * part).sum() / part.square().sum().clamp(min=1e-300))
        return scale if scale > 0 and is_near(wanted, scale * part) else None

    def mixes(middle: Tensor) -> bool:
        """Whether the first token's difference between the rows has come to later tokens in layer 1."""
        moved = (middle[0] - middle[1]).norm(dim=-1) > room[0]
        return not is_first or bool(moved[1:].any())

    calls = [call for call in calls if wide(call.made).shape == before.shape]
    made = [wide(call.made) for call in calls]
    for at, call in enumerate(calls):
        for state in (wide(each) for each in call.given):
            if state.shape != before.shape or is_near(state, before) or not mixes(state):
                continue
            adds_first = any(scale_of(state - before, part) for part in made[:at])
            if adds_first and any(scale_of(after - state, part) for part in made[at:]):
                return Middle(call.module, None)
    for one, other in combinations(range(len(calls)), 2):
        if scale := scale_of(after - before, made[one] + made[other]):
            scale = round(scale, 3) if abs(scale - round(scale, 3)) < 1e-5 else scale  # of rounded states
            mixing = [at for at in (one, other) if not _runs_on_one_token(decoder, calls[at])]
            if len(mixing) == 1 and mixes(before + scale * made[mixing[0]]):
                return Middle(calls[mixing[0]].module, scale)
    return None


def _runs_on_one_token(decoder: Decoder, call: _Call) -> bool:
    last = (slice(-1, None),) if decoder.sequence_first else (slice(None), slice(-1, None))
    try:
        alone = _made(call.module(call.given[0][last]))
    except Exception:  # it needs more than states, such as positions
        return False
    own = call.made[last]
    room = torch.finfo(own.dtype).eps ** 0.5
    return alone is not None and bool((alone - own).norm() <= room * own.norm())


class DepthSums:
    """The figures of each sequence of a batch. Sees a decoder's forward pass in :meth:`observing`."""

    def __init__(self, batch: Batch, decoder: Decoder, middles: Sequence[Middle] | None) -> None:
        self._batch, self._decoder, self._middles = batch, decoder, middles
        self._caught: Tensor | None = None
        self._own: dict[int, Tensor] = {}
        self._norms: list[Tensor] = []
        self._parts: list[Tensor] = []
        self._of_states: list[Tensor] = []

    @contextmanager
    def observing(self) -> Iterator[None]:
        """See every forward pass inside the block."""

        def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._caught = stream_in(args, kwargs).clone()  # later modules may write to it

        def made(module: nn.Module, _: Any, output: Any) -> None:
            self._caught = _made(output)

        with ExitStack() as hooks:
            self._own = hooks.enter_context(_own_outputs(self._decoder))
            hooks.enter_context(self._decoder.observed(self))
            for middle in self._middles or ():
                if middle.scale is None:
                    hooks.enter_context(middle.module.register_forward_pre_hook(given, with_kwargs=True))
                else:
                    hooks.enter_context(middle.module.register_forward_hook(made))
            yield

    def __call__(self, number: int, before: Tensor, after: Tensor) -> None:
        """Add layer ``number``; states are ``[b, s, h]``."""
        if number == 1:
            self._add_state(before)
        self._add_state(after)
        if number <= self._decoder.num_layers and self._middles is not None:
            assert self._caught is not None, "the state between attention and MLP was not seen"
            middle, self._caught = self._caught, None
            middle = middle.transpose(0, 1) if self._decoder.sequence_first else middle
            if (scale := self._middles[number - 1].scale) is not None:
                middle = before + scale * middle
            self._parts.append(contributions(before, middle, self._own.pop(number)).cpu())

    def _add_state(self, state: Tensor) -> None:
        self._norms.append(norms(state).cpu())
        lengths = self._batch.lengths.tolist()
        rows = [row[:length] for row, length in zip(state, lengths, strict=True)]
        self._of_states.append(
            torch.stack([_of_sequence(row[first:]).cpu() for row in rows for first in (0, 1)])
        )

    def of_windows(self) -> Iterator[tuple[Window, list[Tensor]]]:
        """Each sequence, and its means with and without its first token: of :data:`OF_LAYERS` in layers 1..L,
        then of :data:`OF_STATES` at the places 0..L and after the final norm, ``[7 L + 2 P]`` float64. NaN
        where the sequence is too short, and for contributions that are not known."""
        last = self._decoder.num_layers
        void = voids(torch.stack(self._norms)[: last + 1])[None].double()
        parts = torch.full((len(CONTRIBUTIONS), *void.shape[1:]), torch.nan, dtype=torch.float64)
        if self._parts:
            parts = torch.stack(self._parts, dim=1).double()
            parts = torch.where(parts.isnan(), torch.inf, parts)  # 0 / 0 is no number, but it is known
        values = torch.cat((void, parts))
        of_states = torch.stack(self._of_states, dim=-1)
        of_states = of_states.view(-1, 2, *of_states.shape[1:])
        for row, window in enumerate(self._batch.windows):
            of_tokens = values[:, :, row, : len(window.ids)]
            yield (
                window,
                [
                    torch.cat(
                        (of_tokens[..., first:].mean(dim=-1).flatten(), of_states[row, first].flatten())
                    )
                    for first in (0, 1)
                ],
            )


def _of_sequence(states: Tensor) -> Tensor:
    if not len(states):
        return torch.full((len(OF_STATES),), torch.nan, dtype=torch.float64)
    return torch.stack((matrix_entropy(states), curvature(states))).double()


@dataclass
class DepthMeans:
    """The mean over texts of their means. A text of several sequences weighs them by their tokens."""

    num_layers: int
    _total: Tensor | float = 0.0
    _texts: Tensor | float = 0.0
    _of_text: tuple[Tensor | float, Tensor | float] = 0.0, 0.0

    def add(self, window: Window, figures: Tensor, tokens: int) -> None:
        """Add the figures of a sequence of so many tokens, as :meth:`DepthSums.of_windows` gives them."""
        weight = tokens * (~figures.isnan()).double()
        sums = torch.where(weight > 0, figures, 0.0) * weight
        self._of_text = self._of_text[0] + sums, self._of_text[1] + weight
        if window.is_last:
            total, weight = (torch.as_tensor(each) for each in self._of_text)
            self._total = self._total + torch.where(weight > 0, total / weight, 0.0)
            self._texts = self._texts + (weight > 0).double()
            self._of_text = 0.0, 0.0

    def figures(self) -> dict[str, Any]:
        """For JSON: :data:`OF_LAYERS` of layers 1..L, before the final norm, and :data:`OF_STATES` of
        h_0 .. h_L, the last one also after the norm. None for what no text has, or is not finite."""
        last = self.num_layers
        mean = torch.as_tensor(self._total) / torch.as_tensor(self._texts)
        of_layers, of_states = mean[: len(OF_LAYERS) * last], mean[len(OF_LAYERS) * last :]
        found: dict[str, Any] = {}
        for name, row in zip(OF_LAYERS, of_layers.view(-1, last), strict=True):
            found[name] = {"pre_norm": _known(row)}
        for name, row in zip(OF_STATES, of_states.view(len(OF_STATES), -1), strict=True):
            found[name] = {"pre_norm": _known(row[: last + 1])}
            if len(row) > last + 1:
                found[name]["post_norm"] = _known(torch.cat((row[:last], row[last + 1 :])))
        return found


def _known(row: Tensor) -> list[float] | None:
    return row.tolist() if bool(row.isfinite().all()) else None
