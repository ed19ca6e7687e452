"""The interface to Megatron-Core: every layer's residual stream, seen once per micro-batch.

This module does not know the use of the states. An observer gets each layer's global number, the state before
it and the state after it. It returns the state to continue with, so it may attach an autograd node to it. The
taps are plain attributes of built layers: no subclass, no spec, no change of the state dict.

Where the states are. ``TransformerLayer`` calls ``self_attn_bda(...)(x, residual, p)`` with the layer's input
as ``residual``. ``mlp_bda(...)(...)`` returns the layer's output. Both hold in every version from 0.14 on. A
hybrid model's sub-layer has a single bias-dropout-add for both, such as ``mamba_bda`` in a ``MambaLayer``.
Forward hooks on the layer would not work: they return a view, which the pipeline refuses to free. After
``mlp_bda`` the layer itself makes the tensor viewless.

Counted once. Under full recompute a layer's forward runs twice, first without gradients. Only the run that
builds the graph is reported. (Only code outside of the layer can distinguish the two: the layer calls its
bias-dropout-add with gradients on in both.) That run is in the backward pass, outside of the model's forward,
when other micro-batches may have run forward already. Its input identifies its micro-batch: the checkpoint
keeps the tensor from which the first run started, and the second run starts from the same memory. The final
norm runs once, before the last layer is recomputed. Then the observer gets that layer's input without a
graph. In evaluation the only run is reported. In text generation no run is reported.

Changed in every run. A function that changes a state is part of the model. So it is called in each run of a
layer: in both runs under recompute, in evaluation, and in text generation. An observer sees its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream import local_graph
from jreg_megatron.stream.anatomy import ResidualLayer, final_norm_of, num_layers, residual_layers, unwrap
from jreg_megatron.stream.layer_watch import LayerWatch, Report
from jreg_megatron.stream.overlap import SETTING, layers_of, on_passes, wrap

Change = Callable[[int, Tensor, Tensor], Tensor]
"""Gets a layer's number, input and output, ``[s, b, h]``, and returns the output to continue with."""

_FIRST_ARGUMENTS = ("input_ids",)
"""Arguments of Megatron's models that callers may also pass by position."""

_GENERATING = ("inference_context", "inference_params")
"""The argument that Megatron passes to a model in text generation, under its two names."""

Parts = Callable[[Any, int, Tensor, Tensor, Tensor], None]
"""Gets a micro-batch, a layer's number and input, the state after its first bias-dropout-add, and the layer's
output before any change."""

_RERUN_LATER = (
    "a layer runs outside of the model's forward pass, as only recomputed layers do, but none was recomputed "
    "in the first training step; call attach again when recomputation is turned on, or train with it from "
    "the first step on"
)


class ResidualStreamObserver(Protocol):
    """An observer of layers. States are ``[s, b, h]``; s is this rank's share of the sequence.

    If it has an attribute ``parts``, of type :data:`Parts`, that is not None, this is called before
    :meth:`layer`.
    """

    def begin_microbatch(self, training: bool, given: Mapping[str, Any]) -> Any:
        """A model chunk starts the forward pass of a micro-batch.

        Args:
            training: whether a backward pass will follow.
            given: the arguments of the model's call, by name.

        Returns:
            Any object for this micro-batch. The other functions get it as ``microbatch``. If it has an
            attribute ``layers``, a set of numbers, other layers may be left out. With None they are not
            called.
        """

    def layer(self, microbatch: Any, layer_number: int, layer_input: Tensor, layer_output: Tensor) -> Tensor:
        """Layer ``layer_number`` (1-based over the whole model) has run, before any final norm.

        Returns:
            The tensor to continue with instead of ``layer_output``.
        """

    def final_norm(self, microbatch: Any, layer_number: int, layer_input: Tensor, normed: Tensor) -> Tensor:
        """The final norm has run on the output of the last layer, whose input is ``layer_input``.

        If the last layer will be recomputed, ``layer_input`` has no graph, and :meth:`layer` is called later,
        in the backward pass.

        Returns:
            The tensor to continue with instead of ``normed``.
        """


