"""The paper's printed numbers (arXiv 2601.18302v1), from ``paper.toml``."""

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
"""The paper's nine tasks, by the names of lm-evaluation-harness.

The harness has two versions of LAMBADA; ``lambada_openai`` is the usual one. Of RACE it has the high-school
part only. The paper does not say which it took.
"""

WITHOUT_BOOLQ = tuple(name for name in TASKS if name != "boolq")
"""Most of the paper's gain comes from BoolQ."""


@cache
def numbers() -> dict[str, Any]:
    """All of ``paper.toml``. Its comments tell what each number is and its table in the paper."""
    return tomllib.loads((files("jreg_megatron.paper") / "paper.toml").read_text(encoding="utf-8"))


def profile(size: str, setting: str) -> tuple[float, ...]:
    """Psi of layers 1..L, each in [0, 1]; the paper rounds it to four decimals.

    ``size`` is one of :data:`SIZES`, ``setting`` is ``base`` or, for instance, ``alpha 1``.

    Raises:
        KeyError: for a size or setting without a profile.
    """
    return tuple(psi / 100 for psi in numbers()["psi_x100"][size][setting])


def task_means(scores: Mapping[str, float]) -> dict[str, float] | None:
    """``mean`` over the paper's nine tasks and ``mean_without_boolq``; None unless ``scores`` has all nine.

    Other tasks count in neither mean.
    """
    if missing_tasks(scores):
        return None
    means = {"mean": TASKS, "mean_without_boolq": WITHOUT_BOOLQ}
    return {key: math.fsum(scores[name] for name in names) / len(names) for key, names in means.items()}


def missing_tasks(scores: Mapping[str, Any]) -> list[str]:
    """The tasks of the paper that ``scores`` lacks, in order."""
    return [name for name in TASKS if name not in scores]
