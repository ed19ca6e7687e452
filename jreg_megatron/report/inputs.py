"""The inputs of a report; measurements and evaluations are the schemas of their JSON files."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
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

from jreg_megatron.report.check import NULL_IS_EMPTY, Name, Text, Texts, number, refuse
from jreg_megatron.report.history import History

State = Literal["pre_norm", "post_norm"]
STATES: tuple[State, State] = ("pre_norm", "post_norm")
"""The state that counts as the last layer's output: before or after the final norm, if there is one."""
STATE_WORDS: dict[str | None, str] = {
    "pre_norm": "before the final norm",
    "post_norm": "after the final norm",
    None: "before or after the final norm (the logs do not say)",
}
FIRST_TOKEN = {"kept": "with_first_token", "dropped": "without_first_token"}
"""Whether the first token of a text counts, and the block of a measurement for it."""
_VERSION = 1


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise refuse("the lower end before the upper end", value=list(ends))
    return ends


def _depth(layers: int, about: ValidationInfo[Any]) -> int:
    about.context["layers"] = layers
    return layers


def _per_layer(more: int = 0) -> AfterValidator:
    """For a list with one entry per layer of the model, and ``more``."""

    def check(values: list[Any], about: ValidationInfo[Any]) -> list[Any]:
        if len(values) != (length := about.context["layers"] + more):
            raise refuse(f"a list of {length} numbers")
        return values

    return AfterValidator(check)


def _version(found: Any) -> Any:
    if isinstance(found, bool) or found != _VERSION:
        raise refuse(f"{_VERSION}; for a newer file install a newer jreg_megatron")
    return found


Number = Annotated[float, number()]
Share = Annotated[float, number(0, 1)]
Rate = Annotated[float, number(0, 100)]
"""zeta in hundredths of displacement."""
Loss = Annotated[float, number(0)]
"""In nats per token."""
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**53)]
Interval = Annotated[tuple[Number, Number], AfterValidator(_rising)]
_Size = Annotated[float, number(-1e-6)]
_Sizes = Annotated[list[_Size], _per_layer()]


class Part(BaseModel):
    """A part of a JSON file. Other fields are ignored."""

    model_config = ConfigDict(frozen=True)


class Origin(Part):
    """The source of a model's numbers."""

    file: str
    """The printable name of the file."""
    versions: Texts
    """Of the whole file."""
    name: Text
    source: Text
    kind: Literal["hugging_face", "gguf", "megatron"]
    revision: Text | None = None
    step: Whole | None = None
    """Training iteration of the checkpoint, if known."""
    num_layers: Annotated[Count, AfterValidator(_depth)]

    @property
    def origin(self) -> Origin:
        """This, without the numbers."""
        return self


class Block(Part):
    """A measurement over one set of tokens, by state."""

    displacement: dict[State, Annotated[list[Share], _per_layer()]]
    """Psi_l of layers 1..L, mean over tokens, each in [0, 1]."""
    displacement_std: dict[State, Annotated[list[Share], _per_layer()]] | None = None
    """Standard deviation of Psi_l over tokens."""
    jump_rate: dict[State, Rate | None]
    """zeta_L; None for one layer."""
    # Not shown, but checked: a list of another length shows that the file is wrong.
    angular_distance: dict[str, _Sizes] | None = None
    block_influence: dict[str, _Sizes] | None = None
    norm: dict[str, Annotated[list[_Size], _per_layer(1)]] | None = None


class Measured(Block, Origin):
    """One model of a measurement. The numbers outside of blocks belong to ``first_token``."""

    text: Texts
    """Of the whole file."""
    texts: Count | None = None
    tokens: Count | None = None
    hidden_size: Count | None = None
    dtype: Text | None = None
    device: Text | None = None
    settings: Texts = {}
    first_token: Literal["kept", "dropped"]
    with_first_token: Block | None = None
    without_first_token: Block | None = None

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """By keys of :data:`FIRST_TOKEN`."""
        others = {name: getattr(self, key) for name, key in FIRST_TOKEN.items() if name != self.first_token}
        return {self.first_token: self} | {name: block for name, block in others.items() if block}

    @model_validator(mode="after")
    def _has_all_states(self) -> Self:
        for name, block in self.blocks.items():
            at = () if block is self else (FIRST_TOKEN[name],)
            for key in ("displacement", "displacement_std", "jump_rate"):
                found = getattr(block, key)
                for state in self.states if found is not None else ():
                    if found.get(state) is None and (key != "jump_rate" or self.num_layers > 1):
                        raise refuse("there", *at, key, state, value=None)
        return self

    @property
    def states(self) -> tuple[State, ...]:
        """Those of :data:`STATES` with numbers."""
        has_norm = "post_norm" in {*self.displacement, *self.jump_rate}
        return STATES if has_norm else STATES[:1]

    @property
    def how(self) -> dict[str, str]:
        """How it was measured: text, tokens, dtype and so on."""
        found = {f"text {name}": "none" if value == "null" else value for name, value in self.text.items()}
        for name in ("texts", "tokens", "hidden_size", "dtype", "device"):
            if (value := getattr(self, name)) is not None:
                found[name] = value if isinstance(value, str) else f"{value:,}"
        return {name.replace("_", " "): value for name, value in found.items()}

    @property
    def conditions(self) -> dict[str, str]:
        """What must be equal in two measurements of one series."""
        how = self.how.items()
        text = {name: value for name, value in how if name == "dtype" or name.startswith("text ")}
        return {"first token": self.first_token} | text

    def first_for(self, wanted: str) -> str:
        """``wanted``, a key of :data:`FIRST_TOKEN`, or the other key if only that was measured."""
        return wanted if wanted in self.blocks else self.first_token

    def block(self, wanted: str) -> Block:
        """The numbers for :meth:`first_for` ``wanted``."""
        return self.blocks[self.first_for(wanted)]


