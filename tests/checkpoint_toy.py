"""Checkpoints of Megatron's own models with random weights, saved by Megatron as a training does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

GPT2_FLAGS = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1e-3
    --tokenizer-type NullTokenizer --vocab-size 130
"""
"""Megatron's defaults, with 130 tokens that it pads to 256."""
LLAMA_FLAGS = f"""
    {GPT2_FLAGS} --normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights
"""


def made(folder: Path, flags: str = LLAMA_FLAGS, remove: tuple[str, ...] = (), **changes: Any) -> Any:
    """Save a model as iteration 1 in ``folder``; to be called in a rank.

    Args:
        folder: as ``--save``.
        flags: of the training.
        remove: saved arguments that the Megatron of that training did not know.
        changes: saved arguments that it had otherwise.

    Returns:
        the model, in evaluation mode, with the methods of the flags attached: a ``HybridModel`` if the flags
        have a pattern, else a ``GPTModel``.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import arguments
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.models.hybrid import HybridModelBuilder

    from jreg_megatron import attach, cpu, prepare
    from jreg_megatron.mcore.one_process import single_process
    from jreg_megatron.methods import known

    single_process()
    sys.argv = ["x", *cpu.with_cpu_flags(flags.split())]
    args = arguments.parse_args(known.add_arguments)
    arguments.validate_args(args)
    build_tokenizer(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder: Any
    if args.hybrid_layer_pattern:
        builder = HybridModelBuilder(hybrid_config_from_args(args))
    else:
        builder = GPTModelBuilder(gpt_config_from_args(args))
    settings = known.settings_in(args)
    model: Any = builder.build_model(groups, pre_process=True, post_process=True).eval()
    prepare([model], settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    for name in remove:
        delattr(args, name)
    vars(args).update(changes)
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    weights = model.sharded_state_dict(metadata=metadata | {"dp_cp_group": group})
    place = folder / "iter_0000001"
    place.mkdir(parents=True)
    state = {"model": weights, "args": args, "iteration": 1}
    dist_checkpointing.save(state, str(place), content_metadata=metadata)
    if settings:
        attach(model, *settings, num_microbatches=1)
    return model


@torch.inference_mode()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[b, s, rows]``, padding included, that the model itself gives for ids ``[b, s]``."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits: torch.Tensor = model(tokens, positions, None)
    return logits.clone()


def some_tokens(vocab_size: int = 130, seed: int = 1) -> torch.Tensor:
    """Ids ``[2, 64]``."""
    return torch.randint(vocab_size, (2, 64), generator=torch.Generator().manual_seed(seed))
