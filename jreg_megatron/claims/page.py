"""The claims as one HTML page and one JSON document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jreg_megatron.claims.evidence import Evidence, Trained
from jreg_megatron.claims.rules import READ_OUTS, RULE, Claim, Question, more, of_seeds
from jreg_megatron.paper.over_seeds import p_one_sided
from jreg_megatron.report.charts import Axis
from jreg_megatron.report.figures import LAYER, PSI, Figure, curves
from jreg_megatron.report.page import Section, render
from jreg_megatron.report.tables import LOSS, NOTHING, Table, interval, number

_BELOW = ("ζ_L", "ζ_(L-1)", "ζ_(L-2)")
"""The jump rates of these layers are listed, counted down from the last."""
RISE = Axis("Ψ of the last layer minus Ψ of the layer before, x 100")


def document(evidence: Evidence, claims: Mapping[str, Claim], about: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON document of claims by number; ``about`` are more entries, such as versions."""
    found = {}
    for key, claim in claims.items():
        deciding = question_document(claim.deciding)
        found[key] = {
            "claim": claim.text,
            "verdict": claim.verdict,
            "decided_by": deciding["question"],
            **{name: deciding[name] for name in ("paper", "number", "found", "interval")},
            "questions": [question_document(question) for question in claim.questions],
            "remark": claim.remark,
        }
    runs = {str(run.folder): run_document(run) for run in evidence.runs}
    judged = {"rule": RULE, "claims": found, "batch": evidence.batch}
    return {**about, **judged, "runs": runs, "notes": evidence.notes}


def page(document: Mapping[str, Any], evidence: Evidence) -> str:
    """The page of a document, with figures of its evidence."""
    claims, runs = document["claims"], document["runs"].values()
    verdicts = [
        {"claim": key, "text": claim["claim"], "verdict": claim["verdict"], "decided by": claim["decided_by"]}
        | _found(claim)
        for key, claim in claims.items()
    ]
    figures = [(key, figure) for key, figure in _figures(evidence) if figure]
    sections = [
        Section("verdicts", "Verdicts", RULE, tables=(Table.of_rows("Verdicts", verdicts, is_text=True),)),
        *(
            Section(
                f"claim_{key}",
                f"{key}. {claim['claim']}",
                f"Verdict: {claim['verdict']}.",
                tables=(questions_table(claim["questions"]),),
                folded=(
                    Table.of("By seed", "seed", {q["question"]: q["by_seed"] for q in claim["questions"]}),
                ),
                notes=tuple(filter(None, [claim["remark"]])),
                figures=tuple(figure for of, figure in figures if of == key),
            )
            for key, claim in claims.items()
        ),
        how_section(document),
    ]
    batches = ", ".join(str(batch) for batch in sorted({run["batch"] for run in runs}))
    return render(
        "The six claims of the JREG paper, judged",
        f"{len(runs)} training runs, {evidence.num_layers} layers, batches of {batches} sequences",
        sections,
    )


