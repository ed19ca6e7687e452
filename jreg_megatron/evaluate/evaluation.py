"""The evaluation of a model, and the comparison of two."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.reference import name_at
from jreg_megatron.evaluate import layers, paired
from jreg_megatron.evaluate.depth import depth
from jreg_megatron.evaluate.layers import PerText, read_out_error
from jreg_megatron.evaluate.tasks import TaskResult, run_tasks
from jreg_megatron.paper import TASKS, WITHOUT_BOOLQ, missing_tasks, task_means
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import note


@dataclass(frozen=True)
class Evaluation:
    """One model's results. A part that was not run, or is not finished, is None."""

    model: dict[str, Any]  # from Decoder.described
    tasks: dict[str, TaskResult] | None = None
    read_out: PerText | None = None  # its C readings are layers 0..L
    layer_drop: PerText | None = None  # its C readings are without layer 1..L, then the whole model
    lens: PerText | None = None  # its C readings are layers 0..L through the fitted lens
    lens_tokens: int = 0  # in the lens's fit
    depth: dict[str, Any] | None = None  # as depth() gives it

    @property
    def at(self) -> str:
        """The name, with the revision or step if there is one."""
        return name_at(self.model["name"], self.model["revision"], self.model["step"])


def evaluate(
    decoder: Decoder,
    args: Namespace,
    *,
    tasks: Mapping[str, Any],
    texts: Iterable[Text],
    lens_texts: Iterable[Text] = (),
) -> Iterator[Evaluation]:
    """Evaluate a model. Yield the results so far after each part, so that a later error does not lose them.

    Args:
        decoder: the model.
        args: the command's ``parts``, ``lens``, ``limit``, ``max_tokens``, ``batch_size`` and ``quiet``.
        tasks: from :func:`jreg_megatron.evaluate.tasks.load_tasks`.
        texts: for the parts about layers.
        lens_texts: for the fit of the lens; different from ``texts``.

    Raises:
        UserError: if this model cannot run a part; before any part runs, if possible.
    """
    parts = {*args.parts, *(["lens"] if args.lens is not None else [])}
    if (error := read_out_error(decoder)) is not None:
        if parts <= {"read-out", "lens"}:
            raise UserError(error)
        if left_out := sorted(parts & {"read-out", "lens"}):
            note(f"{error}; {' and '.join(left_out)} are left out")
        parts, decoder = parts - {"read-out", "lens"}, replace(decoder, head=None)
    if "lens" in parts and (both := _contents(texts) & _contents(lens_texts)):
        raise UserError(f"--lens has {len(both)} texts that are in the test too; give others")
    if parts - {"tasks"}:
        texts = layers.checked_texts(decoder, texts, args)
    found = Evaluation(decoder.described())
    if "tasks" in parts:
        yield (found := replace(found, tasks=run_tasks(tasks, decoder, args)))
    if "read-out" in parts:
        yield (found := replace(found, read_out=layers.read_out(decoder, texts, args)))
    if "lens" in parts:
        lens = layers.fit_lens(decoder, lens_texts, args)
        through = layers.read_out(decoder, texts, args, lens)
        yield (found := replace(found, lens=through, lens_tokens=lens.tokens))
    if "layer-drop" in parts:
        yield (found := replace(found, layer_drop=layers.layer_drop(decoder, texts, args)))
    if "depth" in parts:
        yield replace(found, depth=depth(decoder, texts, args))


def _contents(texts: Iterable[Text]) -> set[int]:
    return {hash(c if isinstance(c, str) else np.asarray(c).tobytes()) for c in (t.content for t in texts)}


def document(evaluations: Sequence[Evaluation], text: str) -> dict[str, Any]:
    """The JSON document without its head. Two models are compared. ``text`` names the texts."""
    compared = compare(*evaluations) if len(evaluations) == 2 else None
    return {"models": [_model(evaluation, text) for evaluation in evaluations], "comparison": compared}


