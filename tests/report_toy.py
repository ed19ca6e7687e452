"""Small inputs for the report: files of its formats with plausible numbers, and TensorBoard files."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

HEADLINE = "The last state of each model"
PER_LAYER = "Displacement Ψ of each layer"
LAYERS = 30
STEPS = (100, 200, 300, 400, 500, 600, 700, 800)
MODELS = ("baseline", "jreg")
VERSIONS = {"jreg_megatron": "0.1.0", "torch": "2.13.0"}
TASKS = {"arc_easy": 0.52, "boolq": 0.61, "hellaswag": 0.41, "piqa": 0.68}


def psi(model: int, done: float, layers: int = LAYERS) -> list[float]:
    """Displacement before the final norm: the first layer turns far, and in even models a jump grows."""
    middle = [0.006 + 0.03 * math.exp(-((layer / 8) ** 2)) + 1e-4 * model for layer in range(2, layers)]
    jump = 0.09 * done if model % 2 == 0 else 0.002
    return [0.25, *middle, middle[-1] + jump] if layers > 1 else [0.25]


def measurement(
    names: Sequence[str] = MODELS,
    steps: Sequence[int | None] = (None,),
    layers: int = LAYERS,
    source: str = "runs/{}/checkpoints",
    without_norm: Sequence[str] = (),
) -> dict[str, Any]:
    """A file of ``measure --json``; some of its models have no final norm."""
    return {
        "format": "jreg_megatron measurement",
        "version": 1,
        "text": {"source": "speeches 1862-Lincoln-1", "max_tokens": 512},
        "versions": VERSIONS,
        "models": [
            {
                **_origin(name, source, layers, step),
                **{"hidden_size": 576, "dtype": "float32", "device": "cpu", "texts": 3, "tokens": 1536},
                "settings": {
                    "jreg_coeff": "0.1" if model % 2 else "0.0",
                    "jreg_alpha": "3.0",
                    "lr": "0.0006",
                },
                "first_token": "dropped",
                **_block(dropped := psi(model, (place + 1) / len(steps), layers), name in without_norm),
                "without_first_token": _block(dropped, name in without_norm),
                "with_first_token": _block([1.1 * value for value in dropped], name in without_norm),
            }
            for model, name in enumerate(names)
            for place, step in enumerate(steps)
        ],
    }


def _block(before: list[float], without_norm: bool) -> dict[str, Any]:
    after = [*before[:-1], min(1.0, 4.8 * before[-1])]
    states = {"pre_norm": before} | ({} if without_norm else {"post_norm": after})

    def both(function: Any) -> dict[str, Any]:
        return {state: function(values) for state, values in states.items()}

    return {
        "displacement": states,
        "displacement_std": both(lambda v: [value / 3 for value in v]),
        "jump_rate": both(lambda v: 100 * max(0.0, v[-1] - v[-2]) if len(v) > 1 else None),
        "jump_rate_from": both(lambda v: [None, *(100 * max(0.0, v[-1] - v[-2]) for _ in v[1:])]),
        "block_influence": both(lambda v: [2 * value for value in v]),
        "angular_distance": both(lambda v: [math.acos(1 - 2 * value) / math.pi for value in v]),
        "norm": both(lambda v: [1.0 + layer for layer in range(len(v) + 1)]),
    }


def _origin(name: str, source: str, layers: int, step: int | None = None) -> dict[str, Any]:
    place = source.replace("{}", name)
    return {
        "name": name,
        "source": place,
        "kind": "megatron",
        "revision": None,
        "step": step,
        "num_layers": layers,
    }


def evaluation(
    names: Sequence[str] = MODELS, layers: int = LAYERS, source: str = "runs/{}/checkpoints"
) -> dict[str, Any]:
    """A file of ``evaluate --json``; two models are compared."""
    models = []
    for model, name in enumerate(names):
        scores = {task: value + 0.01 * model for task, value in TASKS.items()}
        models.append(
            {
                **_origin(name, source, layers),
                "tasks": {
                    task: {
                        **{"metric": "acc", "value": value, "interval": [value - 0.02, value + 0.02]},
                        **{"samples": 2376, "higher_is_better": True},
                    }
                    for task, value in scores.items()
                },
                "read_out": {
                    **{"text": "held-out speeches", "tokens": 20000},
                    "loss": [11 - 8 * (at / layers) ** (1.6 - 0.4 * (model % 2)) for at in range(layers + 1)],
                    "accuracy": [0.45 * (at / layers) ** 1.5 for at in range(layers + 1)],
                    "agreement": [(at / layers) ** 2 for at in range(layers + 1)],
                },
                "lens": {
                    **{"text": "held-out speeches", "tokens": 20000, "fit_tokens": 90000},
                    "loss": [7 - 4 * (at / layers) ** (1.2 - 0.1 * (model % 2)) for at in range(layers + 1)],
                },
                "layer_drop": {
                    "loss": [3.0 + (2.5 if at == 1 else 0.02 + 0.001 * at) for at in range(1, layers + 1)],
                    "unchanged": 3.0,
                },
                "depth": {"tokens": 20000, "kl": [5.0 * (1 - at / layers) for at in range(layers + 1)]},
            }
        )
    differences = [-0.02 * at * (layers - at) / layers for at in range(layers + 1)]
    comparison = {
        "models": list(names),
        "confidence": 0.95,
        "tasks": {
            task: {"difference": 0.01, "interval": [-0.002, 0.022], "p_value": 0.08, "samples": 2376}
            for task in TASKS
        },
        "overall": {"difference": 0.011, "interval": [0.004, 0.018], "p_value": 0.0004},
        "read_out": {
            "difference": differences,
            "interval": [[value - 0.03, value + 0.03] for value in differences],
            "p_value": [0.04] * (layers + 1),
        },
    }
    return {
        "format": "jreg_megatron evaluation",
        "version": 1,
        "versions": VERSIONS,
        "models": models,
        "comparison": comparison if len(names) == 2 else None,
    }


def summary(names: Sequence[str] = MODELS) -> dict[str, Any]:
    """A file of the demo."""
    runs = {
        name: {
            **({"coeff": 0.1, "alpha": 3.0} if model % 2 else {}),
            **{"validation_loss": 5.5, "jump_rate": 0.6, "displacement": psi(model, 1, 8)},
            "history": [
                {
                    "iteration": step,
                    "validation_loss": 9 - 3.5 * (step / 800) ** 0.5,
                    "jump_rate": step / 1000,
                }
                for step in STEPS
            ],
        }
        for model, name in enumerate(names)
    }
    return {
        "runs": runs,
        **{"layout": {"tensor": 2}, "final_state": "pre_norm", "iterations": 800, "seed": 1},
        "versions": VERSIONS,
    }


def write(path: Path, document: Any) -> Path:
    """Write a document as JSON."""
    path.write_text(json.dumps(document))
    return path


BITS_PER_BYTE = {"metric": "bits_per_byte", "higher_is_better": False, "chance": None}


def evaluation_of(source: Path | str, step: int, scores: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    """A file of ``evaluate --json`` for one model of eight layers; ``scores`` are by task."""
    usual = {"metric": "acc", "interval": None, "samples": 72, "higher_is_better": True, "chance": 0.25}
    model = {"name": "model", "source": str(source), "kind": "megatron", "revision": None, "step": step}
    model |= {"num_layers": 8, "tasks": {task: usual | score for task, score in scores.items()}}
    head = {"format": "jreg_megatron evaluation", "version": 1, "versions": {}, "comparison": None}
    return head | {"models": [model | parts]}


def write_events(
    folder: Path,
    losses: Mapping[int, float],
    layers: int = 4,
    settings: Mapping[str, str] | None = None,
    displacement: Sequence[float] | Mapping[int, Sequence[float]] | None = None,
    jump_rate: float | None = None,
    more: Mapping[str, Mapping[int, float]] | None = None,
) -> Path:
    """TensorBoard files such as Megatron's: a validation loss, displacement and ``more``, by iteration."""
    writer = EventFileWriter(str(folder))

    def add(step: int, **value: Any) -> None:
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(**value)]))
        writer.add_event(event)

    usual = {"jreg_coeff": "0.1", "jreg_alpha": "3.0", "jreg_final_state": "pre_norm"}
    for name, text in (usual | dict(settings or {})).items():
        if not text:  # not logged
            continue
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        add(0, tag=f"{name}/text_summary", tensor=tensor, metadata=plugin)
    for step, loss in losses.items():
        add(step, tag="lm loss validation", simple_value=loss)
        add(step, tag="jump rate validation", simple_value=step / 1000 if jump_rate is None else jump_rate)
        profile = displacement[step] if isinstance(displacement, Mapping) else displacement
        for layer, value in enumerate(profile or psi(0, 1, layers), start=1):
            add(step, tag=f"jreg/displacement_layer_{layer:02d} validation", simple_value=value)
    for tag, values in (more or {}).items():
        for step, value in values.items():
            add(step, tag=tag, simple_value=value)
    writer.close()
    return folder


