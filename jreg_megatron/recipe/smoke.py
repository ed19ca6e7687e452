"""A recipe's flags with the sizes of a small model, so that the recipe runs on a CPU in a minute."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

_LENGTH = 64
_MOST_RANKS = 4
_DATA = (
    *("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--data-args-path"),
    *("--per-split-data-args-path", "--split", "--mock-data"),
)


def ranks(args: Namespace) -> int:
    """Number of ranks of the small model: two replicas if they have at most four ranks, else one replica."""
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return int(model * 2 if model * 2 <= _MOST_RANKS else model)


def flags(args: Namespace, run: Path, iterations: int) -> list[str]:
    """Flags to add after the recipe's. They shrink the model of ``args`` and use the demo's data.

    The numbers of heads and groups stay, so tensor parallelism must divide the recipe's numbers.
    """
    from jreg_megatron.demo.data import prepare

    data = prepare(Path("runs/data"))
    heads, stages = args.num_attention_heads, args.pipeline_model_parallel_size
    layers = max(2, stages * (args.num_virtual_stages_per_pipeline_rank or 1))
    replicas = ranks(args) // (args.tensor_model_parallel_size * stages * args.context_parallel_size)
    ones = ["micro-batch-size", "lr-warmup-iters", "eval-iters", "jreg-measure-interval"]
    ones += ["log-interval", "tensorboard-log-interval"]
    twos = ("eval-interval", "save-interval", "save-retain-interval")
    toy: dict[str, object] = {
        **dict.fromkeys(ones, 1),
        **dict.fromkeys(twos, 2),
        **dict.fromkeys(("seq-length", "max-position-embeddings"), _LENGTH),
        **dict.fromkeys(("save", "load"), run / "checkpoints"),
        "num-layers": layers,
        "hidden-size": 8 * heads,
        "ffn-hidden-size": 16 * heads,
        "padded-vocab-size": data.vocab_size,
        "global-batch-size": 2 * replicas * stages,
        "train-iters": iterations,
        "train-data-path": data.train_prefix,
        "valid-data-path": data.validation_prefix,
        "tokenizer-model": data.tokenizer_model,
        "data-cache-path": run / "data_cache",
        "tensorboard-dir": run / "tensorboard",
    }
    return [word for name, value in toy.items() for word in (f"--{name}", str(value))]


def without_data(flags: list[str]) -> list[str]:
    """The flags without those that name data, because the small model has its own data."""
    kept: list[str] = []
    dropping = False
    for word in flags:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in _DATA
        if not dropping:
            kept.append(word)
    return kept
