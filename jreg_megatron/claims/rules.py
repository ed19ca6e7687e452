"""The six claims as questions with one number per seed, and the rule that gives a verdict.

Rule, questions and bars were written before the toys were trained. README.md in this folder lists the
changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any, Literal

from jreg_megatron.claims.evidence import Evidence, Trained
from jreg_megatron.paper import SIZES, numbers, profile, task_means
from jreg_megatron.paper.over_seeds import LEVEL, Estimate, power

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
BITS = "speeches_bits_per_byte"


@dataclass(frozen=True)
class Question:
    """One number per seed, and the bar for it."""

    text: str
    """A statement that is true if the claim holds."""
    number: str
    """The meaning of the number, with its unit."""
    paper: str
    """The paper's result."""
    values: Mapping[int, float]
    """By seed."""
    side: Literal["above", "below"] = "above"
    """The claim's side of the bar."""
    bar: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """By :data:`RULE`."""
        found = Estimate.of(list(self.values.values()))
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
    questions: Sequence[Question]
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
    """All six, by number. A question without trained models has no values."""
    all_six = (_the_jump, _growth, _equal_tokens, _removal, _middle_layers, _tasks)
    return {str(number): claim(evidence) for number, claim in enumerate(all_six, start=1)}


def _the_jump(evidence: Evidence) -> Claim:
    llama, own = numbers()["open_models"]["Llama-3.2-1B"][0], numbers()["zeta"]["170m"]["base"][0]
    question = Question(
        "The last layer turns the state further than the layer before it.",
        "Psi_L - Psi_(L-1) at the end, x 100",
        f"in nearly every open model: jump rate {llama} in Llama-3.2-1B; {own} in its own 170M",
        {seed: run.rise for seed, run in evidence.baseline.items()},
    )
    return Claim(
        "Without JREG the last layer turns the state further than the layer before it.",
        [question],
        "The paper's claim is about open models. To measure them: jreg-megatron measure --paper.",
    )


def _growth(evidence: Evidence) -> Claim:
    zeta = numbers()["zeta_over_training"]["170m"]["base"]
    early = {seed: run.at(_QUARTER, run.rises) for seed, run in evidence.baseline.items()}
    question = Question(
        "The jump is larger at the end than after a quarter of the steps.",
        "rise of Psi_L - Psi_(L-1) between these two, x 100",
        f"170M: jump rate {zeta[0]} at a quarter, {zeta[-1]} at the end",
        {seed: evidence.baseline[seed].rise - rise for seed, rise in early.items() if rise is not None},
    )
    return Claim("The jump grows over training.", [question])


def _equal_tokens(evidence: Evidence) -> Claim:
    many, few = numbers()["zeta_at_equal_tokens"].values()
    slopes = {
        seed: linear_regression([math.log2(run.steps) for run in runs], [run.rise for run in runs]).slope
        for seed, runs in ((seed, by_batch.values()) for seed, by_batch in evidence.batches.items())
    }
    question = Question(
        "The baseline's jump rises with each doubling of the steps, on equal tokens.",
        "slope of Psi_L - Psi_(L-1) over log2(steps), x 100",
        f"170M: jump rate {many} with 200,000 steps, {few} with 20,000",
        slopes,
    )
    rates = {run.batch: run.history.settings.get("lr", "not logged") for run in evidence.runs}
    here = ", ".join(f"{rate} with a batch of {batch}" for batch, rate in sorted(rates.items()))
    if len(set(rates.values())) == 1:
        here = f"{evidence.runs[0].history.settings.get('lr', 'not logged')} with all batches"
    return Claim(
        "On equal tokens the jump grows with the number of training steps.",
        [question],
        f"The paper does not say whether the learning rate depended on the batch. Here: {here}.",
    )


def _removal(evidence: Evidence) -> Claim:
    zeta, base = numbers()["zeta"]["170m"], evidence.baseline
    questions = [
        Question(
            f"Alpha {alpha:g} leaves at most a fifth of the baseline's jump.",
            "jump rate minus a fifth of the baseline's, same seed",
            f"170M: jump rate {zeta['base'][0]} without JREG, {zeta[f'alpha {alpha:g}'][0]} with it",
            {
                seed: run.jump_rate() - _LEFT * base[seed].jump_rate()
                for seed, run in evidence.by_seed(alpha).items()
                if seed in base
            },
            "below",
        )
        for alpha in (1.0, 0.5, 3.0)
    ]
    sharp, usual = (
        {s: run.jump_rate(2) for s, run in evidence.by_seed(alpha).items()} for alpha in (3.0, 1.0)
    )
    bump = Question(
        "Alpha 3 leaves a larger bump below the last layer than alpha 1.",
        "jump rate from layer L - 2 on, alpha 3 minus alpha 1",
        f"170M: {zeta['alpha 3'][2]} and {zeta['alpha 1'][2]}",
        {seed: rate - usual[seed] for seed, rate in sharp.items() if seed in usual},
    )
    return Claim("JREG removes the jump.", [*questions, bump])


def of_seeds(by_seed: Mapping[int, float]) -> dict[str, Any]:
    """The part of one number per seed in a JSON document: its mean, its interval and its values."""
    mean = Estimate.of(list(by_seed.values()))
    return {
        "found": mean and mean.mean,
        "interval": None if mean is None or mean.low is None else [mean.low, mean.high],
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
    }


