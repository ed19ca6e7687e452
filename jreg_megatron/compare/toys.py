"""The trained toys: their curves, their cost and what they learned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from jreg_megatron.claims.evidence import Trained, read_run
from jreg_megatron.compare.ways import Plan
from jreg_megatron.demo.training import Run
from jreg_megatron.report.reading import read_scalars
from jreg_megatron.runtime.errors import UserError

_SECONDS = "iteration-time"
_KEPT = r"attenuation/kept_layer_\d+ validation"
_PARAMETERS = re.compile(r"number of parameters on .*: (\d+)")


@dataclass(frozen=True)
class Toy(Trained):
    """A trained toy."""

    seconds: Sequence[float] = ()
    """Of a training step: the mean over each log interval, as Megatron logs it."""
    kept: Sequence[float] = ()
    """The learned part that each layer keeps of its input, at the end; empty if none is learned."""
    parameters: int | None = None
    """Number of weights that are trained."""

    @property
    def seconds_per_step(self) -> float | None:
        """The mean of the lower quartiles of both halves; None for a short training.

        Other work on the machine only adds time, so it is the lower quartile. LET acts only in one half, so
        both halves count.
        """
        half = len(self.seconds) // 2
        if half < 2:
            return None
        return fmean(quantiles(part, n=4)[0] for part in (self.seconds[:half], self.seconds[half:]))


Toys = Mapping[str, Mapping[int, Toy]]
"""By way and seed."""


def read_toys(plan: Plan) -> tuple[Toys, Toy | None, list[str]]:
    """The trained toys of a plan, its teacher if it needs one, and a line for each run that does not count,
    such as one that has diverged."""
    notes = []

    def read(run: Run) -> Toy | None:
        try:
            return read_toy(run)
        except UserError as error:
            notes.append(f"{run.name} is left out: {error}.")
            return None

    toys: dict[str, dict[int, Toy]] = {name: {} for name in plan.names}
    for name, seed, run in plan.runs:
        if (toy := read(run)) is not None:
            toys[name][seed] = toy
    return toys, read(plan.teacher) if plan.needs_teacher else None, notes


def read_toy(run: Run) -> Toy:
    """A finished run.

    Raises:
        UserError: with the reason why it does not count.
    """
    logged = read_scalars(run.tensorboard, f"{_SECONDS}|{_KEPT}")
    seconds = list(logged.pop(_SECONDS, {}).values())
    kept = [values[max(values)] for values in logged.values()]
    said = _PARAMETERS.search(run.log.read_text(encoding="utf-8"))
    parameters = int(said[1]) if said else None
    return Toy(
        **vars(read_run(run.folder)) | {"seconds": seconds, "kept": kept, "parameters": parameters},
    )
