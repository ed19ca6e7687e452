"""A recipe's flags with the sizes of a toy, so that the recipe runs on a CPU in a minute."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

from jreg_megatron.decoder.checkpoint.folder import last_checkpoint
from jreg_megatron.recipe import identity

_LENGTH = 64
_MOST_RANKS = 4
_DATA = (
    *("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--data-args-path"),
    *("--per-split-data-args-path", "--split", "--mock-data"),
)


def ranks(args: Namespace) -> int:
    """Ranks of the toy: those of one model; two replicas if that makes at most four ranks."""
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return int(model * 2 if model * 2 <= _MOST_RANKS else model)


def flags(args: Namespace, run: Path, iterations: int) -> list[str]:
    """Flags to set after the recipe's: they shrink the model of ``args`` and take the demo's data.

    Heads and their groups stay, so tensor parallelism must divide those of the recipe.
    """
    from jreg_megatron.demo.data import prepare

    data = prepare(Path("runs/data"))
    heads, stages = args.num_attention_heads, args.pipeline_model_parallel_size
    layers = max(2, stages * (args.num_virtual_stages_per_pipeline_rank or 1))
    replicas = ranks(args) // (args.tensor_model_parallel_size * stages * args.context_parallel_size)
    toy: dict[str, object] = {
        "num-layers": layers,
        "hidden-size": 8 * heads,
        "ffn-hidden-size": 16 * heads,
        "seq-length": _LENGTH,
        "max-position-embeddings": _LENGTH,
        "padded-vocab-size": data.vocab_size,
        "micro-batch-size": 1,
        "global-batch-size": 2 * replicas * stages,
        "train-iters": iterations,
        "lr-warmup-iters": 1,
        "eval-interval": 2,
        "eval-iters": 1,
        "log-interval": 1,
        "tensorboard-log-interval": 1,
        "jreg-measure-interval": 1,
        "save-interval": 2,
        "save-retain-interval": 2,
        "train-data-path": data.train_prefix,
        "valid-data-path": data.validation_prefix,
        "tokenizer-model": data.tokenizer_model,
        "data-cache-path": run / "data_cache",
        "tensorboard-dir": run / "tensorboard",
        "save": run / "checkpoints",
        "load": run / "checkpoints",
    }
    return [word for name, value in toy.items() for word in (f"--{name}", str(value))]


def without_data(flags: list[str]) -> list[str]:
    """The flags without those that name data; the toy has its own data."""
    kept: list[str] = []
    dropping = False
    for word in flags:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in _DATA
        if not dropping:
            kept.append(word)
    return kept


def start_clean(args: Namespace, run: Path) -> bool:
    """Remove an earlier run that is finished or was another one; True if there was one."""
    settings = identity.settings(args)
    is_over = last_checkpoint(args.load) >= int(args.train_iters)
    is_over |= identity.difference(run / identity.FILE, settings) is not None
    if is_over:
        shutil.rmtree(run)
    return is_over
