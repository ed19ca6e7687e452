"""What a method is: something that measures the residual stream of a model, adds a loss to it, or changes it.

A method has settings (:mod:`jreg_megatron.stream.settings`), which make it for a built model. It is then
told of every micro-batch and of every layer. ``jreg_megatron/methods/README.md`` shows how to write one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jreg_megatron.stream.meter import LayerValues, Meter
from jreg_megatron.stream.scaling import AddedLoss, Scaling
from jreg_megatron.stream.settings import Settings


@dataclass(frozen=True)
class Place:
    """The model that a method is made for."""

    chunks: Sequence[nn.Module]
    """This rank's model chunks, unwrapped."""
    layer_numbers: tuple[int, ...]
    """The layers that this rank holds, 1-based over the whole model."""
    num_layers: int
    """Of the whole model."""
    hidden_size: int
    dtype: torch.dtype
    """Of the states."""
    device: torch.device
    scaling: Scaling
    iteration: Callable[[], int] | None = None
    """Tells the training iteration, 1-based. Where a method is attached it may not know it yet, and raise."""


@dataclass(frozen=True)
class Call:
    """A model chunk starts the forward pass of a micro-batch."""

    training: bool
    """Whether a backward pass will follow."""
    iteration: int | None
    """The training iteration, 1-based; None in evaluation, if nobody tells it, and in a CUDA graph of whole
    iterations."""
    loss_mask: Tensor | None = None
    """What the model was called with, ``[b, s]``, if anything; often on the last pipeline stage alone."""
    padding_mask: Tensor | None = None
    """What the model was called with, ``[b, s]``, if anything: True at padding; on all pipeline stages."""
    tokens: Tensor | None = None
    """The token ids that the model was called with, ``[b, s]``; for sure only where the embedding is."""
    is_packed: bool = False
    """Whether several sequences lie one behind the other in a row."""
    in_full_graph: bool = False
    """Whether what is done now may be repeated in every later iteration by a CUDA graph of the whole one.
    Then :attr:`iteration` is None, and :meth:`Method.before_full_graph` has been called for it."""

    @property
    def token_mask(self) -> Tensor | None:
        """Which tokens count, ``[b, s]``: those that are no padding, if the model is told of it; else those
        that the loss mask keeps. None without a mask."""
        return self.loss_mask if self.padding_mask is None else self.padding_mask == 0


class Readings:
    """What a method has measured, for a log: one for a log interval or a validation."""

    def headline(self) -> dict[str, float]:
        """The values of Megatron's console line, by the names they are logged under."""
        return {}

    def per_layer(self) -> dict[str, float]:
        """The values for TensorBoard and W&B alone, by the names they are logged under."""
        return {}

    def remarks(self) -> list[str]:
        """What a reader must know, such as layers without a value."""
        return []


class Method:
    """A method on a built model. All states are ``[s, b, h]``; s is this rank's share of the sequence.

    Each function but :meth:`__init__` and :meth:`begin_microbatch` does nothing unless a subclass says what.
    """

    added_loss: AddedLoss | None = None
    """The loss that it adds, if any, to have its scale checked in the first step."""
    training_meter: Meter | None = None
    """What it has measured in training since the last log line, if it measures."""
    validation_meter: Meter | None = None
    """The same of evaluation; only for a method that has a ``training_meter``."""
    refuse: Callable[[str], None]
    """Set where it is attached. To be called with what this rank alone may have found, one line for the
    user. In the first step the ranks meet, and raise it all alike; later it is raised at once."""

    def __init__(self, settings: Any, place: Place) -> None:
        """Refuse what the model does not allow.

        Raises:
            UserError: on every rank, if it is raised on any.
        """
        self.settings: Any = settings

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Refuse what differs between ranks. A collective call."""

    def describe(self) -> str:
        """One line that says what was attached."""
        return f"> {self.settings.name} attached: {self.settings.as_flags()}"

    def use_optimizer(self, optimizer: Any) -> None:
        """The model's optimizer, Megatron's or torch's; told once, before the first step, if at all.

        Raises:
            UserError: if the method needs it and does not know its kind.
        """

    def detached(self) -> None:
        """The method is taken off the model: undo what was done beyond it, such as hooks on the optimizer."""

    # -- every run of a layer ----------------------------------------------------------------------

    def changes(self, layer_number: int) -> bool:
        """Whether :meth:`change` is to be asked for a layer; asked once, where the method is attached."""
        return type(self).change is not Method.change

    def change(self, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """A layer has run: in training, again under recompute, in evaluation, or where text is generated.

        Returns:
            The tensor that is the layer's output from now on. No view, and not written in place.
        """
        return layer_output

    # -- the run that counts -----------------------------------------------------------------------

    def begin_microbatch(self, call: Call) -> Any:
        """A model chunk starts the forward pass of a micro-batch that is trained on or evaluated.

        Returns:
            Whatever belongs to this micro-batch; it comes back with each of its layers. None to be told
            nothing more of it. If it has an attribute ``layers``, a set of numbers, the method needs no
            others; it may still be told of those that another method wants. By default the meter that
            measures this micro-batch, if there is one and the settings measure in this iteration.
        """
        if call.iteration is not None and not self.settings.measures_at(call.iteration):
            return None
        return self.training_meter if call.training else self.validation_meter

    def before_full_graph(self, iteration: int | None) -> None:
        """A training iteration is run, or replayed, that Megatron's CUDA graph of whole iterations holds.

        Here a method writes what this iteration has of its own into the buffers that the graph reads, for
        settings with :attr:`Settings.in_full_graphs`. All else is in the graph as :meth:`begin_microbatch`
        settled it without an iteration. What the graph adds to a meter counts if the settings measure now.

        Args:
            iteration: 1-based; None where nobody tells.
        """

    def parts(
        self, microbatch: Any, layer_number: int, layer_input: Tensor, middle: Tensor, added: Tensor
    ) -> None:
        """The parts of a layer, to look at, before :meth:`layer` is told of it.

        Args:
            microbatch: as in :meth:`layer`.
            layer_number: likewise.
            layer_input: likewise.
            middle: the state behind attention, or behind the first sub-layer of a hybrid model's layer; if
                there is no other, ``added``.
            added: the layer's output, before any :meth:`change`.
        """

    def layer(self, microbatch: Any, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """Layer ``layer_number`` (1-based over the whole model) has run, before any final norm.

        Under recompute it is the run that builds the graph, in the backward pass.

        Returns:
            The tensor to carry on with: ``layer_output``, or one of the same value whose backward pass adds
            to the gradient.
        """
        return layer_output

    def final_norm(self, microbatch: Any, layer_number: int, layer_input: Tensor, normed: Tensor) -> Tensor:
        """The final norm has run on the output of the last layer, whose input is ``layer_input``.

        Where the last layer is still to be recomputed, ``layer_input`` has no graph, and :meth:`layer` is
        called afterwards, in the backward pass.

        Returns:
            The tensor to carry on with in place of ``normed``.
        """
        return normed

    # -- what was measured -------------------------------------------------------------------------

    def read(self, values: LayerValues) -> Readings:
        """What the meters' values say."""
        return Readings()


