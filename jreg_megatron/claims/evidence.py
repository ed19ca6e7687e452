"""What is known of each trained model: its curves from TensorBoard, its evaluation from JSON."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from jreg_megatron.methods.jreg.formulas import jump_rate
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.report.history import History
from jreg_megatron.report.inputs import Evaluated
from jreg_megatron.report.reading import read
from jreg_megatron.runtime.errors import UserError

# Runs that differ in one of these are of two experiments.
_COMMON = (
    *("num_layers", "hidden_size", "ffn_hidden_size"),
    *("num_attention_heads", "num_query_groups", "seq_length"),
    *("padded_vocab_size", "normalization", "norm_epsilon", "init_method_std", "init_fan_in", "num_experts"),
    *("data_path", "train_data_path", "data_args_path", "split", "tokenizer_model"),
    *("optimizer", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "lr_decay_style"),
    *("jreg_final_state", "jreg_tokens", "jreg_loss_weight", "jreg_negligible_weight"),
)
# What may follow the batch.
_OF_A_BATCH = ("lr", "min_lr", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")
# JREG as the paper has it. Of a baseline they do not matter.
_THE_PAPERS = ("jreg_weights", "jreg_start_iteration", "jreg_stop_iteration", "jreg_warmup_iterations")
_DEFAULTS = {f"jreg_{f.name}": str(f.default) for f in fields(JRegConfig)}

_EQUAL_TOKENS = 0.01
_NEAR = 0.05
_FEWEST_LAYERS = 4


@dataclass(frozen=True)
class Trained:
    """One finished training run."""

    folder: Path
    seed: int
    coeff: float
    """lambda; 0 for the baseline."""
    alpha: float | None
    """None for the baseline."""
    batch: int
    """Sequences a step."""
    tokens: int | None
    """That it was trained on; None with a batch that grows."""
    history: History
    evaluated: Evaluated | None = None

    @property
    def name(self) -> str:
        """Of the folder, with the one above: sweeps call their runs alike."""
        return "/".join(self.folder.parts[-2:])

    @property
    def checkpoints(self) -> Path:
        """The folder of the trained model."""
        return self.folder / "checkpoints"

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.history.iterations[-1]

    @property
    def rise(self) -> float:
        """:func:`rise` at the end."""
        return rise(self.history.displacement)

    def rise_at(self, share: float) -> float | None:
        """:func:`rise` at a share of the steps; None if no validation is near it."""
        wanted = share * self.steps
        iterations = self.history.iterations
        at = min(range(len(iterations)), key=lambda n: abs(iterations[n] - wanted))
        if abs(iterations[at] - wanted) > _NEAR * self.steps:
            return None
        return rise(self.history.profiles[at])

    def jump_rate(self, layers_below_last: int = 0) -> float:
        """zeta of the layer that lies so far below the last, at the end."""
        psi = torch.tensor(self.history.displacement, dtype=torch.float64)
        return float(jump_rate(psi, len(psi) - layers_below_last))


def rise(profile: Sequence[float]) -> float:
    """Psi of the last layer less that of the one before, in hundredths.

    Where it is above 0 it is the jump rate zeta_L.
    """
    return 100 * (profile[-1] - profile[-2])


@dataclass(frozen=True)
class Evidence:
    """All runs of one experiment, sorted for the claims."""

    runs: tuple[Trained, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a folder does not count, by its path."""

    @property
    def batch(self) -> int:
        """The batch, in sequences, with the most pairs; of those the one with the most runs; the smallest."""
        batches = {run.batch for run in self.runs}
        return min(
            batches,
            key=lambda batch: (
                -len(self._pairs(batch)),
                -sum(run.batch == batch for run in self.runs),
                batch,
            ),
        )

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
        """Of the runs with lambda 1 and that batch, rising."""
        found = {run.alpha for run in self.runs if run.coeff == 1 and run.batch == self.batch}
        return sorted(alpha for alpha in found if alpha is not None)

    def jreg(self, alpha: float = 1.0) -> dict[int, Trained]:
        """By seed, the runs with lambda 1."""
        return self._of(alpha, self.batch)

    @property
    def pairs(self) -> dict[int, tuple[Trained, Trained]]:
        """By seed, the baseline and JREG at the paper's lambda 1 and alpha 1."""
        return self._pairs(self.batch)

    @property
    def batches(self) -> dict[int, dict[int, Trained]]:
        """Baselines by seed and batch, of seeds with several on as many tokens as :attr:`baseline`."""
        found = {}
        for seed, base in self.baseline.items():
            alike = {
                run.batch: run
                for run in sorted(self.runs, key=lambda run: run.batch)
                if (run.seed, run.alpha) == (seed, None) and _is_near(run.tokens, base.tokens)
            }
            if len(alike) > 1:
                found[seed] = alike
        return found

    @property
    def notes(self) -> list[str]:
        """What was not used, and why."""
        pairs, batch = self.pairs, self.batch
        said = [f"{where} is left out: {why}." for where, why in self.left_out.items()]
        said += [
            f"{run.folder} counts for no claim: its lambda is {run.coeff:g}, and the paper's is 1."
            for run in self.runs
            if run.coeff not in (0, 1)
        ]
        said += [
            f"{run.folder} counts for no claim: JREG is judged with a batch of {batch}, as most pairs have."
            for run in self.runs
            if run.coeff == 1 and run.batch != batch
        ]
        unpaired = sorted({*self.baseline, *self.jreg()} - pairs.keys())
        if unpaired:
            said.append(f"Seeds {', '.join(map(str, unpaired))} have no baseline, or no JREG at alpha 1.")
        said += [
            f"{run.folder} is not evaluated, nor is its pair: it has no checkpoints folder."
            for pair in pairs.values()
            for run in pair
            if not run.checkpoints.is_dir()
        ]
        return said

    def _pairs(self, batch: int) -> dict[int, tuple[Trained, Trained]]:
        base, jreg = self._of(None, batch), self._of(1.0, batch)
        return {seed: (run, jreg[seed]) for seed, run in base.items() if seed in jreg}

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
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = [
            path.parent for form in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{form}tensorboard"))
        ]
        runs = [run for run in runs if run.name != "smoke"]  # a recipe's toy
        if not runs:
            raise UserError(f"--runs names {folder}, where no folder has a tensorboard folder; name the runs")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def gather(folders: Sequence[Path]) -> Evidence:
    """Read the runs of ``folders``; what is not finished is left out.

    Raises:
        UserError: if runs are of two experiments, if two have the same settings, if none is finished, or if
            no baseline is.
    """
    runs: list[Trained] = []
    left_out: dict[str, str] = {}
    for folder in folders:
        try:
            runs.append(_trained(folder))
        except UserError as error:
            left_out[str(folder)] = str(error)
    if not any(run.alpha is None for run in runs):
        what = "no run is finished" if not runs else "no baseline, a run with lambda 0, is finished"
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise UserError(f"{what}{f' ({why})' if why else ''}; give the folders of finished runs")
    _refuse_two_experiments(runs)
    return Evidence(tuple(runs), left_out)


