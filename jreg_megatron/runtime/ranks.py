"""What the ranks of a job tell each other outside of a training step."""

from __future__ import annotations

import torch.distributed as dist


def of_every_rank[T](own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What each rank of ``group`` (None: all) gives. A collective call."""
    of_all = [own]
    if dist.is_available() and dist.is_initialized():
        of_all *= dist.get_world_size(group)
        dist.all_gather_object(of_all, own, group=group)
    return of_all
