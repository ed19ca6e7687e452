"""The parts of a built Megatron model on the residual stream.

What a layer is. In a ``GPTModel``, a layer is a ``TransformerLayer``: attention and MLP. A ``HybridModel``
has sub-layers. Mixers mix tokens: attention, latent attention, gated delta net, Mamba. The others are
feed-forward: MLP and experts. In a ``HybridModel``, a layer is a mixer with the feed-forward sub-layers after
it. So a pattern of pairs gives the same numbers as the ``GPTModel`` with the same weights. Feed-forward
sub-layers before the first mixer are one layer. If the setting ``layer`` is ``sublayer``, every sub-layer is
a layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from torch import nn

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.settings import LAYER_RULES

MODELS = ("GPTModel", "HybridModel", "MambaModel")
"""The supported models. Before 0.18 a hybrid model is a MambaModel."""

MIXERS, FEED_FORWARD = "*+DGM", "-E"
"""The sub-layers of a hybrid pattern, by Megatron's symbols."""

_ADDS = ("self_attn_bda", "mamba_bda", "mlp_bda")
"""The bias-dropout-adds, in call order. With these a module adds to the residual stream."""

_RULE = "_jreg_layer"


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
    """The two ends of a layer on the residual stream."""

    number: int
    """1-based over the whole model."""
    first: Any
    """The module that gets the layer's input."""
    last: Any
    """The module that returns the layer's output; in a ``GPTModel`` the same module."""
    adds: tuple[tuple[Any, str], ...]
    """The first bias-dropout-add, which adds to the layer's input, and the last one, which returns the
    layer's output: module and attribute each. A single entry if one is both."""
    kinds: str = ""
    """The sub-layers of a hybrid model's layer, in the pattern's symbols."""


def define_layers(chunks: Sequence[Any], rule: str | None) -> None:
    """Store the definition of a layer in unwrapped model chunks.

    Args:
        chunks: of one model.
        rule: one of ``LAYER_RULES``; None removes the stored rule.
    """
    for chunk in chunks:
        if rule is not None:
            setattr(chunk, _RULE, rule)
        elif hasattr(chunk, _RULE):
            delattr(chunk, _RULE)


def layers_of(pattern: str, rule: str = "mixer") -> list[str]:
    """The layers of a hybrid model, each as the symbols of its sub-layers.

    Args:
        pattern: as :func:`sublayers_of` returns it.
        rule: one of ``LAYER_RULES``.

    Raises:
        UserError: for an unknown sub-layer.
    """
    if unknown := [kind for kind in dict.fromkeys(pattern) if kind not in MIXERS + FEED_FORWARD]:
        raise UserError(
            f"jreg_megatron does not support the sub-layer {' or '.join(unknown)} of the hybrid layer "
            f"pattern {pattern}; known are {' '.join(MIXERS + FEED_FORWARD)}"
        )
    return list(pattern) if rule == "sublayer" else _A_LAYER.findall(pattern)


_A_LAYER = re.compile(f"[{MIXERS}][{FEED_FORWARD}]*|[{FEED_FORWARD}]+")


def residual_layers(chunk: nn.Module) -> list[ResidualLayer]:
    """The layers of an unwrapped model chunk, in order.

    Raises:
        UserError: if the chunk is not built like a ``GPTModel`` or a ``HybridModel``, or holds only a part of
            a layer.
    """
    modules = getattr(getattr(chunk, "decoder", None), "layers", None)
    if modules is None or not any(kind.__name__ in MODELS for kind in type(chunk).__mro__):
        raise UserError(
            f"jreg_megatron does not support a {type(chunk).__name__}; it must be a Megatron-Core GPTModel "
            "or HybridModel, or derived from one"
        )
    pattern, rule = sublayers_of(chunk), _rule_of(chunk)
    if pattern is not None:
        return _hybrid_layers(pattern, rule, list(modules), chunk.config)
    if not any(kind.__name__ == "GPTModel" for kind in type(chunk).__mro__):
        raise UserError(
            f"jreg_megatron does not support a {type(chunk).__name__} without a hybrid layer pattern; give "
            "one, such as --hybrid-override-pattern '*-*-*-*-'"
        )
    if rule != LAYER_RULES[0]:
        raise UserError(
            f"the setting layer is '{rule}', but the layers of a {type(chunk).__name__} have no sub-layers; "
            "leave it out"
        )
    return [_layer(module.layer_number, [module]) for module in modules]