@dataclass
class Tap:
    """The taps of an observer on a model. :meth:`remove` restores the model."""

    layer_numbers: tuple[int, ...]
    """The layers that this rank holds, 1-based over the whole model."""
    places: tuple[str, ...] = ()
    """Where layers' inputs and outputs are seen, each kind of layer once."""
    _chunks: list[_ChunkTap] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def end_watch(self) -> None:
        """Stop comparing layers' own arguments and return values with the tapped states.

        Then layers that are not recomputed have no hook, so recompute cannot be turned on later.
        """
        for chunk in self._chunks:
            chunk.end_watch()

    def remove(self) -> None:
        """Remove the taps. Taps that were put on later must be removed first."""
        self.end_watch()
        while self._undo:
            self._undo.pop()()


def tap_residual_stream(
    chunks: Sequence[nn.Module],
    observer: ResidualStreamObserver,
    report: Report | None = None,
    changes: Mapping[int, Change] = MappingProxyType({}),
) -> Tap:
    """Put an observer on a built model.

    Args:
        chunks: this rank's model chunks (one, or one per virtual pipeline stage), wrapped or not.
        observer: called for every layer.
        report: called if a layer's own argument or return value is not the state that the observer sees.
            Passes that count are compared until :meth:`Tap.end_watch`.
        changes: by layer number, a function that changes the layer's output, in every run.

    Returns:
        The tap. Keep it to remove it later.

    Raises:
        UserError: if a chunk has an unknown structure; the message names the missing part.
    """
    chunks = [unwrap(chunk) for chunk in chunks]
    layers = [residual_layers(chunk) for chunk in chunks]
    all_layers = [layer for chunk_layers in layers for layer in chunk_layers]
    kinds = dict.fromkeys(
        " to ".join(f"{type(module).__name__}.{name}" for module, name in layer.adds) for layer in all_layers
    )
    tap = Tap(tuple(layer.number for layer in all_layers), tuple(kinds))
    for chunk, chunk_layers in zip(chunks, layers, strict=True):
        chunk_tap = _ChunkTap(chunk, observer, changes, tap._undo)
        chunk_tap.put_on(chunk_layers, report)
        tap._chunks.append(chunk_tap)
    return tap


