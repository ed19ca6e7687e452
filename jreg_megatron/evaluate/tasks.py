"""Find and run zero-shot tasks of lm-evaluation-harness, and keep each sample's result."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jreg_megatron.data.texts import held_out_speeches
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.evaluate.paired import Floats
from jreg_megatron.evaluate.speech_tasks import SPEECH_TASKS, write_speech_tasks
from jreg_megatron.paper import TASKS
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.imports import errors_alone, need

SETS = {"speeches": tuple(SPEECH_TASKS), "paper": TASKS}
"""Names of sets of tasks."""

_METRICS = ("acc_norm", "acc", "exact_match", "acc_bytes", "bits_per_byte")
"""A task's figure is the first of these metrics that it has. The paper does not say which metric it used."""
_BITS = "bits_per_byte"


@dataclass(frozen=True)
class TaskResult:
    """A model's result on a task. The figure is ``amounts.sum() / weights.sum()``."""

    metric: str
    higher_is_better: bool
    amounts: Floats  # [n]: 0 or 1 for an accuracy, bits for bits per byte
    weights: Floats  # [n]: 1, or bytes
    samples: list[str]  # [n], the harness's hash of each sample
    chance: float | None  # the expected figure of a random guess, for a task with choices
    others: dict[str, float]  # the task's other figures, by metric

    @property
    def value(self) -> float:
        """The figure."""
        return _figure(self.amounts, self.weights)


def load_tasks(names: Sequence[str], include_path: Sequence[str], folder: Path) -> dict[str, Any]:
    """Find tasks and their data. Returns the harness's tasks by name.

    Args:
        names: tasks and groups of the harness, and keys of :data:`SETS`.
        include_path: folders of the user's own task files.
        folder: an empty folder that exists until the tasks have run.

    Raises:
        UserError: for an unknown name, a task that cannot be scored here, and missing data.
    """
    wanted = list(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))
    for path in include_path:
        if not Path(path).is_dir():
            raise UserError(f"--include-path is {path}, which is not a folder; give a folder of task files")
    need("lm_eval", "evaluating on tasks", "analysis")
    datasets = need("datasets", "evaluating on tasks", "analysis")
    from lm_eval.tasks import TaskManager

    folders = list(include_path)
    if set(wanted) & set(SPEECH_TASKS):
        write_speech_tasks(folder, held_out_speeches())
        folders.append(str(folder))
    # The harness has thousands of task files. To read them takes seconds, and only some tasks need them.
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(wanted) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=folders)
    if unknown := [name for name in wanted if name not in manager.task_index]:
        unread = "; task files that are not valid YAML are ignored" if include_path else ""
        raise UserError(
            f"--tasks names {unknown[0]}, which is not a task; `lm_eval ls tasks` lists them{unread}"
        )
    datasets.disable_progress_bars()
    tasks: dict[str, Any] = {}
    for name in wanted:
        try:
            with _silent():
                tasks |= manager.load([name])["tasks"]
        except Exception as error:  # from the harness, datasets, or a task's own code or templates
            raise UserError(
                f"the task {name} cannot be loaded ({type(error).__name__}: {one_line(error, 200)}); if its "
                "data are on the Hugging Face hub, load them once with a network, or give --tasks speeches, "
                "which needs none"
            ) from error
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            raise UserError(
                f"the task {name} lets the model write text, which is not supported; leave it out"
            )
        if not _metrics_of(task):
            found = ", ".join(f"{metric} ({how.__name__})" for metric, how in task.aggregation().items())
            raise UserError(f"the task {name} is measured by {found}, which is not supported; leave it out")
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=1234)
    return tasks


def run_tasks(tasks: Mapping[str, Any], decoder: Decoder, args: Namespace) -> dict[str, TaskResult]:
    """Run tasks of :func:`load_tasks` on a model.

    Of the command's arguments, ``batch_size`` is the number of requests at a time, and ``limit`` is the
    number of samples of each task; None for all.

    Raises:
        UserError: if the model has no tokenizer or gives logits that are not finite.
    """
    from lm_eval.evaluator import evaluate

    from jreg_megatron.evaluate.language_model import DecoderLM

    with _silent():
        found = evaluate(
            DecoderLM(decoder, args.batch_size, args.quiet),
            {"tasks": dict(tasks), "groups": {}, "group_map": {}},
            limit=args.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return {name: _result(task, found["samples"][name]) for name, task in tasks.items()}


def _metrics_of(task: Any) -> list[str]:
    """A task's metrics that are a mean over samples, or bits per byte, in order of preference."""
    from lm_eval.api.metrics import bits_per_byte, mean

    how = task.aggregation()
    return [name for name in _METRICS if how.get(name) in (mean, bits_per_byte)]


def _result(task: Any, samples: list[dict[str, Any]]) -> TaskResult:
    # If a task filters answers in several ways, the first counts.
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metric, *others = [name for name in _metrics_of(task) if name in samples[0]]
    amounts, weights = _column(samples, metric)
    if amounts.shape != weights.shape or not (np.isfinite(amounts).all() and np.isfinite(weights).all()):
        raise UserError(
            f"the task {task.config.task} does not give a number for {metric} of each sample; correct it or "
            "leave it out"
        )
    has_choices = task.OUTPUT_TYPE == "multiple_choice"
    choices = [len(task.doc_to_choice(sample["doc"])) for sample in samples] if has_choices else []
    return TaskResult(
        metric=metric,
        higher_is_better=metric != _BITS,
        amounts=amounts,
        weights=weights,
        samples=[sample["doc_hash"] for sample in samples],
        chance=float(np.mean(1 / np.array(choices))) if has_choices else None,
        others={name: _figure(*_column(samples, name)) for name in others},
    )


def _column(samples: list[dict[str, Any]], metric: str) -> tuple[Floats, Floats]:
    """A metric's amounts and weights, ``[n]`` each."""
    values = np.array([sample[metric] for sample in samples], dtype=float)
    if metric == _BITS:  # pairs of log-likelihood in nats and bytes
        return values[:, 0] / -np.log(2), values[:, 1]
    return values, np.ones(len(values))


def _figure(amounts: Floats, weights: Floats) -> float:
    return float(amounts.sum() / weights.sum())


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the harness's progress bars and messages, and the hub's messages about failed attempts."""
    import lm_eval.api.task as module

    bar = module.tqdm
    module.tqdm = partial(bar, disable=True)
    try:
        with errors_alone("lm_eval", "huggingface_hub"):
            yield
    finally:
        module.tqdm = bar
