"""What a training step is measured with: nothing, measuring, JREG, and the naive way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from jreg_megatron.bench.naive import NaivePenalty
from jreg_megatron.bench.names import AGAIN, EVERY_STEP, JREG, KINDS, MEASURE, NAIVE, UNMODIFIED
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.stream.anatomy import residual_layers, unwrap
from jreg_megatron.stream.attachment import attach
from jreg_megatron.stream.tap import tap_residual_stream

ORDINARY = KINDS[0]
LOG_INTERVAL = 10
"""Iterations of a log interval, as in the demo and the recipes; at its end the metrics are reduced."""


def kind_of_step(config: JRegConfig, iteration: int) -> str:
    """What a step with these settings does beside the ordinary."""
    does = ["measures"] * config.measures_at(iteration) + ["logs"] * (iteration % LOG_INTERVAL == 0)
    return " and ".join(does) or ORDINARY


class Variant:
    """A way to run a training step. This one changes nothing."""

    @contextmanager
    def on(self, iteration: int) -> Iterator[None]:
        """Have the model run this way in training iteration ``iteration``, 1-based."""
        yield

    def kind(self, iteration: int) -> str:
        """What sets an iteration's step apart from others of this way, as far as it takes time."""
        return ORDINARY

    def forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """The forward step function to train with."""
        return forward_step

    def after_step(self, iteration: int) -> None:
        """What the training loop does for it after each step."""


class Attached(Variant):
    """This package's JREG.

    Attached once and then put on and taken off, so that what is done once in a run is not counted.
    """

    def __init__(self, model: list[nn.Module], config: JRegConfig) -> None:
        self._iteration = 0
        self._chunks = [unwrap(chunk) for chunk in model]
        self._config = config
        self.handle = attach(model, config, iteration=lambda: self._iteration)
        self.handle.detach()

    @contextmanager
    def on(self, iteration: int) -> Iterator[None]:
        self._iteration = iteration
        tap = tap_residual_stream(self._chunks, self.handle)
        try:
            yield
        finally:
            tap.remove()

    def kind(self, iteration: int) -> str:
        return kind_of_step(self._config, iteration)

    def after_step(self, iteration: int) -> None:
        metrics = self.handle.end_iteration(iteration, iteration % LOG_INTERVAL == 0)
        if metrics is not None:
            metrics.scalars(self._config.log_per_layer)


class Naive(Variant):
    """The penalty by hooks and autograd, of a model that one rank holds."""

    def __init__(self, model: list[nn.Module], config: JRegConfig) -> None:
        layers: list[Any] = [layer.first for layer in residual_layers(unwrap(model[0]))]
        weights = config.layer_weights(len(layers)).tolist()
        self._penalty = NaivePenalty(layers, config.coeff, weights)

    @contextmanager
    def on(self, iteration: int) -> Iterator[None]:
        self._penalty.put_on()
        try:
            yield
        finally:
            self._penalty.take_off()

    def forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        return self._penalty.in_forward_step(forward_step)


def make_variants(model: list[nn.Module], config: JRegConfig, ways: Collection[str]) -> dict[str, Variant]:
    """The unmodified way and those named, on a built model. Collective; leaves the model as it is."""
    makers: dict[str, Callable[[], Variant]] = {
        UNMODIFIED: Variant,
        AGAIN: Variant,
        MEASURE: lambda: Attached(model, replace(config, coeff=0.0)),
        JREG: lambda: Attached(model, config),
        EVERY_STEP: lambda: Attached(model, replace(config, measure_interval=1)),
        NAIVE: lambda: Naive(model, config),
    }
    return {name: make() for name, make in makers.items() if name == UNMODIFIED or name in ways}
