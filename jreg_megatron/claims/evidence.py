"""The evidence of each trained model: its curves from TensorBoard, its evaluation from JSON."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field

from jreg_megatron.methods import known
from jreg_megatron.methods.jreg.formulas import jump_rate
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.report.inputs import Evaluated, History, Score
from jreg_megatron.report.reading import read, read_history
from jreg_megatron.runtime.documents import checked
from jreg_megatron.runtime.errors import UserError

# All runs of an experiment have equal values of these.
_COMMON = (
    *("num_layers", "hidden_size", "ffn_hidden_size"),
    *("num_attention_heads", "num_query_groups", "seq_length"),
    *("padded_vocab_size", "normalization", "norm_epsilon", "init_method_std", "init_fan_in", "num_experts"),
    *("data_path", "train_data_path", "data_args_path", "split", "tokenizer_model"),
    *("optimizer", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "lr_decay_style"),
    *("jreg_final_state", "jreg_tokens", "jreg_loss_weight", "jreg_negligible_weight"),
)
# These may differ between batch sizes.
_OF_A_BATCH = ("lr", "min_lr", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")
# The paper's JREG has the defaults of these. A baseline may have others.
_THE_PAPERS = (
    *("jreg_weights", "jreg_start_iteration", "jreg_stop_iteration", "jreg_warmup_iterations"),
    "jreg_token_share",
)
_OTHER_METHODS = tuple(
    f"{kind.prefix}_" for kind in known.METHODS if not (kind is JRegConfig or kind.only_measures)
)
_DEFAULTS = {f"jreg_{f.name}": str(f.default) for f in fields(JRegConfig)}

_EQUAL_TOKENS = 0.01
_NEAR = 0.05
_FEWEST_LAYERS = 4


class _Settings(BaseModel):
    """Megatron's arguments by which runs are sorted."""

    seed: int
    global_batch_size: Annotated[int, Field(gt=0)]
    seq_length: int
    jreg_coeff: float
    jreg_alpha: float = JRegConfig().alpha
    train_iters: int | None = None
    train_samples: int | None = None
    rampup_batch_size: str | None = None


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
    """Number of training tokens; None if the batch grows."""
    history: History
    evaluated: Evaluated | None = None

    @property
    def tasks(self) -> Mapping[str, Score]:
        """Its results in tasks; empty if it is not evaluated."""
        return self.evaluated.tasks if self.evaluated else {}

    def by_layer(self, what: str) -> dict[int, float]:
        """:meth:`.Evaluated.by_layer`; empty if it is not evaluated."""
        return self.evaluated.by_layer(what) if self.evaluated else {}

    @property
    def checkpoints(self) -> Path:
        """The folder of the trained model."""
        return self.folder / "checkpoints"

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.history.iterations[-1]

    @property
    def rises(self) -> list[float]:
        """Psi of the last layer minus Psi of the layer before, x 100, at each validation."""
        return [100 * (psi[-1] - psi[-2]) for psi in self.history.profiles]

    @property
    def rise(self) -> float:
        """The last of :attr:`rises`; zeta_L if it is above 0."""
        return self.rises[-1]

    @property
    def shares(self) -> list[float]:
        """The share of the steps that is done at each validation."""
        return [step / self.steps for step in self.history.iterations]

    def at(self, share: float, values: Sequence[float]) -> float | None:
        """The value of the validation nearest to a share of the steps; None if none is near.

        ``values`` has one value per validation.
        """
        done, value = min(zip(self.shares, values, strict=True), key=lambda point: abs(point[0] - share))
        return value if abs(done - share) <= _NEAR else None

    def jump_rate(self, layers_below_last: int = 0) -> float:
        """zeta at the end, of layer ``L - layers_below_last``."""
        psi = torch.tensor(self.history.displacement, dtype=torch.float64)
        return float(jump_rate(psi, len(psi) - layers_below_last))


