"""A causal language model as its parts: a stack of layers on a residual stream, a final norm, a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TextTokenizer(Protocol):
    """What is asked of a model's tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with those special tokens that the model was trained to begin with."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""


class StateObserver(Protocol):
    """What is told about the states of a forward pass, ``[b, s, h]`` each, in the model's type."""

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        """Layer ``number`` (1-based) has run; for the last one this is before the final norm."""

    def final_norm(self, normed: Tensor) -> None:
        """The final norm, if there is one, has run on the output of the last layer."""


@dataclass(frozen=True)
class Decoder:
    """A causal language model, in evaluation mode, whose layers and norm can be seen and replaced."""

    name: str
    """Short, for tables and legends; a user may give another."""
    source: str
    """Where it came from: folder, file or name on the hub."""
    kind: str
    """``hugging_face``, ``gguf`` or ``megatron``."""
    revision: str | None
    """Of the hub's; None elsewhere."""
    step: int | None
    """Training iteration of the checkpoint, where it is known."""
    model: nn.Module
    layers: Sequence[nn.Module]
    """Layers 1..L. Each takes the residual stream as its first argument and returns it, or a tuple or
    list that begins with it."""
    final_norm: nn.Module | None
    """None where no norm runs on the last layer's output; there is no state behind it then."""
    head: Callable[[Tensor], Tensor] | None
    """Logits ``[b, s, V]`` of states ``[b, s, h]`` behind the final norm, or the last layer where there is
    none, all that the model does to them (such as a soft cap) included. None where they are known to differ
    from :attr:`logits`."""
    run: Callable[[Tensor], None]
    """Run token ids ``[b, s]`` through all layers and the final norm, for what an observer sees of it."""
    logits: Callable[[Tensor], Tensor]
    """Logits ``[b, s, V]`` of token ids ``[b, s]``."""
    tokenizer: TextTokenizer | None
    """None where the model comes without one."""
    end_of_text: int | None
    """Id that ends a document, where the tokenizer has one."""
    vocab_size: int
    """Every id is below it."""
    hidden_size: int
    max_length: int | None
    """Longest sequence that the model was made for, if it has such a limit."""
    device: torch.device
    dtype: torch.dtype
    sequence_first: bool = False
    """Whether the modules have states ``[s, b, h]``, as in Megatron; an observer sees ``[b, s, h]``."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @contextmanager
    def observed(self, observer: StateObserver) -> Iterator[None]:
        """Tell ``observer`` about every forward pass inside the block."""

        def outward(states: Tensor) -> Tensor:
            return states.transpose(0, 1) if self.sequence_first else states

        is_through = False  # a norm may run elsewhere too: it is the final one behind the last layer

        def tell(number: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                nonlocal is_through
                layer_output = outward(stream_out(output))
                observer.layer(number, outward(stream_in(args, kwargs)), layer_output)
                is_through = number == self.num_layers

            return hook

        def tell_normed(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            nonlocal is_through
            if is_through:
                is_through = False
                observer.final_norm(outward(output))

        hooks = [
            layer.register_forward_hook(tell(number), with_kwargs=True)
            for number, layer in enumerate(self.layers, start=1)
        ]
        if self.final_norm is not None:
            hooks.append(self.final_norm.register_forward_hook(tell_normed))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def without_layer(self, number: int) -> Iterator[None]:
        """Let layer ``number`` (1-based) hand on its input in every forward pass inside the block."""

        def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            state = stream_in(args, kwargs)
            return type(output)((state, *output[1:])) if isinstance(output, tuple | list) else state

        hook = self.layers[number - 1].register_forward_hook(skip, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @torch.inference_mode()
    def read_out(self, states: Tensor) -> Tensor:
        """Logits ``[b, s, V]`` of the states ``[b, s, h]`` behind any layer, by final norm and head."""
        assert self.head is not None, "the head's own logits are not the model's"
        if self.final_norm is None:
            return self.head(states)
        if self.sequence_first:
            return self.head(self.final_norm(states.transpose(0, 1)).transpose(0, 1))
        return self.head(self.final_norm(states))


def stream_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a layer's arguments."""
    state = args[0] if args else kwargs.get("hidden_states")
    assert isinstance(state, Tensor), "a layer was not given the residual stream"
    return state


def stream_out(output: Any) -> Tensor:
    """The residual stream in what a layer returned."""
    state = output[0] if isinstance(output, tuple | list) and output else output
    assert isinstance(state, Tensor), "a layer did not return the residual stream"
    return state
