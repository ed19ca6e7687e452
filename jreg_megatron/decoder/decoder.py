"""A causal language model as layers on a residual stream, a final norm and a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import numpy
import torch
from torch import Tensor, nn

from jreg_megatron.data.texts import Text
from jreg_megatron.data.windows import Window
from jreg_megatron.runtime.errors import UserError

See = Callable[[int, Tensor, Tensor], None]
"""An observer. It gets a layer's number 1..L, its input and its output, ``[b, s, h]`` each, in the model's
type. If there is a final norm, it also gets L + 1, the last layer's input, and the final norm's output."""

_REACH = 32
"""Logits are clipped at this many median distances from the median of their position: about 20 standard
deviations."""
_TRIED, _EARLY, _BESIDE, _PADDING = 4096, 8, 3, 3
"""Number of tokens of the text; of its first tokens, which must not depend on later ones; of rows in a batch;
of padding tokens."""
_SHARE = 0.05
"""Share of tokens whose state may differ, because rounding may choose another expert."""


@dataclass(frozen=True)
class Decoder:
    """A causal language model in evaluation mode. Its layers and norm can be observed and replaced."""

    name: str  # short, for tables and legends; a user may give another
    source: str  # folder, file or name on the hub
    kind: str  # hugging_face, gguf or megatron
    revision: str | None  # on the hub
    step: int | None  # training iteration of the checkpoint, if known
    model: nn.Module
    layers: Sequence[nn.Module]
    """Layers 1..L. Each takes the residual stream as its first argument, and returns it or a tuple or list
    that begins with it."""
    final_norm: nn.Module | None  # None if no norm runs on the last layer's output
    head: Callable[[Tensor], Tensor] | None
    """Logits ``[b, s, V]`` of states ``[b, s, h]`` after the final norm, or after the last layer if there is
    no norm. It includes changes that the model makes to its logits, such as a soft cap. None if its result is
    known to differ from :attr:`logits`."""
    run: Callable[[Tensor], None]  # runs ids [b, s] through all layers and the final norm, for observers
    logits: Callable[[Tensor], Tensor]  # [b, s, V] of token ids [b, s]
    encode: Callable[[str], list[int]] | None
    """The tokenizer: ids of a text, with the special tokens at the start of the model's texts."""
    end_of_text: int | None  # id that ends a document, if the tokenizer has one
    vocab_size: int  # every id is below it
    hidden_size: int
    max_length: int | None  # the model's longest sequence; None without a limit
    device: torch.device
    dtype: torch.dtype
    in_place: bool = False  # whether a layer writes to its input
    sequence_first: bool = False  # whether the modules' states are [s, b, h], as in Megatron
    settings: Mapping[str, str] = field(default_factory=dict)
    """The training's arguments as text, with those of JREG, if the checkpoint holds them."""
    last_validation: Callable[[], dict[str, Tensor]] | None = None
    """The samples of the training's last validation, if they are known: ``tokens``, ``labels`` (the next
    tokens) and ``loss_mask`` (1.0 if a token's loss counts, else 0.0), ``[n, seq_length]`` each."""

    @property
    def num_layers(self) -> int:
        """The number of layers, L."""
        return len(self.layers)

    def described(self) -> dict[str, Any]:
        """The model's entries in a JSON document."""
        return {
            **{"name": self.name, "source": self.source, "kind": self.kind, "revision": self.revision},
            **{"step": self.step, "num_layers": self.num_layers},
            **{"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)},
        }

    def batch_first(self, states: Tensor) -> Tensor:
        """A view ``[b, s, h]`` of states of this model's modules, or the reverse."""
        return states.transpose(0, 1) if self.sequence_first else states

    def windows(self, texts: Iterable[Text], max_tokens: int | None) -> Iterator[Window]:
        """Cut texts, or their first ``max_tokens`` tokens, into sequences of the model's maximum length.

        A text without tokens gives no window.

        Raises:
            UserError: for a text that cannot be read, for text without a tokenizer, and for ids outside the
                model's vocabulary.
        """
        for number, text in enumerate(texts):
            content: Any = text.content
            if isinstance(content, str):
                if self.encode is None:
                    raise UserError(
                        f"{text.name} is text, but the model has no tokenizer; give token ids (.bin/.idx)"
                    )
                content = self.encode(content)
            ids = numpy.asarray(content, dtype=numpy.int64).reshape(-1)[:max_tokens]
            if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                wrong = ids[(ids < 0) | (ids >= self.vocab_size)][0]
                raise UserError(
                    f"{text.name} holds the id {wrong}, but the model has {self.vocab_size} tokens; give the "
                    "text, or ids of the model's tokenizer"
                )
            step = self.max_length or max(1, ids.size)
            for start in range(0, ids.size, step):
                yield Window(number, ids[start : start + step], start + step >= ids.size)

    @contextmanager
    def observed(self, see: See) -> Iterator[None]:
        """Pass the states of every forward pass inside the block to ``see``."""
        inputs: dict[int, Tensor] = {}
        done = 0  # layers of this run
        last: Tensor | None = None  # the last layer's output, until the final norm has run on it
        last_input: Tensor

        def refuse(what: str) -> UserError:
            return UserError(
                f"{what} for each text in {self.name}, so it cannot be measured; give texts of another "
                "length or another model"
            )

        def refuse_if_cut(number: int) -> None:
            behind = done % self.num_layers
            if number != behind + 1:
                raise refuse(f"layer {behind + 1} does not run right after layer {behind}")
            if number == 1 and last is not None:
                raise refuse("the final norm does not run on the last layer's output")

        def keep(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = stream_in(args, kwargs)
            inputs[number] = state.clone() if self.in_place else state

        def tell(number: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            nonlocal done, last, last_input
            refuse_if_cut(number)
            done = number
            layer_input, layer_output = inputs.pop(number), stream_out(output)
            see(number, self.batch_first(layer_input), self.batch_first(layer_output))
            if number == self.num_layers and self.final_norm is not None:
                # A copy, because the model may write to the output before the norm runs.
                last_input, last = layer_input, layer_output.clone()

        def tell_normed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal last
            # The norm may also run for another head. Only its run on the last layer's output counts.
            if last is not None and is_same_or_scaled(last, stream_in(args, kwargs)):
                last = None
                see(self.num_layers + 1, self.batch_first(last_input), self.batch_first(stream_out(output)))

        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers, start=1):
                hooks.enter_context(layer.register_forward_pre_hook(partial(keep, number), with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(partial(tell, number)))
            if self.final_norm is not None:
                hooks.enter_context(self.final_norm.register_forward_hook(tell_normed, with_kwargs=True))
            yield
            refuse_if_cut(1)

    @contextmanager
    def without_layer(
        self, number: int, rows: slice = slice(None), tokens: slice = slice(None)
    ) -> Iterator[None]:
        """Make layer ``number`` (from 1) return its input in every forward pass inside the block, in these
        rows and tokens of a batch."""
        saved: list[Tensor] = []
        part = (tokens, rows) if self.sequence_first else (rows, tokens)

        def save(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            saved.append(stream_in(args, kwargs).clone())  # the layer may write to its input

        def skip(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            state = stream_out(output).clone()
            state[part] = saved.pop()[part]
            return with_stream(output, state)

        layer = self.layers[number - 1]
        with layer.register_forward_pre_hook(save, with_kwargs=True), layer.register_forward_hook(skip):
            yield

    @torch.inference_mode()
    def last_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's output and the head's input for token ids ``[b, s]``, ``[b, s, h]`` each."""
        seen: dict[int, Tensor] = {}

        def see(number: int, _: Tensor, state: Tensor) -> None:
            if number >= self.num_layers:
                seen[number] = state.clone()  # the model may write to it later

        with self.observed(see):
            self.run(tokens)
        return seen[self.num_layers], seen[max(seen)]

    @torch.inference_mode()
    def read_out(self, states: Tensor) -> Tensor:
        """Logits ``[b, s, V]`` of states ``[b, s, h]`` after any layer: the head of their final norm."""
        assert self.head is not None, "the head's own logits are not the model's"
        if self.final_norm is None:
            return self.head(states)
        return self.head(self.batch_first(stream_out(self.final_norm(self.batch_first(states)))))


def refuse_dependence(decoder: Decoder, ids: Any, batch_size: int) -> None:
    """Run a text alone, and in a batch with padding, as a measurement does.

    Raises:
        UserError: if a token's state depends on the other rows of a batch, or on later tokens.
    """
    row = torch.as_tensor(ids)[None, :_TRIED]
    length = row.shape[1]
    early = min(_EARLY, length - 1)
    other = torch.cat((row[:, :early], (row[:, early:] + 1) % decoder.vocab_size), dim=1)
    rows = torch.cat((row, *[other] * max(1, min(_BESIDE, batch_size) - 1)))
    if batch_size > 1:
        room = _PADDING if decoder.max_length is None else min(_PADDING, decoder.max_length - length)
        rows = torch.nn.functional.pad(rows, (0, room))
    alone = decoder.last_states(row)[0][0]
    first, second = torch.cat([decoder.last_states(some)[0] for some in torch.split(rows, batch_size)])[:2]
    eps = max(torch.finfo(dtype).eps for dtype in (decoder.dtype, alone.dtype))

    def is_other(a: Tensor, b: Tensor) -> bool:
        off = (a - b).float().norm(dim=-1) > 2 * eps**0.5 * a.float().norm(dim=-1)
        return int(off.sum()) > _SHARE * len(off)

    if is_other(alone, first[:length]):
        where = "in a batch with padding than alone; give --batch-size 1"
        again = "in each run; give another model"
        raise UserError(f"{decoder.name} gives a text different states {where if batch_size > 1 else again}")
    if is_other(alone[:early], second[:early]):
        raise UserError(
            f"{decoder.name} looks at later tokens in a longer text; give a causal language model"
        )


def stream_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream in a layer's arguments: the first state, else ``hidden_states``, else any other."""
    named = kwargs.get("hidden_states")
    state = next((each for each in (*args, named, *kwargs.values()) if is_state(each)), None)
    assert state is not None, "a layer was not given the residual stream"
    return state


def stream_out(output: Any) -> Tensor:
    """The residual stream in a layer's output."""
    state = output[0] if isinstance(output, tuple | list) and output else output
    assert isinstance(state, Tensor), "a layer did not return the residual stream"
    return state


def with_stream(output: Any, state: Tensor) -> Any:
    """A layer's output with ``state`` in place of its residual stream."""
    if not isinstance(output, tuple | list):
        return state
    made = getattr(output, "_make", type(output))  # of a named tuple
    return made((state, *output[1:]))


def is_state(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor ``[b, s, h]`` of real numbers."""
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def comparable(logits: Tensor, *others: Tensor) -> list[Tensor]:
    """Logits ``[..., V]`` whose differences can be compared, in fp32 or wider.

    Each position's median is subtracted, because a common offset has no meaning. Masked ids (-Inf or the
    type's smallest number) and ids with a large bias are clipped to the range of the first argument's other
    logits. NaN counts as 0; another check refuses NaN in states.
    """
    centred = []
    for each in (logits, *others):
        wide = each.to(torch.promote_types(each.dtype, torch.float32))
        masked = ~wide.isfinite() | (wide.abs() >= torch.finfo(each.dtype).max / 2)
        median = wide.masked_fill(masked, torch.nan).nanmedian(dim=-1, keepdim=True).values
        centred.append((wide - median, masked))
    away, masked = centred[0]
    reach = _REACH * away.masked_fill(masked, torch.nan).abs().nanmedian().nan_to_num(0.0)
    return [away.clamp(-reach, reach).nan_to_num(0.0) for away, _ in centred]


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two states are equal. One may be rounded to the other's type or copied to its device."""
    if a.shape != b.shape:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()  # another check refuses values that are not finite
    return torch.equal(a.to(b), b) or torch.equal(a, b.to(a))


def is_same_or_scaled(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` is ``a`` times a positive factor, which changes neither cosines nor a norm's output."""
    if is_same(a, b):
        return True
    if a.shape != b.shape:
        return False
    eps = max(torch.finfo(each.dtype).eps for each in (a, b))
    a, b = (each.nan_to_num().to(b.device, torch.promote_types(each.dtype, torch.float32)) for each in (a, b))
    factor = float((a * b).sum() / a.square().sum())
    is_scale = factor > 0 and abs(factor - 1) > 2 * eps
    return is_scale and bool((b - factor * a).norm() <= eps * b.norm())
