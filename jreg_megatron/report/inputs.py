"""The inputs of a report. Measurements and evaluations are also the schemas of their JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, pi, sqrt
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationInfo,
    model_validator,
)

from jreg_megatron.runtime.documents import NULL_IS_EMPTY, Name, Text, Texts

State = Literal["pre_norm", "post_norm"]
STATES: tuple[State, State] = ("pre_norm", "post_norm")
"""The state that counts as the last layer's output: before or after the final norm, if there is one."""
STATE_WORDS: dict[str | None, str] = {
    "pre_norm": "before the final norm",
    "post_norm": "after the final norm",
    None: "before or after the final norm (the logs do not say)",
}
_VERSION = 1
_ROUNDING = 1e-5


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the lower end before the upper end")
    return ends


def _depth(layers: int, about: ValidationInfo[Any]) -> int:
    about.context["layers"] = layers
    return layers


def _per_layer(more: int = 0) -> AfterValidator:
    """Checks that a list has one entry per layer of the model, plus ``more``."""

    def check(values: list[Any], about: ValidationInfo[Any]) -> list[Any]:
        if len(values) != (length := about.context["layers"] + more):
            raise ValueError(f"a list of {length} numbers")
        return values

    return AfterValidator(check)


def _between(least: float, most: float) -> AfterValidator:
    """Checks a range, with room for a mean that was rounded out of it."""

    def check(value: float) -> float:
        if not least - _ROUNDING <= value <= most + _ROUNDING:
            raise ValueError(f"a number from {least:.5g} to {most:.5g}")
        return value

    return AfterValidator(check)


def _behind(rows: list[list[Any]]) -> list[list[Any]]:
    for skipped, row in enumerate(rows, start=1):
        if [value is None for value in row] != [layer <= skipped for layer in range(1, len(rows) + 1)]:
            later = len(rows) - skipped
            raise ValueError(f"a list whose entry {skipped} has {skipped} null and then {later} numbers")
    return rows


def _version(found: Any) -> Any:
    if isinstance(found, bool) or found != _VERSION:
        raise ValueError(f"{_VERSION}; for a newer file install a newer jreg_megatron")
    return found


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Fraction = Annotated[Number, _between(0, 1)]
"""A share or an entropy."""
Cosine = Annotated[Number, _between(-1, 1)]
Angle = Annotated[Number, _between(0, pi / 2)]
Rate = Annotated[Number, Field(ge=0, le=100)]
"""zeta in hundredths of displacement."""
Loss = Annotated[Number, Field(ge=0)]
"""In nats per token."""
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**53)]
Interval = Annotated[tuple[Number, Number], AfterValidator(_rising)]
Turns = dict[State, Annotated[list[Share], _per_layer()]]
"""A number for each layer 1..L, by state."""
type Known[T] = dict[State, Annotated[list[T | None], _per_layer()] | None]
type KnownOfStates[T] = dict[State, Annotated[list[T | None], _per_layer(1)] | None]
"""The same with layer 0, the embedding. An unknown number is None."""


class Part(BaseModel):
    """A part of a JSON file. Other fields are ignored."""

    model_config = ConfigDict(frozen=True)


def _as_words(found: Mapping[str, Any]) -> dict[str, str]:
    """Values as text, without those that are None."""
    return {
        name.replace("_", " "): value if isinstance(value, str) else f"{value:,.10g}"
        for name, value in found.items()
        if value is not None
    }


class Origin(Part):
    """The source of a model's numbers. ``file`` is a printable name; it and ``versions`` are per file."""

    file: str
    versions: Texts
    name: Text
    source: Text
    kind: Literal["hugging_face", "gguf", "megatron"]
    revision: Text | None = None
    step: Whole | None = None
    num_layers: Annotated[Count, AfterValidator(_depth)]