def _layer(number: int, modules: Sequence[Any], kinds: str = "") -> ResidualLayer:
    first, last = modules[0], modules[-1]
    add_first, add_last = (first, _adds_of(first)[0]), (last, _adds_of(last)[-1])
    is_one = first is last and add_first[1] == add_last[1]
    return ResidualLayer(number, first, last, (add_first,) if is_one else (add_first, add_last), kinds)


def _adds_of(module: Any) -> list[str]:
    """The names of a module's bias-dropout-adds that are not identities; at least one."""
    names = [name for name in _ADDS if not _does_nothing(getattr(module, name, None))]
    missing = ["layer_number"] * (not hasattr(module, "layer_number"))
    if not names:
        missing.append(f"{', '.join(_ADDS)} that adds to its input")
    if missing:
        raise UserError(
            f"the model's layers are {type(module).__name__}, which has no {' and no '.join(missing)}; "
            "TransformerLayer and MambaLayer of Megatron-Core 0.16 or later are supported"
        )
    for name in names:
        if isinstance(add := getattr(module, name), nn.Module):
            raise UserError(
                f"{name} of a {type(module).__name__} is a module, {type(add).__name__}, which jreg_megatron "
                "cannot replace; give the layer a function, such as get_bias_dropout_add"
            )
    return names


def _does_nothing(part: Any) -> bool:
    return part is None or type(part).__name__ in ("Identity", "IdentityOp", "IdentityFuncOp")


def _hybrid_layers(pattern: str, rule: str, modules: list[Any], config: Any) -> list[ResidualLayer]:
    """The layers of a hybrid model's chunk. The pattern counts them, because other stages hold the rest."""
    adds = [_adds_of(module)[0] for module in modules]
    numbers = [module.layer_number for module in modules]
    start = numbers[0] - 1 if numbers else 0
    held = pattern[max(start, 0) : start + len(modules)]
    if numbers != list(range(start + 1, start + 1 + len(held))):
        raise UserError(
            f"the sub-layers of a model chunk have the numbers (layer_number) {' '.join(map(str, numbers))}, "
            f"and the hybrid layer pattern {pattern} has {len(pattern)} sub-layers; jreg_megatron needs "
            "consecutive numbers within the pattern"
        )
    for module, kind, add in zip(modules, held, adds, strict=True):
        if (kind in FEED_FORWARD) != (add == "mlp_bda"):
            raise UserError(
                f"sub-layer {module.layer_number} is '{kind}' in the hybrid layer pattern {pattern}, but it "
                f"is a {type(module).__name__} that adds to its input by {add}; a sub-layer must add only by "
                "mlp_bda if it is '-' or 'E', and by another one if not"
            )
    found, end = [], -start
    for number, kinds in enumerate(layers_of(pattern, rule), start=1):
        begin, end = end, end + len(kinds)
        if end <= 0 or begin >= len(modules):
            continue
        if begin < 0 or end > len(modules):
            raise UserError(
                f"jreg_megatron does not support the hybrid layer pattern {pattern} with these pipeline "
                f"stages, which split layer {number}, '{kinds}'; begin each stage with a mixer, or "
                "count every sub-layer as a layer: set 'layer' of each method to 'sublayer'"
            )
        found.append(_layer(number, modules[begin:end], kinds))
    _refuse_parting_recompute(found, config)
    return found


