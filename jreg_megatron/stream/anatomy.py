"""The parts of a built Megatron model that the residual stream goes through.

What a layer is. In a ``GPTModel`` a ``TransformerLayer``, which holds attention and MLP. A ``HybridModel``
has sub-layers; there, a layer is an attention sub-layer and the MLP or experts behind it, so that a pattern
of such pairs gives the numbers of the ``GPTModel`` with the same weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from jreg_megatron.runtime.errors import UserError

MODELS = ("GPTModel", "HybridModel", "MambaModel")
"""Whose decoder's residual stream is known here. Before 0.18 a hybrid model is a MambaModel."""

LAYER_PARTS = ("self_attn_bda", "mlp_bda", "layer_number")
"""What a Megatron layer must have for its residual stream to be seen."""


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model chunk inside DDP and Float16Module wrappers."""
    while not hasattr(chunk, "decoder"):
        inner = getattr(chunk, "module", None)
        if not isinstance(inner, nn.Module):
            break
        chunk = inner
    return chunk


@dataclass(frozen=True)
class ResidualLayer:
    """A layer of a model chunk, as far as the residual stream goes."""

    number: int
    """1-based over the whole model."""
    first: Any
    """The module whose ``self_attn_bda`` adds to the layer's input."""
    last: Any
    """The module whose ``mlp_bda`` returns the layer's output; in a ``GPTModel`` the same."""


def residual_layers(chunk: nn.Module) -> list[ResidualLayer]:
    """The layers of an unwrapped model chunk, in order.

    Raises:
        UserError: if the chunk is not built as a ``GPTModel`` is, or as a ``HybridModel`` of pairs of
            attention and MLP; the message names what was looked for.
    """
    modules = getattr(getattr(chunk, "decoder", None), "layers", None)
    if modules is None or not any(kind.__name__ in MODELS for kind in type(chunk).__mro__):
        raise UserError(
            f"jreg_megatron does not support a {type(chunk).__name__}; it must be a Megatron-Core GPTModel "
            "or HybridModel, or derived from one"
        )
    pattern = _hybrid_pattern(chunk)
    if pattern is not None:
        _refuse_unpaired(pattern, chunk.config)
    elif not any(kind.__name__ == "GPTModel" for kind in type(chunk).__mro__):
        raise UserError(
            f"jreg_megatron does not support a {type(chunk).__name__} without a hybrid layer pattern; give "
            "one, such as --hybrid-override-pattern '*-*-*-*-'"
        )
    for module in modules:
        missing = [part for part in LAYER_PARTS if not hasattr(module, part)]
        if missing:
            raise UserError(
                f"the model's layers are {type(module).__name__}, which has no {' and no '.join(missing)}; "
                "the TransformerLayer of Megatron-Core 0.16 or later is supported"
            )
    if pattern is None:
        return [ResidualLayer(module.layer_number, module, module) for module in modules]
    pairs = zip(modules[::2], modules[1::2], strict=True)
    return [ResidualLayer(mlp.layer_number // 2, attention, mlp) for attention, mlp in pairs]


def final_norm_of(chunk: Any) -> nn.Module | None:
    """An unwrapped chunk's final norm; None where it has none, or one that does nothing."""
    norm = getattr(chunk.decoder, "final_layernorm", None)
    if norm is None:
        norm = getattr(chunk.decoder, "final_norm", None)  # HybridModel's
    return None if type(norm).__name__ in ("Identity", "IdentityOp") else norm


def num_layers(chunk: Any) -> int:
    """How many layers the whole model has that an unwrapped chunk is part of."""
    count: int = chunk.config.num_layers
    return count if _hybrid_pattern(chunk) is None else count // 2


def last_stage_has_a_layer(chunk: Any) -> bool:
    """Whether a hybrid model's last pipeline stage holds a layer; of other models the settings tell."""
    pattern = _hybrid_pattern(chunk)
    return pattern is None or bool(pattern.rpartition("|")[2])


def last_stage_is_given_a_layer(model_config: Any) -> bool:
    """Whether the final norm's pipeline stage gets the last layer, as far as settings tell.

    Args:
        model_config: Megatron's ``TransformerConfig``, or parsed arguments, which use the same names.
    """

    def value(name: str) -> Any:
        return getattr(model_config, name, None)

    if value("mtp_num_layers"):
        return True  # then Megatron puts the final norm behind the last layer, wherever that is
    if layout := value("pipeline_model_parallel_layout"):
        return any(getattr(kind, "name", kind) == "decoder" for kind in _stages_of(layout)[-1])
    if value("account_for_loss_in_pipeline_split"):
        counted = value("num_layers") + 1 + bool(value("account_for_embedding_in_pipeline_split"))
        stages = value("pipeline_model_parallel_size") * (value("virtual_pipeline_model_parallel_size") or 1)
        return bool(counted // stages > 1)
    return True


def _stages_of(layout: Any) -> list[list[Any]]:
    """What each stage of a pipeline layout holds, by the names of Megatron's ``LayerType``."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    given = getattr(layout, "input_data", layout)
    stages: list[list[Any]] = given
    if isinstance(given, str):
        stages = PipelineParallelLayerLayout.parse_str_to_list(given)
    return stages


def _hybrid_pattern(chunk: Any) -> str | None:
    """A ``HybridModel``'s pattern of sub-layers without multi-token prediction; None for other models."""
    pattern = getattr(chunk, "hybrid_layer_pattern", None) or getattr(chunk, "hybrid_override_pattern", None)
    return pattern.partition("/")[0] if isinstance(pattern, str) else None


def _refuse_unpaired(pattern: str, config: Any) -> None:
    """Refuse, on every rank alike, a pattern whose layers are not whole pairs on every stage."""
    stages = pattern.split("|")
    sizes = [len(stage) for stage in stages]
    if len(stages) == 1:
        # Without bars Megatron deals sub-layers out evenly, the first and the last stage apart if asked.
        ends = [config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage]
        given = [size for size in ends if size is not None]
        others = config.pipeline_model_parallel_size - len(given)
        sizes = [*given, (len(pattern) - sum(given)) // others] if others else given
    if any(size % 2 for size in sizes) or not all(re.fullmatch(r"(\*[-E])*", stage) for stage in stages):
        raise UserError(
            f"jreg_megatron does not support the hybrid layer pattern {pattern}; it must be made of pairs of "
            "attention and MLP ('*-') or attention and experts ('*E'), whole on every pipeline stage"
        )
    if config.recompute_granularity == "full" and (
        config.recompute_method != "uniform" or config.recompute_num_layers % 2
    ):
        raise UserError(
            f"jreg_megatron does not support --recompute-method {config.recompute_method} with "
            f"--recompute-num-layers {config.recompute_num_layers} in a hybrid model, since it parts "
            "attention from MLP; take uniform and an even number"
        )