READ_OUTS = {"directly": "read_out.loss", "through a lens": "lens.loss"}
"""The ways to read out the state after a layer."""


def more(base: Trained, jreg: Trained, what: str) -> dict[int, float]:
    """JREG's numbers minus the baseline's, by layer; see :meth:`.Trained.by_layer`. Empty if unknown."""
    first, second = base.by_layer(what), jreg.by_layer(what)
    return {layer: second[layer] - value for layer, value in first.items()} if second else {}


def _middle_layers(evidence: Evidence) -> Claim:
    half = evidence.num_layers // 2
    lower, upper = range(1, half + 1), range(half + 1, evidence.num_layers)
    figure = "a figure: below the baseline's at every layer under the last, one seed"
    of_lower, of_upper = (f"layers {layers[0]} to {layers[-1]}" for layers in (lower, upper))

    def mean(layers: range, what: str) -> dict[int, float]:
        """JREG's number minus the baseline's, mean over the layers, by seed."""
        found = {seed: more(*pair, what) for seed, pair in evidence.pairs.items()}
        return {seed: fmean(by[layer] for layer in layers) for seed, by in found.items() if by}

    turned = {
        seed: _turns_more(base.history.displacement, jreg.history.displacement)
        for seed, (base, jreg) in evidence.pairs.items()
    }
    printed = (
        f"{_turns_more(profile(size, 'base'), profile(size, 'alpha 1')):+.1f}% at {size.upper()}"
        for size in SIZES
    )
    loss = "loss minus the baseline's, mean of these layers, in nats"
    questions = [
        Question(
            f"Layers 2 to {3 * evidence.num_layers // 4} together turn the state further with JREG.",
            "sum of their Psi relative to the baseline's, in percent",
            f"computed from its profiles: {', '.join(printed)}",
            turned,
        ),
        *(
            Question(f"Read out {how}, {words} predict better with JREG.", loss, paper, values, "below")
            for how, words, paper, values in (
                ("directly", of_lower, figure, mean(lower, "read_out.loss")),
                ("directly", of_upper, figure, mean(upper, "read_out.loss")),
                ("through a fitted lens", of_lower, "not measured", mean(lower, "lens.loss")),
            )
        ),
        Question(
            f"A model with JREG loses more when one of layers 2 to {half} is left out.",
            "added loss without one layer, mean of these layers, minus the baseline's, in nats",
            "not measured",
            mean(lower[1:], "layer_drop"),
        ),
    ]
    return Claim(
        "With JREG the layers in the middle do more.",
        questions,
        "Read out directly, a layer also looks better with JREG because the last layers turn less: its state "
        "is near the last one. The lens removes this effect.",
    )


def _tasks(evidence: Evidence) -> Claim:
    seeds = numbers()["tasks"]["seeds"]
    ten = f"{seeds['difference']:+} points over {seeds['seeds']} seeds, one-sided p {seeds['p_one_sided']}"
    means: dict[int, dict[str, float]] = {}
    points: dict[int, float] = {}
    bits: dict[int, float] = {}
    for seed, pair in evidence.pairs.items():
        base, jreg = ({name: score.value for name, score in each.tasks.items()} for each in pair)
        gains = {name: 100 * (jreg[name] - value) for name, value in base.items() if name in jreg}
        if gain := task_means(gains):
            means[seed] = gain
        scored = [gains[name] for name in gains if pair[0].tasks[name].chance is not None]
        points |= {seed: fmean(scored)} if scored else {}
        bits |= {seed: gains[BITS] / 100} if BITS in gains else {}
    asked = [("The mean accuracy in tasks is higher with JREG.", f"{ten} in nine other tasks", points)]
    if means:
        of_nine, without = (
            {s: found[key] for s, found in means.items()} for key in next(iter(means.values()))
        )
        asked = [
            ("The mean of the paper's nine tasks is higher with JREG.", ten, of_nine),
            ("The mean without BoolQ is higher with JREG.", "58% of the gain is BoolQ's", without),
        ]
    number = "mean with JREG minus the baseline's, in points"
    questions = [Question(text, number, paper, values) for text, paper, values in asked]
    fewer = "Held-out text takes fewer bits per byte with JREG."
    questions.append(Question(fewer, "bits per byte minus the baseline's", "not printed", bits, "below"))
    if any(question.values for question in questions):  # leave out tasks that were not run
        questions = [question for question in questions if question.values]
    remark = ""
    if len(means) > 1:
        gain, sd = seeds["difference"], seeds["sd"]
        remark = (
            f"With {len(means)} seeds the paper's test has a power of {power(len(means), gain, sd):.0%} to "
            f"find the paper's gain ({gain} points, standard deviation {sd}), at level {LEVEL:g}."
        )
    return Claim("Models trained with JREG do better in tasks.", questions, remark)


def _turns_more(base: Sequence[float], jreg: Sequence[float]) -> float:
    """Percent by which JREG's summed Psi of layers 2 to 3L/4 is above the baseline's."""
    return 100 * (math.fsum(middle(jreg)) / math.fsum(middle(base)) - 1)


def middle(displacement: Sequence[float]) -> Sequence[float]:
    """Psi of layers 2 to 3L/4."""
    return displacement[1 : 3 * len(displacement) // 4]
