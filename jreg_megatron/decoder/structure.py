"""Find the layers and the final norm of a model by their function, not by their names.

Short forward passes show the function. The layers are the ``ModuleList`` whose members run in order, each on
the output of the previous one. No module before or after them mixes tokens. The final norm is a norm that
runs on the last layer's output. The head sees only this norm's output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from jreg_megatron.decoder.decoder import (
    comparable,
    is_same,
    is_same_or_scaled,
    is_state,
    stream_out,
    with_stream,
)
from jreg_megatron.runtime.errors import UserError

_LENGTH = 12
"""Number of tokens in a forward pass, unless the model's maximum is smaller."""


def _at(length: int) -> int:
    """The position of the token that differs between the two rows. A model may look ahead within blocks of 2
    to 6 tokens; no such block begins here."""
    return length * 7 // 12


_SLIGHT, _MUCH, _HALF = 0.02, 0.1, 0.5
"""Shares of the difference between the rows' logits. At most ``_SLIGHT`` may come from other modules if all
should come from one. At least ``_MUCH`` must come from the last layer if not all does. ``_HALF`` bounds the
slack for rounding."""
_LEAST, _CLEAR = 1e-5, 0.1
"""Shares of the logits. A difference up to ``_LEAST`` counts as none. Rounding cannot hide ``_CLEAR``."""

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_STEPS = (1, 2, 5, 11, 23)
"""Distances between the two ids. Several are tried: reserved ids may share an embedding, or have NaN."""


