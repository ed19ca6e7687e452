"""The seam to Megatron-Core: every layer's residual stream, seen once per micro-batch.

Nothing here knows what is done with the states. An observer gets each layer's global number, the state
before it and the state after it, and returns the state to carry on with, so it may hang an autograd
node on it. The taps are plain attributes of built layers: no subclass, no spec, no state-dict change.

Where the states are. ``TransformerLayer`` calls ``self_attn_bda(...)(x, residual, p)`` with the layer's
input as ``residual``, and what ``mlp_bda(...)(...)`` returns is the layer's output; both in every
version from 0.14 on. Forward hooks on the layer would not do: what they return is a view, which the
pipeline refuses to free; after ``mlp_bda`` the layer itself makes the tensor viewless.

Counted once. Under full recompute a layer's forward runs twice, first without gradients; only the run
that builds the graph is reported. In evaluation the only run is reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jreg_megatron.errors import UserError

LAYER_PARTS = ("self_attn_bda", "mlp_bda", "layer_number")
"""What a Megatron layer must have for its residual stream to be seen."""


class ResidualStreamObserver(Protocol):
    """What an observer is told. States are ``[s, b, h]``; s is this rank's share of the sequence."""

    def begin_microbatch(self, training: bool) -> None:
        """A model chunk starts the forward pass of a micro-batch."""

    def layer(self, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """Layer ``layer_number`` (1-based over the whole model) has run, before any final norm.

        Returns:
            The tensor to carry on with in place of ``layer_output``.
        """

    def final_norm(self, layer_number: int, layer_input: Tensor, normed: Tensor) -> Tensor:
        """The final norm has run on the output of the last layer, whose input is ``layer_input``.

        Returns:
            The tensor to carry on with in place of ``normed``.
        """


@dataclass
class Tap:
    """An observer on a model; :meth:`remove` takes it off and leaves the model as it was."""

    layer_numbers: tuple[int, ...]
    """The layers that this rank holds, 1-based over the whole model."""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def remove(self) -> None:
        """Take the observer off. Taps that were put on later must be removed first."""
        while self._undo:
            self._undo.pop()()


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model chunk inside DDP and Float16Module wrappers."""
    while not hasattr(chunk, "decoder"):
        inner = getattr(chunk, "module", None)
        if not isinstance(inner, nn.Module):
            break
        chunk = inner
    return chunk


def tap_residual_stream(chunks: Sequence[nn.Module], observer: ResidualStreamObserver) -> Tap:
    """Put an observer on a built model.

    Args:
        chunks: this rank's model chunks (one, or one per virtual pipeline stage), wrapped or not.
        observer: what is told about every layer.

    Returns:
        The tap, to be kept and removed.

    Raises:
        UserError: if a chunk is not built as a ``GPTModel`` is; the message names what was looked for.
    """
    layers = [decoder_layers(unwrap(chunk)) for chunk in chunks]
    tap = Tap(tuple(layer.layer_number for chunk_layers in layers for layer in chunk_layers))
    for chunk, chunk_layers in zip(map(unwrap, chunks), layers, strict=True):
        _tap_chunk(chunk, chunk_layers, observer, tap._undo)
    return tap


def decoder_layers(chunk: nn.Module) -> list[Any]:
    """The transformer layers of an unwrapped model chunk, in order.

    Raises:
        UserError: if the chunk is not built as a ``GPTModel`` is; the message names what was looked for.
    """
    decoder = getattr(chunk, "decoder", None)
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise UserError(
            f"the model is a {type(chunk).__name__}, which has no decoder.layers; "
            "a Megatron-Core GPTModel is supported"
        )
    for layer in layers:
        missing = [part for part in LAYER_PARTS if not hasattr(layer, part)]
        if missing:
            raise UserError(
                f"the model's layers are {type(layer).__name__}, which has no {' and no '.join(missing)}; "
                "the TransformerLayer of Megatron-Core 0.16 or later is supported"
            )
    return list(layers)


def _tap_chunk(
    chunk: nn.Module,
    layers: Iterable[Any],
    observer: ResidualStreamObserver,
    undo: list[Callable[[], None]],
) -> None:
    undo.append(
        chunk.register_forward_pre_hook(lambda module, _: observer.begin_microbatch(module.training)).remove
    )
    last_input = _Slot()
    final_norm: nn.Module | None = chunk.decoder.final_layernorm  # type: ignore[union-attr,assignment]
    for layer in layers:
        is_last = layer.layer_number == layer.config.num_layers
        keep = last_input if is_last and final_norm is not None else None
        _tap_layer(layer, observer, keep, undo)
    if final_norm is not None:

        def after_final_norm(norm: nn.Module, _: Any, normed: Tensor) -> Tensor | None:
            if not last_input.is_filled:
                return None
            number = chunk.config.num_layers  # type: ignore[union-attr]
            return observer.final_norm(number, last_input.take(), normed)  # type: ignore[arg-type]

        undo.append(final_norm.register_forward_hook(after_final_norm).remove)


class _Slot:
    """Holds a layer's input from the start of the layer until its output is there."""

    def __init__(self) -> None:
        self._state: Tensor | None = None

    @property
    def is_filled(self) -> bool:
        return self._state is not None

    def put(self, state: Tensor) -> None:
        self._state = state

    def take(self) -> Tensor:
        state, self._state = self._state, None
        assert state is not None
        return state


def _tap_layer(
    layer: Any, observer: ResidualStreamObserver, keep_input: _Slot | None, undo: list[Callable[[], None]]
) -> None:
    slot = _Slot()

    def counts() -> bool:
        return torch.is_grad_enabled() or not layer.training

    def on_input(add: Callable[..., Tensor], x_with_bias: Any, residual: Tensor, *rest: Any) -> Tensor:
        if counts():
            slot.put(residual)
        return add(x_with_bias, residual, *rest)

    def on_output(add: Callable[..., Tensor], *operands: Any) -> Tensor:
        layer_output = add(*operands)
        if not slot.is_filled:
            return layer_output
        layer_input = slot.take()
        if keep_input is not None:
            keep_input.put(layer_input)
        return observer.layer(layer.layer_number, layer_input, layer_output)

    _wrap_bias_dropout_add(layer, "self_attn_bda", on_input, undo)
    _wrap_bias_dropout_add(layer, "mlp_bda", on_output, undo)


def _wrap_bias_dropout_add(
    layer: Any, name: str, around: Callable[..., Tensor], undo: list[Callable[[], None]]
) -> None:
    """Replace the factory ``layer.name(training, fused) -> add`` by one whose ``add`` runs in ``around``."""
    factory = getattr(layer, name)

    @functools.wraps(factory)
    def tapped(*options: Any) -> Callable[..., Tensor]:
        return functools.partial(around, factory(*options))

    setattr(layer, name, tapped)
    undo.append(functools.partial(setattr, layer, name, factory))
