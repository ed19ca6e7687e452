"""The layouts that are compared with the reference in every run of the tests."""

from __future__ import annotations

from functools import cache
from typing import Any

from covertable import make

from jreg_megatron.selftest.layouts import RULES, Layout, Rule

MAX_RANKS = 8

VALUES: dict[str, list[Any]] = {
    "tensor": [1, 2],
    "pipeline": [1, 2, 4],
    "context": [1, 2],
    "data": [1, 2],
    "virtual": [1, 2],
    "split": ["even", "uneven", "embedding and loss", "layout"],
    "model": ["gpt", "moe", "mtp", "hybrid"],
    "recompute": ["none", "selective", "uniform", "block"],
    "precision": ["fp32", "bf16", "fp16"],
    "num_microbatches": [2, 1, 4],
    "sequence_parallel": [False, True],
    "expert": [1, 2],
    "final_state": ["pre_norm", "post_norm"],
    "distributed_optimizer": [False, True],
    "per_token_loss": [False, True],
    "masked": [False, True],
    "tokens": ["all", "unmasked"],
    "tied": [False, True],
    "methods": ["jreg", "all", "blocks"],
}

NAMED = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(context=2),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual=2),
    Layout(data=2),
    Layout(data=2, distributed_optimizer=True),
    Layout(model="moe", data=2, expert=2),
    Layout(tensor=2, pipeline=2, context=2, sequence_parallel=True),
    Layout(tensor=2, pipeline=2, data=2, sequence_parallel=True, distributed_optimizer=True),
    Layout(model="moe", tensor=2, sequence_parallel=True, data=4, expert=4, distributed_optimizer=True),
    Layout(tensor=2, sequence_parallel=True, masked=True, tokens="unmasked"),
    Layout(tensor=2, sequence_parallel=True, context=2, masked=True, tokens="unmasked", per_token_loss=True),
    Layout(pipeline=4, recompute="uniform", num_microbatches=4, masked=True, tokens="unmasked"),
    Layout(pipeline=2, recompute="uniform", num_microbatches=4, final_state="post_norm"),
    *(
        Layout(tensor=2, pipeline=2, padded=True, tokens="unmasked", **more)
        for more in (
            {"masked": True},
            {"sequence_parallel": True, "context": 2, "recompute": "uniform", "final_state": "post_norm"},
            {"sequence_parallel": True, "virtual": 2, "packed": True, "model": "moe"},
            {"sequence_parallel": True, "masked": True, "per_token_loss": True, "model": "hybrid"},
        )
    ),
    Layout(tensor=2, pipeline=2, context=2, sequence_parallel=True, token_stride=4),
    Layout(pipeline=2, token_stride=2, masked=True, tokens="unmasked", recompute="uniform"),
    Layout(pipeline=2, virtual=2, token_stride=4, final_state="post_norm", recompute="block"),
    Layout(tensor=2, data=2, methods="all"),
    Layout(tensor=2, context=2, sequence_parallel=True, methods="all"),
    Layout(
        tensor=2,
        sequence_parallel=True,
        pipeline=2,
        virtual=2,
        recompute="uniform",
        num_microbatches=4,
        methods="all",
    ),
    *(
        Layout(model="hybrid", layers=layers, **cut)
        for layers, cuts in {
            "latent attention": (
                {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "virtual": 2, "recompute": "uniform"},
                {"tensor": 2, "context": 2, "final_state": "post_norm", "recompute": "selective"},
            ),
            "experts": (
                {"data": 2, "expert": 2, "pipeline": 2, "recompute": "uniform", "methods": "all"},
                {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "virtual": 2, "per_token_loss": True},
            ),
            "lone sub-layers": (
                {"methods": "all"},
                {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "split": "uneven"},
                {"pipeline": 4, "recompute": "uniform", "masked": True, "tokens": "unmasked"},
                {"pipeline": 2, "virtual": 2, "final_state": "post_norm", "recompute": "selective"},
            ),
            "sub-layers as layers": (
                {"pipeline": 2, "recompute": "block", "methods": "all"},
                {"tensor": 2, "sequence_parallel": True, "pipeline": 4},
            ),
        }.items()
        for cut in cuts
    ),
]
"""Layouts that a reader looks for first, and errors that need more than two features together."""

FSDP = [
    Layout(data=2, fsdp=True),
    Layout(data=4, fsdp=True, recompute="uniform", methods="all"),
    Layout(tensor=2, sequence_parallel=True, data=2, fsdp=True, masked=True, tokens="unmasked"),
    Layout(context=2, fsdp=True, recompute="selective", final_state="post_norm"),
    *(Layout(data=2, fsdp=True, model=model) for model in ("moe", "mtp", "hybrid")),
    Layout(data=2, fsdp=True, precision="bf16"),
    *(Layout(data=2, megatron_fsdp=shards) for shards in ("no_shard", "optim", "optim_grads")),
    *(
        Layout(megatron_fsdp="optim_grads_params", **more)
        for more in (
            {"data": 2, "recompute": "uniform", "num_microbatches": 4, "methods": "all"},
            {"tensor": 2, "sequence_parallel": True, "data": 2, "masked": True, "tokens": "unmasked"},
            {"tensor": 2, "data": 2, "recompute": "block", "methods": "blocks"},
            {"context": 2, "recompute": "selective", "final_state": "post_norm"},
            {"data": 2, "per_token_loss": True, "masked": True},
            {"data": 4, "expert": 2, "model": "moe"},
            *({"data": 2, "model": model, "tied": model == "hybrid"} for model in ("mtp", "hybrid")),
            *({"data": 2, "precision": precision} for precision in ("bf16", "fp16")),
        )
    ),
    Layout(data=2, expert=2, model="moe", megatron_fsdp="optim"),
]
"""By hand: it goes with so little that the search for pairs does not end."""


def few_rows() -> list[Layout]:
    """Of :func:`rows` the named ones, and one of each model and precision, on at most four ranks."""
    small = [layout for layout in rows() if layout.world_size <= 4]
    first_of = {(layout.model, layout.precision): layout for layout in reversed(small)}
    return [layout for layout in small if layout in NAMED or layout in first_of.values()]


@cache
def rows() -> list[Layout]:
    """The named layouts, and as many more as it takes for every pair of two fields' values to occur."""
    sizes = Rule(
        ("tensor", "pipeline", "context", "data"), lambda layout: layout.world_size <= MAX_RANKS, "too large"
    )
    constraints = [
        {
            "operator": "fn",
            "requires": [name for name in rule.names if name in VALUES],
            # A row may be incomplete, but it has the fields of the rule.
            "evaluate": lambda row, rule=rule: rule.holds(
                Layout(**{name: row[name] for name in rule.names if name in row})
            ),
        }
        for rule in (*RULES, sizes)
    ]
    pairwise = make(VALUES, constraints=constraints)
    return list(dict.fromkeys([*NAMED, *(Layout(**row) for row in pairwise), *FSDP]))
