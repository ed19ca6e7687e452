"""The ways to run a training step: unmodified, measuring, with JREG, naive."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from jreg_megatron.bench.options import AGAIN, EVERY_STEP, INTERVAL, JREG, MEASURE, NAIVE, UNMODIFIED
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.stream.anatomy import residual_layers, unwrap
from jreg_megatron.stream.attachment import attach
from jreg_megatron.stream.tap import tap_residual_stream


class Variant:
    """A way to run a training step. This one changes nothing."""

    @contextmanager
    def on(self, iteration: int) -> Iterator[None]:
        """Run the model this way in training iteration ``iteration``, 1-based."""
        yield

    def forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """The forward step function to train with."""
        return forward_step

    def after_step(self, iteration: int) -> None:
        """The training loop's work for this way after each step."""


class Attached(Variant):
    """This package's JREG.

    It is attached once, then put on and removed, so the work of a run's start is not timed.
    """

    def __init__(self, model: list[nn.Module], config: JRegConfig, **named: Any) -> None:
        self.config = config
        self._iteration = 0
        self._chunks = [unwrap(chunk) for chunk in model]
        self.handle = attach(model, config, iteration=lambda: self._iteration, **named)
        self.handle.detach()

    @contextmanager
    def on(self, iteration: int) -> Iterator[None]:
        self._iteration = iteration
        tap = tap_residual_stream(self._chunks, self.handle)
        try:
            yield
        finally:
            tap.remove()

    def after_step(self, iteration: int) -> None:
        metrics = self.handle.end_iteration(iteration, iteration % INTERVAL == 0)
        if metrics is not None:
            metrics.scalars(self.config.log_per_layer)


class Naive(Variant):
    """JREG as one would write it without this package: keep all states, let autograd do it.

    Forward hooks keep every layer's state ``[s, b, h]``. The loss gets a second term: ``coeff * sum_l
    weight_l * mean over tokens of (1 - cos(h_{l-1}, h_l)) / 2``. One backward pass serves both terms. It
    needs every layer on one rank, and a forward pass that runs once.
    """

    def __init__(self, model: list[nn.Module], config: JRegConfig) -> None:
        self._layers: list[Any] = [layer.first for layer in residual_layers(unwrap(model[0]))]
        self._coeff = config.coeff
        self._weights = config.layer_weights(len(self._layers)).tolist()
        self._states: list[Tensor] = []  # of the micro-batch that goes forward: h_0 .. h_L

    @contextmanager
    def on(self, iteration: int) -> Iterator[None]:
        hooks = [self._layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)]
        hooks += [layer.register_forward_hook(self._keep_output) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._states = []

    def forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        def with_penalty(data_iterator: Any, model: nn.Module) -> tuple[Tensor, Any]:
            output, loss_function = forward_step(data_iterator, model)
            states, self._states = self._states, []

            def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                loss_sum, num_tokens, report = loss_function(output)
                # Megatron divides the sum by the number of tokens.
                return loss_sum + num_tokens * self._penalty(states), num_tokens, report

            return output, loss

        return with_penalty

    def _penalty(self, states: list[Tensor]) -> Tensor:
        psi = [
            (1 - cosine_similarity(before.float(), after.float(), dim=-1)).mean() / 2
            for before, after in pairwise(states)
        ]
        weighted = [weight * value for weight, value in zip(self._weights, psi, strict=True)]
        return self._coeff * torch.stack(weighted).sum()

    def _keep_input(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._states = [named["hidden_states"] if "hidden_states" in named else given[0]]

    def _keep_output(self, layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self._states.append(output[0] if isinstance(output, tuple) else output)


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