@dataclass(frozen=True)
class Evidence:
    """All runs of one experiment, selected for the claims."""

    runs: tuple[Trained, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    """The reason why a folder does not count, by path."""

    @cached_property
    def batch(self) -> int:
        """The batch in sequences with the most pairs; if equal, the most runs; if equal, the smallest."""
        runs = Counter(run.batch for run in self.runs)
        return min(runs, key=lambda batch: (-len(self._pairs(batch)), -runs[batch], batch))

    @property
    def baseline(self) -> dict[int, Trained]:
        """By seed, with :attr:`batch`."""
        return self.by_seed(None)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.runs[0].history.displacement)

    @property
    def alphas(self) -> list[float]:
        """The alphas of runs with lambda 1 and :attr:`batch`, rising."""
        found = {run.alpha for run in self.runs if run.coeff == 1 and run.batch == self.batch}
        return sorted(alpha for alpha in found if alpha is not None)

    def by_seed(self, alpha: float | None, batch: int | None = None) -> dict[int, Trained]:
        """The runs with lambda 1, or the baselines for None, by default with :attr:`batch`."""
        wanted = (alpha, 0 if alpha is None else 1, batch or self.batch)
        return {run.seed: run for run in self.runs if (run.alpha, run.coeff, run.batch) == wanted}

    @property
    def pairs(self) -> dict[int, tuple[Trained, Trained]]:
        """By seed, the baseline and JREG at the paper's lambda 1 and alpha 1."""
        return self._pairs(self.batch)

    @property
    def batches(self) -> dict[int, dict[int, Trained]]:
        """Baselines by seed and batch, on as many tokens as :attr:`baseline`; seeds with several batches."""
        found: dict[int, dict[int, Trained]] = {}
        for seed, base in self.baseline.items():
            for run in sorted(self.runs, key=lambda run: run.batch):
                if (run.seed, run.alpha) == (seed, None) and _is_near(run.tokens, base.tokens):
                    found.setdefault(seed, {})[run.batch] = run
        return {seed: runs for seed, runs in found.items() if len(runs) > 1}

    @property
    def notes(self) -> list[str]:
        """The runs that are not used, and why."""
        pairs = self.pairs
        said = [f"{where} is left out: {why}." for where, why in self.left_out.items()]
        for run in self.runs:
            why = ""
            if run.coeff not in (0, 1):
                why = f"its lambda is {run.coeff:g}, the paper's is 1"
            elif run.coeff == 1 and run.batch != self.batch:
                why = f"JREG is judged at batch {self.batch}, which most pairs have"
            said += [f"{run.folder} counts for no claim: {why}."] if why else []
        if unpaired := sorted({*self.baseline, *self.by_seed(1.0)} - pairs.keys()):
            said.append(f"Seeds {', '.join(map(str, unpaired))} have no baseline, or no JREG at alpha 1.")
        said += [
            f"{run.folder} and its pair are not evaluated: it has no checkpoints folder."
            for pair in pairs.values()
            for run in pair
            if not run.checkpoints.is_dir()
        ]
        return said

    def _pairs(self, batch: int) -> dict[int, tuple[Trained, Trained]]:
        base, jreg = self.by_seed(None, batch), self.by_seed(1.0, batch)
        return {seed: (run, jreg[seed]) for seed, run in base.items() if seed in jreg}


def find(folders: Iterable[Path]) -> list[Path]:
    """The run folders in ``folders``: those with a ``tensorboard`` folder, up to two levels below.

    Raises:
        UserError: for a folder without a run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = [
            path.parent for form in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{form}tensorboard"))
        ]
        runs = [run for run in runs if run.name != "smoke"]  # a recipe's toy
        if not runs:
            raise UserError(f"--runs names {folder}, which has no folder tensorboard; name folders of runs")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def gather(folders: Sequence[Path]) -> Evidence:
    """Read the finished runs of ``folders``.

    Raises:
        UserError: if runs are of two experiments, if two have the same settings, or if no run or no baseline
            is finished.
    """
    runs: list[Trained] = []
    left_out: dict[str, str] = {}
    for folder in folders:
        try:
            run = read_run(folder)
            _check_the_papers(run)
            runs.append(run)
        except UserError as error:
            left_out[str(folder)] = str(error)
    if not any(run.alpha is None for run in runs):
        what = "no run is finished" if not runs else "no baseline, a run with lambda 0, is finished"
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise UserError(f"--runs: {what}{f' ({why})' if why else ''}; give the folders of finished runs")
    _refuse_two_experiments(runs)
    return Evidence(tuple(runs), left_out)


def evaluation_name(folder: Path) -> str:
    """A unique file name for a run's evaluation; runs of several sweeps have the same names."""
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
            f"{file} holds {len(found)} evaluations; it must hold 1: delete it, and start the command again"
        )
    origin = found[0]
    for what, has, wanted in (
        ("checkpoint", Path(origin.source).resolve(), run.checkpoints.resolve()),
        ("step", origin.step, run.steps),
        ("number of layers", origin.num_layers, len(run.history.displacement)),
    ):
        if has != wanted:
            raise UserError(
                f"{file} has {what} {has}, but run {run.folder} has {wanted}; delete the file and start again"
            )
    return found[0]


