"""``attach``: methods on a built Megatron model, and the handle by which the training loop speaks to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jreg_megatron.runtime.errors import DeviceFault, UserError
from jreg_megatron.runtime.ranks import first_that_differs, of_every_rank
from jreg_megatron.stream import overlap
from jreg_megatron.stream.anatomy import (
    define_layers,
    described_layers,
    num_layers,
    residual_layers,
    unwrap,
)
from jreg_megatron.stream.first_step import FirstStep
from jreg_megatron.stream.full_graph import FullGraphs
from jreg_megatron.stream.meter import Meter, reduce_meters
from jreg_megatron.stream.method import Call, Method, Metrics, Place, Reading
from jreg_megatron.stream.reruns import Reruns, tell_of_reruns_in_place
from jreg_megatron.stream.scaling import Scaling
from jreg_megatron.stream.settings import LAYER_RULES, Settings, flags_of
from jreg_megatron.stream.support import (
    LAYER_NOT_SEEN,
    refuse_built,
    refuse_fsdp,
    refuse_unsupported,
    sharding_of,
)
from jreg_megatron.stream.tap import Change, Parts, tap_residual_stream

_HANDLE, _PREPARED = "_jreg_handle", "_jreg_prepared"
"""Attributes of a model chunk: what is attached to it, and the settings that :func:`prepare` got."""
_NO_CHANGE = "no method that changes it"


@dataclass(frozen=True, slots=True)
class _Told:
    """What is to be told of a micro-batch."""

    methods: list[tuple[Method, Any]]
    """Those that are told of its layers, each with what it keeps of the micro-batch."""
    layers: Set[int] | None
    """The layers that one of them wants; None for all."""


class Handle:
    """Methods attached to a model. Made by :func:`attach`; the observer of the residual stream."""

    parts: Parts | None = None
    """Shows the parts of a layer to the methods, if one wants them."""

    def __init__(
        self,
        methods: Sequence[Method],
        chunks: Sequence[nn.Module],
        num_microbatches: Callable[[], int],
        iteration: Callable[[], int] | None,
        group: dist.ProcessGroup | None,
        count_given: int | None,
    ) -> None:
        self.methods = tuple(methods)
        self._num_microbatches = num_microbatches
        self._iteration = iteration
        self._group = group
        self._chunks = chunks
        self._measuring = [method for method in methods if method.training_meter is not None]
        self._validating = [method for method in self._measuring if method.validation_meter is not None]
        for method in methods:
            if method.training_meter is None and method.validation_meter is not None:
                raise UserError(
                    f"{type(method).__name__} has a validation_meter, and must have a training_meter"
                )
        losses = [method.added_loss for method in methods if method.added_loss is not None]
        # All are scaled alike; one that knows what the script multiplies its loss by is the best to check.
        added = max(losses, key=lambda loss: bool(loss.loss_weight_flag), default=None)
        self._coeff = 0.0 if added is None else added.coeff
        # A number that the caller gives once does not follow the batch, as what a function tells does.
        config = cast(Any, chunks[0]).config
        per_token: bool = config.calculate_per_token_loss
        self._is_count_fixed = count_given is not None and added is not None and not per_token
        self._ran = 0  # micro-batches of this step, of all chunks
        self._most_ran = 0.0
        self._measured: dict[Method, list[int]] = {method: [] for method in self._measuring}
        """Iterations of this log interval."""
        self._seen_whole: set[Method] = set()
        if any(type(method).parts is not Method.parts for method in methods):
            self.parts = self._parts
        self._is_sharded = any(map(sharding_of, chunks))
        self._first_step = FirstStep(chunks, added, num_microbatches, group)
        self._tap = tap_residual_stream(chunks, self, self._first_step.report, _changes(methods, chunks))
        self._first_step.start(self._tap.end_watch)
        self._full_graphs: FullGraphs | None = None
        if getattr(config, "cuda_graph_impl", "none") == "full_iteration":
            self._full_graphs = FullGraphs(methods, iteration, lambda: self._first_step.has_ended)
        both = (meter for method in methods for meter in (method.training_meter, method.validation_meter))
        meters = [meter for meter in both if meter is not None]
        self._end_reruns_in_place = tell_of_reruns_in_place(self._rerun_in_place)
        self._reruns: Reruns | None = None
        if getattr(config, "moe_expert_rank_capacity_factor", None) is not None:
            self._reruns = Reruns(meters, self._run_again)
        for meter in meters:
            meter.crosses_streams = getattr(config, overlap.SETTING, False)
        for method in methods:
            method.refuse = self._refuse
        for chunk in chunks:
            setattr(chunk, _HANDLE, self)

    # -- what the residual stream tells ------------------------------------------------------------

    def begin_microbatch(self, training: bool, given: Mapping[str, Any]) -> _Told | None:
        """Ask each method whether, and with what, it wants to be told of this micro-batch's layers."""
        if training and not self._first_step.has_ended:
            self._first_step.begin_training_microbatch()
            if not self._is_sharded and (found := next(filter(None, map(sharding_of, self._chunks)), "")):
                raise UserError(
                    f"the model was put into {found} after attach, which so could not check it; call attach "
                    "with the wrapped model"
                )
        if training and self._is_count_fixed:
            self._ran += 1
        in_full_graph = self._full_graphs is not None and self._full_graphs.is_in_schedule
        iteration = None
        if training and self._iteration is not None and not in_full_graph:
            iteration = self._iteration()
        call = Call(
            training,
            iteration,
            loss_mask=given.get("loss_mask"),
            padding_mask=given.get("padding_mask"),
            tokens=given.get("input_ids"),
            is_packed=given.get("packed_seq_params") is not None,
            in_full_graph=in_full_graph,
        )
        asked = [(method, method.begin_microbatch(call)) for method in self.methods]
        told = [(method, own) for method, own in asked if own is not None]
        wanted = [getattr(own, "layers", None) for _, own in told]
        every = [layers for layers in wanted if layers is not None]
        layers = frozenset().union(*every) if len(every) == len(wanted) else None
        # In the first step layers are compared, whoever wants to be told of them.
        return _Told(told, layers) if told or not self._first_step.has_ended else None

    def _parts(
        self, told: _Told, layer_number: int, layer_input: Tensor, middle: Tensor, added: Tensor
    ) -> None:
        for method, own in told.methods:
            method.parts(own, layer_number, layer_input, middle, added)

    def layer(self, told: _Told, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """Show a layer to the methods."""
        for method, own in told.methods:
            layer_output = method.layer(own, layer_number, layer_input, layer_output)
        return layer_output

    def final_norm(self, told: _Told, layer_number: int, layer_input: Tensor, normed: Tensor) -> Tensor:
        """Show the final norm to the methods."""
        for method, own in told.methods:
            normed = method.final_norm(own, layer_number, layer_input, normed)
        return normed

    def _refuse(self, finding: str) -> None:
        """Refuse what this rank alone may have found; in the first step on all ranks, if they meet."""
        if self._first_step.has_ended or not self._first_step.ranks_meet:
            raise UserError(finding)
        self._first_step.report(finding, is_alike=False)

    # -- what the user asks ------------------------------------------------------------------------

    @property
    def captured(self) -> str:
        """Where in this rank's part of the model the residual stream is seen, for a report."""
        return ", ".join(self._tap.places) or "no layer on this rank"

    def describe(self) -> str:
        """What the layers of a hybrid model are, and a line for each method that says what was attached."""
        chunk = self._chunks[0]
        layers = described_layers(chunk)
        lines = [f"> {type(chunk).__name__}: {layers}"] if layers else []
        return "\n".join([*lines, *(method.describe() for method in self.methods)])

    def end_iteration(self, iteration: int, is_interval_end: bool = True) -> Metrics | None:
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
        for method, iterations in self._measured.items():
            if method.settings.measures_at(iteration):
                iterations.append(iteration)
        is_new = any(
            iterations and method not in self._seen_whole for method, iterations in self._measured.items()
        )
        if not self._measuring or not (is_interval_end or is_new):
            return None
        return self._metrics(is_interval_end)

    def end_training(self) -> Metrics | None:
        """To be called where training ends: metrics over the log interval that this cuts off.

        A collective call if :meth:`end_iteration` has still to give metrics for an iteration, else None.
        """
        return self._metrics(is_interval_end=True) if self._has_measured else None

    @property
    def _has_measured(self) -> bool:
        return any(self._measured.values())

    def _metrics(self, is_interval_end: bool) -> Metrics | None:
        metrics = self.reduce_training_metrics()
        read = () if metrics is None else {type(reading.settings) for reading in metrics.readings}
        if any(
            iterations and type(method.settings) not in read for method, iterations in self._measured.items()
        ):
            raise UserError(LAYER_NOT_SEEN)
        self._seen_whole.update(method for method in self._measuring if type(method.settings) in read)
        if is_interval_end:
            self.reset_training_metrics()
        return metrics

    def reduce_training_metrics(self) -> Metrics | None:
        """Metrics over the training micro-batches since :meth:`reset_training_metrics`. Collective."""
        self._settle_first_step()
        meters = {method: method.training_meter for method in self._measuring}
        return self._read(meters, self._measured)

    def reset_training_metrics(self) -> None:
        """Begin a new interval of training metrics."""
        for method in self._measuring:
            cast(Meter, method.training_meter).reset()
            self._measured[method] = []
        self._ran = 0
        self._first_step.forget()

    def reset_validation_metrics(self) -> None:
        """Begin a new validation."""
        for method in self._validating:
            cast(Meter, method.validation_meter).reset()

    def reduce_validation_metrics(self) -> Metrics | None:
        """Metrics over the micro-batches seen in evaluation mode since the last call. Collective."""
        self._settle_first_step()
        metrics = self._read({method: method.validation_meter for method in self._validating}, {})
        self.reset_validation_metrics()
        return metrics

    def is_whole(self, metrics: Metrics | None) -> bool:
        """Whether a validation's metrics have the values of every method that measures there."""
        return len(self._validating) == (0 if metrics is None else len(metrics.readings))

    def _read(self, meters: dict[Method, Meter | None], measured: dict[Method, list[int]]) -> Metrics | None:
        """What the meters of methods say; None if nothing was seen of any. Collective."""
        every = reduce_meters(cast(Sequence[Meter], [*meters.values()]), self._group)
        readings = [
            Reading(method.settings, method.read(values), tuple(measured.get(method, ())))
            for method, values in zip(meters, every, strict=True)
            if values is not None
        ]
        return Metrics(tuple(readings)) if readings else None

    def _run_again(self) -> None:
        """Forget the micro-batches of a step that is run again."""
        self._ran = 0
        self._first_step.forget()

    def _rerun_in_place(self, is_rerun: bool) -> None:
        """Measure an iteration once that Megatron runs again to validate it."""
        for method in self._measuring:
            cast(Meter, method.training_meter).is_paused = is_rerun
        if is_rerun:
            self._run_again()

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
                f"number, lambda was {self._coeff * ran / self._most_ran:.4g} and not "
                f"{self._coeff:g}: give a function that tells the number of each step, and call "
                "end_iteration once a step"
            )

    def use_optimizer(self, optimizer: Any) -> None:
        """Give the methods the model's optimizer, Megatron's or torch's, before the first step. Collective.

        Raises:
            UserError: if a method does not know its kind, or torch's lacks a parameter that a method added.
        """

        def give() -> None:
            if isinstance(optimizer, torch.optim.Optimizer):
                _refuse_left_out(optimizer, self._chunks, [method.settings for method in self.methods])
            for method in self.methods:
                method.use_optimizer(optimizer)

        if any(
            method.settings.added_parameters or type(method).use_optimizer is not Method.use_optimizer
            for method in self.methods
        ):
            _alike_on_every_rank(give, self._group)

    def detach(self) -> None:
        """Leave the model as it was before :func:`attach`. A second call does nothing."""
        for method in self.methods:
            method.detached()
        self._first_step.end()
        self._tap.remove()
        if self._full_graphs is not None:
            self._full_graphs.end()
        self._end_reruns_in_place()
        if self._reruns is not None:
            self._reruns.end()
        for chunk in self._chunks:
            if getattr(chunk, _HANDLE, None) is self:
                delattr(chunk, _HANDLE)
                define_layers([chunk], None)


