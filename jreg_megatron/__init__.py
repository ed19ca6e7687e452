"""JREG for Megatron-Core: measure and suppress the last-layer jump of hidden states in pretraining.

The regularizer is the one of *Suppressing Final Layer Hidden State Jumps in Transformer Pretraining*
(arXiv 2601.18302). The names here need only torch, which is imported when a name is first used. So tools that
need no torch start at once. Only code for a Megatron model imports Megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jreg_megatron.methods.attenuation.settings import AttenuationConfig
    from jreg_megatron.methods.depth.depth import DepthMetrics
    from jreg_megatron.methods.depth.settings import DepthConfig
    from jreg_megatron.methods.jreg.formulas import displacement, jump_rate, layer_weights
    from jreg_megatron.methods.jreg.regularizer import JRegMetrics
    from jreg_megatron.methods.jreg.settings import JRegConfig
    from jreg_megatron.methods.let.settings import LETConfig
    from jreg_megatron.methods.lns.settings import LayerNormScalingConfig
    from jreg_megatron.methods.norms.norms import NormsMetrics
    from jreg_megatron.methods.norms.settings import NormsConfig
    from jreg_megatron.methods.periln.settings import PeriLNConfig
    from jreg_megatron.methods.slowqk.settings import SlowQKConfig
    from jreg_megatron.runtime.errors import UserError
    from jreg_megatron.stream.attachment import attach
    from jreg_megatron.stream.handle import Handle
    from jreg_megatron.stream.method import Metrics
    from jreg_megatron.stream.preparation import prepare

__version__ = "0.1.0"

__all__ = [
    "AttenuationConfig",
    "DepthConfig",
    "DepthMetrics",
    "Handle",
    "JRegConfig",
    "JRegMetrics",
    "LETConfig",
    "LayerNormScalingConfig",
    "Metrics",
    "NormsConfig",
    "NormsMetrics",
    "PeriLNConfig",
    "SlowQKConfig",
    "UserError",
    "attach",
    "displacement",
    "jump_rate",
    "layer_weights",
    "prepare",
]

_MODULES = {
    "AttenuationConfig": "methods.attenuation.settings",
    "DepthConfig": "methods.depth.settings",
    "DepthMetrics": "methods.depth.depth",
    "JRegConfig": "methods.jreg.settings",
    "Handle": "stream.handle",
    "JRegMetrics": "methods.jreg.regularizer",
    "LETConfig": "methods.let.settings",
    "LayerNormScalingConfig": "methods.lns.settings",
    "Metrics": "stream.method",
    "NormsConfig": "methods.norms.settings",
    "NormsMetrics": "methods.norms.norms",
    "PeriLNConfig": "methods.periln.settings",
    "SlowQKConfig": "methods.slowqk.settings",
    "UserError": "runtime.errors",
    "attach": "stream.attachment",
    "displacement": "methods.jreg.formulas",
    "jump_rate": "methods.jreg.formulas",
    "layer_weights": "methods.jreg.formulas",
    "prepare": "stream.preparation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
