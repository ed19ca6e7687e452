"""The six claims as questions with a number a seed, and the rule that makes a verdict of the numbers.

Rule, questions and bars were written before the toys were trained. README.md here tells what was changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from jreg_megatron.claims.evidence import Evidence, Trained
from jreg_megatron.paper import SIZES, missing_tasks, numbers, profile, task_means
from jreg_megatron.paper.over_seeds import LEVEL, Estimate, power
from jreg_megatron.report.inputs import Evaluated, ReadOut

Verdict = Literal["agrees", "disagrees", "cannot tell"]

FEWEST_SEEDS = 3
"""With fewer the verdict is "cannot tell"."""

RULE = (
    "Each claim is asked as one or more questions. A question has one number for each training seed that has "
    "the runs for it, and a bar. It agrees if the 95% t interval of the mean over seeds lies wholly on the "
    "claim's side of the bar, and disagrees if it lies wholly on the other side. Otherwise, and with fewer "
    f"than {FEWEST_SEEDS} seeds, it cannot tell. A claim disagrees if one of its questions does, and agrees "
    "if all of them do. Otherwise it cannot tell."
)

_LEFT = 0.2
"""Of the baseline's jump rate, what JREG may leave and still be said to remove the jump."""
_QUARTER = 0.25


@dataclass(frozen=True)
class Question:
    """One number a seed, and where it has to lie."""

    text: str
    """What is true if the claim holds."""
    number: str
    """What the number is, with its unit."""
    side: Literal["above", "below"]
    """Of the bar, where the claim wants the number."""
    paper: str
    """What the paper found."""
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
    """What the numbers do not say."""

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
        evidence: trained models; a question that there are no models for has no values.
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
                "The last layer turns it further than the one before.",
                "Psi_L - Psi_(L-1) at the end, x 100",
                "above",
                f"in nearly every open model: jump rate {llama} in Llama-3.2-1B; {own} in its own 170M",
                {seed: run.rise for seed, run in evidence.baseline.items()},
            ),
        ),
        "The paper's claim is about open models: jreg-megatron measure --paper measures those.",
    )


def _growth(evidence: Evidence) -> Claim:
    zeta = numbers()["zeta_over_training"]["170m"]["base"]
    return Claim(
        "The jump grows over training.",
        (
            Question(
                "It is larger at the end than after a quarter of the steps.",
                "rise of Psi_L - Psi_(L-1) between the two, x 100",
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
                "The jump of the baseline rises with each doubling of the steps, the tokens kept.",
                "slope of Psi_L - Psi_(L-1) over log2(steps), x 100",
                "above",
                f"170M: jump rate {many} with 200,000 steps, {few} with 20,000",
                {seed: _slope(runs) for seed, runs in evidence.batches.items()},
            ),
        ),
        "The paper does not say whether the learning rate followed the batch. "
        f"Here: {_learning_rates(evidence)}.",
    )