@dataclass(frozen=True)
class Reading:
    """One method's part of :class:`Metrics`."""

    settings: Settings
    of: Readings
    iterations: tuple[int, ...] = ()
    """Training iterations that measured it, if the loop has told them."""

    def scalars(self, per_layer: bool | None = None) -> dict[str, float]:
        """The values by the names they are logged under; ``per_layer`` as the settings have it by default."""
        wanted = getattr(self.settings, "log_per_layer", True) if per_layer is None else per_layer
        return self.of.headline() | (self.of.per_layer() if wanted else {})

    def remarks(self, interval: Sequence[int] | None = None) -> list[str]:
        """What a reader must know; with the iterations if they are not those that ``interval`` would measure.

        Args:
            interval: the iterations that a reader expects; None for no check.
        """
        said = self.of.remarks()
        if interval is None or not self.iterations:
            return said
        if self.iterations != tuple(filter(self.settings.measures_at, interval)):
            count, first, last = len(self.iterations), self.iterations[0], self.iterations[-1]
            named = f"{count} iterations, {first} to {last}" if count > 1 else f"iteration {first}"
            said = [*said, f"measured in {named}"]
        return said

    def line(self, interval: Sequence[int] | None = None, with_values: bool = True) -> str:
        """What a console shows of it: the values of the headline and the remarks; empty if there are none."""
        values = self.of.headline() if with_values else {}
        shown = [f"{name}: {value:.6E}" for name, value in values.items()]
        return " | ".join([*shown, *self.remarks(interval)])


@dataclass(frozen=True)
class Metrics:
    """What all methods of a model have measured, equal on every rank.

    A method's own values are attributes of this too: ``metrics.jump_rate``.
    """

    readings: tuple[Reading, ...] = field(default=())
    """Of each method that has measured something, in the order in which they were attached."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for reading in self.readings:
                if hasattr(reading.of, name):
                    return getattr(reading.of, name)
        raise AttributeError(f"no attached method has measured '{name}'")

    def headline(self) -> dict[str, float]:
        """The values of Megatron's console line, by the names they are logged under."""
        return self.scalars(per_layer=False)

    def per_layer(self) -> dict[str, float]:
        """The values of each layer, by the names they are logged under."""
        return {name: value for reading in self.readings for name, value in reading.of.per_layer().items()}

    def remarks(self, interval: Sequence[int] | None = None) -> list[str]:
        """What a reader must know, of all methods; see :meth:`Reading.remarks`."""
        return [said for reading in self.readings for said in reading.remarks(interval)]

    @property
    def iterations(self) -> tuple[int, ...]:
        """Training iterations in which something was measured, if the loop has told them."""
        return tuple(sorted({at for reading in self.readings for at in reading.iterations}))

    def scalars(self, per_layer: bool | None = None) -> dict[str, float]:
        """All values by the names they are logged under.

        Args:
            per_layer: whether each layer's values are wanted; by default as the methods' settings have it.
        """
        return {
            name: value for reading in self.readings for name, value in reading.scalars(per_layer).items()
        }


def layer_name(what: str, layer_number: int, num_layers: int) -> str:
    """The name under which a layer's value is logged; equally long for all layers of a model."""
    return f"{what}_layer_{layer_number:0{max(2, len(str(num_layers)))}d}"


def by_layer(what: str, values: Tensor, first_layer: int = 1) -> dict[str, float]:
    """Values of layers ``first_layer`` to L by the names they are logged under."""
    numbers = range(first_layer, first_layer + len(values))
    return {
        layer_name(what, n, numbers[-1]): value for n, value in zip(numbers, values.tolist(), strict=True)
    }


def not_finite(what: str, values: Tensor, first_layer: int = 1) -> list[str]:
    """A remark that names the layers whose value is not a number; none if all are.

    Args:
        what: the value, as a reader knows it.
        values: ``[L]``. One NaN or Inf in a state makes the layer's mean NaN.
        first_layer: the number of the first of them.
    """
    bad = [str(at + first_layer) for at, value in enumerate(values.tolist()) if not math.isfinite(value)]
    return [f"{what} not finite in layers: {' '.join(bad)}"] if bad else []
