"""JREG in Megatron's training loop: a decorator for each of six functions of ``megatron.training``.

They are the same from 0.16 on. :func:`install` decorates them in a running process, for the launcher and
``jreg_megatron.pretrain``; the patches write the decorators into a Megatron-LM tree. Either way nothing
happens unless a ``--jreg-...`` flag is given. Megatron's loop is global to a process, so what is known of
it here is too.
"""

from __future__ import annotations

import functools
import inspect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from jreg_megatron.attachment import JRegHandle, attach
from jreg_megatron.errors import UserError, user_errors_exit
from jreg_megatron.metrics import LOSS_NAME, RATE_NAME, JRegMetrics
from jreg_megatron.settings import FLAG_PREFIX, JRegConfig, flag_of
from jreg_megatron.support import LAYER_NOT_SEEN, refuse_unsupported

GIVES_LOSS_MASK = "jreg_loss_mask_on_every_stage"
"""Attribute of a forward step function that gives the model the loss mask on every pipeline stage."""

_NOT_ATTACHED = "JREG was not attached to the model that Megatron built; the run is stopped"

Function = Callable[..., Any]


@dataclass
class _Attached:
    """The model of the loop that runs in this process."""

    config: JRegConfig
    handle: JRegHandle
    validations: list[JRegMetrics | None] = field(default_factory=list)
    """Of the validation sets that were evaluated since the last report."""


@dataclass
class _Loop:
    attached: _Attached | None = None


_loop = _Loop()


def is_attached() -> bool:
    """Whether a model was built and JREG attached to it."""
    return _loop.attached is not None


def install() -> None:
    """Decorate the functions of ``megatron.training`` in this process; those that a patch decorated stay.

    Other modules of Megatron that have imported a function by its name get the decorated one too.

    Raises:
        UserError: if Megatron has no such function, or one that is called otherwise.
    """
    from megatron.training import arguments, training

    decorators: list[tuple[ModuleType, Callable[[Function], Function], str]] = [
        (arguments, add_arguments, "add_megatron_arguments"),
        (training, attach_to_model, "setup_model_and_optimizer"),
        (training, require_attached, "train"),
        (training, log_training, "training_log"),
        (training, measure_validation, "evaluate"),
        (training, log_validation, "evaluate_and_print_results"),
    ]
    for module, decorate, name in decorators:
        function = getattr(module, name, None)
        if function is None:
            raise UserError(
                f"{module.__name__} has no function {name} ({module.__file__}), by which JREG enters "
                "Megatron's training loop from 0.16 on; use jreg_megatron.attach in the code instead"
            )
        if hasattr(function, _MARK):
            continue
        decorated = decorate(function)
        for other in list(sys.modules.values()):
            if other.__name__.startswith("megatron.") and vars(other).get(name) is function:
                setattr(other, name, decorated)


# -- the decorators --------------------------------------------------------------------------------


def add_arguments(add_megatron_arguments: Function) -> Function:
    """Have Megatron's parser know the ``--jreg-...`` flags."""

    @_decorating(add_megatron_arguments)
    def with_jreg(*args: Any, **named: Any) -> ArgumentParser:
        return JRegConfig.add_arguments(add_megatron_arguments(*args, **named))

    return with_jreg


def attach_to_model(setup_model_and_optimizer: Function) -> Function:
    """Attach JREG to the model that is built, if a flag asks for it."""

    @_decorating(setup_model_and_optimizer)
    def with_jreg(*args: Any, **named: Any) -> Any:
        from megatron.training import get_args, print_rank_0

        _loop.attached = None
        with user_errors_exit():
            config = config_of(get_args())
            if config is not None:
                refuse_unsupported(get_args(), config)
        built = setup_model_and_optimizer(*args, **named)
        if config is not None:
            with user_errors_exit():
                handle = attach(built[0], config, iteration=_current_iteration)
            _loop.attached = _Attached(config, handle)
            print_rank_0(start_up_line(config, handle))
        return built

    return with_jreg