def with_evaluations(evidence: Evidence, files: dict[Path, Path]) -> Evidence:
    """The same with what ``evaluate --json`` wrote, by the runs' folders.

    Raises:
        UserError: for a file that is no evaluation of the run as it ended.
    """
    runs = (
        replace(run, evaluated=evaluation(run, files[run.folder])) if run.folder in files else run
        for run in evidence.runs
    )
    return replace(evidence, runs=tuple(runs))


def evaluation_name(folder: Path) -> str:
    """A file's name for a run's evaluation that no other run has: sweeps call their runs alike."""
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return f"{folder.name[:80]}-{place[:8]}.json"


def evaluation(run: Trained, file: Path) -> Evaluated:
    """The evaluation of a run.

    Raises:
        UserError: if the file cannot be read, or is of another model.
    """
    found = read([file]).evaluated
    if len(found) != 1:
        raise UserError(
            f"{file} holds {len(found)} evaluations; delete it, and the same command makes it anew"
        )
    origin = found[0].origin
    for what, has, wanted in (
        ("checkpoint", Path(origin.source).resolve(), run.checkpoints.resolve()),
        ("step", origin.step, run.steps),
        ("number of layers", origin.num_layers, len(run.history.displacement)),
    ):
        if has != wanted:
            raise UserError(
                f"{file} is of {what} {has}, and {run.folder} ended with {wanted}; delete it to evaluate anew"
            )
    return found[0]


