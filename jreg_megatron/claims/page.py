"""The claims as one HTML page and one JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jreg_megatron.claims.evidence import Evidence, rise
from jreg_megatron.claims.rules import READ_OUTS, RULE, Claim, Question, behind_layers
from jreg_megatron.paper.over_seeds import Estimate, p_one_sided
from jreg_megatron.report.charts import Axis
from jreg_megatron.report.figures import LAYER, PSI, Figure, curves
from jreg_megatron.report.page import Section, render
from jreg_megatron.report.tables import LOSS, NOTHING, Table, number

_BELOW = (0, 1, 2)
"""The jump rates of these layers are listed, counted down from the last."""
_RISE = "Ψ of the last layer minus Ψ of the layer before, x 100"


def document(evidence: Evidence, claims: Mapping[str, Claim], about: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON document.

    Args:
        evidence: the evidence for the claims.
        claims: by number.
        about: more entries, such as versions.
    """
    found = {}
    for key, claim in claims.items():
        deciding = _question(claim.deciding)
        found[key] = {
            "claim": claim.text,
            "verdict": claim.verdict,
            "decided_by": deciding["question"],
            **{name: deciding[name] for name in ("paper", "number", "found", "interval")},
            "questions": [_question(question) for question in claim.questions],
            "remark": claim.remark,
        }
    runs = {
        str(run.folder): {
            **{name: getattr(run, name) for name in ("seed", "coeff", "alpha", "batch", "tokens")},
            "jump_rates": [run.jump_rate(below) for below in _BELOW],
            **run.history.summary(),
        }
        for run in evidence.runs
    }
    return {
        **about,
        "rule": RULE,
        "claims": found,
        "batch": evidence.batch,
        "runs": runs,
        "notes": evidence.notes,
    }


def page(evidence: Evidence, claims: Mapping[str, Claim], how: Sequence[tuple[str, str]]) -> str:
    """The page; ``how``: rows of a table on the training."""
    rows = tuple(
        (key, claim.text, claim.verdict, claim.deciding.text, claim.deciding.paper, *_found(claim.deciding))
        for key, claim in claims.items()
    )
    columns = ("claim", "text", "verdict", "decided by", "the paper found", "found here", "95% interval")
    verdicts = Table("Verdicts", columns, rows, is_text=True)
    figures = _figures(evidence)
    sections = [
        Section("verdicts", "Verdicts", RULE, tables=(verdicts,)),
        *(
            Section(
                f"claim_{key}",
                f"{key}. {claim.text}",
                f"Verdict: {claim.verdict}.",
                tables=(_questions(claim),),
                folded=(_values(claim),),
                notes=(claim.remark,) if claim.remark else (),
                figures=tuple(figure for figure in figures.get(key, ()) if figure),
            )
            for key, claim in claims.items()
        ),
        Section(
            "how",
            "How it was done",
            tables=(Table("What was trained", ("what", "value"), tuple(how), is_text=True),),
            folded=(_runs(evidence),),
            notes=tuple(evidence.notes),
        ),
    ]
    runs = len(evidence.runs)
    return render(
        "The six claims of the JREG paper, judged",
        f"{runs} training runs, {evidence.num_layers} layers, batches of "
        f"{', '.join(str(batch) for batch in sorted({run.batch for run in evidence.runs}))} sequences",
        sections,
    )


def _question(question: Question) -> dict[str, Any]:
    found = question.estimate
    return {
        "question": question.text,
        "verdict": question.verdict,
        "paper": question.paper,
        "number": question.number,
        "wanted": f"{question.side} {question.bar:g}",
        "found": None if found is None else found.mean,
        "interval": None if found is None or found.low is None else [found.low, found.high],
        "p_one_sided": _p(question),
        "by_seed": {str(seed): value for seed, value in question.values.items()},
    }


def _p(question: Question) -> float | None:
    """One-sided p of the paper's test that the number is on the claim's side of the bar."""
    sign = 1 if question.side == "above" else -1
    return p_one_sided([sign * (value - question.bar) for value in question.values.values()])


def _questions(claim: Claim) -> Table:
    rows = [
        (
            question.text,
            question.paper,
            *_found(question),
            f"{question.side} {question.bar:g}",
            str(len(question.values)),
            number(_p(question), "#.2g"),
            question.verdict,
            question.number,
        )
        for question in claim.questions
    ]
    numbers = ("the paper found", "found here", "95% interval", "the claim wants", "seeds", "p, one-sided")
    columns = ("question", *numbers, "verdict", "meaning of the number")
    return Table("Questions", columns, tuple(rows), is_text=True)


def _found(question: Question) -> tuple[str, str]:
    found = question.estimate
    if found is None:
        return NOTHING, NOTHING
    mean = number(found.mean, "#.3g")
    if found.low is None or found.high is None:
        return mean, NOTHING
    return mean, f"{number(found.low, '#.3g')} to {number(found.high, '#.3g')}"


