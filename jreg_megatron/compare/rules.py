"""What is asked of each way to train, and the rule that gives a verdict.

Questions and rule were written before the toys were trained. README.md here lists later changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from jreg_megatron.claims.rules import BITS, Question, middle
from jreg_megatron.compare.toys import Toy, Toys
from jreg_megatron.paper.over_seeds import CONFIDENCE, Estimate, holm, p_two_sided
from jreg_megatron.report.inputs import Evaluated

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


def _evaluated(number: Callable[[Evaluated], float | None]) -> Callable[[Toy], float | None]:
    return lambda toy: None if toy.run.evaluated is None else number(toy.run.evaluated)


def _below_last(what: str) -> Callable[[Evaluated], float | None]:
    def mean(found: Evaluated) -> float | None:
        values = [value for layer, value in found.by_layer(what).items() if 0 < layer < found.num_layers]
        return fmean(values) if values else None

    return mean


def _accuracy(found: Evaluated) -> float | None:
    values = [100 * score.value for score in found.tasks.values() if score.chance is not None]
    return fmean(values) if values else None


def _bits(found: Evaluated) -> float | None:
    return found.tasks[BITS].value if BITS in found.tasks else None


FAMILIES = (
    Family(
        "loss",
        "Validation loss",
        "Cross-entropy at the end, in nats per token",
        lambda toy: toy.run.history.validation_loss[-1],
        "lower",
    ),
    Family("jump", "Jump rate", "ζ_L at the end", lambda toy: toy.run.jump_rate(), "lower"),
    Family(
        "profile",
        "Profile",
        "Sum of Ψ of layers 2 to 6 at the end",
        lambda toy: sum(middle(toy.run.history.displacement)),
        "",
        in_percent=True,
    ),
    Family(
        "early_exit",
        "Early exit, as it is",
        "Loss at an exit behind each of layers 1 to 7, mean, in nats per token",
        _evaluated(_below_last("read_out.loss")),
        "lower",
    ),
    Family(
        "lens",
        "Early exit, through a lens",
        "The same behind a map that is fitted to the last layer's states",
        _evaluated(_below_last("lens.loss")),
        "lower",
    ),
    Family(
        "task",
        "Held-out task",
        "Right last words of 72 passages, in percent",
        _evaluated(_accuracy),
        "higher",
    ),
    Family("bits", "Held-out text", "Bits per byte", _evaluated(_bits), "lower"),
    Family(
        "cost",
        "Time of a step",
        "Seconds per step: the lower quartile of each half of the training, mean of both",
        lambda toy: toy.seconds_per_step,
        "lower",
        in_percent=True,
    ),
)


@dataclass(frozen=True)
class Comparison:
    """A way minus its baseline in one family."""

    way: str
    by_seed: Mapping[int, float]
    p_adjusted: float | None = None

    @property
    def estimate(self) -> Estimate | None:
        """Mean and interval over seeds."""
        return Estimate.of(list(self.by_seed.values()))

    @property
    def p(self) -> float | None:
        """Two-sided."""
        return p_two_sided(list(self.by_seed.values()))

    @property
    def verdict(self) -> Verdict:
        """By :data:`RULE`."""
        if self.estimate is None or self.p_adjusted is None or self.p_adjusted >= 1 - CONFIDENCE:
            return "cannot tell"
        return "lower" if self.estimate.mean < 0 else "higher"


def pairs(toys: Toys, way: str, baseline: str) -> dict[int, tuple[Toy, Toy]]:
    """By seed, the toys of a way and of its baseline."""
    bases = toys.get(baseline, {})
    return {seed: (toy, bases[seed]) for seed, toy in toys.get(way, {}).items() if seed in bases}


def compared(family: Family, toys: Toys, against: Mapping[str, str]) -> list[Comparison]:
    """Each way with its baseline, named by ``against``."""
    found = []
    for way, baseline in against.items():
        by_seed = {}
        for seed, (toy, base) in pairs(toys, way, baseline).items():
            new, old = family.of(toy), family.of(base)
            if new is not None and old is not None:
                # Equal numbers must not differ by the last bits of a float.
                by_seed[seed] = round(100 * (new / old - 1) if family.in_percent else new - old, 12)
        found.append(Comparison(way, by_seed))
    adjusted = holm([comparison.p for comparison in found])
    return [Comparison(c.way, c.by_seed, p) for c, p in zip(found, adjusted, strict=True)]


def published(toys: Toys) -> list[Question]:
    """What the methods' authors report, judged like the claims: by the interval, without a correction."""

    def more(way: str, baseline: str, number: Callable[[Toy], float | None]) -> dict[int, float]:
        pairs = {
            s: (number(t), number(toys[baseline][s]))
            for s, t in toys.get(way, {}).items()
            if s in toys.get(baseline, {})
        }
        return {seed: new - old for seed, (new, old) in pairs.items() if new is not None and old is not None}

    def loss(toy: Toy) -> float:
        return toy.run.history.validation_loss[-1]

    plain, gelu = more("slowqk", "baseline", loss), more("slowqk_gelu", "baseline_gelu", loss)
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
            more("let", "baseline", lambda toy: toy.loss_at(_QUARTER)),
            "below",
        ),
    ]
