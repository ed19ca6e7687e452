"""A method: it measures the residual stream of a model, adds a loss to it, or changes it.

A method's settings (:mod:`jreg_megatron.stream.settings`) make it for a built model. Then its functions are
called for every micro-batch and every layer. ``jreg_megatron/methods/README.md`` shows how to write a method.
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
    """Number of layers of the whole model."""
    hidden_size: int
    dtype: torch.dtype
    """Type of the states."""
    device: torch.device
    scaling: Scaling
    iteration: Callable[[], int] | None = None
    """Returns the training iteration, 1-based. It may raise while a method is being attached: some loops know
    the iteration only from their first step on."""


@dataclass(frozen=True)
class Call:
    """A model chunk starts the forward pass of a micro-batch."""

    training: bool
    """Whether a backward pass will follow."""
    iteration: int | None
    """The training iteration, 1-based. None in evaluation, in a CUDA graph of whole iterations, and if
    ``attach`` got no ``iteration``."""
    loss_mask: Tensor | None = None
    """The model's argument ``[b, s]``, or None. Often only the last pipeline stage has it."""
    padding_mask: Tensor | None = None
    """The model's argument ``[b, s]``, True at padding, or None. It is the same on all pipeline stages."""
    tokens: Tensor | None = None
    """The model's token ids ``[b, s]``. Only the stage with the embedding is sure to have them."""
    is_packed: bool = False
    """Whether a row holds several sequences, one after the other."""
    in_full_graph: bool = False
    """Whether a CUDA graph of the whole iteration may record this pass and repeat it in later iterations.
    Then :attr:`iteration` is None, and :meth:`Method.before_full_graph` was called for the iteration."""

    @property
    def token_mask(self) -> Tensor | None:
        """The tokens that count, ``[b, s]``: with a padding mask the tokens that are not padding, else those
        that the loss mask keeps. None without a mask."""
        return self.loss_mask if self.padding_mask is None else self.padding_mask == 0


class Readings:
    """A method's measurements in a log interval or a validation."""

    def headline(self) -> dict[str, float]:
        """The values for Megatron's console line, by their logged names."""
        return {}

    def per_layer(self) -> dict[str, float]:
        """The values for TensorBoard and W&B only, by their logged names."""
        return {}

    def remarks(self) -> list[str]:
        """Notes for the reader, such as a list of layers without a value."""
        return []


