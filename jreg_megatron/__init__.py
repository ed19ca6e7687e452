"""JREG for Megatron-Core: measure and suppress the last-layer jump of hidden states in pretraining.

The regularizer is the one of *Suppressing Final Layer Hidden State Jumps in Transformer Pretraining*
(arXiv 2601.18302). Importing this package needs torch alone; only what touches a Megatron model
imports Megatron.
"""

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