def _refuse_parting_recompute(layers: list[ResidualLayer], config: Any) -> None:
    """Refuse full recompute that splits a layer: its input and output would come from two runs."""
    if config.recompute_granularity != "full":
        return
    together = config.recompute_num_layers if config.recompute_method == "uniform" else 1  # a checkpoint
    ends = [0, *accumulate(len(layer.kinds) for layer in layers)]
    if not {*range(0, ends[-1], together)} <= {*ends}:
        raise UserError(
            f"jreg_megatron does not support --recompute-method {config.recompute_method} with "
            f"--recompute-num-layers {config.recompute_num_layers} in a hybrid model of the layers "
            f"{' '.join(layer.kinds for layer in layers)}, since it splits one of them; use uniform with a "
            "number of sub-layers at which layers end, or count every sub-layer as a layer: set 'layer' of "
            "each method to 'sublayer'"
        )


def described_layers(model: Any) -> str:
    """One line that describes the layers of a hybrid model; empty for other models.

    Args:
        model: as :func:`sublayers_of` takes it.
    """
    if (pattern := sublayers_of(model)) is None:
        return ""
    rule = _rule_of(model)
    runs = [(kinds, len(list(run))) for kinds, run in groupby(layers_of(pattern, rule))]
    what = {
        "mixer": "a layer is a mixer with the feed-forward sub-layers after it",
        "sublayer": "a layer is a sub-layer",
    }
    shown = " ".join(kinds if times == 1 else f"{times}x{kinds}" for kinds, times in runs)
    return f"{what[rule]}; layers 1 to {num_layers(model)}: {shown}"


def final_norm_of(chunk: Any) -> nn.Module | None:
    """An unwrapped chunk's final norm; None if it has none, or an identity."""
    norm = getattr(chunk.decoder, "final_layernorm", None)
    if norm is None:
        norm = getattr(chunk.decoder, "final_norm", None)  # HybridModel's
    return None if _does_nothing(norm) else norm


def num_layers(chunk: Any) -> int:
    """The number of layers of the whole model.

    Args:
        chunk: an unwrapped model chunk; for a hybrid model also its arguments.
    """
    if (pattern := sublayers_of(chunk)) is not None:
        return len(layers_of(pattern, _rule_of(chunk)))
    count: int = chunk.config.num_layers
    return count


def last_stage_has_a_layer(chunk: Any) -> bool:
    """Whether a hybrid model's last pipeline stage holds a layer; True for other models."""
    pattern = _pattern_of(chunk)
    return pattern is None or bool(pattern.rpartition("|")[2])


def last_stage_is_given_a_layer(model_config: Any) -> bool:
    """Whether the settings put the last layer on the final norm's pipeline stage.

    Args:
        model_config: Megatron's ``TransformerConfig``, or parsed arguments, which use the same names.
    """

    def value(name: str) -> Any:
        return getattr(model_config, name, None)

    if value("mtp_num_layers"):
        return True  # then Megatron puts the final norm on the last layer's stage
    if layout := value("pipeline_model_parallel_layout"):
        return any(getattr(kind, "name", kind) == "decoder" for kind in _stages_of(layout)[-1])
    if value("account_for_loss_in_pipeline_split"):
        counted = value("num_layers") + 1 + bool(value("account_for_embedding_in_pipeline_split"))
        stages = value("pipeline_model_parallel_size") * (value("virtual_pipeline_model_parallel_size") or 1)
        return bool(counted // stages > 1)
    return True


def _stages_of(layout: Any) -> list[list[Any]]:
    """The contents of each stage of a pipeline layout, in the names of Megatron's ``LayerType``."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    given = getattr(layout, "input_data", layout)
    stages: list[list[Any]] = given
    if isinstance(given, str):
        stages = PipelineParallelLayerLayout.parse_str_to_list(given)
    return stages


def sublayers_of(model: Any) -> str | None:
    """A hybrid model's sub-layers without stages and multi-token prediction; None for other models.

    Args:
        model: a model chunk, or Megatron's arguments, which use the same names.
    """
    pattern = _pattern_of(model)
    return None if pattern is None else pattern.replace("|", "")


def _pattern_of(model: Any) -> str | None:
    pattern = getattr(model, "hybrid_layer_pattern", None) or getattr(model, "hybrid_override_pattern", None)
    return pattern.partition("/")[0] if isinstance(pattern, str) else None


def _rule_of(chunk: Any) -> str:
    rule: str = getattr(chunk, _RULE, LAYER_RULES[0])
    return rule
