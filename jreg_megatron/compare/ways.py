"""The ways to train that are compared, and their runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jreg_megatron.claims import toy
from jreg_megatron.demo.training import METHOD_FLAGS, TEACHER_SEED, Run, llama, method_flags

STEPS = 1500
"""With it all runs and evaluations need less than two hours on two cores."""
SEEDS = 5
FEWEST_STEPS = 50

_GELU = llama(8, 64, 288, toy.SEQUENCE, mlp="")  # two matrices in place of three: as many parameters
_TEACHER = llama(4, 32, 96, toy.SEQUENCE)


@dataclass(frozen=True)
class Way:
    """A way to train; without ``against`` it is a baseline."""

    text: str
    against: str | None = None
    """Name of its baseline: the same without the method."""
    flags: str = ""
    coeff: float = 0.0
    """lambda of JREG; alpha is 1."""
    model: str = toy.MODEL


_TIMES = "--log-timers-to-tensorboard"
WAYS = {
    "baseline": Way("baseline"),
    "jreg": Way("JREG, λ 1, α 1", "baseline", coeff=1.0),
    "slowqk": Way("slow Q/K", "baseline", METHOD_FLAGS["slowqk"]),
    "attenuation": Way("attenuation, 0.5 at the last layer", "baseline", "--attenuation-factor 0.5"),
    "attenuation_learned": Way("attenuation, learned", "baseline", METHOD_FLAGS["attenuation"]),
    "periln": Way("Peri-LN", "baseline", METHOD_FLAGS["periln"]),
    "let": Way("LET, a teacher for layer 3", "baseline", METHOD_FLAGS["let"]),
    "baseline_alike": Way("baseline, initial weights of one scale", flags="--init-fan-in"),
    "lns": Way(
        "LayerNorm scaling, initial weights of one scale",
        "baseline_alike",
        f"{METHOD_FLAGS['lns']} --init-fan-in",
    ),
    "baseline_gelu": Way("baseline, GELU", model=_GELU),
    "slowqk_gelu": Way("slow Q/K, GELU", "baseline_gelu", METHOD_FLAGS["slowqk"], model=_GELU),
}


@dataclass(frozen=True)
class Plan:
    """The toys to train."""

    folder: Path
    steps: int = STEPS
    seeds: int = SEEDS
    ways: Sequence[str] = tuple(WAYS)
    """Without baselines that they need; :attr:`names` has these too."""

    @property
    def names(self) -> list[str]:
        """Of all ways to train, in the order of :data:`WAYS`."""
        return [name for name in WAYS if name in self.ways or any(WAYS[w].against == name for w in self.ways)]

    @property
    def needs_teacher(self) -> bool:
        """Whether a way learns from :attr:`teacher`."""
        return any("{teacher}" in WAYS[name].flags for name in self.names)

    @property
    def teacher(self) -> Run:
        """A smaller model of the same vocabulary, on the same text."""
        return self._run("teacher", TEACHER_SEED, _TEACHER)

    def method_flags(self, name: str, teacher: Path) -> list[str]:
        """Megatron's flags of a way's method."""
        return method_flags(WAYS[name].flags, self.steps, teacher)

    def run(self, name: str, seed: int) -> Run:
        """The run of a way with a seed."""
        way, more = WAYS[name], self.method_flags(name, self.teacher.exported)
        return self._run(f"{name}_seed{seed}", seed, way.model, more, way.coeff)

    def _run(self, name: str, seed: int, model: str, more: Sequence[str] = (), coeff: float = 0.0) -> Run:
        flags = (*toy.flags(model, more=_TIMES), *more)
        return Run(name, self.steps, self.folder / name, coeff, seed=seed, flags=flags, ranks=1)

    @property
    def runs(self) -> list[tuple[str, int, Run]]:
        """Each with its way and seed; seed by seed, so that early results are pairs."""
        seeds = range(1, self.seeds + 1)
        return [(name, seed, self.run(name, seed)) for seed in seeds for name in self.names]

    @property
    def against(self) -> dict[str, str]:
        """The baseline of each way that is compared."""
        return {name: against for name in self.names if (against := WAYS[name].against)}
