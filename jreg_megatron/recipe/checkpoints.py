"""How far a run has come, by its checkpoints."""

from __future__ import annotations

from pathlib import Path


def last_checkpoint(folder: str | Path | None) -> int:
    """Iteration of the checkpoint in a folder that Megatron would go on from; 0 where there is none."""
    try:
        text = (Path(folder or "") / "latest_checkpointed_iteration.txt").read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0
