"""Iterations that Megatron runs twice: for the experts' capacity, and to validate a result.

With a fixed number of tokens for the experts of a rank (``moe_expert_rank_capacity_factor``), Megatron's
``PagedStashRunner`` checks after each iteration whether the number was too small. If so, it clears the
gradients and runs the iteration again without the limit. The first run's measurements must not count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

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
            _call_before(PagedStashRunner, "data_read", self._keep),
            _call_before(PagedStashRunner, "prepare_for_rerun", self._give_back),
        ]

    def end(self) -> None:
        """Restore Megatron's runner. A second call is a no-op."""
        self._meters = ()
        while self._undo:
            self._undo.pop()()

    def _keep(self) -> None:
        self._before = [(sums, sums.clone()) for meter in self._meters for sums in meter.totals()]

    def _give_back(self) -> None:
        self._run_again()
        for meter in self._meters:
            meter.totals()  # sums the waiting values, which belong to the iteration too
        for sums, before in self._before:
            sums.copy_(before)


def tell_of_reruns_in_place(tell: Callable[[bool], None]) -> Callable[[], None]:
    """Call ``tell`` when Megatron's rerun state machine repeats an iteration.

    Megatron repeats an iteration whose result looks wrong, such as a loss that jumps. The first run's
    measurements count, because the second run must give the same.

    Args:
        tell: called before each run of an iteration and after the last one. Its argument is true if a second
            run begins.

    Returns:
        A function that ends this.
    """
    from megatron.core.rerun_state_machine import RerunState, RerunStateMachine

    def told(should_run: Callable[..., Any], machine: Any, *given: Any, **named: Any) -> Any:
        runs = should_run(machine, *given, **named)
        tell(bool(runs) and machine.state == RerunState.RERUNNING_IN_PLACE)
        return runs

    return _go_around(RerunStateMachine, "should_run_forward_backward", told)


def _call_before(owner: Any, name: str, ours: Callable[[], None]) -> Callable[[], None]:
    """Call ``ours`` before each call of a class's method; see :func:`_go_around`."""

    def both(method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        ours()
        return method(*args, **named)

    return _go_around(owner, name, both)


def _go_around(owner: Any, name: str, ours: Callable[..., Any]) -> Callable[[], None]:
    """Call ``ours`` instead of a class's method, with that method as its first argument. The returned
    function undoes this, unless other code has replaced the method in the meantime."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def around(*args: Any, **named: Any) -> Any:
        return ours(method, *args, **named)

    def undo() -> None:
        if getattr(owner, name) is around:
            setattr(owner, name, method)

    setattr(owner, name, around)
    return undo