def require_attached(train: Function) -> Function:
    """Stop before the first step if JREG is asked for and nothing has attached it."""
    look_up = _arguments_of(train, "forward_step_func")

    @_decorating(train)
    def with_jreg(*args: Any, **named: Any) -> Any:
        from megatron.training import get_args

        with user_errors_exit():
            attached = _expected()
            if attached is not None and attached.config.tokens == "unmasked":
                (forward_step,) = look_up(args, named)
                if get_args().pipeline_model_parallel_size > 1 and not hasattr(forward_step, GIVES_LOSS_MASK):
                    raise UserError(
                        f"{flag_of('tokens')} is 'unmasked', and the script gives its model the loss mask on "
                        "the last pipeline stage only; leave the setting at 'all', use one pipeline stage, "
                        "or give the mask on every stage and say so on the forward step function: "
                        f"forward_step.{GIVES_LOSS_MASK} = True"
                    )
        return train(*args, **named)

    return with_jreg


def log_training(training_log: Function) -> Function:
    """Let JREG's values join Megatron's console line, TensorBoard and W&B: one reduction per log interval."""
    look_up = _arguments_of(
        training_log, "total_loss_dict", "iteration", "skipped_iter", "is_first_iteration"
    )

    @_decorating(training_log)
    def with_jreg(*args: Any, **named: Any) -> Any:
        with user_errors_exit():
            attached = _expected()
        if attached is None:
            return training_log(*args, **named)
        totals, iteration, is_skipped, is_first = look_up(args, named)
        with user_errors_exit():
            metrics = _end_of_interval(attached, totals, iteration, is_skipped, is_first)
        result = training_log(*args, **named)
        if metrics is not None and (bad := metrics.layers_not_finite()):
            from megatron.training import print_rank_last

            # Megatron's line leaves out what is NaN.
            print_rank_last(f" JREG at iteration {iteration} | displacement not finite in layers: {bad} | ")
        # A value that is not measured in the next interval must be absent there, not zero.
        for name in (LOSS_NAME, RATE_NAME):
            totals.pop(name, None)
        return result

    return with_jreg


def measure_validation(evaluate: Function) -> Function:
    """Collect a validation set's values."""

    @_decorating(evaluate)
    def with_jreg(*args: Any, **named: Any) -> Any:
        with user_errors_exit():
            attached = _expected()
        if attached is None:
            return evaluate(*args, **named)
        attached.handle.validation_meter.reset()
        result = evaluate(*args, **named)
        metrics = attached.handle.reduce_validation_metrics()
        timed_out = result[-1]
        if metrics is None and not timed_out:
            with user_errors_exit():
                raise UserError(LAYER_NOT_SEEN)
        attached.validations.append(metrics)
        return result

    return with_jreg


def log_validation(evaluate_and_print_results: Function) -> Function:
    """Print the values of every validation set and write them to TensorBoard and W&B."""
    look_up = _arguments_of(evaluate_and_print_results, "prefix", "iteration", "write_to_tensorboard")

    @_decorating(evaluate_and_print_results)
    def with_jreg(*args: Any, **named: Any) -> Any:
        attached = _loop.attached
        if attached is None:  # then evaluate() speaks
            return evaluate_and_print_results(*args, **named)
        from megatron.training import get_args, print_rank_last

        attached.validations.clear()
        result = evaluate_and_print_results(*args, **named)
        prefix, iteration, is_written = look_up(args, named)
        for suffix, metrics in zip(_validation_suffixes(get_args()), attached.validations, strict=False):
            if metrics is None:
                continue
            values = metrics.scalars(attached.config.log_per_layer)
            shown = " | ".join(f"{name} value: {values[name]:.6E}" for name in (LOSS_NAME, RATE_NAME))
            print_rank_last(f" validation{suffix} JREG at {prefix} | {shown} | ")
            if is_written:
                _write({f"{name} validation{suffix}": value for name, value in values.items()}, iteration)
        return result

    return with_jreg


