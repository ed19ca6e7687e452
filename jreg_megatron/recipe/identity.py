"""Which run a folder holds, so that another one does not go on from its checkpoints."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from jreg_megatron.runtime.errors import UserError

_FILE = "run.json"
_NAMES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("padded_vocab_size", "seq_length", "seed", "train_iters", "global_batch_size", "lr", "min_lr"),
    *("init_fan_in", "lr_warmup_iters", "train_data_path", "data_path", "data_args_path", "split"),
    "tokenizer_model",
)
_OBSERVING = {"--jreg-kernels", "--jreg-log-per-layer", "--jreg-measure-interval"}
"""JREG's flags that change what is seen of a training, not the training."""


def of(args: Namespace) -> dict[str, Any]:
    """What makes a run the run that it is: JREG, model, length, rates, data; not how it is cut over GPUs."""
    names = [*_NAMES, *sorted(name for name in vars(args) if name.startswith("jreg_"))]
    found = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in names}
    kept: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return kept


def difference(folder: Path, args: Namespace) -> str | None:
    """The first thing in which the run in the folder is another one, in words; None where there is none."""
    try:
        held: dict[str, Any] = json.loads((folder / _FILE).read_text())
    except (OSError, ValueError):
        return None
    asked = of(args)
    for name in sorted((held.keys() | asked.keys()) - _OBSERVING):
        # What an older version did not write down had its default.
        if (held.get(name) or None) != (asked.get(name) or None):
            return f"{name} {held.get(name)}, and now it is {asked.get(name)}"
    return None


def refuse_another(folder: Path, args: Namespace) -> None:
    """Raises:
    UserError: if the folder holds a run with other settings.
    """
    if found := difference(folder, args):
        raise UserError(
            f"{folder} holds a run with {found}; set RUN to another folder, "
            f"or remove {folder / _FILE} to go on from its checkpoints all the same"
        )


def keep(folder: Path, args: Namespace) -> None:
    """Write down which run the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps(of(args), indent=2) + "\n")
