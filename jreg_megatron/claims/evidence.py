"""What is known of each trained model: its curves from TensorBoard, its evaluation from JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jreg_megatron.errors import UserError
from jreg_megatron.history import History
from jreg_megatron.report.inputs import Evaluated
from jreg_megatron.report.reading import read

# Runs that differ in one of these are of two experiments.
_COMMON = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length"),
    *("padded_vocab_size", "lr", "min_lr", "lr_decay_style", "jreg_final_state"),
)
_EQUAL_TOKENS = 0.01
_FEWEST_LAYERS = 4


@dataclass(frozen=True)
class Trained:
    """One finished training run."""

    name: str
    folder: Path
    seed: int
    coeff: float
    """lambda; 0 for the baseline."""
    alpha: float | None
    """None for the baseline."""
    batch: int
    """Sequences a step."""
    tokens: int
    """That it was trained on."""
    history: History
    evaluated: Evaluated | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the trained model."""
        return self.folder / "checkpoints"

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.history.iterations[-1]

    def rise(self, share: float = 1.0) -> float:
        """Psi of the last layer less that of the one before, in hundredths, at a share of the steps.

        Where it is above 0 it is the jump rate zeta_L.
        """
        before, last = self.history.profiles[self._at(share)][-2:]
        return 100 * (last - before)

    def jump_rate(self, layers_below_last: int = 0) -> float:
        """zeta of the layer that lies so far below the last, at the end."""
        psi = self.history.displacement
        first = len(psi) - 1 - layers_below_last
        return 100 * math.fsum(max(0.0, psi[k] - psi[k - 1]) for k in range(first, len(psi)))

    def _at(self, share: float) -> int:
        """The validation that is nearest to a share of the steps."""
        wanted = share * self.steps
        return min(
            range(len(self.history.iterations)), key=lambda n: abs(self.history.iterations[n] - wanted)
        )


@dataclass(frozen=True)
class Evidence:
    """All runs of one experiment, sorted for the claims."""

    runs: tuple[Trained, ...]
    left_out: dict[str, str]
    """Why a folder does not count, by its name."""

    @property
    def batch(self) -> int:
        """The batch that most runs have, in sequences; of equally many the smallest."""
        counts = Counter(run.batch for run in self.runs)
        return min(counts, key=lambda batch: (-counts[batch], batch))

    @property
    def baseline(self) -> dict[int, Trained]:
        """By seed, with that batch."""
        return self._of(None, self.batch)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.runs[0].history.displacement)

    @property
    def alphas(self) -> list[float]:
        """Of the runs with lambda 1, rising."""
        return sorted({run.alpha for run in self.runs if run.alpha is not None and run.coeff == 1})

    def jreg(self, alpha: float = 1.0) -> dict[int, Trained]:
        """By seed, the runs with lambda 1."""
        return self._of(alpha, self.batch)

    @property
    def pairs(self) -> dict[int, tuple[Trained, Trained]]:
        """By seed, the baseline and JREG at the paper's lambda 1 and alpha 1."""
        jreg = self.jreg()
        return {seed: (run, jreg[seed]) for seed, run in self.baseline.items() if seed in jreg}

    @property
    def batches(self) -> dict[int, dict[int, Trained]]:
        """Baselines by seed and batch, of seeds with several batches on equally many tokens."""
        found: dict[int, dict[int, Trained]] = {}
        for run in sorted(self.runs, key=lambda run: run.batch):
            if run.alpha is None:
                found.setdefault(run.seed, {})[run.batch] = run
        return {seed: runs for seed, runs in found.items() if len(runs) > 1 and _equal_tokens(runs.values())}

    def _of(self, alpha: float | None, batch: int) -> dict[int, Trained]:
        coeff = 0 if alpha is None else 1
        return {
            run.seed: run for run in self.runs if (run.alpha, run.coeff, run.batch) == (alpha, coeff, batch)
        }


def find(folders: Iterable[Path]) -> list[Path]:
    """The run folders that lie in ``folders``: those with a ``tensorboard`` folder, up to two levels below.

    Raises:
        UserError: for a folder without any.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = [path for form in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{form}tensorboard"))]
        if not runs:
            raise UserError(f"--runs names {folder}, where no folder has a tensorboard folder; name the runs")
        found |= dict.fromkeys(path.parent for path in runs)
    return list(found)


def gather(folders: Sequence[Path]) -> Evidence:
    """Read the runs of ``folders``; what is not finished is left out.

    Raises:
        UserError: if runs are of two experiments, if two have the same settings, or if none is finished.
    """
    runs: list[Trained] = []
    left_out: dict[str, str] = {}
    for folder in folders:
        try:
            runs.append(_trained(folder))
        except UserError as error:
            left_out[folder.name] = str(error)
    if not runs:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise UserError(f"no run is finished ({why})")
    for run in runs[1:]:
        for name in _COMMON:
            first, own = (r.history.settings.get(name) for r in (runs[0], run))
            if first != own:
                raise UserError(
                    f"--runs: {name} is {first} in {runs[0].folder} and {own} in {run.folder}; give the runs "
                    "of one model and schedule"
                )
    seen: dict[tuple[object, ...], Trained] = {}
    for run in runs:
        key = (run.seed, run.coeff, run.alpha, run.batch, run.steps)
        if key in seen:
            raise UserError(f"--runs: {seen[key].folder} and {run.folder} are one setting and seed; give one")
        seen[key] = run
    return Evidence(tuple(runs), left_out)


def with_evaluations(evidence: Evidence, files: dict[str, Path]) -> Evidence:
    """The same with what ``evaluate --json`` wrote, by the runs' names."""
    runs = [
        replace(run, evaluated=read([files[run.name]]).evaluated[0]) if run.name in files else run
        for run in evidence.runs
    ]
    return replace(evidence, runs=tuple(runs))


def _trained(folder: Path) -> Trained:
    history = History.read(folder / "tensorboard")
    settings = history.settings
    missing = [
        name
        for name in ("jreg_coeff", "jreg_alpha", "seed", "global_batch_size", "seq_length")
        if name not in settings
    ]
    if missing:
        raise UserError(f"its TensorBoard files do not say its {missing[0]}")
    if not history.displacement:
        raise UserError("it was trained without --jreg-log-per-layer")
    if len(history.displacement) < _FEWEST_LAYERS:
        raise UserError(f"it has {len(history.displacement)} layers, and a middle takes {_FEWEST_LAYERS}")
    if not all(map(math.isfinite, (history.validation_loss[-1], *history.displacement))):
        raise UserError("it has diverged")
    steps, batch = history.iterations[-1], int(settings["global_batch_size"])
    wanted = settings.get("train_iters", "None")
    if wanted.isdecimal() and steps < int(wanted):
        raise UserError(f"its last validation is at step {steps:,} of {int(wanted):,}")
    coeff = float(settings["jreg_coeff"])
    return Trained(
        name=folder.name,
        folder=folder,
        seed=int(settings["seed"]),
        coeff=coeff,
        alpha=float(settings["jreg_alpha"]) if coeff > 0 else None,
        batch=batch,
        tokens=steps * batch * int(settings["seq_length"]),
        history=history,
    )


def _equal_tokens(runs: Iterable[Trained]) -> bool:
    tokens = [run.tokens for run in runs]
    return max(tokens) - min(tokens) <= _EQUAL_TOKENS * max(tokens)