_MARK = "_jreg"


def _decorating(function: Function) -> Callable[[Function], Function]:
    def decorate(decorated: Function) -> Function:
        setattr(decorated, _MARK, True)
        return functools.wraps(function)(decorated)

    return decorate


def _arguments_of(function: Function, *names: str) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]:
    """A look-up of a call's arguments by name, wherever a version of the function has them.

    Raises:
        UserError: if the function has no such argument.
    """
    signature = inspect.signature(function)
    if missing := [name for name in names if name not in signature.parameters]:
        raise UserError(
            f"{function.__module__}.{function.__name__} has no argument {', '.join(missing)} "
            f"({inspect.getfile(function)}), which JREG reads in Megatron's training loop from 0.16 on; it "
            f"has {', '.join(signature.parameters)}; use jreg_megatron.attach in the code instead"
        )

    def look_up(args: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        return [bound.arguments[name] for name in names]

    return look_up


# -- what they do ----------------------------------------------------------------------------------


def config_of(args: Namespace) -> JRegConfig | None:
    """The settings among Megatron's arguments; None if no flag of JREG's is given.

    Raises:
        UserError: for a value that is not allowed, and where Megatron has dropped the flags.
    """
    if JRegConfig.is_in(args):
        return JRegConfig.from_args(args)
    # With --yaml-cfg Megatron takes all arguments from the file.
    if given := [word for word in sys.argv[1:] if word.startswith(FLAG_PREFIX)]:
        raise UserError(f"{given[0]} is given, but is not among Megatron's arguments; leave out --yaml-cfg")
    return None


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


def _expected() -> _Attached | None:
    """What is attached; None if JREG was not asked for.

    Raises:
        UserError: if it was, so that no run goes on silently without it.
    """
    from megatron.training import get_args

    if _loop.attached is None and config_of(get_args()) is not None:
        raise UserError(_NOT_ATTACHED)
    return _loop.attached


def _end_of_interval(
    attached: _Attached, totals: dict[str, Any], iteration: int, is_skipped: int, is_first: bool
) -> JRegMetrics | None:
    """At the end of a log interval (and in the first iteration) put its values among Megatron's totals."""
    from megatron.training import get_args

    if iteration != _current_iteration():
        raise UserError(
            f"Megatron logs iteration {iteration}, while its args.curr_iteration told JREG "
            f"{_current_iteration()}; this training loop is none that JREG knows"
        )
    is_interval_end = iteration % get_args().log_interval == 0
    if not (is_interval_end or is_first):
        return None
    metrics = attached.handle.reduce_training_metrics()
    if metrics is None and attached.config.measures_at(iteration):
        raise UserError(LAYER_NOT_SEEN)
    if metrics is not None:
        scalars = metrics.scalars(attached.config.log_per_layer)
        if is_interval_end:
            _write(scalars, iteration)
        # training_log prints each total divided by the iterations that advanced since the last line.
        advanced = totals.get("advanced iterations", 0) + (0 if is_skipped else 1)
        for name in (LOSS_NAME, RATE_NAME):
            totals[name] = torch.tensor([scalars[name] * max(1, advanced)], dtype=torch.float64)
    if is_interval_end:
        attached.handle.reset_training_metrics()
    return metrics


def _current_iteration() -> int:
    """The training iteration under way, 1-based as in the log."""
    from megatron.training import get_args

    return int(get_args().curr_iteration) + 1


def _validation_suffixes(args: Any) -> list[str]:
    if not args.multiple_validation_sets:
        return [""]
    names = getattr(args, "validation_set_names", None) or range(10**6)
    return [f"-{name}" for name in names]


def _write(scalars: dict[str, float], iteration: int) -> None:
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if (writer := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb := get_wandb_writer():
        wandb.log(scalars, iteration)