class Page(HTMLParser):
    """A page's sections, its tables by their caption, and all of its text outside of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.figures: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._at, self._caption = "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("section", "figure"):
            (self.sections if tag == "section" else self.figures).append(found["id"] or "")
        elif tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        self._at = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.tables[self._caption] = self._rows
        self._at = ""

    def handle_data(self, data: str) -> None:
        if self._at in ("td", "th"):
            self._rows[-1][-1] += data
        elif self._at == "caption":
            self._caption += data

    def table(self, caption: str) -> list[list[str]]:
        """The only table whose caption begins with this text."""
        (found,) = (rows for whole, rows in self.tables.items() if whole.startswith(caption))
        return found

    def column(self, caption: str, name: str) -> list[str]:
        """A column's cells, from top to bottom."""
        head, *rows = self.table(caption)
        return [row[head.index(name)] for row in rows]


def page_of(*words: object) -> Page:
    """Run the command in the current folder; returns the page."""
    from jreg_megatron.report.__main__ import main

    with patch.object(sys, "argv", ["jreg-megatron report", *map(str, words)]):
        main()
    return Page(Path("report.html"))


def refusal(report: Callable[..., Page], capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The single line with which the command refuses its input."""
    with pytest.raises(SystemExit) as stop:
        report(*words)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("jreg_megatron: error: ")
    return printed.err
