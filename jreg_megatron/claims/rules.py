"""The six claims as questions with one number per seed, and the rule that gives a verdict.

Rule, questions and bars were written before the toys were trained. README.md here lists the changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Literal

from jreg_megatron.claims.evidence import Evidence, Trained
from jreg_megatron.paper import SIZES, missing_tasks, numbers, profile, task_means
from jreg_megatron.paper.over_seeds import LEVEL, Estimate, power
from jreg_megatron.report.inputs import Evaluated, ReadOut

Verdict = Literal["agrees", "disagrees", "cannot tell"]

FEWEST_SEEDS = 3
"""With fewer seeds the verdict is "cannot tell"."""

RULE = (
    "Each claim has one or more questions. A question has a bar, and one number for each training seed with "
    "the needed runs. It agrees if the 95% t interval of the mean over seeds is wholly on the claim's side "
    "of the bar. It disagrees if the interval is wholly on the other side. Otherwise, and with fewer than "
    f"{FEWEST_SEEDS} seeds, it cannot tell. A claim disagrees if one of its questions disagrees. It agrees "
    "if all its questions agree. Otherwise it cannot tell."
)

_LEFT = 0.2
"""The share of the baseline's jump rate that may remain when JREG "removes" the jump."""
_QUARTER = 0.25


@dataclass(frozen=True)
class Question:
    """One number per seed, and the bar for it."""

    text: str
    """A statement that is true if the claim holds."""
    number: str
    """The meaning of the number, with its unit."""
    side: Literal["above", "below"]
    """The claim's side of the bar."""
    paper: str
    """The paper's result."""
    values: Mapping[int, float]
    """By seed."""
    bar: float = 0.0

    @property
    def estimate(self) -> Estimate | None:
        """Mean and interval over seeds."""
        return Estimate.of(list(self.values.values()))

    @property
    def verdict(self) -> Verdict:
        """By :data:`RULE`."""
        found = self.estimate
        if found is None or found.low is None or found.high is None or found.n < FEWEST_SEEDS:
            return "cannot tell"
        is_above, is_below = found.low > self.bar, found.high < self.bar
        if is_above or is_below:
            return "agrees" if is_above == (self.side == "above") else "disagrees"
        return "cannot tell"


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims."""

    text: str
    questions: tuple[Question, ...]
    remark: str = ""
    """A limit of the numbers."""

    @property
    def deciding(self) -> Question:
        """The first question with the claim's verdict."""
        return next(question for question in self.questions if question.verdict == self.verdict)

    @property
    def verdict(self) -> Verdict:
        """By :data:`RULE`."""
        verdicts = {question.verdict for question in self.questions}
        if "disagrees" in verdicts:
            return "disagrees"
        return "cannot tell" if "cannot tell" in verdicts else "agrees"


def claims(evidence: Evidence) -> dict[str, Claim]:
    """All six, by number.

    Args:
        evidence: trained models. A question without models has no values.
    """
    return {
        "1": _the_jump(evidence),
        "2": _growth(evidence),
        "3": _equal_tokens(evidence),
        "4": _removal(evidence),
        "5": _middle_layers(evidence),
        "6": _tasks(evidence),
    }


def _the_jump(evidence: Evidence) -> Claim:
    llama, own = numbers()["open_models"]["Llama-3.2-1B"][0], numbers()["zeta"]["170m"]["base"][0]
    return Claim(
        "Without JREG the last layer turns the state further than the layer before it.",
        (
            Question(
                "The last layer turns the state further than the layer before it.",
                "Psi_L - Psi_(L-1) at the end, x 100",
                "above",
                f"in nearly every open model: jump rate {llama} in Llama-3.2-1B; {own} in its own 170M",
                {seed: run.rise for seed, run in evidence.baseline.items()},
            ),
        ),
        "The paper's claim is about open models. To measure them: jreg-megatron measure --paper.",
    )


def _growth(evidence: Evidence) -> Claim:
    zeta = numbers()["zeta_over_training"]["170m"]["base"]
    return Claim(
        "The jump grows over training.",
        (
            Question(
                "The jump is larger at the end than after a quarter of the steps.",
                "rise of Psi_L - Psi_(L-1) between these two, x 100",
                "above",
                f"170M: jump rate {zeta[0]} at a quarter, {zeta[-1]} at the end",
                {
                    seed: run.rise - early
                    for seed, run in evidence.baseline.items()
                    if (early := run.rise_at(_QUARTER)) is not None
                },
            ),
        ),
    )