class Score(Part):
    """A model's result in a task."""

    metric: Text
    value: Number
    interval: Interval | None = None
    samples: Count | None = None
    higher_is_better: StrictBool | None = None
    chance: Number | None = None
    """The score of a guess."""


class ReadOut(Part):
    """Predictions behind layers 0..L, read out through the final norm and the head."""

    text: Text | None = None
    tokens: Whole | None = None
    """Number of predicted tokens."""
    loss: Annotated[list[Loss], _per_layer(1)] | None = None
    accuracy: Annotated[list[Share], _per_layer(1)] | None = None
    """Share of tokens predicted right."""
    agreement: Annotated[list[Share], _per_layer(1)] | None = None
    """Share of tokens predicted as the whole model predicts them."""


class LayerDrop(Part):
    """Cross-entropy without one layer."""

    loss: Annotated[list[Loss], _per_layer()]
    """Without layer l, for l in 1..L."""
    unchanged: Loss
    """With all layers."""


class Evaluated(Origin):
    """One model of an evaluation."""

    limit: Loss | None = None
    """Samples per task. This and the next belong to the whole file."""
    max_tokens: Loss | None = None
    tasks: Annotated[dict[Name, Score], NULL_IS_EMPTY] = {}
    read_out: ReadOut | None = None
    lens: ReadOut | None = None
    """The same through the fitted lens."""
    layer_drop: LayerDrop | None = None

    @property
    def how(self) -> dict[str, str]:
        """How it was evaluated: text, limit and so on."""
        text = self.read_out.text if self.read_out else None
        tokens = self.read_out.tokens if self.read_out else None
        found = {} if text is None else {"read-out text": text}
        found |= {} if tokens is None else {"read-out tokens": f"{tokens:,}"}
        for name, value in {"limit": self.limit, "max_tokens": self.max_tokens}.items():
            if name in self.model_fields_set:
                found[name.replace("_", " ")] = "none" if value is None else f"{value:,.10g}"
        return found


class Difference(Part):
    """The second model minus the first."""

    difference: Number
    interval: Interval | None = None
    p_value: Share | None = None
    p_adjusted: Share | None = None
    """The p value, corrected for several tests."""
    samples: Count | None = None
    tasks: list[Any] | None = None
    """The tasks of the mean, if known."""


class DifferenceByLayer(Part):
    """The same behind layers 0..L."""

    difference: list[Number]
    interval: list[Interval | None] | None = None
    p_value: list[Share | None] | None = None
    p_adjusted: list[Share | None] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for key in ("interval", "p_value", "p_adjusted"):
            values, length = getattr(self, key), len(self.difference)
            if values is not None and len(values) != length:
                raise refuse(f"a list of {length} numbers", key, value=values)
        return self


class Comparison(Part):
    """A paired comparison of two models of one evaluation."""

    file: str
    models: tuple[Text, Text]
    """Names; each difference is the second model minus the first."""
    confidence: Share
    """Of the intervals, in (0, 1)."""
    tasks: Annotated[dict[Name, Difference], NULL_IS_EMPTY] = {}
    overall: Difference | None = None
    """Mean over tasks."""
    without_boolq: Difference | None = None
    """Mean over the paper's nine tasks without BoolQ, if all nine were run."""
    read_out: DifferenceByLayer | None = None
    """Of the loss."""
    notes: list[Text] | None = None
    """Comparisons that are missing, and why."""


class _File(Part):
    version: Annotated[int, BeforeValidator(_version)]
    versions: Texts = {}

    @model_validator(mode="before")
    @classmethod
    def _said_once(cls, found: dict[str, Any], about: ValidationInfo[Any]) -> dict[str, Any]:
        """Copy the values of the whole file to each model."""
        common = {"versions": None, "text": None, "file": about.context["file"]}
        common |= {key: found[key] for key in ("versions", "text", "limit", "max_tokens") if key in found}

        def with_common(part: Any) -> Any:
            return part | common if isinstance(part, dict) else part

        models, compared = found.get("models"), with_common(found.get("comparison"))
        models = [with_common(model) for model in models] if isinstance(models, list) else models
        return found | ({} if models is None else {"models": models}) | {"comparison": compared}


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


@dataclass(frozen=True, kw_only=True)
class Run(History):
    """A training run; a summary has only the last profile."""

    file: str
    folder: Path
    """The folder of the run's files."""
    name: str
    final_state: str | None
    """One of :data:`STATES`; None if the run does not say which state it logged."""
    versions: dict[str, str]


@dataclass(frozen=True)
class Inputs:
    """All inputs, in order of the command line."""

    measured: list[Measured] = field(default_factory=list)
    evaluated: list[Evaluated] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
