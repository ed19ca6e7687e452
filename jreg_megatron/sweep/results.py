"""The results of a sweep so far: each finished run against the baseline of its seed, and over the seeds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.paper.over_seeds import INTERVAL, Estimate
from jreg_megatron.report.inputs import History
from jreg_megatron.report.reading import read_history
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import versions
from jreg_megatron.sweep.grid import Sweep, SweepRun

BASELINE = "baseline"
LOSS, DIFFERENCE, RATE = "validation_loss", "difference_to_baseline", "jump_rate"
# Arguments that differ between the runs of a sweep, and values that a run finds when it starts (the iteration
# from which it resumes, the rank that writes).
_OWN = {"jreg_coeff", "jreg_alpha", "seed", "save", "load", "tensorboard_dir", "data_cache_path"}
_FOUND_OUT = {"iteration", "rank", "local_rank", "consumed_train_samples", "consumed_valid_samples"}
_FOUND_OUT |= {"skipped_train_samples", "num_floating_point_operations_so_far", "nodes", "hostname"}


@dataclass(frozen=True)
class Setting:
    """lambda and alpha, with its finished runs by seed."""

    coeff: float
    alpha: float | None
    """None for the baseline."""
    histories: dict[int, History]
    baselines: dict[int, History]
    """The finished baselines by seed."""

    @property
    def by_seed(self) -> dict[str, dict[int, float]]:
        """At the end of each run: the validation loss in nats per token, its difference to the baseline of
        the same seed where both are finished (below 0 is better), and zeta_L in hundredths of displacement.
        """
        losses = {seed: history.validation_loss[-1] for seed, history in self.histories.items()}
        bases = {seed: history.validation_loss[-1] for seed, history in self.baselines.items()}
        return {
            LOSS: losses,
            DIFFERENCE: {seed: loss - bases[seed] for seed, loss in losses.items() if seed in bases},
            RATE: {seed: history.jump_rate[-1] for seed, history in self.histories.items()},
        }

    @cached_property
    def over_seeds(self) -> dict[str, Estimate | None]:
        """The mean of each of :attr:`by_seed`."""
        return {what: Estimate.of(list(values.values())) for what, values in self.by_seed.items()}

    @property
    def displacement(self) -> list[float]:
        """Psi of layers 1..L at the end, mean over the seeds."""
        return list(map(fmean, zip(*(run.displacement for run in self.histories.values()), strict=True)))

    def summary(self) -> dict[str, Any]:
        """Its part of ``summary.json``."""
        over_seeds = {
            what: None if found is None else dataclasses.asdict(found)
            for what, found in self.over_seeds.items()
            if (what, self.alpha) != (DIFFERENCE, None)
        }
        found = {"coeff": self.coeff, "alpha": self.alpha, "seeds": sorted(self.histories), **over_seeds}
        return found | {"displacement": self.displacement}


@dataclass(frozen=True)
class Results:
    """All that a report shows."""

    sweep: Sweep
    histories: dict[SweepRun, History]
    """The runs that count."""
    left_out: dict[str, str]
    """Why the other runs do not count, by name."""

    @classmethod
    def read(cls, sweep: Sweep) -> Results:
        """Read the finished runs.

        Raises:
            UserError: if no run is finished.
        """
        histories, left_out = {}, {}
        for run in sweep.runs:
            try:
                histories[run] = _read(sweep, run)
            except UserError as error:
                left_out[run.name] = str(error)
        last = max((history.iterations[-1] for history in histories.values()), default=0)
        for run in [run for run, history in histories.items() if history.iterations[-1] != last]:
            left_out[run.name] = f"its last validation is at iteration {histories.pop(run).iterations[-1]:,}"
        if not histories:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
            raise UserError(f"{sweep.output} has no finished run yet ({why}); wait for one")
        return cls(sweep, histories, left_out)

    @property
    def iterations(self) -> int:
        """Training iterations of each run, up to its last validation."""
        return next(iter(self.histories.values())).iterations[-1]

    @property
    def final_state(self) -> str:
        """The state that counts as the last layer's output: ``pre_norm`` or ``post_norm``."""
        history = next(iter(self.histories.values()))
        return history.settings.get("jreg_final_state", JRegConfig().final_state)

    @cached_property
    def baseline(self) -> Setting:
        """The runs at lambda 0."""
        found = {run.seed: history for run, history in self.histories.items() if run.alpha is None}
        return Setting(0.0, None, found, found)

    @cached_property
    def settings(self) -> list[Setting]:
        """The other runs with a result, by alpha and lambda."""
        found: dict[tuple[float, float], dict[int, History]] = {}
        for run, history in self.histories.items():
            if run.alpha is not None:
                found.setdefault((run.alpha, run.coeff), {})[run.seed] = history
        return [
            Setting(coeff, alpha, histories, self.baseline.histories)
            for (alpha, coeff), histories in sorted(found.items())
        ]

    @property
    def alphas(self) -> list[float]:
        """The alphas with a result, rising."""
        return sorted({setting.alpha for setting in self.settings if setting.alpha is not None})

    @property
    def coeffs(self) -> list[float]:
        """The lambdas with a result, rising."""
        return sorted({setting.coeff for setting in self.settings})

    @property
    def has_intervals(self) -> bool:
        """Whether a mean is over several seeds."""
        return any(len(setting.histories) > 1 for setting in (self.baseline, *self.settings))

    @cached_property
    def as_often_tried(self) -> list[Setting]:
        """The settings with the most seeds whose baseline is finished too; the best one first.

        The best has the lowest mean difference to the baseline.
        """
        pairs = [list(setting.by_seed[DIFFERENCE].values()) for setting in self.settings]
        most = max(map(len, pairs), default=0)
        ranked = sorted((fmean(of), n) for n, of in enumerate(pairs) if len(of) == most > 0)
        return [self.settings[n] for _, n in ranked]

    @cached_property
    def disagreements(self) -> dict[str, list[str]]:
        """Megatron's arguments that differ between runs though the sweep does not set them; their values."""
        all_settings = [history.settings for history in self.histories.values() if history.settings]
        names = {name for settings in all_settings for name in settings} - _OWN - _FOUND_OUT
        values = {name: sorted({s.get(name, "not given") for s in all_settings}) for name in sorted(names)}
        return {name: found for name, found in values.items() if len(found) > 1}

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        best = self.as_often_tried[:1]
        return {
            "recipe": str(self.sweep.recipe),
            "smoke": self.sweep.smoke,
            "flags": list(self.sweep.flags),
            "knobs": self.sweep.knobs,
            "iterations": self.iterations,
            "final_state": self.final_state,
            "interval": INTERVAL,
            "baseline": self.baseline.summary(),
            "settings": [setting.summary() for setting in self.settings],
            "lowest_validation_loss": {"coeff": best[0].coeff, "alpha": best[0].alpha} if best else None,
            "runs": {run.name: run.model_dump() | of.summary() for run, of in self.histories.items()},
            "left_out": self.left_out,
            "arguments_that_differ": self.disagreements,
            "versions": versions("megatron-core", "torch"),
        }


def _read(sweep: Sweep, run: SweepRun) -> History:
    """The history of a finished run.

    Raises:
        UserError: with the reason why the run does not count.
    """
    if not sweep.is_finished(run):
        raise UserError("unfinished" if sweep.log(run).exists() else "not started")
    history = read_history(sweep.tensorboard(run))
    if not all(
        map(math.isfinite, (history.validation_loss[-1], history.jump_rate[-1], *history.displacement))
    ):
        raise UserError(f"its validation loss is {history.validation_loss[-1]}, so it has diverged")
    asked = {"jreg_coeff": run.coeff, "seed": run.seed}
    asked |= {} if run.alpha is None else {"jreg_alpha": run.alpha}
    for name, value in asked.items():
        had = history.settings.get(name)
        if had is not None and float(had) != value:
            raise UserError(f"the recipe trained it with {name} {had}; it must read it from the environment")
    return history
