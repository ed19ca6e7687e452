"""The comparison as one HTML page and one JSON document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from jreg_megatron.claims.page import RISE, how_section, question_document, questions_table, run_document
from jreg_megatron.claims.rules import READ_OUTS
from jreg_megatron.claims.rules import RULE as INTERVAL_RULE
from jreg_megatron.compare.rules import FAMILIES, RULE, compared, pairs, published
from jreg_megatron.compare.toys import Toy, Toys
from jreg_megatron.compare.ways import WAYS, Plan
from jreg_megatron.paper.over_seeds import Estimate
from jreg_megatron.report.charts import Axis, Style
from jreg_megatron.report.figures import LAYER, PSI, Figure, curves
from jreg_megatron.report.page import Section, render
from jreg_megatron.report.tables import LOSS, NOTHING, Table, interval, number, p_value, whole

_STEP_SHARE = Axis("share of the training steps")
_TEACHER = "teacher"
_FAR = 8.0
"""A way this many times as far from its baseline as the usual way would hide the others in a figure."""


def document(
    plan: Plan, toys: Toys, teacher: Toy | None, notes: Sequence[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON document; ``about`` are more entries, such as versions."""
    families = {}
    for family in FAMILIES:
        numbers = {way: [family.of(toy) for toy in by_seed.values()] for way, by_seed in toys.items()}
        means = {way: Estimate.of([v for v in values if v is not None]) for way, values in numbers.items()}
        families[family.key] = {
            **{name: getattr(family, name) for name in ("title", "number", "better", "in_percent")},
            "means": {way: mean and mean.mean for way, mean in means.items()},
            "ways": compared(family, toys, plan.against),
        }
    every = [toy for by_seed in toys.values() for toy in by_seed.values()] + ([teacher] if teacher else [])
    return {
        **about,
        "rule": RULE,
        "ways": {name: _way(name, plan, toys, teacher) for name in plan.names},
        "families": families,
        "published": {"rule": INTERVAL_RULE, "questions": list(map(question_document, published(toys)))},
        "runs": {
            str(toy.folder): run_document(toy)
            | {"parameters": toy.parameters, "seconds_per_step": toy.seconds_per_step, "kept": [*toy.kept]}
            for toy in every
        },
        "notes": list(notes),
    }


def page(document: Mapping[str, Any], toys: Toys, against: Mapping[str, str]) -> str:
    """The page of a document, with figures of its toys."""
    families, ways, runs = document["families"], document["ways"], document["runs"]
    figures = [(key, figure) for key, figure in _figures(toys, against) if figure]
    cost = Table.of_rows("Weights, the teacher's own cost, flags", [*map(_cost, ways.values())], is_text=True)
    sections = [
        Section(
            "overview",
            "Overview",
            "Each way minus its baseline, mean over seeds. A cell says better or worse (in the profile: "
            "lower or higher) where the corrected p is below 0.05. Elsewhere one cannot tell.",
            tables=(Table.of_rows("Overview", [_overview(way, families) for way in against], is_text=True),),
            notes=(document["rule"],),
        ),
        *(
            Section(
                key,
                family["title"],
                f"{family['number']}." + (f" Better is {family['better']}." if family["better"] else ""),
                tables=(
                    Table.of_rows(
                        "Way minus baseline",
                        [_row(way, found, family) for way, found in family["ways"].items()],
                    ),
                    *([cost] if key == "cost" else []),
                ),
                folded=(
                    Table.of(
                        "Differences by seed",
                        "seed",
                        {WAYS[way].text: found["by_seed"] for way, found in family["ways"].items()},
                    ),
                ),
                figures=tuple(figure for of, figure in figures if of == key),
            )
            for key, family in families.items()
        ),
        Section(
            "published",
            "What the methods' authors report",
            document["published"]["rule"],
            tables=(questions_table(document["published"]["questions"]),),
            figures=tuple(figure for of, figure in figures if of == "published"),
        ),
        how_section(document),
    ]
    seeds = max(len(by_seed) for by_seed in toys.values())
    return render(
        "Methods on the residual stream, side by side",
        f"{len(runs)} training runs, {len(against)} ways with {seeds} paired seeds",
        sections,
    )


def _way(name: str, plan: Plan, toys: Toys, teacher: Toy | None) -> dict[str, Any]:
    way = WAYS[name]
    parameters, base = (
        next((toy.parameters for toy in toys.get(of or "", {}).values()), None) for of in (name, way.against)
    )
    found: dict[str, Any] = {
        "text": way.text,
        "against": way.against,
        "flags": " ".join(plan.method_flags(name, Path("TEACHER"))),
    }
    found |= {"lambda": way.coeff, "parameters": parameters}
    found["added_parameters"] = None if parameters is None or base is None else parameters - base
    if teacher and _TEACHER in way.flags:
        seconds = teacher.seconds_per_step
        found["teacher"] = {"parameters": teacher.parameters, "tokens": teacher.tokens}
        found["teacher"] |= {"seconds": None if seconds is None else seconds * teacher.steps}
    return found


