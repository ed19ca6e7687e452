"""What a report is made of: measurements, evaluations and training runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

STATES = ("pre_norm", "post_norm")
"""Which state counts as the last layer's output: before or after the final norm, which a model may lack."""
STATE_WORDS: dict[str | None, str] = {
    "pre_norm": "before the final norm",
    "post_norm": "after the final norm",
    None: "before or after the final norm, which its logs do not say",
}
FIRST_TOKEN = {"kept": "with_first_token", "dropped": "without_first_token"}
"""Whether a text's first token was counted, and the block of a measurement that holds it."""


@dataclass(frozen=True)
class Layers:
    """What was measured over one set of tokens, for one of :data:`STATES`."""

    displacement: tuple[float, ...]
    """Psi_l of layers 1..L, mean over tokens, each in [0, 1]."""
    spread: tuple[float, ...] | None
    """Standard deviation of Psi_l over tokens."""
    jump_rate: float | None
    """zeta_L in hundredths of displacement; None for one layer."""


@dataclass(frozen=True)
class Origin:
    """Where a model's numbers come from."""

    file: str
    name: str
    source: str
    kind: str
    revision: str | None
    step: int | None
    """Training iteration of the checkpoint, where it is known."""
    num_layers: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """One model of a measurement."""

    origin: Origin
    how: dict[str, str]
    """What else the file says of the measurement: text, tokens, dtype and so on."""
    settings: dict[str, str]
    first_token: str
    """The block that the file puts first, a key of :data:`FIRST_TOKEN`."""
    layers: dict[tuple[str, str], Layers]
    """By first token and state; of a model without a final norm by :data:`STATES`' first alone."""

    @property
    def states(self) -> tuple[str, ...]:
        """Those of :data:`STATES` that there are numbers for."""
        return tuple(state for state in STATES if (self.first_token, state) in self.layers)

    @property
    def conditions(self) -> dict[str, str]:
        """What has to be the same for two measurements to be points of one series."""
        text = {
            name: value for name, value in self.how.items() if name == "dtype" or name.startswith("text ")
        }
        return {"first token": self.first_token} | text

    def first_for(self, wanted: str) -> str:
        """``wanted``, a key of :data:`FIRST_TOKEN`, or the other one where only that was measured."""
        return wanted if (wanted, STATES[0]) in self.layers else self.first_token


@dataclass(frozen=True)
class Score:
    """A model's result in a task."""

    metric: str
    value: float
    interval: tuple[float, float] | None
    samples: int | None
    higher_is_better: bool
    chance: float | None
    """What guessing scores."""


@dataclass(frozen=True)
class ReadOut:
    """Predictions read out behind layers 0..L through the final norm and the head."""

    text: str
    tokens: int | None
    """How many were predicted."""
    loss: tuple[float, ...] | None
    """Cross-entropy in nats per token."""
    accuracy: tuple[float, ...] | None
    """Share of tokens predicted right, in [0, 1]."""
    agreement: tuple[float, ...] | None
    """Share of tokens predicted as the whole model predicts them, in [0, 1]."""


@dataclass(frozen=True)
class LayerDrop:
    """Cross-entropy with single layers left out."""

    loss: tuple[float, ...]
    """Without layer 1..L, in nats per token."""
    unchanged: float
    """With all layers."""


@dataclass(frozen=True)
class Evaluated:
    """One model of an evaluation."""

    origin: Origin
    how: dict[str, str]
    """What the file says of the evaluation: text, limit and so on."""
    tasks: dict[str, Score]
    read_out: ReadOut | None
    lens: ReadOut | None
    """The same through the fitted lens."""
    layer_drop: LayerDrop | None


@dataclass(frozen=True)
class Difference:
    """The second model less the first."""

    value: float
    interval: tuple[float, float] | None
    p_value: float | None
    p_adjusted: float | None
    """The p value raised for there being several tests."""
    samples: int | None


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two models of one evaluation."""

    file: str
    models: tuple[str, str]
    """Names; every difference is the second less the first."""
    confidence: float
    """Of the intervals, in (0, 1)."""
    tasks: dict[str, Difference]
    overall: Difference | None
    """Mean over tasks."""
    overall_tasks: int | None
    """How many tasks that is, where it is known."""
    without_boolq: Difference | None
    """Mean over the paper's nine tasks without BoolQ, where all nine were run."""
    read_out: tuple[Difference, ...]
    """Of the loss read out behind layers 0..L; empty if there is none."""
    notes: tuple[str, ...]
    """What was not compared, and why."""


@dataclass(frozen=True)
class Run:
    """A training run."""

    file: str
    folder: Path
    """What belongs to the run lies in it."""
    name: str
    iterations: tuple[int, ...]
    validation_loss: tuple[float, ...]
    """Nats per token; NaN or infinite where the run had diverged."""
    jump_rate: tuple[float, ...]
    """zeta_L as training logged it."""
    displacement: tuple[float, ...]
    """Psi_l of layers 1..L at the last validation, not finite where the run had diverged; may be empty."""
    final_state: str | None
    """One of :data:`STATES`; None if the run does not say which it logged."""
    settings: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class Inputs:
    """Everything that was read, in the order given."""

    measured: list[Measured] = field(default_factory=list)
    evaluated: list[Evaluated] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