def _trained(folder: Path) -> Trained:
    history = History.read(folder / "tensorboard")
    settings = _DEFAULTS | history.settings
    for name in ("jreg_coeff", "seed", "global_batch_size", "seq_length"):
        if name not in history.settings:
            raise UserError(f"its TensorBoard files do not say its {name}")
    if not history.displacement:
        raise UserError("it was trained without --jreg-log-per-layer")
    if len(history.displacement) < _FEWEST_LAYERS:
        raise UserError(f"it has {len(history.displacement)} layers, and a middle takes {_FEWEST_LAYERS}")
    numbers = (*history.validation_loss, *(psi for profile in history.profiles for psi in profile))
    if not all(map(math.isfinite, numbers)):
        raise UserError("it has diverged")
    try:
        seed, batch, sequence = (int(settings[name]) for name in ("seed", "global_batch_size", "seq_length"))
        coeff, alpha = float(settings["jreg_coeff"]), float(settings["jreg_alpha"])
    except ValueError as error:
        raise UserError(f"a setting that its TensorBoard files name is no number ({error})") from error
    steps = history.iterations[-1]
    by_steps, by_samples = settings.get("train_iters", "None"), settings.get("train_samples", "None")
    if not by_samples.isdecimal() and not by_steps.isdecimal():
        raise UserError("its TensorBoard files do not say how long it was to be trained")
    wanted = int(by_samples) // batch if by_samples.isdecimal() else int(by_steps)
    if steps < wanted:
        raise UserError(f"its last validation is at step {steps:,} of {wanted:,}")
    if coeff > 0:
        for name in _THE_PAPERS:
            if settings[name] != _DEFAULTS[name]:
                raise UserError(f"its {name} is {settings[name]}, and the paper's JREG has {_DEFAULTS[name]}")
    grows = settings.get("rampup_batch_size", "None") != "None"
    return Trained(
        folder=folder,
        seed=seed,
        coeff=coeff,
        alpha=alpha if coeff > 0 else None,
        batch=batch,
        tokens=None if grows else steps * batch * sequence,
        history=history,
    )


def _refuse_two_experiments(runs: Sequence[Trained]) -> None:
    first_of: dict[int, Trained] = {}
    seen: dict[tuple[object, ...], Trained] = {}
    for run in runs:
        _refuse_difference(runs[0], run, _COMMON)
        first = first_of.setdefault(run.batch, run)
        _refuse_difference(first, run, _OF_A_BATCH)
        if first.steps != run.steps:
            raise UserError(
                f"--runs: {first.folder} has {first.steps:,} steps and {run.folder} {run.steps:,}, with one "
                "batch; give runs of one length"
            )
        key = (run.seed, run.coeff, run.alpha, run.batch)
        if key in seen:
            raise UserError(f"--runs: {seen[key].folder} and {run.folder} are one setting and seed; give one")
        seen[key] = run


def _refuse_difference(first: Trained, run: Trained, names: Iterable[str]) -> None:
    for name in names:
        values = [(_DEFAULTS | r.history.settings).get(name) for r in (first, run)]
        if None not in values and values[0] != values[1]:
            raise UserError(
                f"--runs: {name} is {values[0]} in {first.folder} and {values[1]} in {run.folder}; give the "
                "runs of one experiment"
            )


def _is_near(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and abs(a - b) <= _EQUAL_TOKENS * b
