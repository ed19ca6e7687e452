"""Methods in Megatron's CUDA graph of a whole iteration, ``--cuda-graph-impl full_iteration``.

Megatron calls its schedule through ``FullCudaGraphWrapper``. A few warm-up steps run as usual, then one call
is captured, and later calls replay it. A replay runs no Python. It repeats the captured operations on the
same memory. So the model's passes do the same work in every step, also in the warm-up: a method does
everything that any iteration needs. Code around the wrapper, outside of the graph, handles the differences
between iterations:

- A method fills the buffers that the graph reads, in :meth:`Method.before_full_graph`.
- If a meter must not measure in this iteration, its previous sums are restored.

Values that wait in a meter are summed at the end of the schedule, within the graph. The first step's checks
need the host, so they must be over before the capture. When methods are attached or detached, a captured
graph is discarded, and Megatron warms up again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.class_method import go_around_method
from jreg_megatron.stream.method import Method


class FullGraphs:
    """Code around the calls of Megatron's ``FullCudaGraphWrapper``.

    Only one object is active, for the last attached model, because Megatron keeps its graphs in the class.
    """

    def __init__(
        self, methods: Sequence[Method], iteration: Callable[[], int] | None, is_checked: Callable[[], bool]
    ) -> None:
        """Become active with the next step, and replace the object of an earlier model.

        Args:
            methods: all methods of the model.
            iteration: returns the training iteration, 1-based; None if no method depends on it.
            is_checked: returns whether the first step's checks are over; the same on every rank.
        """
        from megatron.core.full_cuda_graph import FullCudaGraphWrapper

        self.is_in_schedule = False
        """Whether the model's current pass may be captured."""
        self._methods = methods
        self._iteration = iteration
        self._is_checked = is_checked
        self._num_microbatches = 0
        self._wrapper: Any = FullCudaGraphWrapper
        for earlier in [*_MADE]:
            earlier.end()
        _MADE.add(self)
        self._undo: Callable[[], None] | None = go_around_method(self._wrapper, "__call__", self._step)
        self._forget_graphs()

    def end(self) -> None:
        """Restore Megatron's wrapper. A second call is a no-op."""
        if self._undo is not None:
            self._undo()
            self._undo = None
            self._forget_graphs()

    def _forget_graphs(self) -> None:
        from megatron.core.full_cuda_graph import StaticBufferLoader

        self._wrapper.reset_cuda_graph(self._wrapper)  # it changes attributes of the class only
        for buffers in StaticBufferLoader.static_buffers.values():
            buffers.clear()

    def _step(self, call: Callable[..., Any], wrapper: Any, *args: Any, **named: Any) -> Any:
        """A call of the wrapper: a step of training or of evaluation."""
        kept: list[tuple[Tensor, Tensor]] = []
        self._sum()  # values that were added outside of the graph
        if not named["forward_only"]:
            self._refuse_what_a_graph_cannot(wrapper, named["num_microbatches"])
            iteration = None if self._iteration is None else self._iteration()
            for method in self._methods:
                method.before_full_graph(iteration)
                measures = iteration is None or method.settings.measures_at(iteration)
                if method.training_meter is not None and not measures:
                    kept += [(sums, sums.clone()) for sums in method.training_meter.totals()]
        schedule = wrapper.forward_backward_func
        wrapper.forward_backward_func = functools.partial(self._run, schedule)
        try:
            result = call(wrapper, *args, **named)
        finally:
            wrapper.forward_backward_func = schedule
        for sums, before in kept:
            sums.copy_(before)
        return result

    def _run(self, schedule: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self.is_in_schedule = True
        try:
            result = schedule(*args, **named)
            self._sum()
        finally:
            self.is_in_schedule = False
        return result

    def _sum(self) -> None:
        for method in self._methods:
            for meter in (method.training_meter, method.validation_meter):
                if meter is not None:
                    meter.totals()

    def _refuse_what_a_graph_cannot(self, wrapper: Any, num_microbatches: int) -> None:
        """Refuse a capture before the first step's checks are over, and a replay for another batch."""
        still_to_warm_up = wrapper.cuda_graph_warmup_steps - wrapper.curr_iter("training")
        if still_to_warm_up == 0 and not self._is_checked():
            raise UserError(
                f"cuda_graph_warmup_steps is {wrapper.cuda_graph_warmup_steps}, and no loss showed its "
                "scale in these steps; a graph cannot show it; give more steps, or call end_iteration "
                "after each step of your own loop"
            )
        if still_to_warm_up < 0 and num_microbatches != self._num_microbatches:
            raise UserError(
                f"the CUDA graph of an iteration has {self._num_microbatches} micro-batches, and now a step "
                f"has {num_microbatches}; keep the batch size, or turn cuda_graph_impl full_iteration off"
            )
        self._num_microbatches = num_microbatches


_MADE: WeakSet[FullGraphs] = WeakSet()
