"""The handle of attached methods. The taps report layers to it, and the training loop reports steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.ranks import alike_on_every_rank
from jreg_megatron.stream import overlap
from jreg_megatron.stream.anatomy import define_layers, described_layers, residual_layers
from jreg_megatron.stream.first_step import FirstStep
from jreg_megatron.stream.full_graph import FullGraphs
from jreg_megatron.stream.meter import Meter, reduce_meters
from jreg_megatron.stream.method import Call, Method, Metrics, Reading
from jreg_megatron.stream.reruns import Reruns, RerunsInPlace
from jreg_megatron.stream.settings import Settings
from jreg_megatron.stream.support import LAYER_NOT_SEEN, sharding_of
from jreg_megatron.stream.tap import Change, Parts, tap_residual_stream

HANDLE = "_jreg_handle"
"""The attribute of a model chunk that holds its handle."""


@dataclass(frozen=True, slots=True)
class _Told:
    """The methods that observe a micro-batch."""

    methods: list[tuple[Method, Any]]
    """Each with its own object for the micro-batch."""
    layers: Set[int] | None
    """The layers that at least one of them needs; None for all."""


class Handle:
    """Methods attached to a model. :func:`attach` makes it. It is the observer of the residual stream."""

    parts: Parts | None = None
    """Passes the parts of a layer to the methods; None if no method needs them."""

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
        # All have the same scale. Prefer one with a loss weight, because the error then names its flag.
        added = max(losses, key=lambda loss: bool(loss.loss_weight_flag), default=None)
        self._coeff = 0.0 if added is None else added.coeff
        # A fixed number does not follow the batch size, as a function does.
        config = cast(Any, chunks[0]).config
        per_token: bool = config.calculate_per_token_loss
        self._is_count_fixed = count_given is not None and added is not None and not per_token
        # Such graphs share memory in the order of the first step.
        is_local = getattr(config, "cuda_graph_impl", "none") == "local"
        self._keeps_count = is_local and config.pipeline_model_parallel_size > 1
        self._first_count = 0
        self._ran = 0  # micro-batches of this step, of all chunks
        self._most_ran = 0.0
        self._measured: dict[Method, list[int]] = {method: [] for method in self._measuring}
        """The iterations of this log interval in which each method measures."""
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
        self._reruns_in_place = RerunsInPlace(self._rerun_in_place)
        self._reruns: Reruns | None = None
        if getattr(config, "moe_expert_rank_capacity_factor", None) is not None:
            self._reruns = Reruns(meters, self._run_again)
        for meter in meters:
            meter.crosses_streams = getattr(config, overlap.SETTING, False)
        for method in methods:
            method.refuse = self._refuse
        for chunk in chunks:
            setattr(chunk, HANDLE, self)

    # -- called by the taps ------------------------------------------------------------------------

    def begin_microbatch(self, training: bool, given: Mapping[str, Any]) -> _Told | None:
        """Let each method decide whether it observes this micro-batch's layers."""
        if training and not self._first_step.has_ended:
            self._first_step.begin_training_microbatch()
            if not self._is_sharded and (found := next(filter(None, map(sharding_of, self._chunks)), "")):
                raise UserError(
                    f"the model was put into {found} after attach, so attach could not check it; call attach "
                    "with the wrapped model"
                )
        if training and self._keeps_count:
            self._refuse_another_count()
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
        # In the first step layers are compared, even if no method observes them.
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
        """Refuse a finding that other ranks may lack. In the first step all ranks raise it, if they meet."""
        if self._first_step.has_ended or not self._first_step.ranks_meet:
            raise UserError(finding)
        self._first_step.report(finding, is_alike=False)

    # -- called by the training loop ---------------------------------------------------------------

    @property
    def captured(self) -> str:
        """The places of the taps in this rank's part of the model, for a report."""
        return ", ".join(self._tap.places) or "no layer on this rank"

    def describe(self) -> str:
        """For a hybrid model a line about its layers, then one line per attached method."""
        chunk = self._chunks[0]
        layers = described_layers(chunk)
        lines = [f"> {type(chunk).__name__}: {layers}"] if layers else []
        return "\n".join([*lines, *(method.describe() for method in self.methods)])

    def end_iteration(self, iteration: int, is_interval_end: bool = True) -> Metrics | None:
        """Call it after every training iteration. At the end of a log interval it returns the metrics.

        It is collective at the end of a log interval, after the first iteration that measures (to check that
        every layer was seen), and until the checks of the first step are over. Otherwise it communicates
        nothing.

        Args:
            iteration: 1-based.
            is_interval_end: whether a log interval ends with this iteration. The next call begins a new one.

        Returns:
            Metrics over the interval so far, at its end and after the first iteration that measures. Else, or
            if nothing was measured, None.

        Raises:
            UserError: if some layer was not seen in an iteration that should have measured it, or less often
                than others; or if the step has more micro-batches than the number given to ``attach``.
        """
        self._settle_first_step()
        if self._is_count_fixed:
            self._check_count()
        # The settings decide, not this rank's observations, so that all ranks decide the same.
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
        """Call it at the end of training. It returns the metrics of an unfinished log interval, else None.

        Collective if there is an unfinished interval.
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
        """Read the meters of methods; None if none has seen every layer. Collective."""
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
        """Count only the first run of an iteration that Megatron repeats to validate it."""
        for method in self._measuring:
            cast(Meter, method.training_meter).is_paused = is_rerun
        if is_rerun:
            self._run_again()

    def _settle_first_step(self) -> None:
        if not self._first_step.has_ended:
            self._first_step.settle()

    def _check_count(self) -> None:
        """Refuse a step with more micro-batches than the step that showed the scale, if the number is fixed.

        A step with fewer is allowed: it is the last one of an epoch, and the divisor does not change.
        """
        ran, self._ran = self._ran / len(self._chunks), 0
        if not self._most_ran:
            self._most_ran = ran if self._first_step.has_seen_scale else self._num_microbatches()
        if ran > self._most_ran:
            raise UserError(
                f"attach(..., num_microbatches={self._num_microbatches()}) fits steps of "
                f"{self._most_ran:g} micro-batches, but a step had {ran:g}: lambda {self._coeff:g} acted as "
                f"{self._coeff * ran / self._most_ran:.4g} if the loss was divided by {ran:g}; give a "
                "function that returns the number of each step, and call end_iteration once a step"
            )

    def _refuse_another_count(self) -> None:
        count = self._num_microbatches()
        self._first_count = self._first_count or count
        if count != self._first_count:
            raise UserError(
                f"with cuda_graph_impl local in a pipeline all steps must have the {self._first_count} "
                f"micro-batches of the first, and now a step has {count}: the graphs would overwrite each "
                "other's states; keep the number, or turn cuda_graph_impl off"
            )

    def use_optimizer(self, optimizer: Any) -> None:
        """Give the methods the model's optimizer, Megatron's or torch's, before the first step. Collective.

        Raises:
            UserError: if a method does not support its kind, or if a torch optimizer lacks a parameter that a
                method added.
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
            alike_on_every_rank(give, self._group)

    def detach(self) -> None:
        """Restore the model's state before :func:`attach`. A second call is a no-op."""
        for method in self.methods:
            method.detached()
        self._first_step.end()
        self._tap.remove()
        if self._full_graphs is not None:
            self._full_graphs.end()
        self._reruns_in_place.end()
        if self._reruns is not None:
            self._reruns.end()
        for chunk in self._chunks:
            if getattr(chunk, HANDLE, None) is self:
                delattr(chunk, HANDLE)
                define_layers([chunk], None)


def _changes(methods: Sequence[Method], chunks: Sequence[nn.Module]) -> dict[int, Change]:
    """By layer number, a function that changes the layer's output: all methods' changes, in attach order."""

    def of_layer(number: int) -> Change | None:
        changing = [method.change for method in methods if method.changes(number)]

        def change(layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
            for one in changing:
                layer_output = one(layer_number, layer_input, layer_output)
            return layer_output

        return change if changing else None

    numbers = (layer.number for chunk in chunks for layer in residual_layers(chunk))
    return {number: change for number in numbers if (change := of_layer(number)) is not None}


def _refuse_left_out(
    optimizer: torch.optim.Optimizer, chunks: Sequence[nn.Module], settings: Sequence[Settings]
) -> None:
    """Refuse an optimizer that was made before :func:`prepare` added a parameter."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for of_one in settings:
        for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
            if of_one.adds(name) and id(parameter) not in held:
                raise UserError(
                    f"the optimizer does not have {name}, which {of_one.as_flags()} added; make the "
                    "optimizer after jreg_megatron.prepare"
                )