def _overview(way: str, families: Mapping[str, Any]) -> dict[str, str]:
    row = {"way": WAYS[way].text}
    for family in families.values():
        found = family["ways"][way]
        row[family["title"].lower()] = _difference(found["found"], family) + _word(found["verdict"], family)
    return row


def _word(verdict: str, family: Mapping[str, Any]) -> str:
    if verdict == "cannot tell":
        return ""
    word = verdict if not family["better"] else "better" if verdict == family["better"] else "worse"
    return f", {word}"


def _difference(value: float | None, family: Mapping[str, Any]) -> str:
    percent = "%" if family["in_percent"] and value is not None else ""
    return number(value, "+#.3g") + percent


def _row(way: str, found: Mapping[str, Any], family: Mapping[str, Any]) -> dict[str, str]:
    means, against = family["means"], found["against"]
    return {
        "way": WAYS[way].text,
        "seeds": str(len(found["by_seed"])),
        **{"baseline": number(means[against], LOSS), "with the method": number(means[way], LOSS)},
        "difference": _difference(found["found"], family),
        "95% interval": interval(found["interval"], "+#.3g"),
        **{"p": p_value(found["p"]), "p, corrected": p_value(found["p_adjusted"])},
        "verdict": found["verdict"],
    }


def _cost(way: Mapping[str, Any]) -> dict[str, str]:
    teacher = way.get("teacher", {})
    jreg = f"--jreg-coeff {way['lambda']:g}" if way["lambda"] else NOTHING
    return {
        **{"way": way["text"], "weights": whole(way["parameters"]), "more": whole(way["added_parameters"])},
        "weights of the teacher": whole(teacher.get("parameters")),
        "training tokens of the teacher": whole(teacher.get("tokens")),
        "training of the teacher, s": number(teacher.get("seconds"), "#.3g"),
        "flags": way["flags"] or jreg,
    }


def _figures(toys: Toys, against: Mapping[str, str]) -> Iterator[tuple[str, Figure | None]]:
    """Each with the key of its family, or of its section."""
    over_seeds: dict[str, Any] = {"band": True, "rule": 0}

    def of_ways(
        points: Callable[[Toy], Iterable[tuple[float, float]]],
    ) -> dict[str, list[tuple[float, float]]]:
        """The points of each way, all seeds."""
        return {
            WAYS[way].text: [point for toy in by_seed.values() for point in points(toy)]
            for way, by_seed in toys.items()
        }

    def differences(of: Callable[[Toy], Mapping[Any, float]]) -> dict[str, list[tuple[float, float]]]:
        """Way minus baseline at each place, all seeds."""
        return {
            WAYS[way].text: [
                (place, value - old[place])
                for toy, base in pairs(toys, way, baseline).values()
                for old in (of(base),)
                for place, value in of(toy).items()
                if place in old
            ]
            for way, baseline in against.items()
        }

    def losses(toy: Toy) -> dict[float, float]:
        return dict(zip(toy.shares, toy.history.validation_loss, strict=True))

    more = Axis("more than the baseline (nats per token)")
    about = "Below 0 the way is better than its baseline."
    found = differences(losses)
    looks = {label: Style.of(index) for index, label in enumerate(found)}
    over_seeds["looks"], title = looks, "Validation loss over training"
    yield "loss", curves("loss_in_training", title, about, found, _STEP_SHARE, more, **over_seeds)
    widest = {label: max(abs(value) for _, value in points) for label, points in found.items() if points}
    near = [label for label, value in widest.items() if value <= _FAR * median(widest.values())]
    if near != [*widest]:
        title += f", without {', '.join(label for label in widest if label not in near)}"
        found = {label: found[label] for label in near}
        yield "loss", curves("loss_nearer", title, about, found, _STEP_SHARE, more, **over_seeds)

    title = "The last layer's jump over training"
    about = "Mean over seeds. Below 0 the last layer turns the state less than the layer before."
    rises = of_ways(lambda toy: zip(toy.shares, toy.rises, strict=True))
    yield "jump", curves("jump_in_training", title, about, rises, _STEP_SHARE, RISE, rule=0)

    profiles = of_ways(lambda toy: enumerate(toy.history.displacement, 1))
    title, about = "How far each layer turns the state, at the end", "Mean over seeds."
    yield "profile", curves("profiles", title, about, profiles, LAYER, PSI)

    for key, (how, what) in zip(("early_exit", "lens"), READ_OUTS.items(), strict=True):
        title = f"Loss after each layer, {how}"
        about = "Way minus its baseline. Below 0 the way is better."
        found = differences(partial(Toy.by_layer, what=what))
        yield key, curves(f"{key}_by_layer", title, about, found, LAYER, more, **over_seeds)

    title, about = "The part of its input that each layer keeps", "Learned; all start at 0.98."
    kept = of_ways(lambda toy: enumerate(toy.kept, 1))
    yield "published", curves("kept", title, about, kept, LAYER, Axis("part that is kept"), band=True)
