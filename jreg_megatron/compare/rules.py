"""The questions about each way to train, and the rule that gives a verdict.

Questions and rule were written before the toys were trained. README.md in this folder lists later changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from jreg_megatron.claims.rules import BITS, Question, middle, of_seeds
from jreg_megatron.compare.toys import Toy, Toys
from jreg_megatron.paper.over_seeds import CONFIDENCE, holm, p_two_sided

Verdict = Literal["lower", "higher", "cannot tell"]

RULE = (
    "Each way to train is compared with its baseline: the same model, text, order and initial weights, "
    "without the method. A family is one question about all ways. It has one number for each run; the runs "
    "of one seed are a pair. Shown is the mean over seeds of way minus baseline, with its 95% t interval. p "
    "is of a two-sided paired t-test, corrected by Holm's method for all ways of the family. A way is lower "
    f"or higher if the corrected p is below {1 - CONFIDENCE:.2g}; otherwise one cannot tell. The first "
    "family, the validation loss, is the primary one; the families are not corrected for each other."
)
_QUARTER = 0.25


@dataclass(frozen=True)
class Family:
    """One question about all ways to train."""

    key: str
    title: str
    number: str
    """The meaning of the number, with its unit."""
    of: Callable[[Toy], float | None]
    better: Literal["lower", "higher", ""]
    in_percent: bool = False
    """Whether way and baseline are compared as a ratio, in percent above it."""


def _below_last(what: str) -> Callable[[Toy], float | None]:
    def mean(toy: Toy) -> float | None:
        last = len(toy.history.displacement)
        values = [value for layer, value in toy.by_layer(what).items() if 0 < layer < last]
        return fmean(values) if values else None

    return mean


def _accuracy(toy: Toy) -> float | None:
    values = [100 * score.value for score in toy.tasks.values() if score.chance is not None]
    return fmean(values) if values else None


FAMILIES = (
    Family(
        "loss",
        "Validation loss",
        "Cross-entropy at the end, in nats per token",
        lambda toy: toy.history.validation_loss[-1],
        "lower",
    ),
    Family("jump", "Jump rate", "ζ_L at the end", lambda toy: toy.jump_rate(), "lower"),
    Family(
        "profile",
        "Profile",
        "Sum of Ψ of layers 2 to 6 at the end",
        lambda toy: sum(middle(toy.history.displacement)),
        "",
        in_percent=True,
    ),
    Family(
        "early_exit",
        "Early exit, directly",
        "Mean loss of an exit after each of layers 1 to 7, in nats per token",
        _below_last("read_out.loss"),
        "lower",
    ),
    Family(
        "lens",
        "Early exit, through a lens",
        "The same through a map that is fitted to the last layer's states",
        _below_last("lens.loss"),
        "lower",
    ),
    Family(
        "task",
        "Held-out task",
        "Right last words of 72 passages, in percent",
        _accuracy,
        "higher",
    ),
    Family(
        "bits",
        "Held-out text",
        "Bits per byte",
        lambda toy: toy.tasks[BITS].value if BITS in toy.tasks else None,
        "lower",
    ),
    Family(
        "cost",
        "Time of a step",
        "Seconds per step: the lower quartile of each half of the training, mean of both",
        lambda toy: toy.seconds_per_step,
        "lower",
        in_percent=True,
    ),
)


def pairs(toys: Toys, way: str, baseline: str) -> dict[int, tuple[Toy, Toy]]:
    """By seed, the toys of a way and of its baseline."""
    bases = toys.get(baseline, {})
    return {seed: (toy, bases[seed]) for seed, toy in toys.get(way, {}).items() if seed in bases}


def compared(family: Family, toys: Toys, against: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The part of a family in the JSON document: each way minus its baseline, named by ``against``."""
    found = {
        way: differences(family.of, toys, way, baseline, family.in_percent)
        for way, baseline in against.items()
    }
    tests = [p_two_sided([*by_seed.values()]) for by_seed in found.values()]
    return {
        way: {
            "against": against[way],
            **of_seeds(by_seed),
            **{"p": p, "p_adjusted": p_adjusted, "verdict": _verdict(by_seed, p_adjusted)},
        }
        for (way, by_seed), p, p_adjusted in zip(found.items(), tests, holm(tests), strict=True)
    }


def _verdict(by_seed: Mapping[int, float], p_adjusted: float | None) -> Verdict:
    """By :data:`RULE`."""
    if p_adjusted is None or p_adjusted >= 1 - CONFIDENCE:
        return "cannot tell"
    return "lower" if fmean(by_seed.values()) < 0 else "higher"


def differences(
    number: Callable[[Toy], float | None], toys: Toys, way: str, baseline: str, in_percent: bool = False
) -> dict[int, float]:
    """By seed, the way's number minus its baseline's, or in percent of it; without unknown numbers."""
    found = {seed: (number(toy), number(base)) for seed, (toy, base) in pairs(toys, way, baseline).items()}
    return {
        # Equal numbers must not differ by the last bits of a float.
        seed: round(100 * (new / old - 1) if in_percent else new - old, 12)
        for seed, (new, old) in found.items()
        if new is not None and old is not None
    }


def published(toys: Toys) -> list[Question]:
    """What the methods' authors report, judged like the claims: by the interval, without a correction."""

    def loss(toy: Toy) -> float:
        return toy.history.validation_loss[-1]

    plain = differences(loss, toys, "slowqk", "baseline")
    gelu = differences(loss, toys, "slowqk_gelu", "baseline_gelu")
    early = differences(lambda toy: toy.at(_QUARTER, toy.history.validation_loss), toys, "let", "baseline")
    kept = {seed: toy.kept for seed, toy in toys.get("attenuation_learned", {}).items() if toy.kept}
    return [
        Question(
            "Slow Q/K lowers the loss of GELU blocks more than that of gated ones.",
            "validation loss minus the baseline's with GELU, minus the same with SwiGLU, in nats",
            "a gain with GPT-2's blocks, hardly any with gated MLPs",
            {seed: gelu[seed] - value for seed, value in plain.items() if seed in gelu},
            "below",
        ),
        Question(
            "Learned attenuation keeps less in the upper half of the layers.",
            "kept part, mean of the upper half minus mean of the lower half",
            "the gates settle on late layers",
            {
                seed: fmean(parts[len(parts) // 2 :]) - fmean(parts[: len(parts) // 2])
                for seed, parts in kept.items()
            },
            "below",
        ),
        Question(
            "Learned attenuation keeps less in the last layer than in the others.",
            "kept part of the last layer minus the mean of the others",
            "the gates settle on the last layer",
            {seed: parts[-1] - fmean(parts[:-1]) for seed, parts in kept.items()},
            "below",
        ),
        Question(
            "While LET works, the loss is lower than the baseline's.",
            "validation loss at a quarter of the steps, minus the baseline's, in nats",
            "1.6 times fewer steps to the same loss",
            early,
            "below",
        ),
    ]
