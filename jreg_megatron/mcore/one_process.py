"""Megatron's parallel state in a single process."""

from __future__ import annotations

from jreg_megatron.runtime.errors import UserError


def single_process() -> None:
    """Initialize a job of one rank, if this is not done yet.

    Raises:
        UserError: inside a job of several ranks.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if dist.get_world_size() > 1:
        raise UserError(
            f"this command needs one process, not {dist.get_world_size()}; start it without torchrun"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
