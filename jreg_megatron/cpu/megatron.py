"""Changes the few places in Megatron that refuse a CPU although they need no CUDA."""

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
    """Import Megatron without the packages for GPUs, and with ``torch.compile`` doing nothing.

    Megatron takes those packages wherever they are. Compiling costs more than it saves here.
    """
    for name in _FOR_GPUS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    torch.compile = uncompiled  # type: ignore[assignment]
    import megatron.core.models.gpt.gpt_model

    if has_training_loop():
        import megatron.training  # noqa: F401


def install() -> None:
    """Patch Megatron in this process, for good."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    from jreg_megatron.mcore import local_layers

    if has_training_loop():
        import megatron.training

        # Megatron has an argument for runs without CUDA, which its training loop does not pass on.
        initialize = partial(megatron.training.initialize.initialize_megatron, allow_no_cuda=True)
        for module in (megatron.training, megatron.training.initialize, megatron.training.training):
            module.initialize_megatron = initialize
        # It draws a number of random values that depends on the layout, from what is here the generator of
        # the initial weights too, to warm up kernels that are not compiled here.
        megatron.training.initialize._warmup_jit_function = lambda tp_size=None: None
        use_built_helper()

    # They reach for the CUDA generator through torch._C.
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    # It takes its default, False, for a wish for FP8, which needs Transformer Engine.
    checkpoint = random.CheckpointWithoutOutput
    begin = checkpoint.__init__
    checkpoint.__init__ = lambda self, fp8=None: begin(self, fp8 or None)

    # It makes the arrays that an exchange of tokens takes of a GPU's tensors only.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
    )

    # Here the GPU's generator is the CPU's, so the warning for it to stay put in a fork is void.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.msg)

    # The first save starts a helper process; started afresh, it would import Megatron once more in each rank.
    filesystem_async.get_write_results_queue = partial(_write_results_queue, filesystem_async)

    # FSDP2 is given a mesh of CUDA devices by name.
    DeviceMesh.from_group = partial(_on_the_cpu, DeviceMesh.from_group)  # type: ignore[method-assign]

    local_layers.install()
    _let_the_distributed_optimizer_resume(DistributedOptimizer)


def _write_results_queue(filesystem_async: Any, mode: str = "") -> Any:
    """The queue to Megatron's checkpoint helper, which here is forked and ends with this process.

    Were it to outlive a killed rank, it would hold that rank's sockets open and let the others wait.
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
        # It asks torch's AdamW for the number of its step, which a new one has not yet.
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return shard(self, model, is_loading, *args, **kwargs)

    @wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        # It copies into parameters, which torch allows outside of autograd only.
        with torch.no_grad():
            load(self, state_dict)
        # It leaves the number of the step with the parameter groups, where AdamW does not look for it.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    @wraps(fill)
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        # It looks for AdamW's step among the tensors of a checkpoint that has it elsewhere (see above).
        fill(self, model_param, defaultdict(lambda: None, tensors))

    optimizer_class._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    optimizer_class.sharded_state_dict = sharded_state_dict
    optimizer_class.load_state_dict = load_state_dict
