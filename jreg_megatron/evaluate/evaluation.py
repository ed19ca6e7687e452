"""All that is found out about a model, and about what two of them differ in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.evaluate import layers, paired
from jreg_megatron.evaluate.layers import Options, PerText
from jreg_megatron.evaluate.lens import fit_lens
from jreg_megatron.evaluate.paired import Difference
from jreg_megatron.evaluate.scoring import read_out_error
from jreg_megatron.evaluate.tasks import TaskResult, run_tasks
from jreg_megatron.paper import TASKS, WITHOUT_BOOLQ, missing_tasks, task_means
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import note


@dataclass(frozen=True)
class Evaluation:
    """Of one model; a part that was not asked for, or not finished, is None."""

    name: str
    source: str
    kind: str
    revision: str | None
    step: int | None
    num_layers: int
    dtype: str
    device: str
    tasks: dict[str, TaskResult] | None = None
    read_out: PerText | None = None
    """Its C readings are layers 0..L."""
    layer_drop: PerText | None = None
    """Its C readings are without layer 1..L, then the whole model."""
    lens: PerText | None = None
    """Its C readings are layers 0..L through the fitted lens."""
    lens_tokens: int = 0
    """How many tokens the lens was fitted on."""

    @property
    def at(self) -> str:
        """The name, with the revision or step if there is one."""
        which = self.step if self.revision is None else self.revision
        return self.name if which is None else f"{self.name}@{which}"


@dataclass(frozen=True)
class Comparison:
    """Of the second model to the first; a part that cannot be compared is None, and a note says why."""

    models: tuple[str, str]
    tasks: dict[str, Difference]
    overall: Difference | None
    overall_tasks: list[str]
    """Those whose mean :attr:`overall` is: the paper's nine if all are there, else all that are a share."""
    without_boolq: Difference | None
    """Of the mean of the paper's nine without BoolQ; None unless all nine are there."""
    read_out: list[Difference] | None
    """Of the loss behind layer 0..L."""
    lens: list[Difference] | None
    """The same through the lens."""
    notes: list[str]


def evaluate(
    decoder: Decoder,
    parts: Iterable[str],
    *,
    tasks: Mapping[str, Any],
    limit: int | None,
    texts: Iterable[Text],
    options: Options,
    lens_texts: Iterable[Text] = (),
) -> Iterator[Evaluation]:
    """Evaluate a model; yields what is known so far after each part, so that no later part can lose it.

    Args:
        decoder: the model.
        parts: of ``tasks``, ``read-out``, ``layer-drop`` and ``lens``.
        tasks: of :func:`jreg_megatron.evaluate.tasks.load_tasks`.
        limit: samples of each task; None for all.
        texts: for the parts about layers; read once more for each part.
        options: how they are run.
        lens_texts: for the fit of the lens; others than ``texts``.

    Raises:
        UserError: if a part cannot be done with this model; before anything is run where that can be seen.
    """
    parts = set(parts)
    if (error := read_out_error(decoder)) is not None:
        if parts <= {"read-out", "lens"}:
            raise UserError(error)
        if left_out := sorted(parts & {"read-out", "lens"}):
            note(f"{error}; {' and '.join(left_out)} are left out")
        parts, decoder = parts - {"read-out", "lens"}, replace(decoder, head=None)
    if parts - {"tasks"}:
        layers.check_texts(decoder, texts, options)
    if "lens" in parts and (both := _contents(texts) & _contents(lens_texts)):
        raise UserError(f"--lens names {len(both)} of the texts that the lens is tested on; give others")
    found = Evaluation(
        name=decoder.name,
        source=decoder.source,
        kind=decoder.kind,
        revision=decoder.revision,
        step=decoder.step,
        num_layers=decoder.num_layers,
        dtype=str(decoder.dtype).removeprefix("torch."),
        device=str(decoder.device),
    )
    if "tasks" in parts:
        results = run_tasks(tasks, decoder, batch_size=options.batch_size, limit=limit, quiet=options.quiet)
        yield (found := replace(found, tasks=results))
    if "read-out" in parts:
        yield (found := replace(found, read_out=layers.read_out(decoder, texts, options)))
    if "lens" in parts:
        lens = fit_lens(decoder, lens_texts, options)
        through = layers.read_out(decoder, texts, options, lens)
        yield (found := replace(found, lens=through, lens_tokens=lens.tokens))
    if "layer-drop" in parts:
        yield replace(found, layer_drop=layers.layer_drop(decoder, texts, options))


def _contents(texts: Iterable[Text]) -> set[int]:
    return {hash(c if isinstance(c, str) else np.asarray(c).tobytes()) for c in (t.content for t in texts)}


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """What ``b`` differs from ``a`` in, on the samples and texts that both have seen."""
    notes: list[str] = []
    of_tasks: dict[str, Difference] = {}
    shares = {}
    results = zip_tasks(a.tasks or {}, b.tasks or {})
    for name, first, second in results:
        assert first.samples == second.samples
        of_tasks[name] = paired.compare(first.amounts, second.amounts, first.weights)
        if paired.is_share(first.amounts, first.weights) and first.higher_is_better:
            shares[name] = (first.amounts, second.amounts)
    has_all = not missing_tasks(shares)
    averaged = [name for name in shares if not has_all or name in TASKS]
    if few := [name for name, found in of_tasks.items() if found.p_value is None]:
        notes.append(_too_few("samples", ", ".join(few)))
    return Comparison(
        models=(a.name, b.name) if a.name != b.name else (a.at, b.at),
        tasks=of_tasks,
        overall=paired.compare_mean([shares[name] for name in averaged]) if averaged else None,
        overall_tasks=averaged,
        without_boolq=paired.compare_mean([shares[name] for name in WITHOUT_BOOLQ]) if has_all else None,
        read_out=_compare_layers(a, b, a.read_out, b.read_out, "Read-out", notes),
        lens=_compare_layers(a, b, a.lens, b.lens, "Lens", notes),
        notes=notes,
    )


