"""Iterations that Megatron runs twice: for the experts' capacity, and to validate a result.

With a fixed number of tokens for the experts of a rank (``moe_expert_rank_capacity_factor``), Megatron's
``PagedStashRunner`` checks after each iteration whether the number was too small. If so, it clears the
gradients and runs the iteration again without the limit. The first run's measurements must not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from jreg_megatron.stream.class_method import go_around_method
from jreg_megatron.stream.meter import Meter


class Reruns:
    """Restores the meters before an iteration is run again."""

    def __init__(self, meters: Sequence[Meter], run_again: Callable[[], None]) -> None:
        """Become active with the next iteration, of training or of evaluation.

        Args:
            meters: all meters of the model.
            run_again: called before an iteration is run again.
        """
        from megatron.core.transformer.moe.paged_stash import PagedStashRunner

        self._meters = meters
        self._run_again = run_again
        self._before: list[tuple[Tensor, Tensor]] = []
        self._undo = [
            go_around_method(PagedStashRunner, "data_read", self._read),
            go_around_method(PagedStashRunner, "prepare_for_rerun", self._prepare),
        ]

    def end(self) -> None:
        """Restore Megatron's runner. A second call is a no-op."""
        self._meters = ()
        while self._undo:
            self._undo.pop()()

    def _read(self, data_read: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self._before = [(sums, sums.clone()) for meter in self._meters for sums in meter.totals()]
        return data_read(*args, **named)

    def _prepare(self, prepare_for_rerun: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self._run_again()
        for meter in self._meters:
            meter.totals()  # sums the waiting values, which belong to the iteration too
        for sums, before in self._before:
            sums.copy_(before)
        return prepare_for_rerun(*args, **named)


class RerunsInPlace:
    """Tells when Megatron's rerun state machine repeats an iteration.

    Megatron repeats an iteration whose result looks wrong, such as a loss that jumps. The first run's
    measurements count, because the second run must give the same.
    """

    def __init__(self, tell: Callable[[bool], None]) -> None:
        """Become active with the next iteration.

        Args:
            tell: called before each run of an iteration and after the last one. Its argument is true if a
                second run begins.
        """
        from megatron.core.rerun_state_machine import RerunStateMachine

        self._tell = tell
        self.end = go_around_method(RerunStateMachine, "should_run_forward_backward", self._should_run)

    def _should_run(self, should_run: Callable[..., Any], machine: Any, *args: Any, **named: Any) -> Any:
        from megatron.core.rerun_state_machine import RerunState

        runs = should_run(machine, *args, **named)
        self._tell(bool(runs) and machine.state == RerunState.RERUNNING_IN_PLACE)
        return runs
