"""The runs of a sweep, and their files."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from jreg_megatron.runtime.documents import checked, read_json
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import write_json

ALPHA, SEED = 1.0, 1234
"""The defaults."""
SWEPT = ("LAMBDA", "ALPHA", "SEED", "RUN")
"""Knobs that a recipe must read from the environment for a sweep."""

# Knobs about the machine. The other knobs must be the same for all runs of a sweep.
_MACHINE = {"NODES", "GPUS", "TP", "PP", "CP", "MICRO_BATCH", "TFLOPS", "PYTHON"}
_MACHINE |= {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"}
_KNOB = re.compile(r"\$\{([A-Z][A-Z0-9_]*):-")
_OWN_FLAGS = ("--jreg-coeff", "--jreg-alpha", "--seed", "--save", "--load", "--tensorboard-dir")
_FILE = "sweep.json"


class SweepRun(BaseModel):
    """One run of a sweep."""

    model_config = ConfigDict(frozen=True)

    seed: int
    coeff: float = 0.0
    """lambda; 0 is the baseline."""
    alpha: float | None = None
    """None for the baseline, which has no layer weights."""

    @property
    def name(self) -> str:
        """Its folder: ``coeff0.1_alpha3_seed1`` or ``baseline_seed1``."""
        if self.alpha is None:
            return f"baseline_seed{self.seed}"
        return f"coeff{_as_text(self.coeff)}_alpha{_as_text(self.alpha)}_seed{self.seed}"


class Sweep(BaseModel):
    """A recipe and its runs: the content of ``sweep.json`` in the output folder."""

    output: Path
    recipe: Path
    smoke: int | None
    """Iterations of toy runs on the CPU, or None for real runs."""
    flags: tuple[str, ...]
    """Megatron flags after the recipe's, the same for all runs."""
    knobs: dict[str, str]
    """The recipe's knobs that the environment set, without those of the machine."""
    runs: tuple[SweepRun, ...]

    def folder(self, run: SweepRun) -> Path:
        """The recipe's RUN."""
        return self.output / run.name

    def tensorboard(self, run: SweepRun) -> Path:
        """Folder of the run's TensorBoard files."""
        return self.folder(run) / ("tensorboard" if self.smoke is None else "smoke/tensorboard")

    def log(self, run: SweepRun) -> Path:
        """The run's log; nodes after the first have logs with their number."""
        rank = node_rank()
        return self.folder(run) / (f"train_node{rank}.log" if rank else "train.log")

    def finished_file(self, run: SweepRun) -> Path:
        """The file that marks a finished run: its recipe ended with status 0, after the last iteration."""
        return self.folder(run) / "finished"

    def is_finished(self, run: SweepRun) -> bool:
        """Whether the run is finished."""
        return self.finished_file(run).exists()

    @property
    def unfinished(self) -> list[SweepRun]:
        """The runs that must still be trained, in order."""
        return [run for run in self.runs if not self.is_finished(run)]

    def command(self, run: SweepRun) -> list[str]:
        """The command of a run; it needs :meth:`environment`."""
        smoke = [] if self.smoke is None else ["--smoke", str(self.smoke)]
        flags = ["--", *self.flags] if self.flags else []
        variant = "baseline" if run.alpha is None else "jreg"
        return [os.path.join(".", self.recipe), variant, *smoke, *flags]

    def settings(self, run: SweepRun) -> dict[str, str]:
        """The recipe's knobs for a run."""
        jreg = {"LAMBDA": _as_text(run.coeff)} | ({} if run.alpha is None else {"ALPHA": _as_text(run.alpha)})
        return {**self.knobs, **jreg, "SEED": str(run.seed), "RUN": str(self.folder(run))}

    def environment(self, run: SweepRun) -> dict[str, str]:
        """The recipe's environment for a run. Its Python is this one, unless PYTHON names another."""
        inherited = {name: value for name, value in os.environ.items() if name not in SWEPT}
        return {"PYTHON": sys.executable} | inherited | self.settings(run)

    def save(self) -> None:
        """Write ``sweep.json``, whole or not at all."""
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(str(self.output / _FILE), self.model_dump(mode="json", exclude={"output"}))

    @classmethod
    def load(cls, output: Path) -> Sweep:
        """Read ``sweep.json``.

        Raises:
            UserError: if there is none, or it is no sweep.
        """
        file = output / _FILE
        if not file.exists():
            raise UserError(f"--output is {output}, which holds no sweep; name a RECIPE to start one")
        kept = checked(file, dict[str, Any], read_json(file))
        found: Sweep = checked(file, cls, kept | {"output": output})
        return found

    def check(self) -> None:
        """Refuse to resume a sweep with other knobs. A knob that is not set now keeps its value.

        Raises:
            UserError: if the recipe is missing, or a knob has another value now.
        """
        _check_recipe(self.recipe)
        for name, value in _knobs_of(self.recipe, os.environ).items():
            before = self.knobs.get(name)
            if before != value:
                had = "without it" if before is None else f"with {before}"
                raise UserError(
                    f"{name} is {value}, but the sweep in {self.output} began {had}; "
                    f"unset {name}, or name another --output"
                )

    def joined(self) -> Sweep:
        """The sweep in the output folder, and after its runs the new ones of this sweep.

        Raises:
            UserError: if that sweep has another recipe, other flags, or other iterations of a smoke.
        """
        if not (self.output / _FILE).exists():
            return self
        before = Sweep.load(self.output)
        before.check()
        same_recipe = self.recipe.resolve() == before.recipe.resolve()
        for what, now, then in (
            ("RECIPE is", self.recipe, self.recipe if same_recipe else before.recipe),
            ("Megatron flags are", " ".join(self.flags) or "none", " ".join(before.flags) or "none"),
            ("--smoke is", self.smoke or "not given", before.smoke or "not given"),
        ):
            if now != then:
                raise UserError(
                    f"{what} {now}, but the sweep in {self.output} has {then}; name another --output"
                )
        new = [run for run in self.runs if run not in before.runs]
        return before.model_copy(update={"runs": (*before.runs, *new)})


