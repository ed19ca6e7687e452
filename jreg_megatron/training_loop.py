"""JREG's values in the log of Megatron's training loop: console line, TensorBoard, W&B.

Three functions of ``megatron.training.training`` are wrapped, each with its ``__wrapped__`` kept:
``training_log`` (one reduction per log interval, then the values join Megatron's own line), ``evaluate``
(collects a validation set's values) and ``evaluate_and_print_results`` (reports them).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from jreg_megatron.attachment import JRegHandle, attach
from jreg_megatron.errors import UserError
from jreg_megatron.metrics import LOSS_NAME, RATE_NAME, JRegMetrics
from jreg_megatron.settings import JRegConfig

_NOT_SEEN = (
    "JREG saw no state of some layer in an iteration that it should have measured, so that layer is not "
    "regularized either; the run is stopped: leave out what changes how layers run, or JREG"
)


class JRegInTrainingLoop:
    """Attaches JREG when Megatron's loop has built its model and reports for it while the loop runs."""

    def __init__(self, config: JRegConfig) -> None:
        self._config = config
        self._handle: JRegHandle | None = None
        self._validations: list[JRegMetrics | None] = []

    def attach_to(self, model: list[nn.Module]) -> list[nn.Module]:
        """Attach to the freshly built chunks; fits Megatron's ``post_wrap_hooks``. Returns ``model``."""
        from megatron.training import print_rank_0

        self._handle = attach(model, self._config, iteration=_current_iteration)
        print_rank_0(start_up_line(self._config, self._handle))
        return model

    @property
    def handle(self) -> JRegHandle:
        """The handle of the attached model.

        Raises:
            UserError: if nothing was attached, so that no run goes on silently without JREG.
        """
        if self._handle is None:
            raise UserError("JREG was not attached to the model that Megatron built; the run is stopped")
        return self._handle

    def install(self, training: ModuleType) -> None:
        """Wrap the logging functions of the module ``megatron.training.training``."""
        for name, around in (
            ("training_log", self._around_training_log),
            ("evaluate", self._around_evaluate),
            ("evaluate_and_print_results", self._around_evaluate_and_print_results),
        ):
            wrapped = getattr(training, name)
            setattr(training, name, functools.wraps(wrapped)(functools.partial(around, wrapped)))

    def _around_training_log(
        self,
        training_log: Callable[..., Any],
        loss_dict: dict[str, Any],
        total_loss_dict: dict[str, Any],
        learning_rate: Any,
        iteration: int,
        loss_scale: Any,
        report_memory_flag: Any,
        skipped_iter: int,
        *rest: Any,
        **named: Any,
    ) -> Any:
        from megatron.training import get_args, print_rank_last

        is_first = named.get("is_first_iteration", False)
        is_interval_end = iteration % get_args().log_interval == 0
        is_reporting = is_interval_end or is_first
        metrics = self.handle.reduce_training_metrics() if is_reporting else None
        if is_reporting and metrics is None and self._config.measures_at(iteration):
            raise UserError(_NOT_SEEN)
        if metrics is not None:
            scalars = metrics.scalars(self._config.log_per_layer)
            if is_interval_end:
                _write(scalars, iteration)
            # training_log prints each total divided by the iterations that advanced since the last line.
            advanced = total_loss_dict.get("advanced iterations", 0) + (0 if skipped_iter else 1)
            for name in (LOSS_NAME, RATE_NAME):
                total = scalars[name] * max(1, advanced)
                total_loss_dict[name] = torch.tensor([total], dtype=torch.float64)
        if is_interval_end:
            self.handle.reset_training_metrics()
        flag = training_log(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            *rest,
            **named,
        )
        if metrics is not None and (bad := metrics.layers_not_finite()):
            # Megatron's line leaves out what is NaN.
            print_rank_last(f" JREG at iteration {iteration} | displacement not finite in layers: {bad} | ")
        # A value that was not measured in the next interval must be absent there, not zero.
        for name in (LOSS_NAME, RATE_NAME):
            total_loss_dict.pop(name, None)
        return flag

    def _around_evaluate(self, evaluate: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self.handle.validation_meter.reset()
        result = evaluate(*args, **named)
        metrics = self.handle.reduce_validation_metrics()
        timed_out = result[-1]
        if metrics is None and not timed_out:
            raise UserError(_NOT_SEEN)
        self._validations.append(metrics)
        return result

    def _around_evaluate_and_print_results(
        self,
        evaluate_and_print_results: Callable[..., Any],
        prefix: str,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        iteration: int,
        *rest: Any,
        **named: Any,
    ) -> Any:
        from megatron.training import get_args, print_rank_last

        self._validations.clear()
        result = evaluate_and_print_results(
            prefix, forward_step_func, data_iterator, model, iteration, *rest, **named
        )
        for suffix, metrics in zip(_validation_suffixes(get_args()), self._validations, strict=False):
            if metrics is None:
                continue
            values = metrics.scalars(self._config.log_per_layer)
            shown = " | ".join(f"{name} value: {values[name]:.6E}" for name in (LOSS_NAME, RATE_NAME))
            print_rank_last(f" validation{suffix} JREG at {prefix} | {shown} | ")
            if named.get("write_to_tensorboard", True):
                _write({f"{name} validation{suffix}": value for name, value in values.items()}, iteration)
        return result


def start_up_line(config: JRegConfig, handle: JRegHandle) -> str:
    """One line that says what was attached."""
    weights = handle.weights.tolist()
    top = " ".join(f"{w:.3g}" for w in weights[-4:])
    doing = f"lambda {config.coeff:g}" if config.coeff > 0 else "measuring only (lambda 0)"
    rule = f"alpha {config.alpha:g}" if config.weights == "softmax" else f"{config.weights} weights"
    return (
        f"> JREG attached: {doing}, {rule}, last state {config.final_state}, {len(weights)} layers, "
        f"weights of the last {min(4, len(weights))}: {top}"
    )


def _current_iteration() -> int:
    """The training iteration under way, 1-based as in the log."""
    from megatron.training import get_args

    return int(get_args().curr_iteration) + 1


def _validation_suffixes(args: Any) -> list[str]:
    if not args.multiple_validation_sets:
        return [""]
    names = args.validation_set_names or range(10**6)
    return [f"-{name}" for name in names]


def _write(scalars: dict[str, float], iteration: int) -> None:
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if (writer := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(scalars, iteration)
