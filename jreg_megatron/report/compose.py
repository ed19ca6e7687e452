"""The parts of the page in order; a part without numbers is left out."""

from __future__ import annotations

from dataclasses import dataclass

from jreg_megatron.report import tables
from jreg_megatron.report.check import shortened
from jreg_megatron.report.figures import Figure, figures
from jreg_megatron.report.inputs import Comparison, Inputs
from jreg_megatron.report.labels import LENGTH, label
from jreg_megatron.report.models import Model, convention, models_of
from jreg_megatron.report.page import Section
from jreg_megatron.report.paper_profiles import PaperProfiles
from jreg_megatron.runtime.errors import UserError

# Sections of figures: name, title, and what the names of their figures begin with.
_OF_FIGURES = (
    ("layers", "Displacement", ("displacement",)),
    ("training", "Over training", ("jump_rate", "validation_loss")),
    ("maps", "Layers over training", ("heat_map",)),
    ("middle", "Middle layers", ("read_out", "lens", "early_exit", "layer_drop")),
)
_FEW = 12
_ABOUT_SCORES = "Scores, with intervals in brackets."
_ABOUT_DIFFERENCES = (
    " A difference is one model minus the other, on the same samples. A small p value: chance alone seldom "
    "makes a difference so large. An adjusted p value is corrected for several tests. Chance is only that of "
    "the samples: other training seeds may give a larger or smaller difference."
)


@dataclass(frozen=True)
class Report:
    """All parts of a page."""

    subtitle: str
    sections: list[Section]

    @property
    def figures(self) -> list[Figure]:
        """In order of the page."""
        return [figure for section in self.sections for figure in section.figures]


def compose(inputs: Inputs, paper: PaperProfiles | None = None) -> Report:
    """The parts of the page.

    Args:
        inputs: all inputs.
        paper: profiles to draw under the displacement per layer.

    Raises:
        UserError: if ``paper`` is given and no input has a displacement.
    """
    models = models_of(inputs)
    label(models, taken=paper.looks if paper else ())
    first = convention(models)
    compared = [_labelled(comparison, models) for comparison in inputs.comparisons]
    drawn = figures(models, compared, first, paper)
    if paper and not any(figure.name.startswith("displacement") for figure in drawn):
        raise UserError(
            f"--paper is {paper.size}, but no input has the displacement of layers; add a measurement or a "
            "training run, or leave --paper out"
        )
    sections = [
        Section(
            "summary",
            "In short",
            "Displacement Ψ: how far a layer turns the state, from 0 to 1. Jump rate ζ: Ψ of the last layer "
            "minus Ψ of the layer before, times 100; 0 if that is negative. Both depend on the last layer's "
            "output: before or after the final norm. Each number names its own.",
            tables=(tables.headline(models, first),),
        )
    ]
    for name, title, prefixes in _OF_FIGURES:
        if mine := tuple(figure for figure in drawn if figure.name.startswith(prefixes)):
            sections.append(Section(name, title, figures=mine))
    scores = [tables.tasks(models), *(tables.comparison(*entry) for entry in compared)]
    found = tuple(table for table in scores if table is not None)
    if found:
        notes = tuple(
            shortened(note, 400) for comparison, _, _ in compared for note in comparison.notes or ()
        )
        about = _ABOUT_SCORES + (_ABOUT_DIFFERENCES if inputs.comparisons else "")
        sections.append(Section("tasks", "Tasks", about, tables=found, notes=notes))
    differing, every = tables.settings(models)
    if every:
        shown = () if differing is None else (differing,)
        sections.append(Section("settings", "Settings", tables=shown, folded=(every,)))
    sources = tables.sources(models)
    few = () if sources is None or len(sources.rows) > _FEW else (sources,)
    many = () if sources is None or few else (sources,)
    files = (tables.files(models), *few)
    conventions = (
        "A measurement takes the last layer's output both before and after the final norm, if there is one. "
        "A training run logs one of them, by its settings. A dropped first token counts in no mean."
    )
    sections.append(Section("sources", "Where the numbers come from", conventions, tables=files, folded=many))
    count = f"{len(models)} model" + ("" if len(models) == 1 else "s")
    return Report(count, sections)


def _labelled(comparison: Comparison, models: list[Model]) -> tuple[Comparison, str, str]:
    """A comparison with the labels of its two models; its file has their names, or name@step."""
    there = [model for model in models if comparison.file in {origin.file for origin in model.origins}]
    labels: list[str] = []
    for name in comparison.models:
        known = [
            model.label
            for model in there
            if name in {model.name, *(f"{e.name}@{e.revision or e.step}" for e in model.evaluated)}
        ]
        free = [label for label in known if label not in labels]
        labels.append((free or known or [shortened(name, LENGTH)])[0])
    return comparison, labels[0], labels[1]
