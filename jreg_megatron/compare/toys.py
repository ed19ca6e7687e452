"""The trained toys: their curves, their cost and what they learned."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from jreg_megatron.claims import toy
from jreg_megatron.claims.evidence import Trained
from jreg_megatron.compare.ways import Plan
from jreg_megatron.demo.training import Run
from jreg_megatron.report.reading import read_history, read_scalars

_SECONDS = "iteration-time"
_KEPT = r"attenuation/kept_layer_\d+ validation"
_PARAMETERS = re.compile(r"number of parameters on .*: (\d+)")


@dataclass(frozen=True)
class Toy:
    """A trained toy."""

    run: Trained
    seconds: Sequence[float] = ()
    """Of a training step, as Megatron logs it: the mean of each log interval."""
    kept: Sequence[float] = ()
    """The learned part that each layer keeps of its input, at the end; empty if none is learned."""
    parameters: int | None = None
    """Number of weights that are trained."""

    @property
    def seconds_per_step(self) -> float | None:
        """The mean of the lower quartiles of both halves; None for a short training.

        What runs beside it only adds time, so the quartile is below the middle. LET works in the first half.
        """
        half = len(self.seconds) // 2
        if half < 2:
            return None
        return fmean(quantiles(part, n=4)[0] for part in (self.seconds[:half], self.seconds[half:]))

    def loss_at(self, share: float) -> float | None:
        """Validation loss after a share of the steps."""
        found = self.run.index_at(share)
        return None if found is None else self.run.history.validation_loss[found]


Toys = Mapping[str, Mapping[int, Toy]]
"""By way and seed."""


def read_toys(plan: Plan) -> tuple[Toys, list[str]]:
    """The trained toys of a plan, and a line for each that has diverged, which is left out."""
    toys: dict[str, dict[int, Toy]] = {name: {} for name in plan.names}
    notes = []
    for name, seed, run in plan.runs:
        found = read_toy(run)
        history = found.run.history
        numbers = (*history.validation_loss, *(psi for psis in history.profiles for psi in psis))
        if all(map(math.isfinite, numbers)):
            toys[name][seed] = found
        else:
            notes.append(f"{run.name} is left out: it has diverged.")
    return toys, notes


def read_toy(run: Run) -> Toy:
    """A finished run.

    Raises:
        UserError: if its logs are not there.
    """
    logged = read_scalars(run.tensorboard, f"{_SECONDS}|{_KEPT}")
    seconds = logged.pop(_SECONDS, {})
    said = _PARAMETERS.search(run.log.read_text(encoding="utf-8"))
    trained = Trained(
        folder=run.folder,
        seed=run.seed,
        coeff=run.config.coeff,
        alpha=run.config.alpha if run.config.coeff > 0 else None,
        batch=toy.BATCHES[0],
        tokens=run.iterations * toy.TOKENS,
        history=read_history(run.tensorboard),
    )
    kept = [values[max(values)] for values in logged.values()]
    return Toy(trained, list(seconds.values()), kept, int(said[1]) if said else None)