def how_section(document: Mapping[str, Any]) -> Section:
    """How the runs of a document were made, and their numbers."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    how = document["how"] | {"versions": versions}
    return Section(
        "how",
        "How it was done",
        tables=(Table("What was trained", ("what", "value"), tuple(how.items()), is_text=True),),
        folded=(Table.of_rows("All runs", [_run(*run) for run in document["runs"].items()]),),
        notes=tuple(document["notes"]),
    )


def run_document(run: Trained) -> dict[str, Any]:
    """The part of a run in a JSON document."""
    return {
        **{name: getattr(run, name) for name in ("seed", "coeff", "alpha", "batch", "tokens")},
        "jump_rates": [run.jump_rate(below) for below in range(len(_BELOW))],
        **run.history.summary(),
    }


def question_document(question: Question) -> dict[str, Any]:
    """The part of a question in a JSON document."""
    # The paper's test of whether the number is on the claim's side of the bar.
    sign = 1 if question.side == "above" else -1
    beyond = [sign * (value - question.bar) for value in question.values.values()]
    return {
        "question": question.text,
        "verdict": question.verdict,
        "paper": question.paper,
        "number": question.number,
        "wanted": f"{question.side} {question.bar:g}",
        "p_one_sided": p_one_sided(beyond),
        **of_seeds(question.values),
    }


def questions_table(questions: Sequence[Mapping[str, Any]]) -> Table:
    """Questions of a document, a row for each."""
    return Table.of_rows("Questions", [_row(question) for question in questions], is_text=True)


def _row(question: Mapping[str, Any]) -> dict[str, str]:
    return {
        "question": question["question"],
        **_found(question),
        **{"the claim wants": question["wanted"], "seeds": str(len(question["by_seed"]))},
        **{"p, one-sided": number(question["p_one_sided"], "#.2g"), "verdict": question["verdict"]},
        "meaning of the number": question["number"],
    }


def _found(judged: Mapping[str, Any]) -> dict[str, str]:
    here = number(judged["found"], "#.3g"), interval(judged["interval"], "#.3g")
    return dict(zip(("the paper found", "found here", "95% interval"), (judged["paper"], *here), strict=True))


def _run(folder: str, run: Mapping[str, Any]) -> dict[str, str]:
    return {
        "run": "/".join(Path(folder).parts[-2:]),  # runs of several sweeps have the same names
        **{"seed": str(run["seed"]), "λ": f"{run['coeff']:g}"},
        **{"α": NOTHING if run["alpha"] is None else f"{run['alpha']:g}", "batch": str(run["batch"])},
        **{
            "steps": f"{run['history'][-1]['iteration']:,}",
            "validation loss": number(run["validation_loss"], LOSS),
        },
        **{name: number(rate, "#.3g") for name, rate in zip(_BELOW, run["jump_rates"], strict=True)},
        "Ψ x 100 of layers 1 to L": " ".join(f"{100 * psi:.2f}" for psi in run["displacement"]),
    }


def _figures(evidence: Evidence) -> Iterator[tuple[str, Figure | None]]:
    """Each with the number of its claim."""
    over_seeds: dict[str, Any] = {"band": True, "rule": 0}
    settings = {"baseline": evidence.baseline}
    settings |= {f"alpha {alpha:g}": evidence.by_seed(alpha) for alpha in evidence.alphas}
    rises = {
        name: [p for run in settings.get(name, {}).values() for p in zip(run.shares, run.rises, strict=True)]
        for name in ("baseline", "alpha 1")
    }
    title, share = "The last layer's jump over training", Axis("share of the training steps")
    about = "Below 0 the last layer turns the state less than the layer before."
    yield "2", curves("growth", title, about, rises, share, RISE, **over_seeds)

    by_steps = [(run.steps, run.rise) for runs in evidence.batches.values() for run in runs.values()]
    title = "The baseline's jump against the number of steps, on equal tokens"
    about, steps = "Runs with fewer steps have larger batches.", Axis("training steps", whole=True)
    yield "3", curves("steps", title, about, {"baseline": by_steps}, steps, RISE, **over_seeds)

    # Jumps differ by seed, so only seeds that all settings have are compared.
    common = sorted(set.intersection(*map(set, settings.values())))
    profiles = {
        name: [point for seed in common for point in enumerate(runs[seed].history.displacement, start=1)]
        for name, runs in settings.items()
    }
    title, about = (
        "How far each layer turns the state, at the end",
        f"Mean over seeds {', '.join(map(str, common))}",
    )
    about += ", at lambda 1."
    yield "4", curves("profiles", title, about, profiles, LAYER, PSI)

    half = max(2, evidence.num_layers // 2)
    upper = {name: [point for point in points if point[0] > half] for name, points in profiles.items()}
    title, linear = "The upper half of the layers, on a linear axis", Axis(PSI.title, zero=True)
    about += " The last layer's jump rate does not show a bump below the last layer."
    yield "4", curves("top", title, about, upper, LAYER, linear)

    pairs = evidence.pairs.values()
    gains = {how: [p for pair in pairs for p in more(*pair, what).items()] for how, what in READ_OUTS.items()}
    title, axis = "Loss after each layer: JREG minus the baseline", Axis("difference (nats per token)")
    about = (
        "Below 0, JREG is better. Directly: the final norm and the head read the state. Through a lens: "
        "before that, a map fitted on other texts brings the state near to the last layer's."
    )
    yield "5", curves("early_exit", title, about, gains, LAYER, axis, **over_seeds)

    drops = {
        name: [point for pair in pairs for point in pair[side].by_layer("layer_drop").items()]
        for side, name in enumerate(("baseline", "alpha 1"))
    }
    title, axis = "Added loss without one layer", Axis("added loss (nats per token)", scale="log")
    about = "A higher value: the model needs the layer more."
    yield "5", curves("layer_drop", title, about, drops, LAYER, axis, band=True)
