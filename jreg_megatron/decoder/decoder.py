"""A causal language model as its parts: a stack of layers on a residual stream, a final norm, a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from jreg_megatron.data.texts import Text
from jreg_megatron.data.windows import Window, windows
from jreg_megatron.decoder.comparing import is_same_or_scaled
from jreg_megatron.runtime.errors import UserError


class TextTokenizer(Protocol):
    """What a model's tokenizer can do."""

    def encode(self, text: str, /) -> list[int]:
        """The ids of a text, with those special tokens that the model was trained to begin with."""

    def decode(self, ids: list[int], /) -> str:
        """The text of ids."""


class StateObserver(Protocol):
    """Is told the states of a forward pass, ``[b, s, h]`` each, in the model's type."""

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        """Layer ``number`` (1-based) has run; for the last one this is before the final norm."""

    def final_norm(self, normed: Tensor) -> None:
        """The final norm, if there is one, has run on the output of the last layer."""


@dataclass(frozen=True)
class Samples:
    """What a validation saw, ``[n, seq_length]`` each."""

    tokens: Tensor
    labels: Tensor
    """The token behind each."""
    loss_mask: Tensor
    """1.0 where a token's loss counts, else 0.0."""


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
    in_place: bool = False
    """Whether a layer writes to its input."""
    sequence_first: bool = False
    """Whether the modules have states ``[s, b, h]``, as in Megatron; an observer sees ``[b, s, h]``."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The training's arguments as text, those of JREG included, where the checkpoint holds them."""
    last_validation: Callable[[], Samples] | None = None
    """What the model saw in the training's last validation, where that can be known."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def described(self) -> dict[str, Any]:
        """What a document says of the model, for JSON."""
        return {
            **{"name": self.name, "source": self.source, "kind": self.kind, "revision": self.revision},
            **{"step": self.step, "num_layers": self.num_layers},
            **{"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)},
        }

    def windows(self, texts: Iterable[Text], max_tokens: int | None) -> Iterator[Window]:
        """Cut texts into sequences that the model can take, each text's first ``max_tokens`` if not None.

        Raises:
            UserError: for a text that cannot be read, and ids that are not the model's.
        """
        encode = None if self.tokenizer is None else self.tokenizer.encode
        return windows(texts, encode, self.vocab_size, max_tokens, self.max_length)

    @contextmanager
    def observed(self, observer: StateObserver) -> Iterator[None]:
        """Tell ``observer`` about every forward pass inside the block."""
        inputs: dict[int, Tensor] = {}
        done = 0  # layers of this run
        last: Tensor | None = None  # the last layer's output, until the final norm has run on it

        def outward(states: Tensor) -> Tensor:
            return states.transpose(0, 1) if self.sequence_first else states

        def refuse(what: str) -> UserError:
            return UserError(
                f"{what} for each text in {self.name}, so it cannot be measured; give texts of another "
                "length, or another model"
            )

        def refuse_if_cut(number: int) -> None:
            behind = done % self.num_layers
            if number != behind + 1:
                raise refuse(f"layer {behind + 1} does not run behind layer {behind}")
            if number == 1 and last is not None:
                raise refuse("the final norm does not run on the last layer's output")

        def keep(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = stream_in(args, kwargs)
            inputs[number] = state.clone() if self.in_place else state

        def tell(number: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            nonlocal done, last
            refuse_if_cut(number)
            done = number
            layer_output = stream_out(output)
            observer.layer(number, outward(inputs.pop(number)), outward(layer_output))
            if number == self.num_layers and self.final_norm is not None:
                last = layer_output.clone()  # it may be written to before the norm runs

        def tell_normed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal last
            # The norm may be another head's too: it is the final one on the last layer's output.
            if last is not None and is_same_or_scaled(last, stream_in(args, kwargs)):
                last = None
                observer.final_norm(outward(stream_out(output)))

        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers, start=1):
                hooks.enter_context(layer.register_forward_pre_hook(partial(keep, number), with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(partial(tell, number)))
            if self.final_norm is not None:
                hooks.enter_context(self.final_norm.register_forward_hook(tell_normed, with_kwargs=True))
            yield
            refuse_if_cut(1)

    @contextmanager
    def without_layer(self, number: int) -> Iterator[None]:
        """Let layer ``number`` (1-based) hand on its input in every forward pass inside the block."""
        saved: list[Tensor] = []

        def save(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            saved.append(stream_in(args, kwargs).clone())  # the layer may write to its input

        def skip(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            return with_stream(output, saved.pop())

        layer = self.layers[number - 1]
        with layer.register_forward_pre_hook(save, with_kwargs=True), layer.register_forward_hook(skip):
            yield

    @torch.inference_mode()
    def read_out(self, states: Tensor) -> Tensor:
        """Logits ``[b, s, V]`` of the states ``[b, s, h]`` behind any layer, by final norm and head."""
        assert self.head is not None, "the head's own logits are not the model's"
        if self.final_norm is None:
            return self.head(states)
        if self.sequence_first:
            return self.head(self.final_norm(states.transpose(0, 1)).transpose(0, 1))
        return self.head(stream_out(self.final_norm(states)))


def stream_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a layer's arguments: the first state, or that of the usual name."""
    named = kwargs.get("hidden_states")
    state = next((each for each in (*args, named, *kwargs.values()) if is_state(each)), None)
    assert state is not None, "a layer was not given the residual stream"
    return state


def stream_out(output: Any) -> Tensor:
    """The residual stream in what a layer returned."""
    state = output[0] if isinstance(output, tuple | list) and output else output
    assert isinstance(state, Tensor), "a layer did not return the residual stream"
    return state


def with_stream(output: Any, state: Tensor) -> Any:
    """What a layer returned, with ``state`` in place of its residual stream."""
    if not isinstance(output, tuple | list):
        return state
    made = getattr(output, "_make", type(output))  # of a named tuple
    return made((state, *output[1:]))


def is_state(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor ``[b, s, h]`` of real numbers."""
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()