class Block(Part):
    """A measurement over one set of tokens: mean and deviation of Psi_l, zeta_L if there are two or more
    layers, and with ``--depth`` the use of depth."""

    displacement: Turns
    displacement_std: Turns | None = None
    jump_rate: dict[State, Rate | None]
    void_share: Known[Fraction] = {}
    attention_ratio: Known[Loss] = {}
    mlp_ratio: Known[Loss] = {}
    layer_ratio: Known[Loss] = {}
    attention_cosine: Known[Cosine] = {}
    mlp_cosine: Known[Cosine] = {}
    layer_cosine: Known[Cosine] = {}
    matrix_entropy: KnownOfStates[Fraction] = {}
    curvature: KnownOfStates[Angle] = {}

    @property
    def states(self) -> tuple[State, ...]:
        """The states of :data:`STATES` that have numbers. Without a final norm, only the first."""
        return STATES if "post_norm" in {*self.displacement, *self.jump_rate} else STATES[:1]

    @model_validator(mode="after")
    def _has_all_states(self, about: ValidationInfo[Any]) -> Self:
        has_rate = about.context["layers"] > 1
        for name in ("displacement", "displacement_std", *(["jump_rate"] if has_rate else [])):
            found = getattr(self, name)
            for state in self.states if found is not None else ():
                if found.get(state) is None:
                    raise ValueError(f"an object with {name}.{state}")
        return self


class Measured(Origin):
    """One model of a measurement. ``first_token`` names the block that the user chose."""

    text: Texts
    texts: Count | None = None
    tokens: Count | None = None
    hidden_size: Count | None = None
    dtype: Text | None = None
    device: Text | None = None
    settings: Texts = {}
    first_token: Literal["kept", "dropped"]
    with_first_token: Block
    without_first_token: Block | None = None

    @model_validator(mode="after")
    def _has_its_block(self) -> Self:
        if self.first_token not in self.blocks:
            raise ValueError("an object with without_first_token")
        return self

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """The existing blocks, by ``kept`` and ``dropped``."""
        found = {"kept": self.with_first_token, "dropped": self.without_first_token}
        return {name: block for name, block in found.items() if block}

    @property
    def states(self) -> tuple[State, ...]:
        """The states of its blocks."""
        return self.with_first_token.states

    def by_layer(self, what: str) -> dict[int, float | None]:
        """A number of the use of depth, by layer; empty if it is not known.

        Args:
            what: such as ``kept.void_share`` with first tokens, or ``dropped.void_share`` without them.
        """
        part, _, name = what.partition(".")
        found = getattr(self.blocks[part], name) if part in self.blocks else {}
        values = found.get(STATES[0]) or []
        return dict(enumerate(values, start=self.num_layers + 1 - len(values)))

    @property
    def how(self) -> dict[str, str]:
        """The conditions of the measurement: text, tokens, dtype and so on."""
        found: dict[str, Any] = {
            f"text {name}": "none" if value == "null" else value for name, value in self.text.items()
        }
        found |= {name: getattr(self, name) for name in ("texts", "tokens", "hidden_size", "dtype", "device")}
        return _as_words(found)

    @property
    def conditions(self) -> dict[str, str]:
        """The conditions that must be equal in all measurements of a series."""
        how = self.how.items()
        text = {name: value for name, value in how if name == "dtype" or name.startswith("text ")}
        return {"first token": self.first_token} | text


class Score(Part):
    """A model's result in a task. ``chance`` is the expected score of a random guess."""

    metric: Text
    value: Number
    interval: Interval | None = None
    samples: Count | None = None
    higher_is_better: StrictBool | None = None
    chance: Number | None = None


class ReadOut(Part):
    """Predictions after layers 0..L, read out through the final norm and the head.

    Accuracy is the share of tokens with the right prediction. Agreement is the share with the whole model's.
    """

    text: Text | None = None
    tokens: Whole | None = None
    loss: Annotated[list[Loss], _per_layer(1)] | None = None
    accuracy: Annotated[list[Share], _per_layer(1)] | None = None
    agreement: Annotated[list[Share], _per_layer(1)] | None = None


