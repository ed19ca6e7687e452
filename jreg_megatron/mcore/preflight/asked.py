"""Megatron's arguments, read as Megatron reads them, and checks of one or two of them."""

from __future__ import annotations

from argparse import Namespace

from jreg_megatron.runtime.errors import UserError, one_line


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def given(args: Namespace, *names: str) -> list[str]:
    return [flag_of(name) for name in names if getattr(args, name) is not None]


def divisible(args: Namespace, name: str, by: str, fix: str = "change one of them") -> None:
    """Raises:
    UserError: if the argument ``name`` is given and not divisible by the argument ``by``.
    """
    value, part = getattr(args, name), getattr(args, by)
    if value is not None and value % part:
        raise UserError(f"{flag_of(name)} {value} is not divisible by {flag_of(by)} {part}; {fix}")


def only_one(args: Namespace, *names: str, fix: str = "give only one") -> None:
    """Raises:
    UserError: if more than one of these arguments are given.
    """
    values = {flag_of(name): getattr(args, name) for name in names}
    found = [
        flag if value is True else f"{flag} is {value}"
        for flag, value in values.items()
        if value is not None and value is not False
    ]
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)}, which exclude each other; {fix}")


def tensor_parallel(args: Namespace) -> int:
    return int(args.tensor_model_parallel_size)


def weight_replicas(args: Namespace) -> int:
    """Ranks that share a tensor-parallel slice of the weights; 1 without weight shards."""
    return int(args.tensor_parallel_num_weight_shards or tensor_parallel(args)) // tensor_parallel(args)


def num_layers(args: Namespace) -> int:
    return int(args.num_layers if args.num_layers is not None else args.encoder_num_layers)


def virtual_stages(args: Namespace) -> int:
    stages = int(args.pipeline_model_parallel_size)
    if isinstance(args.pipeline_model_parallel_layout, str):
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        layout = args.pipeline_model_parallel_layout
        return int(PipelineParallelLayerLayout.get_num_stages_from_str(layout)) // stages
    if args.num_layers_per_virtual_pipeline_stage is not None:
        counted = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        return (num_layers(args) + int(counted)) // stages // int(args.num_layers_per_virtual_pipeline_stage)
    return int(args.num_virtual_stages_per_pipeline_rank or 1)


def other_layer_plan(args: Namespace) -> bool:
    """Whether a pattern gives the layers. Only Megatron can count them."""
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