def _removal(evidence: Evidence) -> Claim:
    zeta = numbers()["zeta"]["170m"]
    questions = [
        Question(
            f"Alpha {alpha:g} leaves at most a fifth of the baseline's jump.",
            "jump rate less a fifth of the baseline's of the same seed",
            "below",
            f"170M: jump rate {zeta['base'][0]} without JREG, {zeta[f'alpha {alpha:g}'][0]} with it",
            _left(evidence, alpha),
        )
        for alpha in (1.0, 0.5, 3.0)
    ]
    sharp, usual = evidence.jreg(3.0), evidence.jreg()
    questions.append(
        Question(
            "Alpha 3 leaves a bump below the last layer, which alpha 1 does not.",
            "jump rate from layer L - 2 on, alpha 3 less alpha 1",
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
"""How the state behind a layer is read out."""


def behind_layers(base: Evaluated, jreg: Evaluated, how: str) -> list[float]:
    """The loss behind layers 0..L, read out as ``how`` says, less the baseline's; empty if unknown."""
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
        """Of the loss behind the layers less the baseline's, by seed."""

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
    loss = "loss less the baseline's, mean of these layers, in nats"
    questions = (
        Question(
            f"Layers 2 to {3 * evidence.num_layers // 4} together turn the state further with JREG.",
            "their summed Psi against the baseline's, in percent",
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
            f"So do {of_upper}.",
            "the same of those layers, in nats",
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
            "loss added by leaving one out, their mean, less the baseline's, in nats",
            "above",
            "not measured",
            _differences(evidence, lambda base, jreg: _dropped(base, jreg, lower[1:])),
        ),
    )
    return Claim(
        "With JREG the layers in the middle do more.",
        questions,
        "Read out as it is, a layer looks better with JREG for a plain reason too: small last steps put its "
        "state near the last one. The lens takes that away.",
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
                "mean with JREG less the baseline's, in points",
                "above",
                paper,
                {seed: 100 * (jreg[key] - base[key]) for seed, (base, jreg) in both.items()},
            )
            for text, key, paper in (
                ("The mean of the paper's nine tasks is higher with JREG.", "mean", ten),
                ("So is the mean without BoolQ.", "mean_without_boolq", "58% of the gain is BoolQ's"),
            )
        ]
    else:
        questions = [
            Question(
                "The mean accuracy in tasks is higher with JREG.",
                "mean with JREG less the baseline's, in points",
                "above",
                f"{ten} in nine other tasks",
                _differences(evidence, _accuracy),
            )
        ]
    questions.append(
        Question(
            "Held-out text takes fewer bits per byte with JREG.",
            "bits per byte less the baseline's",
            "below",
            "not printed",
            _differences(evidence, _bits),
        )
    )
    if any(question.values for question in questions):  # tasks that were not run are not asked
        questions = [question for question in questions if question.values]
    remark = ""
    if len(both) > 1:
        gain, sd = seeds["difference"], seeds["sd"]
        remark = (
            f"With {len(both)} seeds the paper's test finds a gain such as the paper's ({gain} points with a "
            f"standard deviation of {sd}) {power(len(both), gain, sd):.0%} of the time, at level {LEVEL:g}."
        )
    return Claim("Models trained with JREG do better in tasks.", tuple(questions), remark)


def _turns_more(base: Sequence[float], jreg: Sequence[float]) -> float:
    """Percent by which JREG's summed Psi of layers 2 to 3L/4 is above the baseline's."""
    middle = slice(1, 3 * len(base) // 4)
    return 100 * (math.fsum(jreg[middle]) / math.fsum(base[middle]) - 1)


def _differences(
    evidence: Evidence, what: Callable[[Evaluated, Evaluated], float | None]
) -> dict[int, float]:
    """By seed, of JREG at alpha 1 to the baseline; without seeds where it is not known."""
    return {
        seed: value
        for seed, (base, jreg) in evidence.pairs.items()
        if base.evaluated and jreg.evaluated and (value := what(base.evaluated, jreg.evaluated)) is not None
    }


def _learning_rates(evidence: Evidence) -> str:
    """By batch."""
    found = {run.batch: run.history.settings.get("lr", "not logged") for run in evidence.runs}
    if len(set(found.values())) == 1:
        return f"{next(iter(found.values()))} with all batches"
    return ", ".join(f"{rate} with a batch of {batch}" for batch, rate in sorted(found.items()))


def _slope(runs: Mapping[int, Trained]) -> float:
    """Least squares of the last layer's rise over the doublings of the steps."""
    steps = [math.log2(run.steps) for run in runs.values()]
    rises = [run.rise for run in runs.values()]
    middle = fmean(steps)
    return math.fsum((x - middle) * y for x, y in zip(steps, rises, strict=True)) / math.fsum(
        (x - middle) ** 2 for x in steps
    )


def _left(evidence: Evidence, alpha: float) -> dict[int, float]:
    """The jump rate less what may be left of the baseline's, by seed."""
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
    """In points, of the tasks of both where guessing scores something."""
    names = [name for name, score in base.tasks.items() if score.chance is not None and name in jreg.tasks]
    if not names:
        return None
    return 100 * fmean(jreg.tasks[name].value - base.tasks[name].value for name in names)


def _bits(base: Evaluated, jreg: Evaluated) -> float | None:
    task = "speeches_bits_per_byte"
    if task not in base.tasks or task not in jreg.tasks:
        return None
    return jreg.tasks[task].value - base.tasks[task].value
