"""Settings of LET."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.settings import Settings, is_finite, is_integer, setting

if TYPE_CHECKING:
    from jreg_megatron.stream.method import Method, Place

_ONE_TEXT = "the teacher would see several documents as one text"


@dataclass(frozen=True, kw_only=True)
class LETConfig(Settings):
    """Settings of LET (arXiv 2602.05393, *Late-to-Early Training*).

    In training iteration s the loss is ``L_NLL + coeff(s) * L_proj``. ``L_proj`` is the mean over tokens of
    ``-cos(h, t)``: ``h`` is the output of layer ``layer``, and ``t`` is the teacher's last state of the same
    token, linearly interpolated to the width of ``h``. ``coeff(s)`` is
    ``coeff * max(0, (stop_iterations - s) / stop_iterations)``. ``jreg_megatron/methods/README.md`` says what
    is published. The last state is the one after the teacher's final norm.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "LET"
    prefix: ClassVar[str] = "let"
    title: ClassVar[str] = "LET, late-to-early training"
    about: ClassVar[str] = (
        "an early layer learns from the last state of a small trained model (arXiv 2602.05393). It needs "
        "--let-teacher and --let-stop-iterations."
    )

    refused: ClassVar[Mapping[str, str]] = {
        "reset_attention_mask": _ONE_TEXT,
        "reset_position_ids": _ONE_TEXT,
        "dataloader_inter_document_masking": _ONE_TEXT,
        "cuda_graph_impl": "no run of both has been compared",
    }

    teacher: str | None = setting(
        None,
        "the teacher: a folder with a Hugging Face causal language model. It must have the tokenizer of "
        "this training. jreg-megatron export makes such a folder from a Megatron checkpoint.",
        metavar="FOLDER",
        required=True,
    )
    coeff: float = setting(0.1, "the coefficient at the start, >= 0. At 0 nothing changes.", float, "LAMBDA")
    layer: int | None = setting(
        None,
        "the layer that learns from the teacher, 1-based; on the first pipeline stage. Without it: layer "
        "L // 3, at least 1.",
        int,
        "K",
    )
    stop_iterations: int | None = setting(
        None,
        "the iteration in which the coefficient reaches 0, in a straight line. We suggest half of the "
        "training.",
        int,
        "N",
        required=True,
    )
    tokens: str = setting(
        "all",
        "the tokens that count: 'all', or 'unmasked', as in --jreg-tokens.",
        metavar="WHICH",
    )

    def __post_init__(self) -> None:
        what = "the folder of a Hugging Face model"
        self.require(
            "teacher", self.teacher, isinstance(self.teacher, str | Path) and self.teacher != "", what
        )
        object.__setattr__(self, "teacher", str(self.teacher))
        coeff, layer, stop = self.coeff, self.layer, self.stop_iterations
        self.require("coeff", coeff, is_finite(coeff) and coeff >= 0, "a finite number >= 0")
        allowed = layer is None or (is_integer(layer) and layer >= 1)
        self.require("layer", layer, allowed, "a layer's number, 1-based, or left out")
        allowed = is_integer(stop) and stop >= 1  # type: ignore[operator]
        self.require("stop_iterations", stop, allowed, "a whole number >= 1, such as half of the training's")
        self.require("tokens", self.tokens, self.tokens in ("all", "unmasked"), "'all' or 'unmasked'")

    @property
    def layer_rule(self) -> None:
        """None: it uses the layers of the other methods."""

    @property
    def has_schedule(self) -> bool:
        """True: the coefficient depends on the iteration."""
        return True

    def coeff_at(self, iteration: int) -> float:
        """The coefficient in training iteration ``iteration``, 1-based; >= 0."""
        assert self.stop_iterations is not None
        return self.coeff * max(0, self.stop_iterations - iteration) / self.stop_iterations

    def measures_at(self, iteration: int) -> bool:
        """Whether the teacher runs in training iteration ``iteration``, 1-based."""
        return self.coeff_at(iteration) > 0

    def layer_of(self, num_layers: int) -> int:
        """The layer that learns from the teacher, 1-based, in a model of ``num_layers`` layers."""
        return max(1, num_layers // 3) if self.layer is None else self.layer

    def refuse(self, model_config: Any) -> None:
        """Refuse by name what is not supported. With Megatron's parsed arguments also refuse a teacher that
        cannot be loaded or has another tokenizer, if the run needs it."""
        super().refuse(model_config)
        if getattr(model_config, "tokenizer_type", None) and self._is_needed(model_config):
            from jreg_megatron.methods.let import teacher, tokens

            teacher.check(str(self.teacher), getattr(model_config, "seq_length", None))
            tokens.refuse_other_tokens(str(self.teacher), model_config)

    def _is_needed(self, args: Any) -> bool:
        """Whether a run with these arguments of Megatron trains before the coefficient is 0."""
        load, done = getattr(args, "load", None), getattr(args, "ckpt_step", None)
        if load is None or getattr(args, "finetune", False):
            done = 0
        elif done is None:
            with suppress(OSError, ValueError):
                done = int((Path(load) / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
        return not getattr(args, "skip_train", False) and self.measures_at(1 + (done or 0))

    def refuse_layers(self, num_layers: int) -> None:
        """Refuse a layer that the model does not have."""
        if (number := self.layer_of(num_layers)) > num_layers:
            raise UserError(
                f"{self.flag('layer')} is {number}, and the model has {num_layers} layers; give one of 1 to "
                f"{num_layers}"
            )

    def make(self, place: Place) -> Method:
        """LET on a built model."""
        from jreg_megatron.methods.let.let import LET

        return LET(self, place)
