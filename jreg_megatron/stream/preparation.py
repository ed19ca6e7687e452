"""``prepare``: methods change a model before it is wrapped and has an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.anatomy import define_layers, residual_layers, unwrap
from jreg_megatron.stream.handle import HANDLE
from jreg_megatron.stream.settings import Settings, flags_of, layer_rule

_PREPARED = "_jreg_prepared"
"""The attribute of a model chunk that holds the settings that changed it."""
_NO_CHANGE = "no method that changes it"
changed_here: set[Settings] = set()
"""Settings that changed a model in this process, by :func:`prepare` or ``attach``."""


def prepares(settings: Sequence[Settings]) -> bool:
    """Whether some method changes the model in :func:`prepare`."""
    return any(of_one.changes_modules for of_one in settings)


def prepare(chunks: list[Any], settings: Sequence[Settings]) -> list[Any]:
    """Let methods change model chunks before these are wrapped and have an optimizer; returns the chunks.

    In your own loop, call it once, before ``DistributedDataParallel``, with the settings that :func:`attach`
    gets later. Megatron's loop and Bridge call it themselves.

    Raises:
        UserError: if a chunk is prepared already, is wrapped already, or cannot be changed by a method.
    """
    define_layers([unwrap(chunk) for chunk in chunks], layer_rule(settings))
    changing = tuple(of_one for of_one in settings if of_one.changes_modules)
    for given in chunks:
        chunk = unwrap(given)
        if changing and chunk is not given:
            raise UserError(
                f"prepare was called for a model in {type(given).__name__}, which would not see the changes "
                f"of {flags_of(changing, _NO_CHANGE)}; call it before the model is wrapped"
            )
        if done := getattr(chunk, _PREPARED, ()):
            raise UserError(
                f"prepare was called twice for a model, the first time with {flags_of(done, _NO_CHANGE)}; "
                "call it once"
            )
        for of_one in changing:
            if of_one.added_parameters and any(parameter.is_meta for parameter in chunk.parameters()):
                raise UserError(
                    f"{of_one.as_flags()} adds parameters, whose initial values would be lost with "
                    "--init-model-with-meta-device; leave one of the two out"
                )
            of_one.prepare(chunk)
        _have_graphs_wait(chunk, changing)
        if any(type(of_one).make is not Settings.make for of_one in changing):
            _ask_for_attach(chunk, changing)
        setattr(chunk, _PREPARED, changing)
        changed_here.update(changing)
    return chunks


def _ask_for_attach(chunk: nn.Module, settings: Sequence[Settings]) -> None:
    """Refuse to train a prepared model without :func:`attach`: its added parameters would have no effect."""

    def look(chunk: nn.Module, _: Any) -> None:
        if chunk.training:
            hook.remove()
            if not hasattr(chunk, HANDLE):
                raise UserError(
                    f"the model was prepared for {flags_of(settings, _NO_CHANGE)}, and no method is attached "
                    "to it; call jreg_megatron.attach with the same settings before training"
                )

    hook = chunk.register_forward_pre_hook(look)


def _have_graphs_wait(chunk: nn.Module, settings: Sequence[Settings]) -> None:
    """Make a graph of a part of a layer wait for the all-gather of parameters that methods added.

    A replay calls no module. So Megatron itself waits for the parameters of the modules in a list. The
    methods' modules are added to this list.
    """
    if not any(of_one.added_parameters for of_one in settings):
        return
    for layer in {part for whole in residual_layers(chunk) for part in (whole.first, whole.last)}:
        holders = {
            name.rpartition(".")[0]
            for name, _ in layer.named_parameters()
            if any(of_one.adds(name) for of_one in settings)
        }
        if listed := getattr(layer, "_get_submodules_under_cudagraphs", None):
            added = [layer.get_submodule(name) for name in holders]
            layer._get_submodules_under_cudagraphs = functools.partial(_also, listed, added)


def _also(listed: Callable[[], list[nn.Module]], added: list[nn.Module]) -> list[nn.Module]:
    return [*listed(), *added]


def refuse_other_preparation(chunks: Sequence[nn.Module], settings: Sequence[Settings]) -> None:
    """Refuse a model that was not prepared, or was prepared for other settings than those of ``attach``."""
    wanted = {of_one for of_one in settings if of_one.changes_modules}
    for chunk in chunks:
        done = getattr(chunk, _PREPARED, ())
        if set(done) != wanted:
            raise UserError(
                f"the model was prepared for {flags_of(done, _NO_CHANGE)}, and is attached with "
                f"{flags_of([of_one for of_one in settings if of_one in wanted], _NO_CHANGE)}; call "
                "jreg_megatron.prepare(chunks, settings) with the same settings, before the model is wrapped "
                "and has an optimizer"
            )
