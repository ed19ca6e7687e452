"""The paper's printed numbers (arXiv 2601.18302v1), for tests and to lay beside one's own: ``paper.toml``."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

SIZES = ("170m", "1b", "3.4b")
"""The paper's names for its models, of 12, 16 and 30 layers."""

TASKS = tuple("arc_easy boolq hellaswag lambada_openai piqa race social_iqa sciq swag".split())
"""The paper's nine tasks, by lm-evaluation-harness's names.

The paper says LAMBADA and RACE; the harness has two of the first, of which ``lambada_openai`` is the usual
one, and of the second the high-school part alone.
"""

WITHOUT_BOOLQ = tuple(name for name in TASKS if name != "boolq")
"""The same without the task that most of the paper's gain comes from."""


@cache
def numbers() -> dict[str, Any]:
    """All of ``paper.toml``, whose comments say what each number is and which table it stands in."""
    return tomllib.loads((files("jreg_megatron.paper") / "paper.toml").read_text(encoding="utf-8"))


def profile(size: str, setting: str) -> tuple[float, ...]:
    """Psi of layers 1..L, each in [0, 1] and rounded by the paper to four decimals.

    Args:
        size: one of :data:`SIZES`.
        setting: ``base`` or, for instance, ``alpha 1``; those that there are differ by size.

    Raises:
        KeyError: for a size or setting without a profile.
    """
    return tuple(psi / 100 for psi in numbers()["psi_x100"][size][setting])


def task_means(scores: Mapping[str, float]) -> dict[str, float] | None:
    """``mean`` over the paper's nine tasks and ``mean_without_boolq``; None unless all nine are there.

    Args:
        scores: by task; further tasks count in neither mean.
    """
    if missing_tasks(scores):
        return None

    def mean(names: tuple[str, ...]) -> float:
        return math.fsum(scores[name] for name in names) / len(names)

    return {"mean": mean(TASKS), "mean_without_boolq": mean(WITHOUT_BOOLQ)}


def missing_tasks(scores: Mapping[str, Any]) -> list[str]:
    """Those of the paper's nine that are not among ``scores``, in order."""
    return [name for name in TASKS if name not in scores]