def zip_tasks(
    a: Mapping[str, TaskResult], b: Mapping[str, TaskResult]
) -> Iterator[tuple[str, TaskResult, TaskResult]]:
    """Name and both results of every task that both models have run."""
    for name in a:
        if name in b:
            yield name, a[name], b[name]


def _compare_layers(
    a: Evaluation, b: Evaluation, first: PerText | None, second: PerText | None, what: str, notes: list[str]
) -> list[Difference] | None:
    if first is None or second is None:
        if first or second:
            notes.append(f"{what} is not compared: {(b if first else a).at} has none.")
        return None
    if a.num_layers != b.num_layers:
        notes.append(f"{what} is not compared: {a.at} has {a.num_layers} layers, {b.at} has {b.num_layers}.")
        return None
    if first.ids != second.ids:
        notes.append(
            f"{what} is not compared: the models cut the texts differently (another tokenizer or another "
            "longest sequence), so a loss per token is not the same thing; the task speeches_bits_per_byte "
            "compares the whole models."
        )
        return None
    if len(first.tokens) < paired.FEWEST:
        notes.append(_too_few("texts", f"the {what.lower()} ({len(first.tokens)})"))
        return None
    return [
        paired.compare(first.loss[:, layer], second.loss[:, layer], first.tokens)
        for layer in range(a.num_layers + 1)
    ]


def _too_few(what: str, where: str) -> str:
    return f"Too few {what} for an interval or a test (fewer than {paired.FEWEST}): {where}."


def document(evaluations: list[Evaluation], comparison: Comparison | None, text: str) -> dict[str, Any]:
    """All of it for JSON, without the name of the format; ``text`` says what was read."""
    return {
        "models": [_model(evaluation, text) for evaluation in evaluations],
        "comparison": None if comparison is None else _comparison(comparison),
    }


def _model(e: Evaluation, text: str) -> dict[str, Any]:
    names = ("name", "source", "kind", "revision", "step", "num_layers", "dtype", "device")
    found: dict[str, Any] = {name: getattr(e, name) for name in names}
    found["tasks"] = {
        name: {
            "metric": task.metric,
            "value": task.value,
            "interval": paired.interval(task.amounts, task.weights),
            "samples": len(task.samples),
            "higher_is_better": task.higher_is_better,
            "chance": task.chance,
            "other_metrics": task.others,
        }
        for name, task in (e.tasks or {}).items()
    }
    found["paper_means"] = task_means({name: task.value for name, task in (e.tasks or {}).items()})
    found["read_out"] = e.read_out and _by_layer(e.read_out, text)
    found["lens"] = e.lens and _by_layer(e.lens, text) | {"fit_tokens": e.lens_tokens}
    if e.layer_drop is None:
        return found | {"layer_drop": None}
    *loss, unchanged = e.layer_drop.mean(e.layer_drop.loss)
    return found | {"layer_drop": {"loss": loss, "unchanged": unchanged}}


def _by_layer(found: PerText, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "texts": len(found.names),
        "tokens": int(found.tokens.sum()),
        "loss": found.mean(found.loss),
        "accuracy": found.mean(found.correct),
        "agreement": found.mean(found.agreed),
    }


def _columns(differences: list[Difference] | None) -> dict[str, Any] | None:
    if differences is None:
        return None
    rows = _adjusted(differences)
    keys = ("difference", "interval", "p_value", "p_adjusted")
    return {key: [row[key] for row in rows] for key in keys} | {"texts": differences[0].samples}


def _comparison(c: Comparison) -> dict[str, Any]:
    of_tasks = _adjusted(list(c.tasks.values()))
    return {
        "models": c.models,
        "confidence": paired.CONFIDENCE,
        "tasks": dict(zip(c.tasks, of_tasks, strict=True)),
        "overall": c.overall and _difference(c.overall) | {"tasks": c.overall_tasks},
        "without_boolq": c.without_boolq and _difference(c.without_boolq),
        "read_out": _columns(c.read_out),
        "lens": _columns(c.lens),
        "notes": c.notes,
    }


def _adjusted(differences: list[Difference]) -> list[dict[str, Any]]:
    """Differences for JSON, with the p-values adjusted for there being several."""
    tested = [found.p_value for found in differences if found.p_value is not None]
    corrected = iter(paired.adjusted(tested))
    return [
        _difference(found) | {"p_adjusted": None if found.p_value is None else next(corrected)}
        for found in differences
    ]


def _difference(found: Difference) -> dict[str, Any]:
    row = asdict(found)
    return {"difference": row.pop("value"), **row}
