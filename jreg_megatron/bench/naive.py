"""JREG as one would write it without this package, for comparison: keep all states, let autograd do it.

Forward hooks keep every layer's state. When the loss is made, the cosines between neighbours are computed
and the penalty is added to it; one backward pass goes through both. It needs every layer on one rank, and
a forward pass that runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


class NaivePenalty:
    """``coeff * sum_l weight_l * mean over tokens of (1 - cos(h_{l-1}, h_l)) / 2``, added to the loss.

    Args:
        layers: the model's layers, in order, each a Megatron ``TransformerLayer``.
        coeff: lambda.
        weights: one for each layer.
    """

    def __init__(self, layers: Sequence[nn.Module], coeff: float, weights: Sequence[float]) -> None:
        self._layers = layers
        self._coeff = coeff
        self._weights = weights
        self._states: list[Tensor] = []  # of the micro-batch that goes forward: h_0 .. h_L, [s, b, h]
        self._hooks: list[Any] = []

    def put_on(self) -> None:
        """Hook into the layers."""
        self._hooks = [self._layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)]
        self._hooks += [layer.register_forward_hook(self._keep_output) for layer in self._layers]

    def take_off(self) -> None:
        """Leave the layers as they were."""
        for hook in self._hooks:
            hook.remove()
        self._states = []

    def in_forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's forward step function with the penalty in its loss."""

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
