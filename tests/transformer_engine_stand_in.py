"""The classes of Transformer Engine that Megatron's layers subclass, in plain torch, without its kernels.

They have the real interfaces and keep their promises: one rank, no FP8 arithmetic. As in
the real package, ``checkpoint`` runs first under ``no_grad``, keeps its inputs and runs again on their
memory. A norm takes any type and returns its weight's. A norm within a linear layer takes only its weight's.
"""

from __future__ import annotations

import functools
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

VERSION = "2.6.0"
"""The stand-in's version. Later versions have more modules, which Megatron imports without a check."""


def install() -> None:
    """Make ``import transformer_engine`` find the stand-in. To be called before Megatron is imported."""
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        "common": {},
        "common.recipe": {
            "DelayedScaling": _Recipe,
            "Format": SimpleNamespace(E4M3=0, HYBRID=1),
        },
        "pytorch": {
            "Linear": Linear,
            "LayerNormLinear": LayerNormLinear,
            "LayerNorm": Norm,
            "RMSNorm": Norm,
            "DotProductAttention": DotProductAttention,
            "GroupedLinear": GroupedLinear,
            "fp8_autocast": fp8_autocast,
        },
        "pytorch.ops": {
            "FusibleOperation": nn.Module,
            "Sequential": Sequential,
            "MakeExtraOutput": MakeExtraOutput,
            "RMSNorm": Norm,
            "BasicLinear": Linear,
            "SwiGLU": SwiGLU,
        },
        "pytorch.distributed": {
            "CudaRNGStatesTracker": object,
            "activation_recompute_forward": lambda **_: nullcontext(),
            "checkpoint": checkpoint,
        },
        "pytorch.fp8": {
            "FP8GlobalStateManager": SimpleNamespace(is_fp8_enabled=lambda: False),
            "fp8_autocast": fp8_autocast,
            "fp8_model_init": fp8_autocast,
        },
        "pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
        "pytorch.cpu_offload": {"get_cpu_offload_context": get_cpu_offload_context},
        "pytorch.float8_tensor": {"Float8Tensor": type("Float8Tensor", (), {})},
    }
    for path, content in contents.items():
        name = ".".join(filter(None, ("transformer_engine", path)))
        module: Any = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


CALLS: set[str] = set()
"""Calls that a test checks."""


class _Recipe:
    def __init__(self, **_: Any) -> None:
        pass


def fp8_autocast(**_: Any) -> Any:
    CALLS.add("fp8")
    return nullcontext()


def checkpoint(function: Any, *args: Any, **named: Any) -> Any:
    CALLS.add("checkpoint")
    for option in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        del named[option]
    whole = functools.partial(function, **named)
    return torch.utils.checkpoint.checkpoint(whole, *args, use_reentrant=True)


def get_cpu_offload_context(enabled: bool, *_: Any, **__: Any) -> Any:
    return (Offload() if enabled else nullcontext()), lambda state: state


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Every tensor that is saved is replaced by a copy; the backward pass gets the copy."""

    inside_context = False

    def __init__(self) -> None:
        super().__init__(self._take_away, lambda copy: copy)

    @staticmethod
    def _take_away(saved: Tensor) -> Tensor:
        CALLS.add("offload")
        return saved.detach().clone()


class Norm(nn.Module):
    """RMSNorm, whatever it is called."""

    def __init__(
        self,
        normalized_shape: Any = None,
        *,
        eps: float,
        hidden_size: int | None = None,
        device: Any = None,
        **named: Any,
    ) -> None:
        super().__init__()
        dtype = named.get("params_dtype", named.get("dtype"))
        self.weight = nn.Parameter(torch.ones(normalized_shape or hidden_size, device=device, dtype=dtype))
        self.eps, self.zero_centered_gamma = eps, False

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(weight.dtype)


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int, device: Any = None, **named: Any) -> None:
        super().__init__()
        dtype = named.get("params_dtype", named.get("dtype"))
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias, self.use_bias, self.parallel_mode = None, False, named.get("parallel_mode")
        self.ub_name = None
        self.sequence_parallel = self.fuse_wgrad_accumulation = False

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        CALLS.add("linear")
        return F.linear(x, self.weight)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, eps: float, **named: Any) -> None:
        super().__init__(in_features, out_features, **named)
        self.layer_norm_weight, self.layer_norm_bias = nn.Parameter(torch.ones_like(self.weight[0])), None
        self.eps, self.normalization, self.zero_centered_gamma = eps, "RMSNorm", False

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        if x.dtype != self.weight.dtype:
            raise TypeError("data types for parameters must match")
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps))


class GroupedLinear(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError


class DotProductAttention(nn.Module):
    """Causal attention on ``[s, b, heads, d]``."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


class MakeExtraOutput(nn.Module):
    pass


class SwiGLU(nn.Module):
    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Sequential(nn.Sequential):
    """Returns the last operation's output, followed by the input of each ``MakeExtraOutput``."""

    def forward(self, x: Tensor) -> Any:
        CALLS.add("ops")
        extra = []
        for op in self:
            if isinstance(op, MakeExtraOutput):
                extra.append(x.view_as(x))
            else:
                x = op(x)
        return (x, *extra) if extra else x