def _values(claim: Claim) -> Table:
    columns = {
        question.text: {str(seed): value for seed, value in question.values.items()}
        for question in claim.questions
    }
    return Table.of("By seed", "seed", columns)


def _runs(evidence: Evidence) -> Table:
    rows = [
        (
            run.name,
            str(run.seed),
            f"{run.coeff:g}",
            NOTHING if run.alpha is None else f"{run.alpha:g}",
            str(run.batch),
            f"{run.steps:,}",
            number(run.history.validation_loss[-1], LOSS),
            *(number(run.jump_rate(below), "#.3g") for below in _BELOW),
            " ".join(f"{100 * psi:.2f}" for psi in run.history.displacement),
        )
        for run in evidence.runs
    ]
    columns = ("run", "seed", "λ", "α", "batch", "steps", "validation loss", "ζ_L", "ζ_(L-1)", "ζ_(L-2)")
    return Table("All runs", (*columns, "Ψ x 100 of layers 1 to L"), tuple(rows))


def _figures(evidence: Evidence) -> dict[str, list[Figure | None]]:
    alphas = {f"alpha {alpha:g}": evidence.jreg(alpha) for alpha in evidence.alphas}
    settings = {"baseline": evidence.baseline} | {name: runs for name, runs in alphas.items() if runs}
    growth = curves(
        "growth",
        "The last layer's jump over training",
        "Below 0 the last layer turns the state less than the layer before.",
        {
            name: _over_seeds(
                (step / run.steps, rise(psi))
                for run in settings[name].values()
                for step, psi in zip(run.history.iterations, run.history.profiles, strict=True)
            )
            for name in ("baseline", "alpha 1")
            if name in settings
        },
        Axis("share of the training steps"),
        Axis(_RISE),
        band=True,
        rule=0,
    )
    steps = curves(
        "steps",
        "The baseline's jump against the number of steps, on equal tokens",
        "Runs with fewer steps have larger batches.",
        {
            "baseline": _over_seeds(
                (run.steps, run.rise) for runs in evidence.batches.values() for run in runs.values()
            )
        },
        Axis("training steps", whole=True),
        Axis(_RISE),
        band=True,
        rule=0,
    )
    # Jumps differ by seed, so only seeds that all settings have are compared.
    common = sorted(set.intersection(*map(set, settings.values())))
    of_seeds = f"Mean over seeds {', '.join(map(str, common))}, at lambda 1."
    profiles = {
        name: _over_seeds(
            (layer, psi)
            for seed in common
            for layer, psi in enumerate(runs[seed].history.displacement, start=1)
        )
        for name, runs in settings.items()
    }
    whole = curves(
        "profiles", "How far each layer turns the state, at the end", of_seeds, profiles, LAYER, PSI
    )
    half = max(2, evidence.num_layers // 2)
    top = curves(
        "top",
        "The upper half of the layers, on a linear axis",
        f"{of_seeds} The last layer's jump rate does not show a bump below the last layer.",
        {name: {x: y for x, y in of.items() if x > half} for name, of in profiles.items()},
        LAYER,
        Axis(PSI.title, zero=True),
    )
    evaluated = [
        (base.evaluated, jreg.evaluated)
        for base, jreg in evidence.pairs.values()
        if base.evaluated and jreg.evaluated
    ]
    early_exit = curves(
        "early_exit",
        "Loss behind each layer: JREG minus the baseline",
        "Below 0, JREG is better. As it is: the final norm and the head read the state. Through a lens: "
        "before that, a map fitted on other texts brings the state near to the last layer's.",
        {
            how: _over_seeds(
                point for base, jreg in evaluated for point in enumerate(behind_layers(base, jreg, how))
            )
            for how in READ_OUTS
        },
        LAYER,
        Axis("difference (nats per token)"),
        band=True,
        rule=0,
    )
    layer_drop = curves(
        "layer_drop",
        "Added loss without one layer",
        "A higher value: the model needs the layer more.",
        {
            name: _over_seeds(
                (layer, loss - drop.unchanged)
                for pair in evaluated
                if (drop := pair[side].layer_drop)
                for layer, loss in enumerate(drop.loss, start=1)
            )
            for side, name in enumerate(("baseline", "alpha 1"))
        },
        LAYER,
        Axis("added loss (nats per token)", scale="log"),
        band=True,
    )
    return {"2": [growth], "3": [steps], "4": [whole, top], "5": [early_exit, layer_drop]}


def _over_seeds(points: Iterable[tuple[float, float]]) -> dict[float, Estimate | None]:
    """The mean of the values at each x, with its interval."""
    found: dict[float, list[float]] = {}
    for x, y in points:
        found.setdefault(x, []).append(y)
    return {x: Estimate.of(values) for x, values in found.items()}
