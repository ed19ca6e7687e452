"""``attach``: methods on a built Megatron model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.ranks import alike_on_every_rank, first_that_differs, of_every_rank
from jreg_megatron.stream.anatomy import define_layers, num_layers, residual_layers, unwrap
from jreg_megatron.stream.handle import HANDLE, Handle
from jreg_megatron.stream.method import Method, Place
from jreg_megatron.stream.preparation import changed_here, refuse_other_preparation
from jreg_megatron.stream.scaling import Scaling
from jreg_megatron.stream.settings import Settings, layer_rule
from jreg_megatron.stream.support import refuse_built, refuse_fsdp, refuse_unsupported


def attach(
    model: nn.Module | Sequence[nn.Module],
    *settings: Settings,
    num_microbatches: int | Callable[[], int] | None = None,
    iteration: Callable[[], int] | None = None,
    group: dist.ProcessGroup | None = None,
    optimizer: Any = None,
) -> Handle:
    """Attach methods to a built Megatron-Core model. State dicts do not change. Collective.

    Call it before or after the model is wrapped in ``Float16Module`` and DDP. It reads the fp16 loss scale
    from ``model.config.grad_scale_func``, which Megatron's loop sets.

    Args:
        model: a ``GPTModel`` or ``HybridModel``, or the list of this rank's virtual pipeline chunks.
        settings: one per method, as in ``attach(model, A(...), B(...))``. At most one of each kind.
        num_microbatches: the divisor of a micro-batch's mean loss: the number of micro-batches of one
            data-parallel replica in a training step. By default Megatron-Core's calculator gives it in each.
        iteration: returns the current training iteration, 1-based. Needed if the settings depend on it.
        group: the ranks among which the model and the batch are split, for metrics; by default all.
        optimizer: the model's optimizer, Megatron's or torch's, for methods that need it. It can also be
            given later, with :meth:`Handle.use_optimizer`.

    Returns:
        The handle, with metrics and ``detach()``.

    Raises:
        UserError: if methods are attached already, if the model or a setting is not supported, or if the
            settings need an argument that is missing.

    A micro-batch gets added gradients if the model is in training mode (``model.train()``) and gradients are
    on. A micro-batch in evaluation mode is measured as validation, except in text generation (with
    Megatron's ``inference_context``). A layer with an added gradient is measured in the backward pass, so
    ask for metrics between steps. The first step checks the assumptions about layers and loss. If one is
    wrong, every rank raises a ``UserError`` before the schedule finishes the gradients.
    """
    given = [model] if isinstance(model, nn.Module) else list(model)
    chunks = [unwrap(chunk) for chunk in given]

    def check() -> tuple[Callable[[], int], list[Method]]:
        for outer, chunk in zip(given, chunks, strict=True):
            refuse_fsdp(outer, getattr(chunk, "config", None))
        refuse_settings(settings, knows_iteration=iteration is not None)
        _refuse_model(chunks, settings)
        counter = _microbatch_counter(num_microbatches)
        place = place_of(chunks, counter, iteration)
        return counter, [of_one.make(place) for of_one in settings]

    counter, methods = alike_on_every_rank(check, group)
    _refuse_other_settings(settings, group)
    _refuse_other_numbers(chunks, group)
    for method in methods:
        method.agree(group)
    count_given = None if callable(num_microbatches) else num_microbatches
    handle = Handle(methods, chunks, counter, iteration, group, count_given)
    changed_here.update(of_one for of_one in settings if of_one.changes_model)
    if optimizer is not None:
        try:
            handle.use_optimizer(optimizer)
        except UserError:
            handle.detach()
            raise
    return handle


def _refuse_other_settings(settings: Sequence[Settings], group: dist.ProcessGroup | None) -> None:
    """Refuse settings that differ between ranks: each rank would train another model, or the run would hang.
    Collective."""
    ranks = of_every_rank([f"{type(of_one).__name__}: {of_one.as_flags()}" for of_one in settings], group)
    if found := first_that_differs(ranks, group):
        at, first, other = found
        raise UserError(
            f"rank {first} has the settings {'; '.join(ranks[0])}, and rank {other} has "
            f"{'; '.join(ranks[at])}; give all ranks the same, in the same order"
        )


def refuse_settings(settings: Sequence[Settings], knows_iteration: bool) -> None:
    """Refuse settings that cannot be attached together.

    Args:
        settings: as :func:`attach` gets them.
        knows_iteration: whether the training iteration is known.

    Raises:
        UserError: naming the settings and what to do.
    """
    if not settings:
        raise UserError("attach() was given no settings; give it those of a method, as in attach(model, A())")
    kinds = [type(of_one) for of_one in settings]
    for of_one in settings:
        if not isinstance(of_one, Settings):
            raise UserError(
                f"attach() was given {of_one!r:.60} as settings; give it the settings of each method as a "
                "separate argument, such as attach(model, A(...), B(...))"
            )
        if kinds.count(type(of_one)) > 1:
            raise UserError(f"attach() was given two {type(of_one).__name__}; give it one of each kind")
        if of_one.has_schedule and not knows_iteration:
            raise UserError(
                f"the settings of {of_one.name} depend on the iteration (such as a start, a warm-up or a "
                "measure interval); give attach(..., iteration=) a function that returns it, 1-based"
            )
    layer_rule(settings)


def _refuse_model(chunks: Sequence[Any], settings: Sequence[Settings]) -> None:
    if not chunks:
        raise UserError("the list of model chunks is empty; call attach after the model is built")
    for chunk in chunks:
        if (attached := getattr(chunk, HANDLE, None)) is not None:
            names = " and ".join(method.settings.name for method in attached.methods)
            raise UserError(f"{names} is attached to this model already; call detach() on its handle first")
    define_layers(chunks, layer_rule(settings))
    for chunk in chunks:
        residual_layers(chunk)
        refuse_built(chunk)
    refuse_unsupported(chunks[0].config, *settings)
    refuse_other_preparation(chunks, settings)
    for of_one in settings:
        of_one.refuse_layers(num_layers(chunks[0]))
        of_one.refuse_model(chunks)


def place_of(
    chunks: Sequence[nn.Module],
    num_microbatches: Callable[[], int],
    iteration: Callable[[], int] | None = None,
) -> Place:
    """A built model's description for its methods: unwrapped chunks, and functions as in :func:`attach`."""
    config: Any = chunks[0].config
    # Between steps Megatron-FSDP replaces the model's own parameters with the optimizer's float32 ones.
    own = (getattr(p, "orig_param", p) for chunk in chunks for p in chunk.parameters())
    dtype = next((p.dtype for p in own), config.params_dtype)
    return Place(
        chunks=chunks,
        layer_numbers=tuple(layer.number for chunk in chunks for layer in residual_layers(chunk)),
        num_layers=num_layers(chunks[0]),
        hidden_size=config.hidden_size,
        dtype=torch.float32 if config.fp32_residual_connection else dtype,
        device=device_of(chunks),
        scaling=Scaling(chunks[0], num_microbatches),
        iteration=iteration,
    )


def device_of(chunks: Sequence[nn.Module]) -> torch.device:
    """The device of this rank's part of the model; of a stage without parameters, the training device.

    Raises:
        UserError: if the model is not on its training device yet.
    """
    trained_on = torch.device("cpu")
    backend = dist.get_backend() if dist.is_available() and dist.is_initialized() else ""
    if "nccl" in backend or (backend == "undefined" and torch.cuda.is_available()):
        trained_on = torch.device("cuda", torch.cuda.current_device())
    device = next((p.device for chunk in chunks for p in chunk.parameters()), trained_on)
    if device.type == "meta" or (device.type == "cpu" and backend == "nccl"):
        raise UserError(
            f"the model is still on the {device.type} device; move it to the GPU before attach is called"
        )
    return device


def _refuse_other_numbers(chunks: Sequence[nn.Module], group: dist.ProcessGroup | None) -> None:
    """Refuse layers that are not numbered 1 to L: the number selects a layer's weight and row of metrics."""
    own = [layer.number for chunk in chunks for layer in residual_layers(chunk)]
    ranks = of_every_rank(own, group)
    count = num_layers(chunks[0])
    if {number for rank in ranks for number in rank} != {*range(1, count + 1)} or any(
        len(rank) > len({*rank}) for rank in ranks
    ):
        numbers = " and ".join(dict.fromkeys(" ".join(map(str, rank)) for rank in ranks if rank))
        raise UserError(
            f"the model's layers have the numbers (layer_number) {numbers}, but the model has {count} "
            f"layers; jreg_megatron needs each of 1 to {count} once"
        )


def _microbatch_counter(num_microbatches: int | Callable[[], int] | None) -> Callable[[], int]:
    if callable(num_microbatches):

        def checked() -> int:
            if (told := num_microbatches()) < 1:
                raise UserError(
                    f"the function attach(..., num_microbatches=) returned {told}; it must return >= 1"
                )
            return told

        return checked
    if num_microbatches is not None:
        if not isinstance(num_microbatches, Integral) or num_microbatches < 1:
            raise UserError(
                f"attach(..., num_microbatches={num_microbatches!r}) must be a whole number >= 1, or a "
                "function that returns it"
            )
        return lambda: num_microbatches
    from megatron.core import num_microbatches_calculator as calculator

    if calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        raise UserError(
            "the number of micro-batches is not known: Megatron's calculator is not initialized; "
            "give attach(..., num_microbatches=) the number or a function that returns it"
        )
    count: Callable[[], int] = calculator.get_num_microbatches
    return count
