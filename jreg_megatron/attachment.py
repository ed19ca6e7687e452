"""``attach``: JREG on a built Megatron model.

What has to come out, at every layout, is the gradient of

    mean over tokens of (CE + lambda * sum_l w_l * Psi_l).

Megatron scales the loss on its way to the parameters, so what is added to a layer's states has to carry
the same factors. Let ``n`` be the tokens of the micro-batch that this rank holds, ``S`` the number of
ranks that share a sequence among them by sequence parallelism (the tensor-parallel size with
``sequence_parallel``, else 1), ``C`` the context-parallel size, ``D`` the data-parallel size, ``M`` the
number of micro-batches, and ``g`` the loss scale of fp16 training (1 otherwise), which the optimizer
takes out again.

*Averaged loss (the default).* The schedule scales by ``g / M``; DDP averages over ``D * C`` ranks. A
micro-batch of a data-parallel replica has ``n * S * C`` tokens and the whole batch ``n * S * C * D * M``.
A rank that adds ``k * (sum of Psi over its tokens)`` contributes ``k / (D * C)`` of that sum, and this
must be ``g * lambda * w_l / (n * S * C * D * M)``. Hence

    k = g * lambda * w_l / (n * S * M);

the context-parallel size cancels. Without sequence parallelism every tensor-parallel rank holds all
tokens and, like cross-entropy's, its gradient is already the whole one: ``S = 1``, no averaging.

*``calculate_per_token_loss``.* DDP sums, and ``finalize_model_grads`` divides by the number of tokens
that the loss mask lets through in the whole batch. So ``k = g * lambda * w_l``: every token counts,
masked ones too, and where a mask is used the effective lambda is larger by all/unmasked.

None of this needs a collective, and nothing in it is known only on some ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jreg_megatron.errors import UserError
from jreg_megatron.metrics import DisplacementMeter, JRegMetrics
from jreg_megatron.penalty import add_displacement_gradient, measure_displacement
from jreg_megatron.residual_stream import decoder_layers, tap_residual_stream, unwrap
from jreg_megatron.settings import JRegConfig

_HANDLE = "_jreg_handle"


class JRegHandle:
    """JREG attached to a model. Made by :func:`attach`; an observer of the residual stream."""

    def __init__(
        self,
        config: JRegConfig,
        chunks: Sequence[nn.Module],
        num_microbatches: Callable[[], int],
        iteration: Callable[[], int] | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        model_config: Any = chunks[0].config
        device = next((p.device for chunk in chunks for p in chunk.parameters()), torch.device("cpu"))
        self.config = config
        self.weights = config.layer_weights(model_config.num_layers)
        """Layer weights ``w_1..w_L``, ``[L]`` float64 on the CPU."""
        self.training_meter = DisplacementMeter(model_config.num_layers, device)
        self.validation_meter = DisplacementMeter(model_config.num_layers, device)
        self._weight_of = self.weights.tolist()
        self._model_config = model_config
        self._num_microbatches = num_microbatches
        self._iteration = iteration
        self._group = group
        self._chunks = chunks
        sharing_ranks = model_config.tensor_model_parallel_size if model_config.sequence_parallel else 1
        self._sequence_parallel_size: int = sharing_ranks
        # lambda * g / M of this step: a fixed buffer, read by the backward pass (see penalty.py).
        self._coefficient = torch.zeros(1, device=device)
        self._is_regularizing = False
        self._is_measuring = True
        self._is_training = True
        self._tap = tap_residual_stream(chunks, self)
        for chunk in chunks:
            setattr(chunk, _HANDLE, self)

    # -- what the residual stream tells ------------------------------------------------------------

    def begin_microbatch(self, training: bool) -> None:
        """Settle for this micro-batch whether to regularize and to measure, and how strongly."""
        self._is_training = training
        if not training:
            self._is_regularizing, self._is_measuring = False, True
            return
        iteration = self._iteration() if self._iteration is not None else None
        coeff = self.config.coeff if iteration is None else self.config.coeff_at(iteration)
        self._is_measuring = iteration is None or self.config.measures_at(iteration)
        self._is_regularizing = coeff > 0
        if self._is_regularizing:
            self._fill_coefficient(coeff)

    def layer(self, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """Measure and regularize a layer; the last one only if its state counts before the norm."""
        is_last = layer_number == len(self._weight_of)
        if is_last and self.config.final_state == "post_norm":
            return layer_output
        return self._observe(layer_number, layer_input, layer_output)

    def final_norm(self, layer_number: int, layer_input: Tensor, normed: Tensor) -> Tensor:
        """Measure and regularize the last layer if its state counts after the norm."""
        if self.config.final_state == "pre_norm":
            return normed
        return self._observe(layer_number, layer_input, normed)

    def _observe(self, layer_number: int, h_in: Tensor, h_out: Tensor) -> Tensor:
        weight = self._weight_of[layer_number - 1]
        num_tokens = h_out.shape[0] * h_out.shape[1]
        if self._is_regularizing and weight > 0:
            factor = weight
            if not self._model_config.calculate_per_token_loss:
                factor /= num_tokens * self._sequence_parallel_size
            h_out, psi_sum = add_displacement_gradient(h_in, h_out, self._coefficient, factor)
        elif self._is_measuring:
            psi_sum = measure_displacement(h_in, h_out)
        if self._is_measuring:
            meter = self.training_meter if self._is_training else self.validation_meter
            meter.add(layer_number, psi_sum, num_tokens)
        return h_out

    def _fill_coefficient(self, coeff: float) -> None:
        per_token = self._model_config.calculate_per_token_loss
        self._coefficient.fill_(coeff if per_token else coeff / self._num_microbatches())
        grad_scale = self._model_config.grad_scale_func
        if grad_scale is not None:
            self._coefficient.copy_(grad_scale(self._coefficient.clone()))

    # -- what the user asks ------------------------------------------------------------------------

    def reduce_training_metrics(self) -> JRegMetrics | None:
        """Metrics over the training micro-batches since :meth:`reset_training_metrics`. Collective."""
        return self.training_meter.reduce(self.weights, self._group)

    def reset_training_metrics(self) -> None:
        """Begin a new interval of training metrics."""
        self.training_meter.reset()

    def reduce_validation_metrics(self) -> JRegMetrics | None:
        """Metrics over the micro-batches seen in evaluation mode since the last call. Collective."""
        metrics = self.validation_meter.reduce(self.weights, self._group)
        self.validation_meter.reset()
        return metrics

    def detach(self) -> None:
        """Leave the model as it was before :func:`attach`."""
        self._tap.remove()
        for chunk in self._chunks:
            delattr(chunk, _HANDLE)


def attach(
    model: nn.Module | Sequence[nn.Module],
    config: JRegConfig,
    *,
    num_microbatches: int | Callable[[], int] | None = None,
    iteration: Callable[[], int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> JRegHandle:
    """Attach JREG to a built Megatron-Core model. Changes no forward value and no state dict.

    Call it on every rank, on the model or the list of its virtual pipeline chunks, before or after they
    are wrapped by ``Float16Module`` and DDP. With ``config.coeff == 0`` it only measures. The fp16 loss
    scale is taken from ``model.config.grad_scale_func``, where Megatron's loop puts it.

    Args:
        model: a ``GPTModel``, or the list of this rank's chunks.
        config: the settings.
        num_microbatches: micro-batches per training step of one data-parallel replica; by default
            Megatron-Core's calculator is asked at each of them.
        iteration: tells the current training iteration, 1-based. Needed when the settings depend on it.
        group: the ranks among which the model and the batch are split, for metrics; by default all.

    Returns:
        The handle, with metrics and ``detach()``.

    Raises:
        UserError: if JREG is attached already, if the model or a setting is not supported, or if
            something is missing that the settings need.
    """
    chunks = [unwrap(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]
    if not chunks:
        raise UserError("the list of model chunks is empty; attach JREG after the model is built")
    if any(hasattr(chunk, _HANDLE) for chunk in chunks):
        raise UserError("JREG is attached to this model already; call detach() on its handle first")
    if iteration is None and config.has_schedule:
        raise UserError(
            "the settings depend on the iteration (start, stop, warm-up or measure interval); "
            "give attach(..., iteration=) a function that tells it, 1-based"
        )
    for chunk in chunks:
        decoder_layers(chunk)
    refuse_unsupported(chunks[0].config, config)
    return JRegHandle(config, chunks, _microbatch_counter(num_microbatches), iteration, group)


def refuse_unsupported(model_config: Any, config: JRegConfig) -> None:
    """Refuse by name what would give wrong numbers, or has not been shown to give right ones.

    Args:
        model_config: Megatron's ``TransformerConfig``, or parsed arguments, which use the same names.
        config: the settings.

    Raises:
        UserError: naming the setting that JREG does not support, and what to do.
    """

    def value(name: str) -> Any:
        return getattr(model_config, name, None)

    unsupported = {
        "overlap_moe_expert_parallel_comm": value("overlap_moe_expert_parallel_comm"),
        "enable_hyper_connections": value("enable_hyper_connections"),
        "fine_grained_activation_offloading": value("fine_grained_activation_offloading"),
        "use_megatron_fsdp": value("use_megatron_fsdp"),
        "use_torch_fsdp2": value("use_torch_fsdp2"),
        # A graph replays the choice of whether to regularize and to measure that it was captured with.
        f"cuda_graph_impl '{value('cuda_graph_impl')}'": value("cuda_graph_impl") not in (None, "none"),
        "recompute_granularity 'full' together with final_state 'post_norm'": (
            value("recompute_granularity") == "full" and config.final_state == "post_norm"
        ),
        # The final norm may then be on another stage than the last layer's input.
        "a pipeline layout of your own together with final_state 'post_norm'": (
            config.final_state == "post_norm"
            and bool(value("pipeline_model_parallel_layout") or value("account_for_loss_in_pipeline_split"))
        ),
    }
    for name, is_used in unsupported.items():
        if is_used:
            raise UserError(f"JREG does not support {name} yet; turn it off")


def _microbatch_counter(num_microbatches: int | Callable[[], int] | None) -> Callable[[], int]:
    if isinstance(num_microbatches, int):
        return lambda: num_microbatches
    if num_microbatches is not None:
        return num_microbatches
    from megatron.core import num_microbatches_calculator as calculator

    if calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        raise UserError(
            "the number of micro-batches is not known: Megatron's calculator is not initialized; "
            "give attach(..., num_microbatches=) the number or a function that tells it"
        )
    count: Callable[[], int] = calculator.get_num_microbatches
    return count