class Skip(Part):
    """The effect of skipping layer s, for s in 1..L, on each later layer's contribution and on the output."""

    later_mean: Annotated[list[list[Loss | None]], _per_layer(), AfterValidator(_behind)]
    output_mean: Annotated[list[Annotated[Number, _between(0, sqrt(2))]], _per_layer()]


class Depth(ReadOut):
    """The use of depth after layers 0..L: KL divergence of the read-out from the whole model's output, the
    share of common tokens among the five likeliest, and cosines of the state and two input embeddings."""

    kl: Annotated[list[Loss], _per_layer(1)] | None = None
    top5_overlap: Annotated[list[Share], _per_layer(1)] | None = None
    cosine_to_token: Annotated[list[Cosine], _per_layer(1)] | None = None
    cosine_to_next_token: Annotated[list[Cosine], _per_layer(1)] | None = None
    skip: Skip | None = None

    @property
    def alignment(self) -> dict[int, float]:
        """The cosine with the next token's embedding minus that with the own token's, for layers 1..L.

        Layer 0 is left out, because h_0 is the own token's embedding. Above 0 the state points to the next
        token.
        """
        pairs = zip(self.cosine_to_next_token or (), self.cosine_to_token or (), strict=False)
        return {layer: following - own for layer, (following, own) in enumerate(pairs) if layer > 0}

    @property
    def skip_output(self) -> dict[int, float]:
        """The change of the probabilities without each layer."""
        return dict(enumerate(self.skip.output_mean, start=1)) if self.skip else {}

    @property
    def skip_later(self) -> dict[int, float]:
        """For each layer except the last, the change of later layers' contributions without it, as a mean."""
        rows = enumerate(self.skip.later_mean, start=1) if self.skip else ()
        known = {layer: [value for value in row if value is not None] for layer, row in rows}
        return {layer: fmean(values) for layer, values in known.items() if values}


class LayerDrop(Part):
    """Cross-entropy without layer l, for l in 1..L, and with all layers."""

    loss: Annotated[list[Loss], _per_layer()]
    unchanged: Loss


class Evaluated(Origin):
    """One model of an evaluation. ``limit`` and ``max_tokens`` are per file."""

    limit: Loss | None = None
    max_tokens: Loss | None = None
    tasks: Annotated[dict[Name, Score], NULL_IS_EMPTY] = {}
    read_out: ReadOut | None = None
    lens: ReadOut | None = None
    layer_drop: LayerDrop | None = None
    depth: Depth | None = None

    @property
    def how(self) -> dict[str, str]:
        """The conditions of the evaluation: text, limit and so on."""
        about = self.read_out or ReadOut()
        found: dict[str, Any] = {"read-out text": about.text, "read-out tokens": about.tokens}
        for name in ("limit", "max_tokens"):
            if name in self.model_fields_set:
                found[name] = "none" if (value := getattr(self, name)) is None else value
        return _as_words(found)

    def by_layer(self, what: str) -> dict[int, float]:
        """Numbers by layer; empty if they are not known.

        Args:
            what: ``read_out.loss``, ``lens.loss``, ``read_out.accuracy``, ``read_out.agreement`` of layers
                0..L; ``depth.`` and a name of :class:`Depth`; or ``layer_drop``, the rise of the loss without
                one of layers 1..L.
        """
        part, _, name = what.partition(".")
        found = getattr(self, part, None)
        if isinstance(found, LayerDrop):
            return {layer: loss - found.unchanged for layer, loss in enumerate(found.loss, start=1)}
        values = getattr(found, name, None) or ()
        return values if isinstance(values, dict) else dict(enumerate(values))


class Difference(Part):
    """The second model minus the first. ``p_adjusted`` is corrected for several tests."""

    difference: Number
    interval: Interval | None = None
    p_value: Share | None = None
    p_adjusted: Share | None = None
    samples: Count | None = None
    tasks: list[Any] | None = None
    """The tasks of the mean, if known."""


