"""Patch the few places in Megatron that refuse a CPU although they need no CUDA."""

from __future__ import annotations

import logging
import multiprocessing
import sys
from collections import defaultdict
from functools import partial, wraps
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from jreg_megatron.mcore.dataset_helper import use_built_helper
from jreg_megatron.mcore.installed import has_training_loop
from jreg_megatron.runtime.fork import end_with_the_parent
from jreg_megatron.runtime.imports import uncompiled

_FOR_GPUS = ("transformer_engine", "apex", "amp_C")


def import_for_the_cpu() -> None:
    """Import Megatron without the packages for GPUs, and with ``torch.compile`` as a no-op.

    Megatron uses these packages if they are installed. Compilation costs more than it saves here.
    """
    for name in _FOR_GPUS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    torch.compile = uncompiled  # type: ignore[assignment]
    import megatron.core.models.gpt.gpt_model

    if has_training_loop():
        import megatron.training  # noqa: F401


def install() -> None:
    """Patch Megatron until the process ends."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    from jreg_megatron.mcore import local_layers

    if has_training_loop():
        import megatron.training

        # Megatron has an argument for runs without CUDA, but its training loop does not pass it.
        initialize = partial(megatron.training.initialize.initialize_megatron, allow_no_cuda=True)
        for module in (megatron.training, megatron.training.initialize, megatron.training.training):
            module.initialize_megatron = initialize
        # It warms up kernels that are not compiled here. For this it draws random values, whose number
        # depends on the layout, from a generator that here also draws the initial weights.
        megatron.training.initialize._warmup_jit_function = lambda tp_size=None: None
        use_built_helper()

    # They access the CUDA generator through torch._C.
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    # It reads its default, False, as a request for FP8, which needs Transformer Engine.
    checkpoint = random.CheckpointWithoutOutput
    begin = checkpoint.__init__
    checkpoint.__init__ = lambda self, fp8=None: begin(self, fp8 or None)

    # For the exchange of tokens it converts only a GPU's tensors to arrays.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
    )

    # Here the GPU's generator is the CPU's, so the warning that the CPU's must not change is wrong.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.msg)

    # The first save starts a helper process. Spawned, it would import Megatron again for each rank.
    filesystem_async.get_write_results_queue = partial(_write_results_queue, filesystem_async)

    # Megatron gives FSDP2 a mesh of "cuda" devices.
    DeviceMesh.from_group = partial(_on_the_cpu, DeviceMesh.from_group)  # type: ignore[method-assign]

    local_layers.install()
    _let_the_distributed_optimizer_resume(DistributedOptimizer)


def _write_results_queue(filesystem_async: Any, mode: str = "") -> Any:
    """The queue to Megatron's checkpoint helper, which here is forked and dies with this process.

    If it survived a killed rank, it would keep that rank's sockets open, and the other ranks would wait.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(initializer=end_with_the_parent)
        filesystem_async._results_queue = manager.Queue()
    return filesystem_async._results_queue


def _on_the_cpu(from_group: Any, group: Any, device_type: str, **named: Any) -> DeviceMesh:
    mesh: DeviceMesh = from_group(group, "cpu", **named)
    return mesh


def _let_the_distributed_optimizer_resume(optimizer_class: Any) -> None:
    """Correct four bugs on a path that Megatron takes only without Apex and Transformer Engine."""
    shard, load = optimizer_class.sharded_state_dict, optimizer_class.load_state_dict
    fill = optimizer_class._set_main_param_and_optimizer_states

    @wraps(shard)
    def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        # It reads the step number from torch's AdamW, which a new optimizer does not have yet.
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return shard(self, model, is_loading, *args, **kwargs)

    @wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        # It copies into parameters, which torch allows only without autograd.
        with torch.no_grad():
            load(self, state_dict)
        # It leaves the step number in the parameter groups, where AdamW does not read it.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    @wraps(fill)
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        # It expects AdamW's step number among a checkpoint's tensors, but it is elsewhere (see above).
        fill(self, model_param, defaultdict(lambda: None, tensors))

    optimizer_class._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    optimizer_class.sharded_state_dict = sharded_state_dict
    optimizer_class.load_state_dict = load_state_dict