def _equal_tokens(evidence: Evidence) -> Claim:
    many, few = numbers()["zeta_at_equal_tokens"].values()
    return Claim(
        "On equal tokens the jump grows with the number of training steps.",
        (
            Question(
                "The baseline's jump rises with each doubling of the steps, on equal tokens.",
                "slope of Psi_L - Psi_(L-1) over log2(steps), x 100",
                "above",
                f"170M: jump rate {many} with 200,000 steps, {few} with 20,000",
                {seed: _slope(runs) for seed, runs in evidence.batches.items()},
            ),
        ),
        "The paper does not say whether the learning rate depended on the batch. "
        f"Here: {_learning_rates(evidence)}.",
    )


def _removal(evidence: Evidence) -> Claim:
    zeta = numbers()["zeta"]["170m"]
    questions = [
        Question(
            f"Alpha {alpha:g} leaves at most a fifth of the baseline's jump.",
            "jump rate minus a fifth of the baseline's, same seed",
            "below",
            f"170M: jump rate {zeta['base'][0]} without JREG, {zeta[f'alpha {alpha:g}'][0]} with it",
            _left(evidence, alpha),
        )
        for alpha in (1.0, 0.5, 3.0)
    ]
    sharp, usual = evidence.jreg(3.0), evidence.jreg()
    questions.append(
        Question(
            "Alpha 3 leaves a larger bump below the last layer than alpha 1.",
            "jump rate from layer L - 2 on, alpha 3 minus alpha 1",
            "above",
            f"170M: {zeta['alpha 3'][2]} and {zeta['alpha 1'][2]}",
            {
                seed: run.jump_rate(2) - usual[seed].jump_rate(2)
                for seed, run in sharp.items()
                if seed in usual
            },
        )
    )
    return Claim("JREG removes the jump.", tuple(questions))


READ_OUTS: dict[str, Callable[[Evaluated], ReadOut | None]] = {
    "as it is": lambda evaluated: evaluated.read_out,
    "through a lens": lambda evaluated: evaluated.lens,
}
"""The ways to read out the state behind a layer."""


def behind_layers(base: Evaluated, jreg: Evaluated, how: str) -> list[float]:
    """JREG's loss minus the baseline's behind layers 0..L, read out by ``how``; empty if unknown."""
    first, second = READ_OUTS[how](base), READ_OUTS[how](jreg)
    if not (first and second and first.loss and second.loss):
        return []
    return [b - a for a, b in zip(first.loss, second.loss, strict=True)]


def _middle_layers(evidence: Evidence) -> Claim:
    half = evidence.num_layers // 2
    lower, upper = range(1, half + 1), range(half + 1, evidence.num_layers)
    figure = "a figure: below the baseline's at every layer under the last, one seed"
    of_lower, of_upper = (f"layers {layers[0]} to {layers[-1]}" for layers in (lower, upper))

    def mean(layers: range, how: str) -> dict[int, float]:
        """JREG's loss minus the baseline's, mean over the layers, by seed."""

        def difference(base: Evaluated, jreg: Evaluated) -> float | None:
            found = behind_layers(base, jreg, how)
            return fmean(found[layer] for layer in layers) if found else None

        return _differences(evidence, difference)

    turned = {
        seed: _turns_more(base.history.displacement, jreg.history.displacement)
        for seed, (base, jreg) in evidence.pairs.items()
    }
    printed = (
        f"{_turns_more(profile(size, 'base'), profile(size, 'alpha 1')):+.1f}% at {size.upper()}"
        for size in SIZES
    )
    loss = "loss minus the baseline's, mean of these layers, in nats"
    questions = (
        Question(
            f"Layers 2 to {3 * evidence.num_layers // 4} together turn the state further with JREG.",
            "sum of their Psi relative to the baseline's, in percent",
            "above",
            f"computed from its profiles: {', '.join(printed)}",
            turned,
        ),
        Question(
            f"Read out as they are, {of_lower} predict better with JREG.",
            loss,
            "below",
            figure,
            mean(lower, "as it is"),
        ),
        Question(
            f"Read out as they are, {of_upper} predict better with JREG.",
            loss,
            "below",
            figure,
            mean(upper, "as it is"),
        ),
        Question(
            f"Read out through a fitted lens, {of_lower} predict better with JREG.",
            loss,
            "below",
            "not measured",
            mean(lower, "through a lens"),
        ),
        Question(
            f"A model with JREG loses more when one of layers 2 to {half} is left out.",
            "added loss without one layer, mean of these layers, minus the baseline's, in nats",
            "above",
            "not measured",
            _differences(evidence, lambda base, jreg: _dropped(base, jreg, lower[1:])),
        ),
    )
    return Claim(
        "With JREG the layers in the middle do more.",
        questions,
        "Read out as it is, a layer also looks better with JREG because the last layers turn less: its state "
        "is near the last one. The lens removes this effect.",
    )


