"""A stand-in for the kernels of HybridEP and for experts that run on their results, without a GPU.

Megatron's own dispatcher, rank capacity and rerun use them. Here each rank gathers all tokens of its group
and takes those of its experts, up to the given number, in an order that the host need not know. Tokens that
do not fit are left out, and the handle's flag is set.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import full_cuda_graph, pipeline_parallel
from megatron.core.transformer.moe import experts, fused_a2a, token_dispatcher
from megatron.core.transformer.moe.paged_stash import PagedStashRunner
from torch import Tensor

from jreg_megatron.selftest import step as selftest_step

RERUNS: list[bool] = []
"""For each iteration that was run again, whether it was one of training."""


def install(capacity: float) -> None:
    """Have the self-test's models use these: experts that take a limited number of tokens for a rank.

    Args:
        capacity: ``moe_expert_rank_capacity_factor``.
    """
    _install_kernels()
    step: Any = selftest_step
    make_config, attach = step.config_of, step.attach
    graphs: Any = full_cuda_graph
    schedules: Any = pipeline_parallel
    wrapper, schedule_of = graphs.FullCudaGraphWrapper, schedules.get_forward_backward_func
    chunks: list[Any] = []

    def config_of(*given: Any) -> Any:
        config = make_config(*given)
        vars(config).update(
            moe_token_dispatcher_type="flex",
            moe_flex_dispatcher_backend="hybridep",
            moe_expert_rank_capacity_factor=capacity,
            moe_expert_capacity_factor=None,
            moe_pad_expert_input_to_capacity=False,
        )
        return config

    def in_runner(run: Any) -> Any:
        """As Megatron's loop does it."""
        graphs.FullCudaGraphWrapper = wrapper
        return PagedStashRunner(chunks[0].config, False, chunks, None, run)

    def attached(wrapped: list[Any], *settings: Any, **named: Any) -> Any:
        chunks.extend(wrapped)
        handle = attach(wrapped, *settings, **named)
        graphs.FullCudaGraphWrapper = lambda *given, **named: in_runner(wrapper(*given, **named))
        return handle

    def schedule() -> Any:
        has_graph = chunks[0].config.cuda_graph_impl != "none"
        return schedule_of() if has_graph else in_runner(schedule_of())

    step.config_of, step.attach = config_of, attached
    schedules.get_forward_backward_func = schedule
    runner: Any = PagedStashRunner
    prepare = runner.prepare_for_rerun

    def counted(self: Any, is_training: bool = True) -> None:
        RERUNS.append(is_training)
        prepare(self, is_training)

    runner.prepare_for_rerun = counted


def _install_kernels() -> None:
    """Have Megatron's dispatcher ``flex`` use these."""

    package: Any = ModuleType("deep_ep")
    package.HybridEPBuffer = Buffer
    sys.modules["deep_ep"] = package
    kernels: Any = importlib.reload(fused_a2a)
    dispatcher: Any = token_dispatcher
    dispatcher.hybrid_ep_dispatch = kernels.hybrid_ep_dispatch
    dispatcher.hybrid_ep_combine = kernels.hybrid_ep_combine
    dispatcher.get_align_size_for_quantization = lambda _: 1  # else 256, more tokens than there are
    of_rank: Any = experts.SequentialMLP
    of_rank.forward = _run_experts


class Buffer:
    """Replaces ``deep_ep.HybridEPBuffer``."""

    def __init__(self, group: dist.ProcessGroup, num_local_experts: int, **_: Any) -> None:
        self._group = group
        self._first = group.rank() * num_local_experts
        self._experts = slice(self._first, self._first + num_local_experts)

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        num_permuted_tokens: int | None = None,
        handle: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None, Tensor, Any]:
        """The tokens of this rank's experts, one expert after the other, and the handle to send them back."""
        every = self._gather(hidden)
        if handle is None:
            assert routing_map is not None
            wanted = self._gather(routing_map.to(torch.uint8))[:, self._experts].T.flatten() > 0
            size = int(wanted.sum()) if num_permuted_tokens is None else num_permuted_tokens
            places = torch.argsort((~wanted).to(torch.uint8), stable=True)[:size]
            overflow = (wanted.sum() > size).int().view(1)
            handle = places, wanted[places], routing_map.shape, overflow
        places, is_token = handle[:2]
        given = None
        if probs is not None:
            given = torch.where(is_token, self._gather(probs)[:, self._experts].T.flatten()[places], 0.0)
        per_expert = (places // len(every))[:, None] == torch.arange(
            self._experts.stop - self._first, device=places.device
        )
        counts = (per_expert & is_token[:, None]).sum(0)
        tokens = torch.where(is_token[:, None], every[places % len(every)], 0.0)
        return tokens, given, None, counts, handle

    def combine_with_unpermute(
        self, *, hidden: Tensor, probs: Tensor | None = None, handle: Any, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of all experts' outputs for each token of this rank, and the probabilities per token."""
        places, is_token, (tokens, num_experts), _ = handle
        number = tokens * self._group.size()
        back = hidden.new_zeros(number, hidden.shape[1])
        back.index_add_(0, places % number, torch.where(is_token[:, None], hidden, 0.0))
        own = slice(self._group.rank() * tokens, (self._group.rank() + 1) * tokens)
        dist.all_reduce(back, group=self._group)
        if probs is None:
            return back[own], None
        of_experts = probs.new_zeros(number, num_experts)
        columns = self._first + places // number
        of_experts.index_put_((places % number, columns), torch.where(is_token, probs, 0.0), accumulate=True)
        dist.all_reduce(of_experts, group=self._group)
        return back[own], of_experts[own]

    def _gather(self, own: Tensor) -> Tensor:
        every = own.new_empty(len(own) * self._group.size(), own.shape[1])
        dist.all_gather_into_tensor(every, own.contiguous(), group=self._group)
        return every


def _run_experts(
    self: Any, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Each expert on all tokens, of which its own count: the host does not know which."""
    ends = tokens_per_expert.cumsum(0)
    at = torch.arange(len(tokens), device=tokens.device)
    output = torch.zeros_like(tokens)
    for expert, end, count in zip(self.local_experts, ends, tokens_per_expert, strict=True):
        is_own = (at < end) & (at >= end - count)
        output = output + torch.where(is_own[:, None], expert(tokens, probs)[0], 0.0)
    return output, None
