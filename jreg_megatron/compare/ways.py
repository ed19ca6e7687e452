"""The ways to train that are compared, and their runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jreg_megatron.claims import toy
from jreg_megatron.demo.training import METHOD_FLAGS, Run
from jreg_megatron.methods.jreg.settings import JRegConfig

STEPS = 1500
"""55 runs and their evaluations then take less than two hours on two cores."""
SEEDS = 5
FEWEST_STEPS = 50
TEACHER_SEED = 1000
"""No other run has it."""

_NO_JREG = JRegConfig(coeff=0.0)
_GELU = toy.model(ffn=288, mlp="")  # two matrices in place of three: as many parameters
_TEACHER = toy.model(layers=4, hidden=32, ffn=96)


@dataclass(frozen=True)
class Way:
    """A way to train; without ``against`` it is a baseline."""

    name: str
    text: str
    against: str | None = None
    """Name of its baseline: the same without the method."""
    flags: str = ""
    config: JRegConfig = _NO_JREG
    model: str = toy.model()


_TIMES = "--log-timers-to-tensorboard"
_LET = "--let-teacher {teacher} --let-layer 3 --let-stop-iterations {half} --let-coeff 0.1"
_ALL = (
    Way("baseline", "baseline"),
    Way("jreg", "JREG, λ 1, α 1", "baseline", config=JRegConfig(coeff=1.0, alpha=1.0)),
    Way("slowqk", "slow Q/K", "baseline", METHOD_FLAGS["slowqk"]),
    Way("attenuation", "attenuation, 0.5 at the last layer", "baseline", "--attenuation-factor 0.5"),
    Way("attenuation_learned", "attenuation, learned", "baseline", METHOD_FLAGS["attenuation"]),
    Way("periln", "Peri-LN", "baseline", METHOD_FLAGS["periln"]),
    Way("let", "LET, a teacher for layer 3", "baseline", _LET),
    Way("baseline_alike", "baseline, all weights drawn alike", flags="--init-fan-in"),
    Way(
        "lns",
        "LayerNorm scaling, all weights drawn alike",
        "baseline_alike",
        f"{METHOD_FLAGS['lns']} --init-fan-in",
    ),
    Way("baseline_gelu", "baseline, GELU", model=_GELU),
    Way("slowqk_gelu", "slow Q/K, GELU", "baseline_gelu", METHOD_FLAGS["slowqk"], model=_GELU),
)
WAYS = {way.name: way for way in _ALL}


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
        flags = toy.flags(_TEACHER, more=_TIMES)
        return Run("teacher", _NO_JREG, self.steps, self.folder / "teacher", TEACHER_SEED, flags, ranks=1)

    @property
    def exported_teacher(self) -> Path:
        """The teacher as a folder for transformers, which LET takes."""
        return self.folder / "teacher_exported"

    def method_flags(self, name: str, teacher: Path) -> str:
        """Megatron's flags of a way's method; slow Q/K is held for 4% of the steps, as published."""
        return WAYS[name].flags.format(hold=self.steps // 25, half=self.steps // 2, teacher=teacher)

    def run(self, name: str, seed: int) -> Run:
        """The run of a way with a seed."""
        way, label = WAYS[name], f"{name}_seed{seed}"
        more = self.method_flags(name, self.exported_teacher.absolute())
        flags = toy.flags(way.model, more=f"{_TIMES} {more}")
        return Run(label, way.config, self.steps, self.folder / label, seed, flags, ranks=1)

    @property
    def runs(self) -> list[tuple[str, int, Run]]:
        """Each with its way and seed; seed by seed, so that what is there early is paired."""
        seeds = range(1, self.seeds + 1)
        return [(name, seed, self.run(name, seed)) for seed in seeds for name in self.names]

    @property
    def against(self) -> dict[str, str]:
        """The baseline of each way that is compared."""
        return {name: against for name in self.names if (against := WAYS[name].against)}
