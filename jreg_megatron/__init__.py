"""JREG for Megatron-Core: measure and suppress the last-layer jump of hidden states in pretraining.

The regularizer is the one of *Suppressing Final Layer Hidden State Jumps in Transformer Pretraining*
(arXiv 2601.18302). What is named here needs torch alone, and imports it when it is first asked for, so that
the tools which need no torch start at once; only what touches a Megatron model imports Megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jreg_megatron.attachment import JRegHandle, attach
    from jreg_megatron.errors import UserError
    from jreg_megatron.formulas import displacement, jump_rate, layer_weights
    from jreg_megatron.metrics import JRegMetrics
    from jreg_megatron.settings import JRegConfig

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
    "JRegConfig": "settings",
    "JRegHandle": "attachment",
    "JRegMetrics": "metrics",
    "UserError": "errors",
    "attach": "attachment",
    "displacement": "formulas",
    "jump_rate": "formulas",
    "layer_weights": "formulas",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