def compare(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """The differences ``b`` minus ``a`` on the samples and texts of both, for JSON.

    A part that cannot be compared is None, and a note gives the reason. ``overall`` is the mean of the
    paper's nine tasks if both models have all nine. Else it is the mean of all tasks with a share of right
    answers. ``without_boolq`` needs all nine.
    """
    notes: list[str] = []
    first, second = a.tasks or {}, b.tasks or {}
    pairs = {name: (first[name].amounts, second[name].amounts) for name in first if name in second}
    for name in pairs:
        assert first[name].samples == second[name].samples
    of_tasks = [paired.compare(*pair, first[name].weights) for name, pair in pairs.items()]
    if few := [name for name, found in zip(pairs, of_tasks, strict=True) if found.p_value is None]:
        notes.append(_too_few("samples", ", ".join(few)))
    shares = [
        name
        for name, (amounts, _) in pairs.items()
        if first[name].higher_is_better and paired.is_share(amounts, first[name].weights)
    ]
    has_all = not missing_tasks(dict.fromkeys(shares))
    averaged = [name for name in shares if not has_all or name in TASKS]

    def mean_of(names: Sequence[str]) -> dict[str, Any]:
        return paired.compare_mean([pairs[name] for name in names])._asdict()

    return {
        "models": (a.model["name"], b.model["name"]) if a.model["name"] != b.model["name"] else (a.at, b.at),
        "confidence": paired.CONFIDENCE,
        "tasks": dict(zip(pairs, paired.adjusted(of_tasks), strict=True)),
        "overall": mean_of(averaged) | {"tasks": averaged} if averaged else None,
        "without_boolq": mean_of(WITHOUT_BOOLQ) if has_all else None,
        "read_out": _compare_layers(a, b, "read_out", "Read-out", notes),
        "lens": _compare_layers(a, b, "lens", "Lens", notes),
        "notes": notes,
    }


def _compare_layers(
    a: Evaluation, b: Evaluation, part: str, what: str, notes: list[str]
) -> dict[str, Any] | None:
    """The loss after layers 0..L, by columns; None and a note if it cannot be compared."""
    first, second = getattr(a, part), getattr(b, part)
    depths = [each.model["num_layers"] for each in (a, b)]
    why = f"{what} is not compared: "
    if not (first and second):
        notes += [f"{why}{(b if first else a).at} has none."] if first or second else []
    elif depths[0] != depths[1]:
        notes.append(f"{why}{a.at} has {depths[0]} layers, {b.at} has {depths[1]}.")
    elif first.ids != second.ids:
        notes.append(
            f"{why}the models cut the texts differently (another tokenizer or another maximum length), so "
            "their losses per token are not comparable; the task speeches_bits_per_byte compares the whole "
            "models."
        )
    elif len(first.tokens) < paired.FEWEST:
        notes.append(_too_few("texts", f"the {what.lower()} ({len(first.tokens)})"))
    else:
        of_layers = zip(first.loss.T, second.loss.T, strict=True)
        rows = paired.adjusted([paired.compare(*pair, first.tokens) for pair in of_layers])
        keys = ("difference", "interval", "p_value", "p_adjusted")
        return {key: [row[key] for row in rows] for key in keys} | {"texts": len(first.tokens)}
    return None


def _too_few(what: str, where: str) -> str:
    return f"Too few {what} for an interval or a test (fewer than {paired.FEWEST}): {where}."


def _model(e: Evaluation, text: str) -> dict[str, Any]:
    tasks = {
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

    def by_layer(found: PerText) -> dict[str, Any]:
        means = {"loss": found.loss, "accuracy": found.correct, "agreement": found.agreed}
        return {
            **{"text": text, "texts": len(found.tokens), "tokens": int(found.tokens.sum())},
            **{key: found.mean(sums) for key, sums in means.items()},
        }

    losses = e.layer_drop and e.layer_drop.mean(e.layer_drop.loss)
    return {
        **e.model,
        "tasks": tasks,
        "paper_means": task_means({name: task.value for name, task in (e.tasks or {}).items()}),
        "read_out": e.read_out and by_layer(e.read_out),
        "lens": e.lens and by_layer(e.lens) | {"fit_tokens": e.lens_tokens},
        "layer_drop": losses and {"loss": losses[:-1], "unchanged": losses[-1]},
        "depth": e.depth and {"text": text} | e.depth,
    }
