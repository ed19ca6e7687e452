"""Identify the run of a folder, so that no other run resumes from its checkpoints."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import flag_of
from jreg_megatron.runtime.output import write_json

FILE = "run.json"
_NAMES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("padded_vocab_size", "seq_length", "seed", "train_iters", "global_batch_size", "lr", "min_lr"),
    *("init_fan_in", "lr_warmup_iters", "train_data_path", "data_path", "data_args_path", "split"),
    "tokenizer_model",
)
_OBSERVING = ("--jreg-kernels", "--jreg-log-per-layer", "--jreg-measure-interval")
"""Flags that change only the log, besides those of methods that only measure."""


def settings(args: Namespace) -> dict[str, Any]:
    """The settings that identify a run: methods, model, length, learning rate, data; not its layout."""
    from jreg_megatron.methods import known  # it imports torch

    of_methods = tuple(f"{method.prefix}_" for method in known.METHODS)
    names = [*_NAMES, *sorted(name for name in vars(args) if name.startswith(of_methods))]
    found = {flag_of(name): getattr(args, name, None) for name in names}
    kept: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return kept


def difference(file: Path, asked: dict[str, Any]) -> str | None:
    """A phrase for the first setting that differs between ``file`` and ``asked``; None if none differs."""
    try:
        held: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    from jreg_megatron.methods import known  # it imports torch

    measuring = (f"--{method.prefix}-" for method in known.METHODS if method.only_measures)
    observing = (*_OBSERVING, *measuring)
    for name in (name for name in dict.fromkeys((*asked, *held)) if not name.startswith(observing)):
        was, now = held.get(name), asked.get(name)
        if was != now:
            return f"{name} {was}, and now it is {now}"
    return None


def refuse_another(file: Path, asked: dict[str, Any]) -> None:
    """Raises:
    UserError: if ``file`` is from a run with other settings.
    """
    if found := difference(file, asked):
        raise UserError(
            f"{file.parent} holds a run with {found}; set RUN to another folder, "
            f"or remove {file} to resume from its checkpoints in any case"
        )


def write(file: Path, asked: dict[str, Any]) -> None:
    """Write the settings of a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(str(file), asked)