@dataclass(frozen=True)
class Structure:
    """The parts of a model."""

    layers: Sequence[nn.Module]  # 1..L
    final_norm: nn.Module | None  # None if no norm runs on the last layer's output, or not only on it
    feeds_head_alone: bool  # whether the head sees only the last layer's output
    hidden_size: int
    in_place: bool  # whether a layer writes to its input
    scales: bool  # whether the state is multiplied by a number between layers


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a module from states to states."""

    module: nn.Module
    number: int  # index among the module's calls, from 1
    state_in: Tensor
    state_out: Tensor
    more_in: list[Tensor]  # other states among its arguments
    more_out: list[Tensor]
    in_place: bool


def find_structure(
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    vocab_size: int,
    name: str,
    num_layers: int | None = None,
    max_length: int | None = None,
) -> Structure:
    """Run a few tokens and find the modules on the residual stream.

    Args:
        model: the whole model, in evaluation mode.
        run: logits ``[b, s, V]`` of token ids ``[b, s]``.
        vocab_size: every id is below it.
        name: for messages.
        num_layers: number of layers in the configuration; None if not known.
        max_length: maximum length of a sequence; None if not known.

    Raises:
        UserError: if no layers are found, the model looks at later tokens, or its logits change from run to
            run.
    """
    tokens, calls, logits = _two_rows(model, run, vocab_size, name, min(_LENGTH, max_length or _LENGTH))
    with torch.inference_mode():
        own, again = comparable(logits, run(tokens))
    if bool((again - own).norm() > max(1e-3, 8 * torch.finfo(logits.dtype).eps) * own.norm()):
        raise UserError(
            f"{name} gives different logits for the same tokens in each run, so it cannot be measured; "
            "switch off its dropout, its noise and its memory of earlier runs"
        )

    def effect(call: _Call) -> tuple[bool, bool]:
        return _effect(call, logits, lambda: run(tokens))

    for chain in _chains(model, calls, num_layers):
        last = chain[-1]
        if _tells_apart(chain[0].state_in):
            is_last, is_all = effect(last)
            # Other paths to the head may exist beside the configured layers, such as a skip connection.
            if is_last and (is_all or (len(chain) == num_layers and not _hands_on_more(chain))):
                break
    else:
        wanted = "" if num_layers is None else f" of {num_layers} layers (its configuration)"
        raise UserError(
            f"no list of layers found in {name} ({type(model).__name__}): jreg_megatron looks for a "
            f"ModuleList{wanted}, a Sequential or a ModuleDict, whose members run once each, in order; give "
            "another model"
        )
    first, second = last.state_out[:, : _at(tokens.shape[1])].float()
    # The rows may differ by rounding, because an expert processes both rows' tokens together.
    if (first - second).norm() > torch.finfo(last.state_out.dtype).eps ** 0.5 * first.norm():
        raise UserError(f"{name} looks at later tokens, as an encoder does; give a causal language model")
    behind = calls[calls.index(last) + 1 :]
    norms = (call for call in behind if _is_norm_of(call, last.state_out) and effect(call)[1])
    norm = next((call.module for call in norms), None)
    in_place = any(call.in_place for call in chain)
    scales = not all(is_same(a.state_out, b.state_in) for a, b in pairwise(chain))
    layers = [call.module for call in chain]
    return Structure(layers, norm, is_all, last.state_out.shape[-1], in_place, scales)


def _two_rows(
    model: nn.Module, run: Callable[[Tensor], Tensor], vocab_size: int, name: str, length: int
) -> tuple[Tensor, list[_Call], Tensor]:
    """Two rows of ids that differ in one token, and the calls and logits of their run.

    The ids are chosen so that the rows' logits differ clearly.
    """
    widest = -1.0
    for step in _STEPS:
        some = (torch.arange(length) + step - 1).repeat(2, 1) % max(1, vocab_size - 1)
        some[1, _at(length)] = (some[1, _at(length)] + step) % vocab_size
        calls, logits = _record(model, run, some)
        if (apart := _apart(logits)) > widest:
            widest, found = apart, (some, calls, logits)
        if widest > _CLEAR:
            break
    if widest <= _LEAST:
        raise UserError(
            f"{name} gives the same logits for different tokens, so its layers cannot be found; check its "
            "embedding"
        )
    return found


def _record(model: nn.Module, run: Callable[[Tensor], Tensor], tokens: Tensor) -> tuple[list[_Call], Tensor]:
    """All calls from states to states ``[b, s, h]``, in the order in which they return; and the logits."""
    calls: list[_Call] = []
    numbers: Counter[nn.Module] = Counter()

    given: dict[nn.Module, list[list[tuple[Tensor, Tensor]]]] = {}

    def states(*values: Any) -> list[Tensor]:
        found = {id(value): value for value in values if is_state(value)}
        return [value for value in found.values() if value.shape[:2] == tokens.shape]

    def kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        dicts = (each for each in (*args, *kwargs.values()) if isinstance(each, dict))
        return [value for each in dicts for value in each.values()]

    # Copies of all states, because later modules may write to them.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = states(*args, kwargs.get("hidden_states"), *kwargs.values(), *kept(args, kwargs))
        given.setdefault(module, []).append([(state, state.clone()) for state in found])

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        numbers[module] += 1
        found = given[module].pop()
        outputs = output if isinstance(output, tuple | list) and output else (output,)
        if found and states(outputs[0]) and found[0][1].shape == outputs[0].shape:
            in_place = not is_same(*found[0])
            (first, *more_in), (out, *more_out) = (
                [copy for _, copy in found],
                [state.clone() for state in states(*outputs)],
            )
            # States that the module puts into a dict argument are outputs too.
            new = (
                each for each in states(*kept(args, kwargs)) if not any(is_same(each, old) for old in more_in)
            )
            more_out += [each.clone() for each in new]
            calls.append(_Call(module, numbers[module], first, out, more_in, more_out, in_place))

    with ExitStack() as hooks, torch.inference_mode():
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after, with_kwargs=True))
        return calls, run(tokens)


def _apart(logits: Tensor) -> float:
    """The difference of the rows' logits at the token that differs, as a share of the logits."""
    at = _at(logits.shape[1])
    if logits[:, at].isnan().any():  # try other ids; another check refuses NaN in states
        return 2 * _LEAST
    first, second = comparable(logits)[0][:, at]
    return float((first - second).norm() / first.norm().clamp(min=torch.finfo(first.dtype).tiny))


