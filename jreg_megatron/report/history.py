"""The validations of a run, read from its TensorBoard files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jreg_megatron.methods.jreg.regularizer import RATE_NAME, displacement_name
from jreg_megatron.runtime.errors import UserError

_VALIDATION = " validation"
_LOSS = "lm loss" + _VALIDATION
_LAYER = re.compile(re.escape(displacement_name(1, 1)).replace("01", r"\d+") + _VALIDATION)
_SETTING = "/text_summary"


@dataclass(frozen=True)
class History:
    """Validation over a run's training."""

    iterations: list[int]
    """Iterations of the validations, rising."""
    validation_loss: list[float]
    """Cross-entropy in nats per token, one for each of :attr:`iterations`; not finite after a divergence."""
    jump_rate: list[float]
    """zeta_L, one for each of :attr:`iterations`, in hundredths of displacement."""
    profiles: list[list[float]]
    """Displacement of layers 1..L, each in [0, 1], one list for each of :attr:`iterations`; the lists are
    empty without ``--jreg-log-per-layer``."""
    settings: dict[str, str]
    """Megatron's last arguments as text, with ``jreg_coeff`` and the like."""

    @property
    def displacement(self) -> list[float]:
        """Per layer 1..L at the end."""
        return self.profiles[-1]

    def summary(self) -> dict[str, Any]:
        """The run's part of a ``summary.json``: the last values and the two curves."""
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

    @classmethod
    def read(cls, folder: Path) -> History:
        """Read all TensorBoard files of a run, also of one that was resumed.

        Raises:
            UserError: if there are none, or they hold no validation with JREG's measurements.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is not there; train with --tensorboard-dir")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()

        def history(tag: str) -> dict[int, float]:
            # Megatron evaluates once more after the last iteration; the later value counts.
            return {event.step: event.value for event in events.Scalars(tag)}

        if not any(tags[kind] for kind in ("scalars", "tensors")):
            raise UserError(f"{folder} holds no events; its files are empty or damaged, name another folder")
        missing = {_LOSS, RATE_NAME + _VALIDATION}.difference(tags["scalars"])
        if missing:
            raise UserError(
                f"{folder} holds no '{min(missing)}'; train with JREG's flags and validation data"
            )
        loss, rate = history(_LOSS), history(RATE_NAME + _VALIDATION)
        # Numbers are padded to one length, so names sort like layers.
        layers = [history(tag) for tag in sorted(filter(_LAYER.fullmatch, tags["scalars"]))]
        # A killed run may have written a part of a validation, which does not count.
        iterations = sorted(set(loss).intersection(rate, *layers))
        if not iterations:
            raise UserError(f"{folder} holds no whole validation; continue the run")
        texts = [tag for tag in tags["tensors"] if tag.endswith(_SETTING)]
        return cls(
            iterations=iterations,
            validation_loss=[loss[iteration] for iteration in iterations],
            jump_rate=[rate[iteration] for iteration in iterations],
            profiles=[[layer[iteration] for layer in layers] for iteration in iterations],
            settings={
                tag.removesuffix(_SETTING): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
                for tag in texts
            },
        )
