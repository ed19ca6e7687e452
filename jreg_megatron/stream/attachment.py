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

*Unmasked tokens only* (``tokens="unmasked"``). JREG then averages as Megatron averages cross-entropy:
over the ``m`` unmasked tokens of a context-parallel rank's part of a micro-batch, and over these parts.
Each unmasked token gets ``g * lambda * w_l / (m * M)``, with ``m = 1`` and ``M = 1`` for per-token loss.
All ranks that share that part by sequence parallelism hold its whole mask, so each can count ``m``.

None of this needs a collective, and nothing in it is known only on some ranks. That the loss is scaled so is
looked at in the first step (:mod:`jreg_megatron.stream.first_step`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jreg_megatron.methods.jreg import kernels
from jreg_megatron.methods.jreg.kernels import Kernels
from jreg_megatron.methods.jreg.penalty import Strength, add_displacement_gradient, add_input_gradient
from jreg_megatron.methods.jreg.settings import JRegConfig, flag_of
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.ranks import of_every_rank
from jreg_megatron.stream.first_step import FirstStep
from jreg_megatron.stream.metrics import DisplacementMeter, JRegMetrics
from jreg_megatron.stream.residual_stream import (
    final_norm_of,
    last_stage_has_a_layer,
    num_layers,
    residual_layers,
    tap_residual_stream,
    unwrap,
)
from jreg_megatron.stream.support import (
    LAYER_NOT_SEEN,
    NO_LAYER_FOR_POST_NORM,
    refuse_fsdp,
    refuse_unsupported,
)

_HANDLE = "_jreg_handle"

_MASK_OF_OTHER_TOKENS = (
    f"{flag_of('tokens')} is 'unmasked', and the loss mask is for {{}} tokens, while this rank has {{}}; "
    "call the model with a loss mask [b, s] of a number for each of its tokens"
)


_NO_MASK = (
    f"{flag_of('tokens')} is 'unmasked', but the model was called without a loss mask on this pipeline "
    "stage; call it on every stage with loss_mask=, or leave the setting at 'all'"
)


@dataclass
class _Microbatch:
    """What is settled for a micro-batch when it goes forward, and still holds when layers are recomputed."""

    is_training: bool
    is_regularizing: bool
    is_measuring: bool
    mask: Tensor | None
    """``[s, b]``: which tokens of this rank count; None if all do."""
    token_weights: Tensor | None
    """``[s, b]``: what each counts for in the loss."""
    normed: Tensor | None = None
    """The final norm's output, kept for the last layer's input where that layer is still to be recomputed."""


class JRegHandle:
    """JREG attached to a model. Made by :func:`attach`; an observer of the residual stream."""

    def __init__(
        self,
        config: JRegConfig,
        chunks: Sequence[nn.Module],
        num_microbatches: Callable[[], int],
        iteration: Callable[[], int] | None,
        group: dist.ProcessGroup | None,
        kernels: Kernels,
        count_given: int | None,
    ) -> None:
        model_config: Any = chunks[0].config
        device = _device_of(chunks)
        self.config = config
        layers = num_layers(chunks[0])
        self.weights = config.layer_weights(layers)
        """Layer weights ``w_1..w_L``, ``[L]`` float64 on the CPU."""
        self.training_meter = DisplacementMeter(layers, device)
        self.validation_meter = DisplacementMeter(layers, device)
        self._weight_of = config.gradient_weights(layers).tolist()
        self._kernels = kernels
        self._model_config = model_config
        self._num_microbatches = num_microbatches
        self._iteration = iteration
        self._group = group
        self._chunks = chunks
        # A number that the caller gives once does not follow the batch, as what a function tells does.
        self._is_count_fixed = (
            count_given is not None and config.coeff > 0 and not model_config.calculate_per_token_loss
        )
        self._ran = 0  # micro-batches of this step, of all chunks
        self._most_ran = 0.0
        self._measured: list[int] = []  # iterations of this log interval
        self._is_seen_whole = False
        self._sequence_parallel_size, self._sequence_parallel_rank = _sequence_parallel_place(chunks[0])
        # lambda * g / M of this step: a fixed buffer, read by the backward pass (see penalty.py).
        self._coefficient = torch.zeros(1, device=device)
        self._first_step = FirstStep(chunks, config, num_microbatches, group)
        self._tap = tap_residual_stream(chunks, self, self._first_step.report)
        self._first_step.start(self._tap.end_watch)
        self._holds_weight = any(self._weight_of[number - 1] > 0 for number in self._tap.layer_numbers)
        for chunk in chunks:
            setattr(chunk, _HANDLE, self)

    # -- what the residual stream tells ------------------------------------------------------------

    def begin_microbatch(self, training: bool, loss_mask: Tensor | None) -> _Microbatch | None:
        """Settle for this micro-batch whether to regularize and to measure, how strongly, which tokens."""
        if training and not self._first_step.has_ended:
            self._first_step.begin_training_microbatch()
        if training and self._is_count_fixed:
            self._ran += 1
        if self.config.tokens == "unmasked" and loss_mask is None and not training:
            return None  # text is being generated
        if self.config.tokens == "unmasked" and (loss_mask is None or loss_mask.dim() != 2):
            other = (
                _NO_MASK if loss_mask is None else _MASK_OF_OTHER_TOKENS.format([*loss_mask.shape], "[s, b]")
            )
            self._refuse(other)
            return None
        iteration = self._iteration() if training and self._iteration is not None else None
        coeff = self.config.coeff if iteration is None else self.config.coeff_at(iteration)
        is_regularizing = training and coeff > 0 and self._holds_weight
        if is_regularizing:
            self._fill_coefficient(coeff)
        mask = token_weights = None
        if self.config.tokens == "unmasked" and loss_mask is not None:
            mask, token_weights = self._token_weights(loss_mask)
        return _Microbatch(
            is_training=training,
            is_regularizing=is_regularizing,
            is_measuring=iteration is None or self.config.measures_at(iteration),
            mask=mask,
            token_weights=token_weights,
        )

    def layer(
        self, microbatch: _Microbatch, layer_number: int, layer_input: Tensor, layer_output: Tensor
    ) -> Tensor:
        """Measure and regularize a layer; the last one only if its state counts before the norm."""
        is_last = layer_number == len(self._weight_of)
        if is_last and self.config.final_state == "post_norm":
            if microbatch.normed is None:
                return layer_output
            (normed, microbatch.normed) = microbatch.normed, None
            strength = self._strength(microbatch, layer_number, layer_output)
            return add_input_gradient(layer_output, layer_input, normed, strength)
        return self._observe(microbatch, layer_number, layer_input, layer_output)

    def final_norm(
        self, microbatch: _Microbatch, layer_number: int, layer_input: Tensor, normed: Tensor
    ) -> Tensor:
        """Measure and regularize the last layer if its state counts after the norm."""
        if self.config.final_state == "pre_norm":
            return normed
        if self._has_gradient(microbatch, layer_number) and not layer_input.requires_grad:
            microbatch.normed = normed.detach()
        return self._observe(microbatch, layer_number, layer_input, normed)

    def _observe(self, microbatch: _Microbatch, layer_number: int, h_in: Tensor, h_out: Tensor) -> Tensor:
        if microbatch.mask is not None and microbatch.mask.shape != h_out.shape[:2]:
            self._refuse(_MASK_OF_OTHER_TOKENS.format([*microbatch.mask.shape], [*h_out.shape[:2]]))
            return h_out
        meter = self.training_meter if microbatch.is_training else self.validation_meter
        on_psi = None
        if microbatch.is_measuring:
            on_psi = functools.partial(meter.add, layer_number, mask=microbatch.mask)
        # What is frozen up to here has no backward pass to do it in.
        if self._has_gradient(microbatch, layer_number) and h_out.requires_grad:
            strength = self._strength(microbatch, layer_number, h_out)
            return add_displacement_gradient(h_in, h_out, strength, on_psi)
        if on_psi is not None:
            on_psi(self._kernels.displacement(h_in, h_out))
        return h_out

    def _has_gradient(self, microbatch: _Microbatch, layer_number: int) -> bool:
        return microbatch.is_regularizing and self._weight_of[layer_number - 1] > 0

    def _strength(self, microbatch: _Microbatch, layer_number: int, state: Tensor) -> Strength:
        """``k`` of the derivation above, as coefficient (of the step), factor and weights of the tokens."""
        factor = self._weight_of[layer_number - 1]
        if microbatch.token_weights is None and not self._model_config.calculate_per_token_loss:
            factor /= state.shape[0] * state.shape[1] * self._sequence_parallel_size
        return Strength(self._kernels, self._coefficient, factor, microbatch.token_weights)

    def _refuse(self, finding: str) -> None:
        """Refuse what this rank alone may have found; in the first step on all ranks, if they meet."""
        if self._first_step.has_ended or not self._first_step.ranks_meet:
            raise UserError(finding)
        self._first_step.report(finding, is_alike=False)

    def _token_weights(self, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of the loss mask, ``[s, b]``, and what each token then counts for."""
        mask = loss_mask.transpose(0, 1).float().clone()  # the caller may use its buffer again
        weights = mask if self._model_config.calculate_per_token_loss else mask / mask.sum().clamp(min=1)
        if self._sequence_parallel_size > 1:
            rank, size = self._sequence_parallel_rank, self._sequence_parallel_size
            mask, weights = (x.chunk(size)[rank] for x in (mask, weights))
        return mask, weights

    def _fill_coefficient(self, coeff: float) -> None:
        per_token = self._model_config.calculate_per_token_loss
        self._coefficient.fill_(coeff if per_token else coeff / self._num_microbatches())
        grad_scale = self._model_config.grad_scale_func
        if grad_scale is not None:
            self._coefficient.copy_(grad_scale(self._coefficient.clone()))

    # -- what the user asks ------------------------------------------------------------------------

    @property
    def captured(self) -> str:
        """Where in this rank's part of the model the residual stream is seen, for a report."""
        return ", ".join(self._tap.places) or "no layer on this rank"

    def describe(self) -> str:
        """One line that says what was attached."""
        config, weights = self.config, self.weights.tolist()
        doing = f"lambda {config.coeff:g}" if config.coeff > 0 else "measuring only (lambda 0)"
        rule = f"alpha {config.alpha:g}" if config.weights == "softmax" else f"{config.weights} weights"
        return (
            f"> JREG attached: {doing}, {rule}, last state {config.final_state}, {len(weights)} layers, "
            f"weights of the last {min(4, len(weights))}: {' '.join(f'{w:.3g}' for w in weights[-4:])}, "
            f"{self._gradient_text()}kernels {self._kernels.name}"
        )

    def _gradient_text(self) -> str:
        if self.config.coeff == 0:
            return ""
        regularized = sum(weight > 0 for weight in self._weight_of)
        return f"gradient in {regularized} of them, " if regularized < len(self._weight_of) else ""

    def end_iteration(self, iteration: int, is_interval_end: bool = True) -> JRegMetrics | None:
        """To be called after every training iteration; at the end of a log interval it gives its metrics.

        A collective call there, and after the first iteration that measures, to make sure that every layer
        is seen; else it does nothing.

        Args:
            iteration: 1-based.
            is_interval_end: whether a log interval ends with it; the next begins anew.

        Returns:
            Metrics over the interval so far; None if it is not at its end, or nothing was measured in it.

        Raises:
            UserError: if some layer was not seen in an iteration that should have measured it, or less often
                than others.
        """
        self._settle_first_step()
        if self._is_count_fixed:
            self._check_count()
        # Told from the settings, not from what this rank saw: all ranks must come to the same.
        if self.config.measures_at(iteration):
            self._measured.append(iteration)
        if not (is_interval_end or (self._measured and not self._is_seen_whole)):
            return None
        return self._metrics(is_interval_end)

    def end_training(self) -> JRegMetrics | None:
        """To be called where training ends: metrics over the log interval that this cuts off.

        A collective call if :meth:`end_iteration` has still to give metrics for an iteration, else None.
        """
        return self._metrics(is_interval_end=True) if self._measured else None

    def _metrics(self, is_interval_end: bool) -> JRegMetrics | None:
        metrics = self.reduce_training_metrics()
        if metrics is None and self._measured:
            raise UserError(LAYER_NOT_SEEN)
        if metrics is not None:
            self._is_seen_whole = True
            metrics = replace(metrics, iterations=tuple(self._measured))
        if is_interval_end:
            self.reset_training_metrics()
        return metrics

    def reduce_training_metrics(self) -> JRegMetrics | None:
        """Metrics over the training micro-batches since :meth:`reset_training_metrics`. Collective."""
        self._settle_first_step()
        return self.training_meter.reduce(self.weights, self._group)

    def reset_training_metrics(self) -> None:
        """Begin a new interval of training metrics."""
        self.training_meter.reset()
        self._measured.clear()
        self._ran = 0
        self._first_step.forget()

    def reduce_validation_metrics(self) -> JRegMetrics | None:
        """Metrics over the micro-batches seen in evaluation mode since the last call. Collective."""
        self._settle_first_step()
        metrics = self.validation_meter.reduce(self.weights, self._group)
        self.validation_meter.reset()
        return metrics

    def _settle_first_step(self) -> None:
        if not self._first_step.has_ended:
            self._first_step.settle()

    def _check_count(self) -> None:
        """Refuse a step of more micro-batches than those whose scale was seen, if their number was given.

        A step of fewer is the last one of an epoch, where the loss is divided as before.
        """
        ran, self._ran = self._ran / len(self._chunks), 0
        if not self._most_ran:
            self._most_ran = ran if self._first_step.has_seen_scale else self._num_microbatches()
        if ran > self._most_ran:
            raise UserError(
                f"attach(..., num_microbatches=) is {self._num_microbatches()}, for steps of "
                f"{self._most_ran:g} micro-batches, and a step had {ran:g}; if the loss is divided by their "
                f"number, lambda was {self.config.coeff * ran / self._most_ran:.4g} and not "
                f"{self.config.coeff:g}: give a function that tells the number of each step, and call "
                "end_iteration once a step"
            )

    def detach(self) -> None:
        """Leave the model as it was before :func:`attach`. A second call does nothing."""
        self._first_step.end()
        self._tap.remove()
        for chunk in self._chunks:
            if getattr(chunk, _HANDLE, None) is self:
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

    A collective call, on the model or the list of its virtual pipeline chunks, before or after they are
    wrapped by ``Float16Module`` and DDP. With ``config.coeff == 0`` it only measures. The fp16 loss scale is
    taken from ``model.config.grad_scale_func``, where Megatron's loop puts it.

    Args:
        model: a ``GPTModel``, or the list of this rank's chunks.
        config: the settings.
        num_microbatches: by what the mean loss of a micro-batch is divided: the micro-batches of one
            data-parallel replica in a training step. By default Megatron-Core's calculator is asked at each.
        iteration: tells the current training iteration, 1-based. Needed when the settings depend on it.
        group: the ranks among which the model and the batch are split, for metrics; by default all.

    Returns:
        The handle, with metrics and ``detach()``.

    Raises:
        UserError: if JREG is attached already, if the model or a setting is not supported, or if
            something is missing that the settings need.

    A micro-batch is regularized if the model is in training mode (``model.train()``) and gradients are on;
    one in evaluation mode is measured as validation. A regularized layer is measured in the backward pass:
    ask for metrics between steps. What is taken for granted of layers and loss is compared with the first
    step, which raises a ``UserError`` on every rank before the schedule finishes the gradients.
    """
    given = [model] if isinstance(model, nn.Module) else list(model)
    chunks = [unwrap(chunk) for chunk in given]

    def check() -> tuple[Callable[[], int], Kernels]:
        for chunk in given:
            refuse_fsdp(chunk)
        if iteration is None and config.has_schedule:
            raise UserError(
                "the settings depend on the iteration (start, stop, warm-up or measure interval); "
                "give attach(..., iteration=) a function that tells it, 1-based"
            )
        _refuse_model(chunks, config)
        counter = _microbatch_counter(num_microbatches)
        device, model_config = _device_of(chunks), cast(Any, chunks[0]).config
        dtypes = (p.dtype for chunk in chunks for p in chunk.parameters())
        dtype = next(dtypes, model_config.params_dtype)
        if model_config.fp32_residual_connection:
            dtype = torch.float32
        return counter, kernels.choose(config.kernels, device, model_config.hidden_size, dtype)

    counter, chosen = _alike_on_every_rank(check, group)
    _refuse_other_numbers(chunks, group)
    _refuse_different_kernels(chosen, config, group)
    count_given = None if callable(num_microbatches) else num_microbatches
    return JRegHandle(config, chunks, counter, iteration, group, chosen, count_given)


def _device_of(chunks: Sequence[nn.Module]) -> torch.device:
    """Where this rank's part of the model is; of a stage that has no parameters, where it would be.

    Raises:
        UserError: if the model has still to be moved to where it is trained.
    """
    trained_on = torch.device("cpu")
    backend = dist.get_backend() if dist.is_available() and dist.is_initialized() else ""
    if "nccl" in backend or (backend == "undefined" and torch.cuda.is_available()):
        trained_on = torch.device("cuda", torch.cuda.current_device())
    device = next((p.device for chunk in chunks for p in chunk.parameters()), trained_on)
    if device.type == "meta" or (device.type == "cpu" and backend == "nccl"):
        raise UserError(
            f"the model is still on the {device.type} device; move it to the GPU before JREG is attached"
        )
    return device


def _refuse_model(chunks: Sequence[Any], config: JRegConfig) -> None:
    if not chunks:
        raise UserError("the list of model chunks is empty; attach JREG after the model is built")
    if any(hasattr(chunk, _HANDLE) for chunk in chunks):
        raise UserError("JREG is attached to this model already; call detach() on its handle first")
    for chunk in chunks:
        residual_layers(chunk)
    refuse_unsupported(chunks[0].config, config)
    config.layer_weights(num_layers(chunks[0]))
    if config.final_state == "post_norm":
        if not last_stage_has_a_layer(chunks[0]):
            raise UserError(NO_LAYER_FOR_POST_NORM)
        for chunk in chunks:
            is_last = any(layer.number == num_layers(chunk) for layer in residual_layers(chunk))
            if is_last and final_norm_of(chunk) is None:
                raise UserError(
                    f"{flag_of('final_state')} is post_norm, and the model has no final norm behind its last "
                    "layer; use pre_norm"
                )


def _alike_on_every_rank[T](check: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """``check()``; where it fails on some ranks only, it fails on all, so that none waits for the others."""
    refusal, error, result = "", None, None
    try:
        result = check()
    except kernels.DeviceFault:
        raise  # NCCL could not tell the others
    except Exception as caught:
        error = caught
        refusal = str(caught) if isinstance(caught, UserError) else f"{type(caught).__name__}: {caught}"
    refusals = of_every_rank(refusal, group)
    if error is not None and not isinstance(error, UserError):
        raise error
    if first := next(filter(None, refusals), ""):
        raise UserError(first)
    return cast(T, result)


def _refuse_other_numbers(chunks: Sequence[nn.Module], group: dist.ProcessGroup | None) -> None:
    """Refuse layers that are not numbered 1 to L: their numbers choose weights and rows of the metrics."""
    own = [layer.number for chunk in chunks for layer in residual_layers(chunk)]
    ranks = of_every_rank(own, group)
    count = num_layers(chunks[0])
    if {number for rank in ranks for number in rank} != {*range(1, count + 1)} or any(
        len(rank) > len({*rank}) for rank in ranks
    ):
        numbers = " and ".join(dict.fromkeys(" ".join(map(str, rank)) for rank in ranks if rank))
        raise UserError(
            f"the model's layers have the numbers (layer_number) {numbers}, and its config.num_layers tells "
            f"{count}; JREG needs each of 1 to {count} once"
        )


def _refuse_different_kernels(chosen: Kernels, config: JRegConfig, group: dist.ProcessGroup | None) -> None:
    ranks = of_every_rank((chosen.kind, chosen.name), group)
    (kind, name), *_ = ranks
    for at, (other_kind, other_name) in enumerate(ranks):
        if other_kind == kind:
            continue
        first, other = (n if group is None else dist.get_global_rank(group, n) for n in (0, at))
        raise UserError(
            f"{flag_of('kernels')} is {config.kernels!r}, for which rank {first} would run {name}, and "
            f"rank {other} {other_name}, which round differently and take other times; make them alike, or "
            "set it to 'torch'"
        )


def _sequence_parallel_place(chunk: Any) -> tuple[int, int]:
    """Among how many ranks sequence parallelism shares a sequence, and which of them this one is."""
    if not chunk.config.sequence_parallel:
        return 1, 0
    group = getattr(getattr(chunk, "pg_collection", None), "tp", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    return group.size(), group.rank()


def _microbatch_counter(num_microbatches: int | Callable[[], int] | None) -> Callable[[], int]:
    if callable(num_microbatches):

        def checked() -> int:
            if (told := num_microbatches()) < 1:
                raise UserError(
                    f"the function attach(..., num_microbatches=) tells {told}; it must tell >= 1"
                )
            return told

        return checked
    if num_microbatches is not None:
        if not isinstance(num_microbatches, Integral) or num_microbatches < 1:
            raise UserError(
                f"attach(..., num_microbatches={num_microbatches!r}) must be a whole number >= 1, or a "
                "function that tells it"
            )
        return lambda: num_microbatches
    from megatron.core import num_microbatches_calculator as calculator

    if calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        raise UserError(
            "the number of micro-batches is not known: Megatron's calculator is not initialized; "
            "give attach(..., num_microbatches=) the number or a function that tells it"
        )
    count: Callable[[], int] = calculator.get_num_microbatches
    return count