def read_run(folder: Path) -> Trained:
    """A finished run, from its TensorBoard files.

    Raises:
        UserError: with the reason why the run does not count.
    """
    history = read_history(folder / "tensorboard")
    if not history.displacement:
        raise UserError("it was trained without --jreg-log-per-layer")
    if len(history.displacement) < _FEWEST_LAYERS:
        raise UserError(f"it has {len(history.displacement)} layers; a middle needs {_FEWEST_LAYERS}")
    numbers = (*history.validation_loss, *(psi for profile in history.profiles for psi in profile))
    if not all(map(math.isfinite, numbers)):
        raise UserError("it has diverged")
    given = {name: value for name, value in history.settings.items() if value != "None"}
    asked: _Settings = checked(folder, _Settings, given)
    steps, batch, coeff = history.iterations[-1], asked.global_batch_size, asked.jreg_coeff
    wanted = asked.train_samples // batch if asked.train_samples else asked.train_iters
    if wanted is None:
        raise UserError("its TensorBoard files have neither train_iters nor train_samples")
    if steps < wanted:
        raise UserError(f"its last validation is at step {steps:,} of {wanted:,}")
    return Trained(
        folder=folder,
        seed=asked.seed,
        coeff=coeff,
        alpha=asked.jreg_alpha if coeff > 0 else None,
        batch=batch,
        tokens=None if asked.rampup_batch_size else steps * batch * asked.seq_length,
        history=history,
    )


def _check_the_papers(run: Trained) -> None:
    settings = run.history.settings
    others = [name for name in settings if name.startswith(_OTHER_METHODS) and settings[name] != "None"]
    if others:
        raise UserError(f"it was trained with another method ({', '.join(others)})")
    for name in _THE_PAPERS if run.coeff > 0 else ():
        if (had := settings.get(name, _DEFAULTS[name])) != _DEFAULTS[name]:
            raise UserError(f"its {name} is {had}; the paper's JREG has {_DEFAULTS[name]}")


def _refuse_two_experiments(runs: Sequence[Trained]) -> None:
    first_of: dict[int, Trained] = {}
    seen: dict[tuple[object, ...], Trained] = {}
    for run in runs:
        first = first_of.setdefault(run.batch, run)
        for other, names in ((runs[0], _COMMON), (first, _OF_A_BATCH)):
            for name in names:
                values = [(_DEFAULTS | r.history.settings).get(name) for r in (other, run)]
                if None not in values and values[0] != values[1]:
                    raise UserError(
                        f"--runs: {name} is {values[0]} in {other.folder} and {values[1]} in {run.folder}; "
                        "give the runs of one experiment"
                    )
        if first.steps != run.steps:
            raise UserError(
                f"--runs: {first.folder} has {first.steps:,} steps and {run.folder} {run.steps:,} at one "
                "batch; give runs of one length"
            )
        twin = seen.setdefault((run.seed, run.coeff, run.alpha, run.batch), run)
        if twin is not run:
            raise UserError(
                f"--runs: {twin.folder} and {run.folder} have the same settings and seed; give one"
            )


def _is_near(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=_EQUAL_TOKENS)
