"""Hybrid models of Megatron's whose sub-layers are whole pairs: the ``GPTModel`` with the same weights.

In a ``HybridModel`` attention ('*') and MLP ('-') are layers of their own. A pair of them computes what one
layer of a ``GPTModel`` does, so such a checkpoint is read as one, under other names.
"""

from __future__ import annotations

import re
from typing import Any

from jreg_megatron.cpu.flags import HYBRID_SPECS
from jreg_megatron.decoder.megatron_folder import bridge_as
from jreg_megatron.runtime.errors import UserError

_PAIRS = re.compile(r"(\*-)+")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_OF_THE_MLP = ("mlp.", "pre_mlp_layernorm.")
# They go by the layer's number, and a hybrid model counts sub-layers.
_BY_NUMBER = ("no_rope_freq", "window_attn_skip_freq")


def pattern_of(arguments: dict[str, Any]) -> str | None:
    """The sub-layers, without those that predict further ahead and without stages; None for other models."""
    pattern = arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern")
    if not pattern:
        return "" if arguments.get("is_hybrid_model") else None
    return str(pattern).partition("/")[0].replace("|", "")


def refuse_other_hybrids(arguments: dict[str, Any], what: str) -> None:
    """Refuse a hybrid model that is no ``GPTModel`` in pairs.

    Raises:
        UserError: naming its pattern, and what else can read it.
    """
    pattern = pattern_of(arguments)
    if pattern is None:
        return
    if not _PAIRS.fullmatch(pattern):
        raise UserError(
            f"{what} is a hybrid model of the layers {pattern or '?'}, and only pairs of attention and MLP "
            f"('*-') can be run; {bridge_as('Nemotron-H')}, and name the Hugging Face folder"
        )
    spec = arguments.get("spec")
    if spec and tuple(spec) not in HYBRID_SPECS:
        raise UserError(
            f"{what} has layers of its own (--spec {' '.join(spec)}), which cannot be run; export it with "
            "the tool that trained it, and name the Hugging Face folder"
        )
    for name in _BY_NUMBER:
        if arguments.get(name):
            raise UserError(
                f"{what} is a hybrid model with --{name.replace('_', '-')} {arguments[name]}, which cannot "
                "be run; export it with the tool that trained it, and name the Hugging Face folder"
            )


def as_gpt(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the ``GPTModel`` that computes the same; those of other models as they are."""
    pattern = pattern_of(arguments)
    if pattern is None:
        return arguments
    # HybridModel is never told of --use-rope-scaling.
    none = dict.fromkeys(("hybrid_layer_pattern", "hybrid_override_pattern", "spec"))
    return arguments | none | {"num_layers": len(pattern) // 2, "use_rope_scaling": False}


def hybrid_name(name: str) -> str:
    """The name of a weight of the ``GPTModel``, layers not stacked, in the hybrid model."""
    if found := _LAYER.fullmatch(name):
        number = 2 * int(found[1]) + found[2].startswith(_OF_THE_MLP)
        return f"decoder.layers.{number}.{found[2]}"
    return name.replace("decoder.final_layernorm.", "decoder.final_norm.")
