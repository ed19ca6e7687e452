"""The parts of the page in order. A part without numbers is left out."""

from __future__ import annotations

from jreg_megatron.report import tables
from jreg_megatron.report.figures import figures
from jreg_megatron.report.inputs import Comparison, Inputs
from jreg_megatron.report.models import LENGTH, Model, convention, label, models_of
from jreg_megatron.report.page import Section
from jreg_megatron.report.paper_profiles import PaperProfiles
from jreg_megatron.runtime.documents import shortened
from jreg_megatron.runtime.errors import UserError

# Sections of figures: name, title, and prefixes of their figures' names.
_OF_FIGURES = (
    ("layers", "Displacement", ("displacement",)),
    ("training", "Over training", ("jump_rate", "validation_loss")),
    ("maps", "Layers over training", ("heat_map",)),
    ("middle", "Middle layers", ("read_out", "lens", "early_exit", "layer_drop")),
    ("depth", "Use of depth", ("depth",)),
)
_FEW = 12
_ABOUT_SUMMARY = (
    "Displacement Ψ: how far a layer turns the state, from 0 to 1. Jump rate ζ: Ψ of the last layer minus Ψ "
    "of the layer before, times 100; 0 if that is negative. Both depend on the last layer's output: before "
    "or after the final norm. Each number says which."
)
_ABOUT_SCORES = "Scores, with intervals in brackets."
_ABOUT_DIFFERENCES = (
    " A difference is one model minus the other, on the same samples. A small p value: chance alone rarely "
    "makes such a large difference. An adjusted p value is corrected for several tests. These numbers cover "
    "only the chance of the samples: other training seeds may give a larger or smaller difference."
)
_ABOUT_SOURCES = (
    "A measurement takes the last layer's output both before and after the final norm, if there is one. "
    "A training run logs one of them, by its settings. A dropped first token is in no mean."
)


def compose(inputs: Inputs, paper: PaperProfiles | None = None) -> tuple[str, list[Section]]:
    """The subtitle and the parts of the page. ``paper`` is drawn under the displacement per layer.

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
    scores = [*tables.tasks(models), *(table for entry in compared for table in tables.comparison(*entry))]
    notes = [note for comparison, _, _ in compared for note in comparison.notes or ()]
    about = _ABOUT_SCORES + (_ABOUT_DIFFERENCES if compared else "")
    differing, every = tables.settings(models)
    sources = tables.sources(models)
    sections = [
        Section("summary", "In short", _ABOUT_SUMMARY, tables=[tables.headline(models, first)]),
        *(
            Section(name, title, figures=[figure for figure in drawn if figure.name.startswith(prefixes)])
            for name, title, prefixes in _OF_FIGURES
        ),
        Section("tasks", "Tasks", about, tables=scores, notes=[shortened(note, 400) for note in notes]),
        Section("settings", "Settings", tables=differing, folded=every),
        Section(
            "sources",
            "Where the numbers come from",
            _ABOUT_SOURCES,
            tables=[tables.files(models), *(table for table in sources if len(table.rows) <= _FEW)],
            folded=[table for table in sources if len(table.rows) > _FEW],
        ),
    ]
    count = f"{len(models)} model" + ("" if len(models) == 1 else "s")
    return count, [part for part in sections if part.figures or part.tables or part.folded]


def _labelled(comparison: Comparison, models: list[Model]) -> tuple[Comparison, str, str]:
    """A comparison with the labels of its two models. Its file has their names, or name@step."""
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