def _changes(methods: Sequence[Method], chunks: Sequence[nn.Module]) -> dict[int, Change]:
    """By a layer's number what changes its output: the methods, in the order in which they were attached."""

    def of_layer(number: int) -> Change | None:
        changing = [method.change for method in methods if method.changes(number)]

        def change(layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
            for one in changing:
                layer_output = one(layer_number, layer_input, layer_output)
            return layer_output

        return change if changing else None

    numbers = (layer.number for chunk in chunks for layer in residual_layers(chunk))
    return {number: change for number in numbers if (change := of_layer(number)) is not None}


def prepares(settings: Sequence[Settings]) -> bool:
    """Whether some method changes the model in :func:`prepare`."""
    return any(of_one.changes_modules for of_one in settings)


def prepare(chunks: list[Any], settings: Sequence[Settings]) -> list[Any]:
    """Let methods change model chunks before these are wrapped and have an optimizer; returns the chunks.

    To be called in a loop of one's own before ``DistributedDataParallel``, once, with the settings that
    :func:`attach` gets later. Megatron's loop and Bridge do it by themselves.

    Raises:
        UserError: if a chunk is prepared already, is wrapped already, or is none that a method can change.
    """
    define_layers([unwrap(chunk) for chunk in chunks], _layer_rule(settings))
    changing = tuple(of_one for of_one in settings if of_one.changes_modules)
    for given in chunks:
        chunk = unwrap(given)
        if changing and chunk is not given:
            raise UserError(
                f"prepare was called for a model in {type(given).__name__}, which would not see what "
                f"{flags_of(changing, _NO_CHANGE)} changes; call it before the model is wrapped"
            )
        if done := getattr(chunk, _PREPARED, ()):
            raise UserError(
                f"prepare was called twice for a model, the first time with {flags_of(done, _NO_CHANGE)}"
            )
        for of_one in changing:
            if of_one.added_parameters and any(parameter.is_meta for parameter in chunk.parameters()):
                raise UserError(
                    f"{of_one.as_flags()} gives the model parameters, whose first values would be lost with "
                    "--init-model-with-meta-device; leave one of the two out"
                )
            of_one.prepare(chunk)
        _have_graphs_wait(chunk, changing)
        setattr(chunk, _PREPARED, changing)
    return chunks


def _have_graphs_wait(chunk: nn.Module, settings: Sequence[Settings]) -> None:
    """Have a graph of a part of a layer wait for the gathered parameters that methods added.

    A replay calls no module, so Megatron waits for the parameters of the modules that it lists itself.
    """
    if not any(of_one.added_parameters for of_one in settings):
        return
    for layer in {part for whole in residual_layers(chunk) for part in (whole.first, whole.last)}:
        holders = {name.rpartition(".")[0] for name, _ in layer.named_parameters() if _adds(settings, name)}
        if listed := getattr(layer, "_get_submodules_under_cudagraphs", None):
            added = [layer.get_submodule(name) for name in holders]
            layer._get_submodules_under_cudagraphs = functools.partial(_also, listed, added)


def _also(listed: Callable[[], list[nn.Module]], added: list[nn.Module]) -> list[nn.Module]:
    return [*listed(), *added]


def _adds(settings: Iterable[Settings], parameter: str) -> bool:
    """Whether one of the methods adds a parameter, by its name in the model."""
    names = (name for of_one in settings for name in of_one.added_parameters)
    return any(f".{name}." in f".{parameter}." for name in names)


def _refuse_other_preparation(chunks: Sequence[nn.Module], settings: Sequence[Settings]) -> None:
    """Refuse a model that was prepared for other settings than those it is attached with, or not at all."""
    wanted = {of_one for of_one in settings if of_one.changes_modules}
    for chunk in chunks:
        done = getattr(chunk, _PREPARED, ())
        if set(done) != wanted:
            raise UserError(
                f"the model was prepared for {flags_of(done, _NO_CHANGE)}, and is attached with "
                f"{flags_of([of_one for of_one in settings if of_one in wanted], _NO_CHANGE)}; call "
                "jreg_megatron.prepare(chunks, settings) with the same settings, before the model is wrapped "
                "and has an optimizer"
            )


def _refuse_left_out(
    optimizer: torch.optim.Optimizer, chunks: Sequence[nn.Module], settings: Sequence[Settings]
) -> None:
    """Refuse an optimizer that was made before :func:`prepare` added a parameter."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for of_one in settings:
        for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
            if _adds([of_one], name) and id(parameter) not in held:
                raise UserError(
                    f"the optimizer does not have {name}, which {of_one.as_flags()} added; make the "
                    "optimizer after jreg_megatron.prepare"
                )


def _layer_rule(settings: Sequence[Settings]) -> str:
    """What a layer of a hybrid model is to all methods.

    Raises:
        UserError: if they differ.
    """
    for of_one in settings:
        of_one.require_layer()
    given = {of_one.layer_rule: of_one for of_one in settings if of_one.layer_rule is not None}
    if len(given) > 1:
        told = [f"{of_one.flag('layer')} is {rule}" for rule, of_one in given.items()]
        raise UserError(f"{' and '.join(told)}; all methods on a model must have the same layers")
    return next(iter(given), LAYER_RULES[0])


def attach(
    model: nn.Module | Sequence[nn.Module],
    *settings: Settings,
    num_microbatches: int | Callable[[], int] | None = None,
    iteration: Callable[[], int] | None = None,
    group: dist.ProcessGroup | None = None,
    optimizer: Any = None,
) -> Handle:
    """Attach methods to a built Megatron-Core model. Changes no state dict.

    A collective call, on the model or the list of its virtual pipeline chunks, before or after they are
    wrapped by ``Float16Module`` and DDP. The fp16 loss scale is taken from ``model.config.grad_scale_func``,
    where Megatron's loop puts it.

    Args:
        model: a ``GPTModel``, or the list of this rank's chunks.
        settings: of each method, such as ``JRegConfig(coeff=1.0)``. At most one of each kind.
        num_microbatches: by what the mean loss of a micro-batch is divided: the micro-batches of one
            data-parallel replica in a training step. By default Megatron-Core's calculator is asked at each.
        iteration: tells the current training iteration, 1-based. Needed when the settings depend on it.
        group: the ranks among which the model and the batch are split, for metrics; by default all.
        optimizer: the model's, Megatron's or torch's, for a method that takes part in its steps. It can be
            given later too, by :meth:`Handle.use_optimizer`.

    Returns:
        The handle, with metrics and ``detach()``.

    Raises:
        UserError: if something is attached already, if the model or a setting is not supported, or if
            something is missing that the settings need.

    A micro-batch is regularized if the model is in training mode (``model.train()``) and gradients are on;
    one in evaluation mode is measured as validation. A regularized layer is measured in the backward pass:
    ask for metrics between steps. What is taken for granted of layers and loss is compared with the first
    step, which raises a ``UserError`` on every rank before the schedule finishes the gradients.
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

    counter, methods = _alike_on_every_rank(check, group)
    _refuse_other_settings(settings, group)
    _refuse_other_numbers(chunks, group)
    for method in methods:
        method.agree(group)
    count_given = None if callable(num_microbatches) else num_microbatches
    handle = Handle(methods, chunks, counter, iteration, group, count_given)
    if optimizer is not None:
        try:
            handle.use_optimizer(optimizer)
        except UserError:
            handle.detach()
            raise
    return handle


def _refuse_other_settings(settings: Sequence[Settings], group: dist.ProcessGroup | None) -> None:
    """Refuse settings that differ between ranks, which would train another model on each and hang.
    Collective."""
    ranks = of_every_rank([f"{type(of_one).__name__}: {of_one.as_flags()}" for of_one in settings], group)
    if found := first_that_differs(ranks, group):
        at, first, other = found
        raise UserError(
            f"rank {first} has the settings {'; '.join(ranks[0])}, and rank {other} has "
            f"{'; '.join(ranks[at])}; give all ranks the same, in the same order"
        )


def refuse_settings(settings: Sequence[Settings], knows_iteration: bool) -> None:
    """Refuse what cannot be attached together.

    Args:
        settings: as :func:`attach` gets them.
        knows_iteration: whether the training iteration is known.

    Raises:
        UserError: naming the settings and what to do.
    """
    if not settings:
        raise UserError("attach() was given no settings; give it those of a method, such as JRegConfig()")
    kinds = [type(of_one) for of_one in settings]
    for of_one in settings:
        if not isinstance(of_one, Settings):
            raise UserError(
                f"attach() was given {of_one!r:.60} as settings; give it those of each method as an argument "
                "of their own, such as attach(model, JRegConfig(coeff=1.0), NormsConfig())"
            )
        if kinds.count(type(of_one)) > 1:
            raise UserError(f"attach() was given two {type(of_one).__name__}; give it one of each kind")
        if of_one.has_schedule and not knows_iteration:
            raise UserError(
                f"the settings of {of_one.name} depend on the iteration (such as a start, a warm-up or a "
                "measure interval); give attach(..., iteration=) a function that tells it, 1-based"
            )
    _layer_rule(settings)


def _refuse_model(chunks: Sequence[Any], settings: Sequence[Settings]) -> None:
    if not chunks:
        raise UserError("the list of model chunks is empty; call attach after the model is built")
    for chunk in chunks:
        if (attached := getattr(chunk, _HANDLE, None)) is not None:
            names = " and ".join(method.settings.name for method in attached.methods)
            raise UserError(f"{names} is attached to this model already; call detach() on its handle first")
    define_layers(chunks, _layer_rule(settings))
    for chunk in chunks:
        residual_layers(chunk)
        refuse_built(chunk)
    refuse_unsupported(chunks[0].config, *settings)
    _refuse_other_preparation(chunks, settings)
    for of_one in settings:
        of_one.refuse_layers(num_layers(chunks[0]))
        of_one.refuse_model(chunks)


def place_of(
    chunks: Sequence[nn.Module],
    num_microbatches: Callable[[], int],
    iteration: Callable[[], int] | None = None,
) -> Place:
    """What a method is told of a built model's unwrapped chunks; the functions are :func:`attach`'s."""
    config: Any = chunks[0].config
    # Megatron-FSDP has the optimizer's float32 parameters in the place of the model's own between steps.
    own = (getattr(p, "orig_param", p) for chunk in chunks for p in chunk.parameters())
    dtype = next((p.dtype for p in own), config.params_dtype)
    return Place(
        chunks=chunks,
        layer_numbers=tuple(layer.number for chunk in chunks for layer in residual_layers(chunk)),
        num_layers=num_layers(chunks[0]),
        hidden_size=config.hidden_size,
        dtype=torch.float32 if config.fp32_residual_connection else dtype,
        device=_device_of(chunks),
        scaling=Scaling(chunks[0], num_microbatches),
        iteration=iteration,
    )


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
            f"the model is still on the {device.type} device; move it to the GPU before attach is called"
        )
    return device


def _alike_on_every_rank[T](check: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """``check()``; where it fails on some ranks only, it fails on all, so that none waits for the others."""
    refusal, error, result = "", None, None
    try:
        result = check()
    except DeviceFault:
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
            f"{count}; jreg_megatron needs each of 1 to {count} once"
        )


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
