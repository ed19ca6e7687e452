"""Steps of the toy model in Megatron's Transformer Engine specs, compared with the reference.

A separate process, ``python transformer_engine_step.py RESULTS CASES...``: Megatron looks for Transformer
Engine at its import. Here it finds the stand-in.
"""

from __future__ import annotations

import functools
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jreg_megatron.runtime.imports import silence_megatron
from jreg_megatron.selftest.layouts import Layout


@dataclass(frozen=True)
class Case:
    """A way to run the toy model."""

    layout: Layout = field(default_factory=Layout)
    config: dict[str, Any] = field(default_factory=dict)
    """Further settings of Megatron's ``TransformerConfig``."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Arguments of Megatron's function that makes the spec."""
    norms_apart: bool = False
    """Whether norms are modules of their own, as with latent attention or experts, not in linear layers."""
    calls: tuple[str, ...] = ("linear",)
    """What of Transformer Engine must have been called."""


FP8 = {"fp8": "hybrid", "fp8_recipe": "delayed"}
OFFLOAD = {"cpu_offloading": True, "cpu_offloading_num_layers": 3}
RECOMPUTED = ("linear", "fp8", "checkpoint")

CASES = {
    "norm and linear in one": Case(),
    "operation fuser": Case(spec={"use_te_op_fuser": True}, calls=("linear", "ops")),
    "norm that forks the residual": Case(
        config={"fused_residual_rmsnorm": True}, norms_apart=True, calls=("linear", "ops")
    ),
    "fp32 residual": Case(
        Layout(precision="bf16", final_state="post_norm"),
        {"fp32_residual_connection": True},
        norms_apart=True,
    ),
    "experts": Case(Layout(model="moe", final_state="post_norm")),
    "multi-token prediction": Case(Layout(model="mtp")),
    "hybrid model": Case(Layout(model="hybrid", layers="lone sub-layers")),
    "selective recompute": Case(Layout(model="moe", recompute="selective")),
    "FP8, uniform recompute": Case(
        Layout(recompute="uniform", num_microbatches=4, masked=True, tokens="unmasked"), FP8, calls=RECOMPUTED
    ),
    "FP8, block recompute": Case(Layout(recompute="block", final_state="post_norm"), FP8, calls=RECOMPUTED),
    "activations offloaded": Case(Layout(num_microbatches=4), OFFLOAD, calls=("linear", "offload")),
}


def main(results: Path, names: list[str]) -> None:
    import transformer_engine_stand_in as stand_in

    stand_in.install()
    from jreg_megatron.selftest import __main__ as selftest

    silence_megatron()
    selftest.start(True, "transformer_engine", timedelta(seconds=60))
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.transformer import transformer_block

    transformer_block.LayerNormImpl = TENorm  # as on a GPU; CPU mode has local layers only
    results.write_bytes(pickle.dumps({name: _run(CASES[name], stand_in.CALLS) for name in names}))


def _run(case: Case, calls: set[str]) -> Any:
    """The comparison and the calls, or the error."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_config

    from jreg_megatron.selftest.compare import compare_step

    make_config: Any = functools.partial(transformer_config.TransformerConfig, **case.config)
    make_spec = _spec_maker(gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec, case)
    calls.clear()
    try:
        with (
            patch.object(transformer_config, "TransformerConfig", make_config),
            patch.object(gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", make_spec),
        ):
            return compare_step(case.layout, "transformer_engine"), set(calls)
    except Exception:
        return traceback.format_exc()


def _spec_maker(make: Callable[..., Any], case: Case) -> Callable[..., Any]:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    def make_spec(**arguments: Any) -> Any:
        spec = make(**arguments, **case.spec)
        if case.norms_apart:
            layer, provider = spec.submodules, TESpecProvider()
            has_residual = {"has_residual": True} if case.config.get("fused_residual_rmsnorm") else {}
            layer.input_layernorm = layer.pre_mlp_layernorm = provider.layer_norm(**has_residual)
            layer.self_attention.submodules.linear_qkv = provider.column_parallel_linear()
            mlp = getattr(layer.mlp, "submodules", None) or layer.mlp.keywords["submodules"]
            mlp.linear_fc1 = provider.column_parallel_linear()
            layer.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        return spec

    return make_spec


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
