"""JREG for Megatron-Core: measure and suppress the last-layer jump of hidden states in pretraining.

The regularizer is the one of *Suppressing Final Layer Hidden State Jumps in Transformer Pretraining*
(arXiv 2601.18302). What is named here needs torch alone, and imports it when it is first asked for, so that
the tools which need no torch start at once; only what touches a Megatron model imports Megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jreg_megatron.methods.jreg.formulas import displacement, jump_rate, layer_weights
    from jreg_megatron.methods.jreg.settings import JRegConfig
    from jreg_megatron.runtime.errors import UserError
    from jreg_megatron.stream.attachment import JRegHandle, attach
    from jreg_megatron.stream.metrics import JRegMetrics

__version__ = "0.1.0"

__all__ = [
    "JRegConfig",
    "JRegHandle",
    "JRegMetrics",
    "UserError",
    "attach",
    "displacement",
    "jump_rate",
    "layer_weights",
]

_MODULES = {
    "JRegConfig": "methods.jreg.settings",
    "JRegHandle": "stream.attachment",
    "JRegMetrics": "stream.metrics",
    "UserError": "runtime.errors",
    "attach": "stream.attachment",
    "displacement": "methods.jreg.formulas",
    "jump_rate": "methods.jreg.formulas",
    "layer_weights": "methods.jreg.formulas",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