@torch.inference_mode()
def _effect(call: _Call, logits: Tensor, run: Callable[[], Tensor]) -> tuple[bool, bool]:
    """Whether a call's output has a large effect on its own token's logits and no other, and whether nothing
    else has an effect on these logits.

    The output is swapped between the rows at the token that differs. Then these logits should be swapped.
    """
    numbers, at = count(1), _at(logits.shape[1])
    others = [place for place in range(logits.shape[1]) if place != at]

    def swap(_: nn.Module, __: Any, output: Any) -> Any:
        if next(numbers) != call.number:
            return None
        # Use the recorded state, because experts on a GPU may round differently in each run.
        state = call.state_out.clone()
        state[:, at] = state[:, at].flip(0)
        return with_stream(output, state)

    with call.module.register_forward_hook(swap):
        own, found = comparable(logits, run())
    expected = own.clone()
    expected[:, at] = own[:, at].flip(0)
    off = found - expected
    eps = 4 * torch.finfo(call.state_out.dtype).eps
    apart, moved = (own[0] - own[1])[at].norm(), (found - own)[:, at].norm()
    is_alone = bool(off[:, others].norm() <= min(eps, 1e-3) * own[:, others].norm())
    # The slack for rounding is bounded by the difference, so that the check can fail.
    slack = torch.minimum(_SLIGHT * apart + eps * own[:, at].norm(), _HALF * apart)
    return is_alone and bool(moved >= _MUCH * apart), bool(off[:, at].norm() <= slack)


def _chains(model: nn.Module, calls: list[_Call], num_layers: int | None) -> list[list[_Call]]:
    """The calls of each list of modules that pass the stream from one to the next.

    Lists of ``num_layers`` come first, then the longest ones, then the outermost ones.
    """
    by_module: dict[nn.Module, list[_Call]] = {}
    for call in calls:
        by_module.setdefault(call.module, []).append(call)
    found = []
    for modules in model.modules():
        if not isinstance(modules, _LISTS):
            continue
        members = modules._modules.values()
        # Sequential and ModuleDict may hold the norm and other modules too.
        if not isinstance(modules, nn.ModuleList) and len({type(module) for module in members}) > 1:
            continue
        # Layers beyond config.num_hidden_layers do not run.
        of_each = [by_module[module] for module in members if module in by_module]
        chain = [calls[0] for calls in of_each if len(calls) == 1]
        handed_on = all(is_same_or_scaled(a.state_out, b.state_in) for a, b in pairwise(chain))
        if chain and len(chain) == len(of_each) and handed_on:
            found.append(chain)
    return sorted(found, key=lambda chain: (len(chain) != num_layers, -len(chain)))


def _hands_on_more(chain: list[_Call]) -> bool:
    """Whether a module passes on a second state, such as the sum of the stream and its last branch."""
    pairs = pairwise(chain)
    return any(is_same(out, into) for a, b in pairs for out in a.more_out for into in b.more_in)


def _tells_apart(states: Tensor) -> bool:
    """Whether each state depends on one token: the rows' states differ only at the token that differs."""
    first, second = states.float()
    off = (first - second).norm(dim=-1)
    off[_at(len(off))] = 0
    return not bool(off.norm() > 4 * torch.finfo(states.dtype).eps * first.norm())


def _is_norm_of(call: _Call, state: Tensor) -> bool:
    """Whether a call is a norm of ``state``.

    A norm's only weights are a scale and a shift. Its output does not depend on the length of its input
    vector.
    """
    if not is_same_or_scaled(call.state_in, state) or is_same(call.state_out, state):
        return False
    if any(parameter.numel() > state.shape[-1] for parameter in call.module.parameters()):
        return False
    some = torch.randn(1, _LENGTH, state.shape[-1], generator=torch.Generator().manual_seed(0))
    some = some.to(call.state_in)
    try:
        with torch.inference_mode():
            once, twice = (stream_out(call.module(each))[:, :1].float() for each in (some, 2 * some[:, :1]))
    except Exception:  # it needs more arguments
        return False
    return not bool((once - twice).norm() > max(0.01, 4 * torch.finfo(state.dtype).eps) * once.norm())
