"""What goes on the page, in which order; a part without numbers is left out."""

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
_ABOUT_SCORES = "Scores with their intervals in brackets."
_ABOUT_DIFFERENCES = (
    " A difference is one model less the other, on the same samples. A small p value says that chance alone "
    "would seldom make it so large. An adjusted one allows for several tests. Chance is that of the samples: "
    "the same models trained anew, with other seeds, may differ by more or less."
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
    """The page's parts.

    Args:
        inputs: what was read.
        paper: what to lay under the displacement per layer.

    Raises:
        UserError: if there is no displacement to lay the paper's under.
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
            "Ψ, the displacement, says how far a layer turns the state, from 0 to 1. ζ, the jump rate, says "
            "how much further the last layer turns it than the layer before, in hundredths. Both depend on "
            "whether the last layer's output is taken before or after the final norm, so each is named.",
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
        "A measurement takes the last layer's output both before and after the final norm, if there is one; "
        "a training run logs the one that its settings ask for. A first token that is dropped counts in no "
        "mean."
    )
    sections.append(Section("sources", "Where the numbers come from", conventions, tables=files, folded=many))
    count = f"{len(models)} model" + ("" if len(models) == 1 else "s")
    return Report(count, sections)


def _labelled(comparison: Comparison, models: list[Model]) -> tuple[Comparison, str, str]:
    """A comparison with the labels of its two models, which its file knows by name, or name@step."""
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
