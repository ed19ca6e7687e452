"""Compare values of ranks, outside a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch.distributed as dist

from jreg_megatron.runtime.errors import DeviceFault, UserError


def of_every_rank[T](own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of each rank of ``group`` (None: all ranks). A collective call."""
    of_all = [own]
    if dist.is_initialized():
        of_all *= dist.get_world_size(group)
        dist.all_gather_object(of_all, own, group=group)
    return of_all


def first_that_differs(
    of_all: Sequence[object], group: dist.ProcessGroup | None = None
) -> tuple[int, int, int] | None:
    """The first value of :func:`of_every_rank` that differs from the first rank's.

    Returns:
        Its index in ``of_all``, the global number of the first rank, and that of the rank that differs. None
        if all are equal.
    """
    at = next((at for at, own in enumerate(of_all) if own != of_all[0]), None)
    if at is None:
        return None
    first, other = (n if group is None else dist.get_global_rank(group, n) for n in (0, at))
    return at, first, other


def alike_on_every_rank[T](check: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run ``check``. If it fails on one rank, all ranks raise, so that no rank waits for another. Collective.

    Raises:
        UserError: with the message of the first rank that failed. A rank with another kind of error raises
            its own.
    """
    refusal, error, result = "", None, None
    try:
        result = check()
    except DeviceFault:
        raise  # no collective can reach the other ranks any more
    except Exception as caught:
        error = caught
        refusal = str(caught) if isinstance(caught, UserError) else f"{type(caught).__name__}: {caught}"
    refusals = of_every_rank(refusal, group)
    if error is not None and not isinstance(error, UserError):
        raise error
    if first := next(filter(None, refusals), ""):
        raise UserError(first)
    return cast(T, result)
