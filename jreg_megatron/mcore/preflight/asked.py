"""What the arguments ask for, read the way Megatron reads them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from jreg_megatron.runtime.errors import UserError


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def given(args: Namespace, *names: str) -> list[str]:
    return [flag_of(name) for name in names if getattr(args, name) is not None]


def positive(args: Namespace, *names: str) -> None:
    """Raises:
    UserError: if one of these is given and below 1.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{flag_of(name)} is {value}; it must be >= 1")


def tensor_parallel(args: Namespace) -> int:
    return int(args.tensor_model_parallel_size)


def weight_replicas(args: Namespace) -> int:
    """Ranks that share one tensor-parallel slice of the weights; 1 without weight shards."""
    return int(args.tensor_parallel_num_weight_shards or tensor_parallel(args)) // tensor_parallel(args)


def num_layers(args: Namespace) -> int:
    return int(args.num_layers if args.num_layers is not None else args.encoder_num_layers)


def virtual_stages(args: Namespace) -> int:
    stages = int(args.pipeline_model_parallel_size)
    if isinstance(args.pipeline_model_parallel_layout, str):
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        return (
            int(PipelineParallelLayerLayout.get_num_stages_from_str(args.pipeline_model_parallel_layout))
            // stages
        )
    if args.num_layers_per_virtual_pipeline_stage is not None:
        counted = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        return (num_layers(args) + int(counted)) // stages // int(args.num_layers_per_virtual_pipeline_stage)
    return int(args.num_virtual_stages_per_pipeline_rank or 1)


def other_layer_plan(args: Namespace) -> bool:
    """Whether the layers come from a pattern, which only Megatron knows how to count."""
    return bool(given(args, "hybrid_layer_pattern", "hybrid_override_pattern"))


def read_text(flag: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} cannot be read ({one_line(error)}); correct the path") from error


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def one_line(error: Any) -> str:
    return " ".join(str(error).split())
