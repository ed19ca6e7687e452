"""Iterations that Megatron runs twice: for the experts' capacity, and to validate a result.

With a fixed number of tokens for the experts of a rank (``moe_expert_rank_capacity_factor``) Megatron's
``PagedStashRunner`` checks after each iteration whether it was too small. If so, it clears the gradients and
runs the iteration again without the limit. What the first run measured must not count.
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
        """Begin with the next iteration, of training or of evaluation.

        Args:
            meters: all of the model's.
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
        """Leave the runner to Megatron again; a second call does nothing."""
        self._meters = ()
        while self._undo:
            self._undo.pop()()

    def _keep(self) -> None:
        self._before = [(sums, sums.clone()) for meter in self._meters for sums in meter.totals()]

    def _give_back(self) -> None:
        self._run_again()
        for meter in self._meters:
            meter.totals()  # what waits in it belongs to the iteration too
        for sums, before in self._before:
            sums.copy_(before)


def tell_of_reruns_in_place(tell: Callable[[bool], None]) -> Callable[[], None]:
    """Megatron's rerun state machine repeats an iteration whose result looks wrong, such as a loss that
    jumps. The first run's measurements count, since the second must give the same.

    Args:
        tell: called before each run of an iteration and after the last one; its argument says whether a
            second run begins.

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
    """:func:`_go_around` a class's method with ``ours`` before it."""

    def both(method: Callable[..., Any], *args: Any, **named: Any) -> Any:
        ours()
        return method(*args, **named)

    return _go_around(owner, name, both)


def _go_around(owner: Any, name: str, ours: Callable[..., Any]) -> Callable[[], None]:
    """Call ``ours`` instead of a class's method, with that method as its first argument. The returned
    function undoes this, unless other code replaced the method since."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def around(*args: Any, **named: Any) -> Any:
        return ours(method, *args, **named)

    def undo() -> None:
        if getattr(owner, name) is around:
            setattr(owner, name, method)

    setattr(owner, name, around)
    return undo