def make(asked: Namespace, output: Path) -> Sweep:
    """The asked grid, with a baseline before the runs of each seed, joined to the same sweep in ``output``.

    ``asked`` are the options of the command; it has lambdas.

    Raises:
        UserError: for a setting that JREG refuses, a value given twice, a file that is no recipe, flags
            that the sweep sets itself, or another sweep in ``output``.
    """
    from jreg_megatron.methods.jreg.settings import JRegConfig  # it brings torch

    _check_recipe(asked.recipe)
    coeffs, alphas, seeds = asked.coeff, asked.alpha or [ALPHA], asked.seeds or [SEED]
    for name, values in (("--coeff", coeffs), ("--alpha", alphas), ("--seeds", seeds)):
        if len(set(values)) < len(values):
            twice = next(value for n, value in enumerate(values) if value in values[:n])
            raise UserError(f"{name} names {twice:g} twice; name each value once")
    jreg = [JRegConfig(coeff=coeff, alpha=alpha) for alpha in alphas for coeff in coeffs]
    if 0 in coeffs:
        raise UserError("--coeff names 0, the baseline, which each seed trains in any case; leave it out")
    for flag in (word.partition("=")[0] for word in asked.flags):
        if flag in _OWN_FLAGS:
            raise UserError(f"{flag} comes after --, but the sweep sets it for each run; leave it out")
    JRegConfig.check_flags(asked.flags)
    runs: list[SweepRun] = []
    for seed in seeds:
        of_seed = [SweepRun(seed=seed, coeff=config.coeff, alpha=config.alpha) for config in jreg]
        runs += [SweepRun(seed=seed), *of_seed]
    return Sweep(
        output=output,
        recipe=asked.recipe,
        smoke=asked.smoke,
        flags=tuple(asked.flags),
        knobs=_knobs_of(asked.recipe, os.environ),
        runs=tuple(runs),
    ).joined()


def node_rank() -> int:
    """Number of this node in its job, from 0."""
    return int(os.environ.get("NODE_RANK") or 0)


def _check_recipe(recipe: Path) -> None:
    """Refuse a recipe that is no program, or does not mention each of :data:`SWEPT`."""
    if not recipe.is_file() or not os.access(recipe, os.X_OK | os.R_OK):
        why = "that cannot be executed or read" if recipe.exists() else "that does not exist"
        raise UserError(f"RECIPE is {recipe}, a file {why}; name one such as recipes/llama_170m.sh")
    known = set(re.findall(r"\w+", recipe.read_text(errors="replace")))
    if missing := [name for name in SWEPT if name not in known]:
        raise UserError(
            f"RECIPE is {recipe}, which takes no {', '.join(missing)} from the environment; "
            "name one such as recipes/llama_170m.sh"
        )


def _knobs_of(recipe: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The knobs of a recipe, ``${NAME:-value}`` in its text, that the environment sets for all runs."""
    lines = recipe.read_text(errors="replace").splitlines()
    found = _KNOB.findall("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    names = set(found) - _MACHINE - set(SWEPT)
    return {name: environment[name] for name in sorted(names) if environment.get(name)}


def _as_text(value: float) -> str:
    """The shortest exact text of a number: ``3``, ``0.1``."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