def _tasks(evidence: Evidence) -> Claim:
    seeds = numbers()["tasks"]["seeds"]
    ten = f"{seeds['difference']:+} points over {seeds['seeds']} seeds, one-sided p {seeds['p_one_sided']}"
    on_paper = {seed: [_means(run.evaluated) for run in pair] for seed, pair in evidence.pairs.items()}
    both = {seed: (a, b) for seed, (a, b) in on_paper.items() if a and b}
    if both:
        questions = [
            Question(
                text,
                "mean with JREG minus the baseline's, in points",
                "above",
                paper,
                {seed: 100 * (jreg[key] - base[key]) for seed, (base, jreg) in both.items()},
            )
            for text, key, paper in (
                ("The mean of the paper's nine tasks is higher with JREG.", "mean", ten),
                (
                    "The mean without BoolQ is higher with JREG.",
                    "mean_without_boolq",
                    "58% of the gain is BoolQ's",
                ),
            )
        ]
    else:
        questions = [
            Question(
                "The mean accuracy in tasks is higher with JREG.",
                "mean with JREG minus the baseline's, in points",
                "above",
                f"{ten} in nine other tasks",
                _differences(evidence, _accuracy),
            )
        ]
    questions.append(
        Question(
            "Held-out text takes fewer bits per byte with JREG.",
            "bits per byte minus the baseline's",
            "below",
            "not printed",
            _differences(evidence, _bits),
        )
    )
    if any(question.values for question in questions):  # leave out tasks that were not run
        questions = [question for question in questions if question.values]
    remark = ""
    if len(both) > 1:
        gain, sd = seeds["difference"], seeds["sd"]
        remark = (
            f"With {len(both)} seeds the paper's test has a power of {power(len(both), gain, sd):.0%} to "
            f"find the paper's gain ({gain} points, standard deviation {sd}), at level {LEVEL:g}."
        )
    return Claim("Models trained with JREG do better in tasks.", tuple(questions), remark)


def _turns_more(base: Sequence[float], jreg: Sequence[float]) -> float:
    """Percent by which JREG's summed Psi of layers 2 to 3L/4 is above the baseline's."""
    middle = slice(1, 3 * len(base) // 4)
    return 100 * (math.fsum(jreg[middle]) / math.fsum(base[middle]) - 1)


def _differences(
    evidence: Evidence, what: Callable[[Evaluated, Evaluated], float | None]
) -> dict[int, float]:
    """``what`` of baseline and JREG at alpha 1, by seed, where it is known."""
    return {
        seed: value
        for seed, (base, jreg) in evidence.pairs.items()
        if base.evaluated and jreg.evaluated and (value := what(base.evaluated, jreg.evaluated)) is not None
    }


def _learning_rates(evidence: Evidence) -> str:
    found = {run.batch: run.history.settings.get("lr", "not logged") for run in evidence.runs}
    if len(set(found.values())) == 1:
        return f"{next(iter(found.values()))} with all batches"
    return ", ".join(f"{rate} with a batch of {batch}" for batch, rate in sorted(found.items()))


def _slope(runs: Mapping[int, Trained]) -> float:
    """Slope of the last layer's rise over log2 of the steps, by least squares."""
    steps = [math.log2(run.steps) for run in runs.values()]
    return linear_regression(steps, [run.rise for run in runs.values()]).slope


def _left(evidence: Evidence, alpha: float) -> dict[int, float]:
    """The jump rate minus the share of the baseline's that may remain, by seed."""
    return {
        seed: run.jump_rate() - _LEFT * base.jump_rate()
        for seed, run in evidence.jreg(alpha).items()
        if (base := evidence.baseline.get(seed))
    }


def _dropped(base: Evaluated, jreg: Evaluated, layers: range) -> float | None:
    if base.layer_drop is None or jreg.layer_drop is None:
        return None
    added = [
        fmean(drop.loss[layer - 1] - drop.unchanged for layer in layers)
        for drop in (base.layer_drop, jreg.layer_drop)
    ]
    return added[1] - added[0]


def _means(evaluated: Evaluated | None) -> dict[str, float] | None:
    if evaluated is None or missing_tasks(evaluated.tasks):
        return None
    return task_means({name: score.value for name, score in evaluated.tasks.items()})


def _accuracy(base: Evaluated, jreg: Evaluated) -> float | None:
    """Mean difference in points, over tasks of both with a known chance score."""
    names = [name for name, score in base.tasks.items() if score.chance is not None and name in jreg.tasks]
    if not names:
        return None
    return 100 * fmean(jreg.tasks[name].value - base.tasks[name].value for name in names)


def _bits(base: Evaluated, jreg: Evaluated) -> float | None:
    task = "speeches_bits_per_byte"
    if task not in base.tasks or task not in jreg.tasks:
        return None
    return jreg.tasks[task].value - base.tasks[task].value