class Method:
    """A method on a built model. All states are ``[s, b, h]``; s is this rank's share of the sequence.

    Except for :meth:`__init__` and :meth:`begin_microbatch`, each function does nothing unless a subclass
    overrides it.
    """

    added_loss: AddedLoss | None = None
    """The loss that the method adds, if any. The first step checks its scale."""
    training_meter: Meter | None = None
    """Measurements in training since the last log line; None for a method that does not measure."""
    validation_meter: Meter | None = None
    """The same for evaluation. Then the method needs a ``training_meter`` too."""
    refuse: Callable[[str], None]
    """Set by ``attach``. Call it with one line for the user about a mistake that only this rank may see. In
    the first step all ranks meet and all raise it; later this rank raises it at once."""

    def __init__(self, settings: Any, place: Place) -> None:
        """Refuse a model that the method does not support.

        Raises:
            UserError: if any rank raises it, ``attach`` raises it on every rank.
        """
        self.settings: Any = settings

    def agree(self, group: dist.ProcessGroup | None) -> None:
        """Refuse differences between ranks. Collective."""

    def describe(self) -> str:
        """One line that says what was attached."""
        return f"> {self.settings.name} attached: {self.settings.as_flags()}"

    def use_optimizer(self, optimizer: Any) -> None:
        """Called at most once, before the first step, with the model's optimizer, Megatron's or torch's.

        Raises:
            UserError: if the method needs an optimizer and does not support this kind.
        """

    def detached(self) -> None:
        """The method is removed from the model. Undo its changes outside the model, such as hooks on the
        optimizer."""

    # -- every run of a layer ----------------------------------------------------------------------

    def changes(self, layer_number: int) -> bool:
        """Whether to call :meth:`change` for a layer. Called once, when the method is attached."""
        return type(self).change is not Method.change

    def change(self, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """A layer has run: in training, again under recompute, in evaluation, or in text generation.

        Returns:
            The layer's new output: not a view, and not ``layer_output`` changed in place.
        """
        return layer_output

    # -- the run that counts -----------------------------------------------------------------------

    def begin_microbatch(self, call: Call) -> Any:
        """A model chunk starts the forward pass of a micro-batch that is trained on or evaluated.

        Returns:
            Any object for this micro-batch. :meth:`layer` and the others get it as ``microbatch``. With None,
            they are not called for this micro-batch. If the object has an attribute ``layers``, a set of
            layer numbers, the method needs only these; it may still be called for layers that another method
            needs. By default the meter for this micro-batch, or None if the iteration does not measure.
        """
        if call.iteration is not None and not self.settings.measures_at(call.iteration):
            return None
        return self.training_meter if call.training else self.validation_meter

    def before_full_graph(self, iteration: int | None) -> None:
        """Called before each training iteration, run or replayed, with Megatron's CUDA graph of iterations.

        For settings with :attr:`Settings.in_full_graphs`. Write values that depend on the iteration into
        buffers that the graph reads. Everything else is in the graph as :meth:`begin_microbatch` returned it
        for ``iteration`` None. The graph's additions to a meter count only if the settings measure in this
        iteration.

        Args:
            iteration: 1-based; None if ``attach`` got no ``iteration``.
        """

    def parts(
        self, microbatch: Any, layer_number: int, layer_input: Tensor, middle: Tensor, added: Tensor
    ) -> None:
        """The states within a layer, read-only. Called before :meth:`layer`.

        Args:
            microbatch: as in :meth:`layer`.
            layer_number: as there.
            layer_input: as there.
            middle: the state after attention, or after the first sub-layer of a hybrid model's layer. If the
                layer has only one sub-layer, the same as ``added``.
            added: the layer's output, before any :meth:`change`.
        """

    def layer(self, microbatch: Any, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """Layer ``layer_number`` (1-based over the whole model) has run, before any final norm.

        Under recompute this is the second run, which builds the graph in the backward pass.

        Returns:
            The tensor to continue with: ``layer_output``, or a tensor with the same values whose backward
            pass adds to the gradient.
        """
        return layer_output

    def final_norm(self, microbatch: Any, layer_number: int, layer_input: Tensor, normed: Tensor) -> Tensor:
        """The final norm has run on the output of the last layer, whose input is ``layer_input``.

        If the last layer will be recomputed, ``layer_input`` has no graph, and :meth:`layer` is called later,
        in the backward pass.

        Returns:
            The tensor to continue with instead of ``normed``.
        """
        return normed

    # -- what was measured -------------------------------------------------------------------------

    def read(self, values: LayerValues) -> Readings:
        """Turn a meter's values into the method's readings."""
        return Readings()


@dataclass(frozen=True)
class Reading:
    """One method's part of :class:`Metrics`."""

    settings: Settings
    of: Readings
    iterations: tuple[int, ...] = ()
    """The training iterations that measured it; empty if the loop does not call ``end_iteration``."""

    def scalars(self, per_layer: bool | None = None) -> dict[str, float]:
        """The values by their logged names.

        Args:
            per_layer: whether to add each layer's values; by default the settings decide.
        """
        wanted = getattr(self.settings, "log_per_layer", True) if per_layer is None else per_layer
        return self.of.headline() | (self.of.per_layer() if wanted else {})

    def remarks(self, interval: Sequence[int] | None = None) -> list[str]:
        """Notes for the reader. They name the measured iterations if these are not the expected ones.

        Args:
            interval: the log interval's iterations; None for no check.
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
        """The console's text: the headline's values and the remarks; empty if there are none."""
        values = self.of.headline() if with_values else {}
        shown = [f"{name}: {value:.6E}" for name, value in values.items()]
        return " | ".join([*shown, *self.remarks(interval)])


@dataclass(frozen=True)
class Metrics:
    """The measurements of all methods of a model, equal on every rank.

    A method's own values are attributes too, by their names.
    """

    readings: tuple[Reading, ...] = field(default=())
    """One for each method that measured something, in the order of ``attach``."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for reading in self.readings:
                if hasattr(reading.of, name):
                    return getattr(reading.of, name)
        raise AttributeError(f"no attached method has measured '{name}'")

    def headline(self) -> dict[str, float]:
        """The values for Megatron's console line, by their logged names."""
        return self.scalars(per_layer=False)

    def per_layer(self) -> dict[str, float]:
        """The values of each layer, by their logged names."""
        return {name: value for reading in self.readings for name, value in reading.of.per_layer().items()}

    def remarks(self, interval: Sequence[int] | None = None) -> list[str]:
        """The remarks of all methods; see :meth:`Reading.remarks`."""
        return [said for reading in self.readings for said in reading.remarks(interval)]

    @property
    def iterations(self) -> tuple[int, ...]:
        """The training iterations in which something was measured."""
        return tuple(sorted({at for reading in self.readings for at in reading.iterations}))

    def scalars(self, per_layer: bool | None = None) -> dict[str, float]:
        """All values by their logged names.

        Args:
            per_layer: whether to add each layer's values; by default each method's settings decide.
        """
        return {
            name: value for reading in self.readings for name, value in reading.scalars(per_layer).items()
        }


def layer_name(what: str, layer_number: int, num_layers: int) -> str:
    """The logged name of a layer's value. The names of all layers of a model have the same length."""
    return f"{what}_layer_{layer_number:0{max(2, len(str(num_layers)))}d}"


def by_layer(what: str, values: Tensor, first_layer: int = 1) -> dict[str, float]:
    """Values of layers ``first_layer`` to L by their logged names."""
    numbers = range(first_layer, first_layer + len(values))
    return {
        layer_name(what, n, numbers[-1]): value for n, value in zip(numbers, values.tolist(), strict=True)
    }


def not_finite(what: str, values: Tensor, first_layer: int = 1) -> list[str]:
    """A remark that names the layers whose value is not finite; empty if all values are finite.

    Args:
        what: the value's name for the reader.
        values: ``[L]``. One NaN or Inf in a state makes the layer's mean NaN.
        first_layer: the number of the first value's layer.
    """
    bad = [str(at + first_layer) for at, value in enumerate(values.tolist()) if not math.isfinite(value)]
    return [f"{what} not finite in layers: {' '.join(bad)}"] if bad else []