class _ChunkTap:
    """The taps on one model chunk, and its current micro-batch."""

    def __init__(
        self,
        chunk: Any,
        observer: ResidualStreamObserver,
        changes: Mapping[int, Change],
        undo: list[Callable[[], None]],
    ) -> None:
        self.observer = observer
        self.changes = changes
        self.parts: Parts | None = getattr(observer, "parts", None)
        self.microbatch: Any = None
        """The micro-batch in its forward pass, or whose layers are recomputed; None if it does not count."""
        self.recomputes = chunk.config.recompute_granularity == "full"
        """Whether layers are, or have been, recomputed."""
        self.is_in_forward = False
        self.graphs: str = getattr(chunk.config, "cuda_graph_impl", "none")
        """The setting ``cuda_graph_impl``: the kind of CUDA graphs that replay layers."""
        self.is_planned = bool(getattr(chunk.config, SETTING, False))
        """Whether plans run the layers in training. Then no graph contains a layer's end."""
        self._chunk = chunk
        self._undo = undo
        # The states that checkpoints keep, and their micro-batches, by the identity of the memory. As long as
        # the weak reference exists, no other memory gets this identity, even after the memory was freed.
        self._checkpointed: dict[int, tuple[StorageWeakRef, Any]] = {}
        # For the final norm: the micro-batch and the input of the last layer, if both are in this chunk.
        self.last_layer: tuple[Any, Tensor] | None = None
        self._taps: list[_LayerTap] = []
        self._tapped: Collection[int] | None = None  # the layers on which taps are; None for all
        self.watched: list[_LayerTap] = []
        self.is_watching = False
        self._was_evaluated = False

    @property
    def is_training(self) -> bool:
        """Whether Megatron recomputes. It reads the block's mode, so a single layer may be in evaluation."""
        return bool(self._chunk.decoder.training)

    def put_on(self, layers: Sequence[ResidualLayer], report: Report | None) -> None:
        chunk, undo = self._chunk, self._undo
        undo.append(on_passes(chunk, self._before_chunk, self._after_chunk, self._on_plan))
        final_norm = final_norm_of(chunk)
        for layer in layers:
            is_last = layer.number == num_layers(chunk)
            tap = _LayerTap(layer, self, feeds_final_norm=is_last and final_norm is not None)
            undo.append(tap.end)
            tap.put_on()
            self._taps.append(tap)
            if self.recomputes or report is not None:
                tap.start_hook()
            if report is not None:
                self.watched.append(tap)
                tap.start_watch(chunk.config, report)
        if final_norm is not None:
            undo.append(final_norm.register_forward_hook(self._after_final_norm).remove)
        if any(layer.number in self.changes for layer in layers):
            undo.append(self._refuse_what_graphs_hold)

    def _refuse_what_graphs_hold(self) -> None:
        """Refuse later runs of the chunk, if its graphs still contain a method's changes."""
        is_held = any(tap.is_changed_in_graph for tap in self._taps)
        if self.graphs == "local":
            is_held = local_graph.is_held(is_held)
        if is_held:
            self._chunk.register_forward_pre_hook(_refuse_to_run)

    def _watches(self) -> list[LayerWatch]:
        return [tap.watch for tap in self.watched if tap.watch is not None and self.is_watching]

    def end_watch(self) -> None:
        while self.watched:
            self.watched.pop().end_watch()

    def remember(self, state: Tensor) -> None:
        """A layer runs on ``state`` without gradients. If a checkpoint keeps the state, it will run again."""
        storage = StorageWeakRef(state.untyped_storage())  # type: ignore[no-untyped-call]
        self._checkpointed[storage.cdata] = (storage, self.microbatch)
        self.recomputes = True

    def recall(self, state: Tensor) -> None:
        """A layer is recomputed from ``state``: find its micro-batch, or keep that of the previous layer."""
        found = self._checkpointed.pop(state.untyped_storage()._cdata, None)
        if found is not None:
            self.microbatch = found[1]

    def _before_chunk(self, chunk: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        gone = [key for key, (storage, _) in self._checkpointed.items() if _is_gone(storage)]
        for key in gone:
            del self._checkpointed[key]
        named = {**dict(zip(_FIRST_ARGUMENTS, given, strict=False)), **named}
        # Megatron may capture a pass of text generation, after warm-up runs of its layers.
        is_generating = any(named.get(name) is not None for name in _GENERATING)
        is_counted = torch.is_grad_enabled() if chunk.training else not is_generating
        self.microbatch = self.observer.begin_microbatch(chunk.training, named) if is_counted else None
        self.is_in_forward = True
        if self.watched and self.graphs == "local" and local_graph.are_captured():
            self.end_watch()  # of the recorded step; Megatron replays no layer that has a hook
        # One evaluation is enough; there may be thousands before the first training step.
        self.is_watching = is_counted and (chunk.training or not self._was_evaluated)
        self._was_evaluated = self._was_evaluated or (is_counted and not chunk.training)
        self._put_taps_where_needed()
        for watch in self._watches():
            watch.begin()

    def _on_plan(self, plan: Any) -> None:
        for tap, nodes in zip(self._taps, layers_of(plan), strict=False):
            tap.follow(*nodes)

    def _put_taps_where_needed(self) -> None:
        """Remove the taps from layers that no method needs in this micro-batch.

        The needed layers change only between steps: all micro-batches of a step need the same.
        """
        needed: Collection[int] | None = ()
        if self.recomputes or self.watched:
            needed = None
        elif self.microbatch is not None:
            needed = getattr(self.microbatch, "layers", None)
        if needed != self._tapped:
            for tap in self._taps:
                is_needed = needed is None or tap.number in needed or tap.number in self.changes
                tap.put_on() if is_needed else tap.take_off()
            self._tapped = needed

    def _after_chunk(self, chunk: nn.Module, _: Any, output: Any) -> None:
        if output is not None and self.microbatch is not None:  # it was counted, and not aborted
            for watch in self._watches():
                watch.ended()
        self.is_in_forward = False
        self.microbatch = self.last_layer = None

    def _after_final_norm(self, norm: nn.Module, given: tuple[Any, ...], normed: Tensor) -> Tensor | None:
        if self.last_layer is None:
            return None
        self._taps[-1].returned(given[0])  # where the last layer's own return is already normed
        (microbatch, layer_input), self.last_layer = self.last_layer, None
        return self.observer.final_norm(microbatch, num_layers(self._chunk), layer_input, normed)


def _refuse_to_run(*_: Any) -> None:
    raise UserError(
        "a method that changes the model was detached, but the CUDA graphs of its layers still contain its "
        "changes; keep it attached, or build the model again"
    )


def _nothing() -> None:
    pass


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


class _LayerTap:
    """Combines the input and the output of a layer with their micro-batch."""

    def __init__(self, layer: ResidualLayer, chunk: _ChunkTap, feeds_final_norm: bool) -> None:
        self.number = layer.number
        self._layer = layer
        self._chunk = chunk
        # The installed taps: module, attribute, the layer's own factory, and its replacement.
        self._places: list[tuple[Any, str, Any, Any]] = []
        self._undo_graphs: list[Callable[[], None]] = []
        self._feeds_final_norm = feeds_final_norm
        # State of the current run; None between runs, and in a run that does not count.
        self._microbatch: Any = None
        self._input: Tensor | None = None
        self._middle: Tensor | None = None
        self._will_be_rerun = False
        self._change = chunk.changes.get(layer.number)
        self._is_over = self._is_captured = self._is_begun = False
        self.is_changed_in_graph = False
        """Whether a method changed a state in a run that was, or may be, captured in a graph."""
        self._hook: RemovableHandle | None = None
        self.watch: LayerWatch | None = None
        self._watching: LayerWatch | None = None  # in the current run
        self._stop_watching_returns: Callable[[], None] = _nothing

    def put_on(self) -> None:
        """Replace the factories ``name(training, fused) -> add`` of the bias-dropout-adds."""
        if self._places:
            return
        adds = self._layer.adds
        taps = (self._tapped_input, self._tapped_output) if len(adds) > 1 else (self._tapped_both,)
        for (module, name), tapped in zip(adds, taps, strict=True):
            factory = getattr(module, name)
            ours = functools.partial(tapped, factory)
            self._places.append((module, name, factory, ours))
            setattr(module, name, ours)
        for module in dict.fromkeys((self._layer.first, self._layer.last)):
            begins = module is self._layer.first
            if self._chunk.graphs == "transformer_engine":
                self._undo_graphs.append(self._go_around_graphs(module, begins))
            elif self._chunk.graphs == "local":
                whole = functools.partial(self._on_local_graph, module, begins)
                begins = begins and self._layer.adds[0][1] == "mlp_bda"
                experts = functools.partial(self._on_local_graph, module, begins)
                self._undo_graphs.append(local_graph.go_around(module, whole))
                self._undo_graphs.append(local_graph.go_around_experts(module, experts))

    def _go_around_graphs(self, module: Any, begins: bool) -> Callable[[], None]:
        capture, replay = module._te_cuda_graph_capture, module._te_cuda_graph_replay
        module._te_cuda_graph_capture = functools.partial(self._on_capture, capture)
        module._te_cuda_graph_replay = functools.partial(self._on_replay, module, begins, replay)

        def undo() -> None:
            del module._te_cuda_graph_capture, module._te_cuda_graph_replay

        return undo

    def end(self) -> None:
        """Stop for good, even if other code has replaced the factories and still calls ours."""
        self._is_over, self._change = True, None
        self.end_hook()
        self.take_off()

    def take_off(self) -> None:
        """Restore the layer's own factories, unless other code has replaced ours."""
        if all(getattr(module, name) is ours for module, name, _, ours in self._places):
            for module, name, factory, _ in self._places:
                setattr(module, name, factory)
            while self._undo_graphs:
                self._undo_graphs.pop()()
            self._places = []

    def start_watch(self, config: Any, report: Report) -> None:
        """Compare the layer's argument and return value with the tapped states, in passes that count."""
        self.watch = LayerWatch(self._layer, config, report)
        self._stop_watching_returns = self._layer.last.register_forward_hook(self._after_layer).remove

    def end_watch(self) -> None:
        self.watch = self._watching = None
        self._stop_watching_returns()
        if not self._chunk.recomputes:
            self.end_hook()

    def start_hook(self) -> None:
        """Add a hook that finds for each run of the layer its micro-batch, and whether it will run again."""
        self._hook = self._layer.first.register_forward_pre_hook(self._before_layer, with_kwargs=True)

    def end_hook(self) -> None:
        """Remove the hook. A layer that runs once does not need it, and it costs more than all the rest."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._will_be_rerun = False

    def follow(self, first: Any, last: Any) -> None:
        """The next run of the layer is that of a plan's nodes ``first`` to ``last``."""
        if self._places:
            wrap(first, lambda state, _: self._began_at(state), before=self._begins_at)
            wrap(last, lambda _, output: self.returned(output))

    def _begins_at(self, state: Tensor) -> None:
        if self._hook is not None:
            self._before_layer(self._layer.first, (state,), {})

    def _began_at(self, leaf: Tensor) -> None:
        if self._input is not None:  # inside the first node's graph, if a fused norm or a cast comes first
            self._input = leaf

    def returned(self, output: Any) -> None:
        """The layer, or its last node in a plan, returns ``output``."""
        if self._watching is not None:
            self._watching.returned(output)
            self._watching = None

    def _after_layer(self, module: nn.Module, _: Any, output: Any) -> None:
        self.returned(output)

    def _before_layer(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        chunk = self._chunk
        state = named["hidden_states"] if "hidden_states" in named else given[0]
        self._will_be_rerun = chunk.is_training and not torch.is_grad_enabled()
        if self._will_be_rerun and chunk.microbatch is not None:
            chunk.remember(state)
        elif not chunk.is_in_forward and chunk.is_training:
            chunk.recall(state)
        is_watched = chunk.is_watching and chunk.is_in_forward and chunk.microbatch is not None
        self._watching = self.watch if is_watched else None
        if self._watching is not None:
            self._watching.given(state)

    def _tapped_input(
        self, factory: Callable[..., Any], *options: Any, **named: Any
    ) -> Callable[..., Tensor]:
        chunk = self._chunk
        if self._is_over:
            return cast(Callable[..., Tensor], factory(*options, **named))
        is_captured = self._is_captured or (chunk.graphs == "local" and not chunk.is_in_forward)
        is_rerun = not chunk.is_in_forward and not is_captured
        if self._hook is None and is_rerun and chunk.is_training:
            raise UserError(_RERUN_LATER)
        self._microbatch, self._input = (None if is_captured else chunk.microbatch), None
        self._is_begun = self._is_begun or not is_captured
        # A state that is captured in the first module's graph is not the input of the last module's graph.
        is_part = is_captured and self._layer.first is not self._layer.last
        return functools.partial(self._on_input, factory(*options, **named), is_part)

    def _tapped_output(
        self, factory: Callable[..., Any], *options: Any, **named: Any
    ) -> Callable[..., Tensor]:
        return functools.partial(self._on_output, factory(*options, **named))

    def _tapped_both(self, factory: Callable[..., Any], *options: Any, **named: Any) -> Callable[..., Tensor]:
        return self._tapped_output(functools.partial(self._tapped_input, factory), *options, **named)

    def _on_input(
        self, add: Callable[..., Tensor], is_part: bool, x_with_bias: Any, residual: Tensor, *rest: Any
    ) -> Tensor:
        self._input = None if is_part else residual
        if self._watching is not None:
            self._watching.adds_to(residual)
        state = add(x_with_bias, residual, *rest)
        if self._chunk.parts is not None and self._microbatch is not None and not self._will_be_rerun:
            self._middle = state
        return state

    def _on_output(self, add: Callable[..., Tensor], *operands: Any) -> Tensor:
        layer_output = add(*operands)
        middle, self._middle = self._middle, None
        if self._chunk.parts is not None and middle is not None and self._input is not None:
            self._chunk.parts(self._microbatch, self.number, self._input, middle, layer_output)
        layer_output = self._show(self._changed(layer_output))
        if self._watching is not None:
            self._watching.tapped(layer_output)
        return layer_output

    def _on_capture(self, capture: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """The layer, or a part of it, is or may be captured in a CUDA graph. This is not a micro-batch."""
        of_run = self._microbatch, self._input
        self._microbatch, self._input, self._is_captured = None, None, True
        try:
            return capture(*given, **named)
        finally:
            self._microbatch, self._input, self._is_captured = *of_run, False

    def _on_local_graph(
        self, module: Any, begins: bool, run: Callable[..., Any], *given: Any, **named: Any
    ) -> Any:
        """Megatron records, replays or runs a part of the model that has, or will have, its own graph."""
        return self._on_replay(module, begins, functools.partial(self._on_capture, run), *given, **named)

    def _on_replay(
        self, module: Any, begins: bool, replay: Callable[..., Any], *given: Any, **named: Any
    ) -> Any:
        """A CUDA graph replaces the layer, or a part of it. Code in the graph calls no tap.

        A graph of the whole layer also contains a method's changes. A state that a graph returns is in the
        graph's memory. After its backward pass the next graph reuses this memory, so a method must not keep
        the state longer.
        """
        if begins:
            state = named["hidden_states"] if "hidden_states" in named else given[0]
            self._microbatch, self._input = self._chunk.microbatch, state
            self._is_begun = module is not self._layer.last
        result = replay(*given, **named)
        layer_input = self._input
        # If the layer's end is not in the graph, a tap sees it.
        if module is not self._layer.last or layer_input is None or self._chunk.is_planned:
            return result
        if not begins:
            # A view hides the input's own node: the output's node must not hand work down to it, because the
            # graph's backward pass runs between the two.
            self._input = layer_input.view_as(layer_input)
        output, *rest = result if isinstance(result, tuple) else (result,)  # a MambaLayer's is a tensor
        is_local = self._chunk.graphs == "local"
        state = local_graph.apart(output) if is_local and self._microbatch is not None else output
        shown = self._show(self._changed(state) if self._is_begun else state)
        if is_local:
            local_graph.keep(output, shown)
        if self._watching is not None:  # the layer continues after its graphs
            self._watching.handed_on(output, shown)
        return (shown, *rest) if isinstance(result, tuple) else shown

    def _changed(self, layer_output: Tensor) -> Tensor:
        if self._change is None or self._input is None:
            return layer_output
        self.is_changed_in_graph |= self._is_captured
        return self._change(self.number, self._input, layer_output)

    def _show(self, layer_output: Tensor) -> Tensor:
        """Show the layer to the observer if the run counts."""
        microbatch, layer_input = self._microbatch, self._input
        self._microbatch = self._input = None
        if microbatch is not None and layer_input is not None:
            if self._feeds_final_norm and self._chunk.is_in_forward:
                shown = layer_input.detach() if self._will_be_rerun else layer_input
                self._chunk.last_layer = (microbatch, shown)
            if not self._will_be_rerun:
                observer = self._chunk.observer
                layer_output = observer.layer(microbatch, self.number, layer_input, layer_output)
        return layer_output
