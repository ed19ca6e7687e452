"""Where the layers and the final norm of a model are, found by what they do and not by their names.

A short forward pass shows it: the layers are the ``ModuleList`` whose members run one after the other,
each on what the one before it returned; the final norm is what runs on the last one's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from jreg_megatron.errors import UserError

_LENGTH = 6


@dataclass(frozen=True)
class Structure:
    """The parts of a model.

    Attributes:
        layers: layers 1..L.
        place: where they are in the model, such as ``model.layers``.
        final_norm: None where nothing runs on the last layer's output (post-norm models).
        hidden_size: width of the residual stream.
    """

    layers: Sequence[nn.Module]
    place: str
    final_norm: nn.Module | None
    hidden_size: int


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    state_in: Tensor | None
    state_out: Tensor | None


def find_structure(model: nn.Module, run: Callable[[Tensor], Any], vocab_size: int, name: str) -> Structure:
    """Run a few tokens and see which modules carry the residual stream.

    Args:
        model: the whole model, in evaluation mode.
        run: runs token ids ``[b, s]`` through it.
        vocab_size: ids below it are used.
        name: of the model, for messages.

    Raises:
        UserError: if no layers are found, or the model looks at tokens to come; says what was looked for.
    """
    # Two rows that differ in the last token alone: what comes before it must not see that.
    tokens = torch.arange(_LENGTH).repeat(2, 1) % max(1, vocab_size - 1)
    tokens[1, -1] += 1
    calls = _record(model, run, tokens)
    place, calls_of_layers = _longest_chain(model, calls)
    if not calls_of_layers:
        raise UserError(
            f"{name} ({type(model).__name__}) has no layers that were found: looked for a ModuleList whose "
            "members run in order, each on the [batch, sequence, hidden] states that the last one returned; "
            f"it has {_lists(model)}"
        )
    last = calls_of_layers[-1]
    assert last.state_out is not None
    _refuse_lookahead(last.state_out, name)
    norm = _final_norm(calls[calls.index(last) + 1 :], last.state_out)
    return Structure([call.module for call in calls_of_layers], place, norm, last.state_out.shape[-1])


def _record(model: nn.Module, run: Callable[[Tensor], Any], tokens: Tensor) -> list[_Call]:
    """Every module's call that has states ``[b, s, h]`` on both sides, in the order in which they return."""
    calls: list[_Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        state_in = args[0] if args else kwargs.get("hidden_states")
        state_out = output[0] if isinstance(output, tuple | list) and output else output
        calls.append(_Call(module, _state(state_in, tokens), _state(state_out, tokens)))

    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    try:
        with torch.inference_mode():
            run(tokens)
    finally:
        for handle in hooks:
            handle.remove()
    return [
        call
        for call in calls
        if call.state_in is not None
        and call.state_out is not None
        and call.state_in.shape == call.state_out.shape
    ]


def _state(value: Any, tokens: Tensor) -> Tensor | None:
    is_state = isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == tokens.shape
    return value if is_state and value.is_floating_point() else None


def _longest_chain(model: nn.Module, calls: list[_Call]) -> tuple[str, list[_Call]]:
    """Name and calls of the longest list of modules that hand the stream on; the outermost of equal ones."""
    by_module: dict[nn.Module, list[_Call]] = {}
    for call in calls:
        by_module.setdefault(call.module, []).append(call)
    best: tuple[str, list[_Call]] = ("", [])
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList):
            continue
        # Layers behind those that the model uses (config.num_hidden_layers) do not run.
        chain = [by_module[module] for module in modules if module in by_module]
        if any(len(of_one) != 1 for of_one in chain):
            continue
        ran = [of_one[0] for of_one in chain]
        handed_on = all(_is_same(a.state_out, b.state_in) for a, b in pairwise(ran))
        if handed_on and len(ran) > len(best[1]):
            best = (name, ran)
    return best


def _final_norm(calls: list[_Call], state: Tensor) -> nn.Module | None:
    """What first changes the last layer's output, if it is a norm: no weights but a scale and a shift."""
    for call in calls:
        if _is_same(call.state_in, state) and not _is_same(call.state_out, state):
            has_matrix = any(parameter.ndim > 1 for parameter in call.module.parameters())
            return None if has_matrix else call.module
    return None


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a.to(b.device), b)


def _refuse_lookahead(states: Tensor, name: str) -> None:
    first, second = states[:, :-1].float()
    # The rows may differ by rounding, for experts take both rows' tokens together.
    if (first - second).norm() > torch.finfo(states.dtype).eps ** 0.5 * first.norm():
        raise UserError(
            f"{name} looks at tokens to come (an encoder, not a causal decoder); give a causal language model"
        )


def _lists(model: nn.Module) -> str:
    lists = [
        f"{name} ({len(module)} x {type(module[0]).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    more = f" and {len(lists) - 4} more" if len(lists) > 4 else ""
    return ", ".join(lists[:4]) + more if lists else "no ModuleList at all"