class DifferenceByLayer(Part):
    """The same after layers 0..L, of models with the same L."""

    difference: Annotated[list[Number], _per_layer(1)]
    interval: Annotated[list[Interval | None], _per_layer(1)] | None = None
    p_value: Annotated[list[Share | None], _per_layer(1)] | None = None
    p_adjusted: Annotated[list[Share | None], _per_layer(1)] | None = None


class Comparison(Part):
    """A paired comparison of two models of one evaluation, by their names."""

    file: str
    models: tuple[Text, Text]
    confidence: Share
    tasks: Annotated[dict[Name, Difference], NULL_IS_EMPTY] = {}
    overall: Difference | None = None
    """Mean over tasks."""
    without_boolq: Difference | None = None
    """Mean over the paper's nine tasks without BoolQ, if all nine were run."""
    read_out: DifferenceByLayer | None = None
    notes: list[Text] | None = None
    """Comparisons that are missing, and why."""


class _File(Part):
    version: Annotated[int, BeforeValidator(_version)]
    versions: Texts = {}


class Measurement(_File):
    """The file of ``measure --json``."""

    models: Annotated[list[Measured], Field(min_length=1)]


class Evaluation(_File):
    """The file of ``evaluate --json``."""

    models: Annotated[list[Evaluated], Field(min_length=1)]
    comparison: Comparison | None = None


class Validation(Part):
    """A validation in training."""

    iteration: Whole
    validation_loss: Loss
    jump_rate: Rate


class SummaryRun(Part):
    """A run in a summary."""

    coeff: Loss | None = None
    alpha: Number | None = None
    seed: Whole | None = None
    displacement: list[Share]
    history: Annotated[list[Validation], Field(min_length=1)]


class Summary(Part):
    """The ``summary.json`` of the demo or of a sweep."""

    final_state: State
    iterations: Count
    recipe: Text | None = None
    seed: Whole | None = None
    versions: Texts = {}
    runs: Annotated[dict[Name, SummaryRun], Field(min_length=1)]


@dataclass(frozen=True)
class History:
    """Validation over a run's training."""

    iterations: list[int]
    """Iterations of the validations, in ascending order."""
    validation_loss: list[float]
    """Cross-entropy in nats per token, one for each of :attr:`iterations`; not finite after a divergence."""
    jump_rate: list[float]
    """zeta_L, one for each of :attr:`iterations`, in hundredths of displacement."""
    profiles: list[list[float]]
    """Displacement of layers 1..L, each in [0, 1], one list for each of :attr:`iterations`. The lists are
    empty without ``--jreg-log-per-layer``."""
    settings: dict[str, str]
    """Megatron's last arguments as text, with ``jreg_coeff`` and the like."""

    @property
    def displacement(self) -> list[float]:
        """Displacement of layers 1..L at the last validation."""
        return self.profiles[-1]

    def summary(self) -> dict[str, Any]:
        """The run's part of a ``summary.json``: the last values, and the curves of loss and jump rate."""
        rows = zip(self.iterations, self.validation_loss, self.jump_rate, strict=True)
        return {
            "validation_loss": self.validation_loss[-1],
            "jump_rate": self.jump_rate[-1],
            "displacement": self.displacement,
            "history": [
                {"iteration": iteration, "validation_loss": loss, "jump_rate": rate}
                for iteration, loss, rate in rows
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Run(History):
    """A training run. A run from a summary has only the last profile."""

    file: str
    folder: Path
    """The folder of the run's files."""
    name: str
    final_state: State | None
    """The logged state, one of :data:`STATES`; None if the logs do not name it."""
    versions: dict[str, str]

    def by_layer(self, what: str) -> dict[int, float | None]:
        """``displacement`` by layer; ``jump_rate`` or ``validation_loss`` by step."""
        if what == "displacement":
            return {layer: x if isfinite(x) else None for layer, x in enumerate(self.displacement, start=1)}
        values = vars(self).get(what)
        return dict(zip(self.iterations, values, strict=True)) if values else {}


@dataclass(frozen=True)
class Inputs:
    """All inputs, in the order of the command line."""

    measured: list[Measured] = field(default_factory=list)
    evaluated: list[Evaluated] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
