"""Methods in Megatron's training loop: decorators for nine functions of ``megatron.training``.

Megatron has these functions from 0.16 on. :func:`install` decorates them in a running process, for the
launcher and ``jreg_megatron.pretrain``. The patches write six of the decorators into a Megatron-LM tree, and
:func:`attach_to_model` adds the other three. The decorators are no-ops unless a method's flag is given, such
as ``--jreg-coeff``. Megatron's loop is global to a process, so the state here is global too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from jreg_megatron.methods import known
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.ranks import of_every_rank
from jreg_megatron.stream.attachment import attach
from jreg_megatron.stream.handle import Handle
from jreg_megatron.stream.method import Metrics
from jreg_megatron.stream.preparation import changed_here, prepare, prepares
from jreg_megatron.stream.settings import Settings, flags_of
from jreg_megatron.stream.support import LAYER_NOT_SEEN, is_since_0_19, refuse_unsupported

_NOT_ATTACHED = (
    "jreg_megatron is not attached to the model, because "
    "megatron.training.training.setup_model_and_optimizer was not called before train_step or evaluate; the "
    "run stops: call it, or use jreg_megatron.attach in the code"
)

_NO_FLAG = "no flag that changes the model"

Function = Callable[..., Any]


@dataclass
class _Attached:
    """The model that this process trains."""

    settings: tuple[Settings, ...]
    handle: Handle
    validations: list[Metrics | None] = field(default_factory=list)
    """Values of the validation sets since the last report; None for a set that timed out or has no values."""


@dataclass
class _Loop:
    attached: _Attached | None = None
    must_be_asked: bool = False
    """Whether Megatron's arguments must have a method's flag."""
    had_flag: bool = False
    """Whether the command line had one when the script began. A script may take it away."""
    is_setting_up: bool = False
    """Whether Megatron is building and loading the model that gets the methods."""
    last_step: int | None = None
    """The iteration of the last training step."""
    decorated: dict[str, Function] = field(default_factory=dict)
    """The original functions, by their names in Megatron."""


_loop = _Loop()


def is_attached() -> bool:
    """Whether a method is attached to a model."""
    return _loop.attached is not None


def install() -> None:
    """Decorate the functions of ``megatron.training`` in this process, except those that a patch decorates.

    Other modules of Megatron that have imported such a function get the decorated function too. From then on
    a model without a method's flag is refused.

    Raises:
        UserError: if Megatron lacks a function, or if its arguments differ.
    """
    from megatron.training import arguments, training

    _decorate(arguments, add_arguments, "add_megatron_arguments")
    _decorate(training, attach_to_model, "setup_model_and_optimizer")
    _decorate(training, require_attached, "train_step")
    _decorate(training, log_training, "training_log")
    _decorate(training, measure_validation, "evaluate")
    _decorate(training, log_validation, "evaluate_and_print_results")
    _decorate_the_end(training)
    _loop.must_be_asked, _loop.had_flag = True, known.has_flag(sys.argv[1:])


def _decorate_the_end(training: ModuleType) -> None:
    # It returns whether the process exits, the same on every rank.
    _decorate(training, log_at_the_end, "checkpoint_and_decide_exit")
    _decorate(training, functools.partial(log_at_the_end, ends=lambda _: True), "train")


def _decorate_the_loading() -> None:
    from megatron.training import checkpointing

    if hasattr(checkpointing, "check_checkpoint_args"):
        _decorate(checkpointing, refuse_another_model, "check_checkpoint_args")


def _decorate(module: ModuleType, decorate: Callable[[Function], Function], name: str) -> None:
    function = getattr(module, name, None)
    if function is None:
        raise UserError(
            f"{module.__name__} has no function {name} ({module.__file__}), which jreg_megatron decorates in "
            "Megatron 0.16 or later; use jreg_megatron.attach in the code instead"
        )
    if hasattr(function, _MARK):
        return
    _check_arguments(name, function)
    decorated = decorate(function)
    for key, other in list(sys.modules.items()):
        if key.startswith("megatron.") and getattr(other, "__dict__", {}).get(name) is function:
            setattr(other, name, decorated)


# -- the decorators --------------------------------------------------------------------------------


def add_arguments(add_megatron_arguments: Function) -> Function:
    """Add the methods' flags to Megatron's parser."""

    @_decorating(add_megatron_arguments)
    def with_jreg(*args: Any, **named: Any) -> ArgumentParser:
        _decorate_the_loading()
        parser: ArgumentParser = known.add_arguments(add_megatron_arguments(*args, **named))
        if _loop.must_be_asked:
            # The script may have added its own methods since the launcher has checked the flags.
            with user_errors_exit():
                known.check_flags(sys.argv[1:])
            if not (_loop.had_flag or known.has_flag(sys.argv[1:])):
                parser.set_defaults(**known.MEASURING)
        return parser

    return with_jreg


def attach_to_model(setup_model_and_optimizer: Function) -> Function:
    """Attach the methods to the built model, if their flags are given."""

    @_decorating(setup_model_and_optimizer)
    def with_jreg(*args: Any, **named: Any) -> Any:
        from megatron.training import get_args, print_rank_0, training

        _loop.attached = _loop.last_step = None
        _decorate_the_loading()
        with user_errors_exit():
            settings = settings_of(get_args())
            if settings:
                _refuse_another_megatron()
                _decorate_the_end(training)
                for name, function in _loop.decorated.items():
                    _check_arguments(name, function)
                refuse_unsupported(get_args(), *settings)
                _refuse_another_model_to_generate(get_args(), settings)
                _refuse_another_checkpoint(get_args(), settings)
                _refuse_optimizer(get_args())
                _refuse_fusion_on_some_ranks(get_args().gradient_accumulation_fusion)
                args, named = _with_prepared_model(setup_model_and_optimizer, settings, args, named)
        _loop.is_setting_up = True
        try:
            built = setup_model_and_optimizer(*args, **named)
        finally:
            _loop.is_setting_up = False
        if settings:
            with user_errors_exit():
                # Without training, every schedule counts as finished.
                iteration = (lambda: sys.maxsize) if get_args().skip_train else _current_iteration
                handle = attach(built[0], *settings, iteration=iteration, optimizer=built[1])
            _loop.attached = _Attached(settings, handle)
            print_rank_0(handle.describe())
        return built

    return with_jreg


def refuse_another_model(check_checkpoint_args: Function) -> Function:
    """Refuse to resume a model that a method changed, unless this run changes it in the same way."""

    @_decorating(check_checkpoint_args)
    def with_jreg(saved_args: Namespace, *args: Any, **named: Any) -> Any:
        from megatron.training import get_args

        with user_errors_exit():
            saved = known.changes_in(saved_args)
            if _loop.is_setting_up or _loop.attached is not None:
                _refuse_other_changes(saved, known.changes_in(get_args()), is_finetuned=False)
            elif not changed_here.issuperset(saved):
                raise UserError(
                    f"the checkpoint was saved with {flags_of(saved, _NO_FLAG)}, but this script builds its "
                    "model without setup_model_and_optimizer, so no flag can change it; call "
                    "jreg_megatron.prepare and attach in its code before it loads"
                )
        return check_checkpoint_args(saved_args, *args, **named)

    return with_jreg


def _refuse_other_changes(saved: tuple[Settings, ...], own: tuple[Settings, ...], is_finetuned: bool) -> None:
    there = {name for of_one in saved for name in of_one.added_parameters}
    is_lacking = any(not of_one.added_parameters <= there for of_one in own)
    if saved != own and (is_lacking or not is_finetuned):
        was, now = (flags_of(of_one, _NO_FLAG) for of_one in (saved, own))
        other = "leave out what adds parameters" if is_lacking else "--finetune to take only its weights"
        raise UserError(
            f"the checkpoint was saved with {was}, and this run has {now}, which is another model; give the "
            f"flags of the checkpoint, or {other}"
        )


def _refuse_another_checkpoint(args: Namespace, settings: tuple[Settings, ...]) -> None:
    """As :func:`refuse_another_model`, but before Megatron finds that a parameter is missing or superfluous.
    Collective."""
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing, print_rank_0
    from torch.distributed.checkpoint.api import CheckpointException

    def saved(load: str, step: int | None) -> tuple[Settings, ...] | None:
        tracker = Path(checkpointing.get_checkpoint_tracker_filename(load))
        at = str(step or tracker.read_text(encoding="utf-8").strip())
        which = (0, True) if at == "release" else (int(at), False)
        folder = checkpointing.get_checkpoint_name(load, *which, return_base_dir=True)
        if dist_checkpointing.check_is_distributed_checkpoint(folder):
            return known.changes_in(dist_checkpointing.load_common_state_dict(folder)["args"])
        # --ckpt-format torch: one file per rank. The memory map reads no tensor.
        file = checkpointing.get_checkpoint_name(load, *which)
        return known.changes_in(torch.load(file, map_location="cpu", mmap=True, weights_only=False)["args"])

    found, is_finetuned = None, args.finetune
    if torch.distributed.get_rank() == 0:
        with contextlib.suppress(Exception, CheckpointException):  # Megatron will report it
            if args.load:
                found = saved(args.load, args.ckpt_step)
        with contextlib.suppress(Exception, CheckpointException):
            if found is None and args.pretrained_checkpoint:
                found, is_finetuned = saved(args.pretrained_checkpoint, None), True
    found, is_finetuned = of_every_rank((found, is_finetuned))[0]
    own = tuple(of_one for of_one in settings if of_one.changes_model)
    if found is not None and found != own:
        _refuse_other_changes(found, own, is_finetuned)
        print_rank_0(
            f"> only weights are taken from the checkpoint: it was trained with {flags_of(found, _NO_FLAG)}, "
            f"and this run has {flags_of(own, _NO_FLAG)}"
        )


def require_attached(train_step: Function) -> Function:
    """Stop before a step without the methods, or with a wrong iteration number."""

    @_decorating(train_step)
    def with_jreg(*args: Any, **named: Any) -> Any:
        attached = _expected()
        if attached is not None:
            _check_step()
        with user_errors_exit():  # errors of the first step's checks
            result = train_step(*args, **named)
        if attached is not None and result[_SHOULD_EXIT]:
            # Megatron's loop ends here, within this iteration.
            _log_the_rest(attached.handle.end_iteration(_current_iteration()))
        return result

    return with_jreg


def log_training(training_log: Function) -> Function:
    """Add the methods' values to Megatron's console line, TensorBoard and W&B: one reduction per interval."""
    look_up = _arguments_of("training_log", training_log)

    @_decorating(training_log)
    def with_jreg(*args: Any, **named: Any) -> Any:
        attached = _expected()
        if attached is None:
            return training_log(*args, **named)
        losses, totals, iteration, is_skipped = look_up(args, named)
        metrics = _end_iteration(attached, losses, totals, iteration, is_skipped)
        result = training_log(*args, **named)
        if metrics is not None:
            _print(iteration, metrics, _interval(iteration))
            # If the next interval does not measure a value, it must be missing there, not zero.
            for reading in metrics.readings:
                for name in reading.of.headline():
                    totals.pop(name, None)
        return result

    return with_jreg


def measure_validation(evaluate: Function) -> Function:
    """Measure a validation set, and keep the values for :func:`log_validation`."""

    @_decorating(evaluate)
    def with_jreg(*args: Any, **named: Any) -> Any:
        attached = _expected()
        if attached is None:
            return evaluate(*args, **named)
        attached.handle.reset_validation_metrics()
        result = evaluate(*args, **named)
        with user_errors_exit():
            metrics = attached.handle.reduce_validation_metrics()
        is_timed_out = result[-1]
        if not is_timed_out and not attached.handle.is_whole(metrics):
            with user_errors_exit():
                raise UserError(LAYER_NOT_SEEN)
        attached.validations.append(None if is_timed_out else metrics)
        return result

    return with_jreg


def log_validation(evaluate_and_print_results: Function) -> Function:
    """Print the values of every validation set and write them to TensorBoard and W&B."""
    look_up = _arguments_of("evaluate_and_print_results", evaluate_and_print_results)

    @_decorating(evaluate_and_print_results)
    def with_jreg(*args: Any, **named: Any) -> Any:
        attached = _loop.attached
        if attached is None:  # evaluate() refuses
            return evaluate_and_print_results(*args, **named)
        from megatron.training import get_args, print_rank_last

        attached.validations.clear()
        result = evaluate_and_print_results(*args, **named)
        prefix, iteration, is_written = look_up(args, named)
        for suffix, metrics in zip(_validation_suffixes(get_args()), attached.validations, strict=False):
            if metrics is None:
                continue
            for reading in metrics.readings:
                values = reading.of.headline().items()
                shown = " | ".join(f"{name} value: {value:.6E}" for name, value in values)
                print_rank_last(f" validation{suffix} {reading.settings.name} at {prefix} | {shown} | ")
            if is_written:
                values = metrics.scalars().items()
                _write({f"{name} validation{suffix}": value for name, value in values}, iteration)
        return result

    return with_jreg


def log_at_the_end(function: Function, *, ends: Callable[[Any], bool] = bool) -> Function:
    """Log the values since the last line, if ``ends(result)`` says that training is over."""

    @_decorating(function)
    def with_jreg(*args: Any, **named: Any) -> Any:
        result = function(*args, **named)
        if ends(result) and _loop.attached is not None:
            _end_training(_loop.attached)
        return result

    return with_jreg


_MARK = "_jreg"
_SHOULD_EXIT = 3
"""The index of ``should_exit`` in the result of ``train_step``. Megatron's rerun state machine sets it."""


def _decorating(function: Function) -> Callable[[Function], Function]:
    def decorate(decorated: Function) -> Function:
        setattr(decorated, _MARK, True)
        return functools.wraps(function)(decorated)

    return decorate


_READ = {
    "training_log": ("loss_dict", "total_loss_dict", "iteration", "skipped_iter"),
    "evaluate_and_print_results": ("prefix", "iteration", "write_to_tensorboard"),
}
"""The arguments that the decorators read, by function, with their names in Megatron."""


def _check_arguments(name: str, function: Function) -> None:
    """Raises:
    UserError: if Megatron's function ``name`` lacks an argument that its decorator reads.
    """
    has = inspect.signature(function).parameters
    if missing := [argument for argument in _READ.get(name, ()) if argument not in has]:
        raise UserError(
            f"{function.__module__}.{name} has no argument {', '.join(missing)} "
            f"({inspect.getfile(function)}), which jreg_megatron reads in Megatron 0.16 or later; it has "
            f"{', '.join(has)}; use jreg_megatron.attach in the code instead"
        )


def _arguments_of(name: str, function: Function) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]:
    """A function that finds the values of the arguments in ``_READ`` in a call, by position or by name."""
    # Not checked here, because a patched tree that has changed must still run jobs without our flags.
    _loop.decorated[name] = function
    signature = inspect.signature(function)

    def look_up(args: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        return [bound.arguments[argument] for argument in _READ[name]]

    return look_up


# -- what they do ----------------------------------------------------------------------------------


def settings_of(args: Namespace) -> tuple[Settings, ...]:
    """The settings of each method that has a flag in Megatron's arguments.

    Raises:
        UserError: for a value that is not allowed, or if the flags are not in Megatron's arguments.
    """
    if settings := known.settings_in(args):
        return settings
    # With --yaml-cfg Megatron takes all arguments from the file.
    if _loop.must_be_asked or known.has_flag(sys.argv[1:]):
        flags = ", ".join(f"--{method.prefix}-..." for method in known.METHODS)
        raise UserError(
            f"none of the flags {flags} is among Megatron's arguments any more: the script replaced them, or "
            "read them from a file (--yaml-cfg); give the flags to Megatron's parser"
        )
    return ()


@user_errors_exit()
def _expected() -> _Attached | None:
    """The attached model; None if no method's flag is given.

    Raises:
        UserError: if a flag is given and nothing is attached, so that no run continues silently without it.
    """
    from megatron.training import get_args

    if _loop.attached is None and settings_of(get_args()):
        raise UserError(_NOT_ATTACHED)
    return _loop.attached


@user_errors_exit()
def _end_iteration(
    attached: _Attached, losses: dict[str, Any], totals: dict[str, Any], iteration: int, is_skipped: int
) -> Metrics | None:
    """End the iteration. At the end of a log interval, add its values to the totals that Megatron prints."""
    from megatron.training import get_args, is_last_rank

    if iteration != _current_iteration():
        raise UserError(
            f"Megatron logs iteration {iteration}, but args.curr_iteration gives {_current_iteration()}, so "
            "the methods' schedule is unknown; set args.curr_iteration before each step as Megatron does, or "
            "use jreg_megatron.attach in the code"
        )
    is_interval_end = iteration % get_args().log_interval == 0
    metrics = attached.handle.end_iteration(iteration, is_interval_end)
    if metrics is None:
        return None
    if is_interval_end:
        _write(metrics.scalars(), iteration)
    if is_last_rank():  # this rank prints
        # After Megatron's own values: its main branch exports the first total as the loss.
        for name, loss in () if is_skipped else losses.items():
            totals.setdefault(name, torch.zeros(1, device=loss.device))
        # training_log divides each total by the iterations that advanced since the last line.
        advanced = totals.get("advanced iterations", 0) + (0 if is_skipped else 1)
        for reading in metrics.readings:
            for name, value in reading.of.headline().items():
                total = torch.tensor([value * max(1, advanced)], dtype=torch.float64)
                totals[name] = total.as_subclass(_Total)
    return metrics


def _interval(iteration: int) -> range | None:
    """The iterations of the log interval that ends with ``iteration``; None if no interval ends."""
    from megatron.training import get_args

    length = get_args().log_interval
    return range(iteration - length + 1, iteration + 1) if iteration % length == 0 else None


class _Total(torch.Tensor):
    """A total whose average Megatron always prints."""

    def item(self) -> _Average:
        return _Average(super().item())


class _Average(float):
    """Compares as greater than anything: Megatron 0.16 hides averages of 0, and all versions hide NaN."""

    def __truediv__(self, count: float) -> _Average:
        return _Average(float(self) / count)

    def __gt__(self, other: float) -> bool:
        return True

    __ge__ = __gt__


@user_errors_exit()
def _end_training(attached: _Attached) -> None:
    _log_the_rest(attached.handle.end_training())


def _log_the_rest(metrics: Metrics | None) -> None:
    iteration = _loop.last_step
    if metrics is not None and iteration is not None:
        _print(iteration, metrics, range(0), with_values=True)
        _write(metrics.scalars(), iteration)


def _print(iteration: int, metrics: Metrics, interval: range | None, with_values: bool = False) -> None:
    """Print each method's line. Use ``with_values`` if Megatron prints no line with the values."""
    from megatron.training import print_rank_last

    for reading in metrics.readings:
        if line := reading.line(interval, with_values):
            print_rank_last(f" {reading.settings.name} at iteration {iteration} | {line} | ")


@user_errors_exit()
def _check_step() -> None:
    """Refuse a training step with the same iteration as the step before."""
    iteration = _current_iteration()
    if iteration == _loop.last_step:
        raise UserError(
            f"two training steps had args.curr_iteration {iteration - 1}, so the methods' schedule is "
            "unknown; set it before each step as Megatron does, or use jreg_megatron.attach in the code"
        )
    _loop.last_step = iteration


def _with_prepared_model(
    function: Function, settings: tuple[Settings, ...], args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``setup_model_and_optimizer``, with the methods' changes of the unwrapped model."""
    if not prepares(settings):
        return args, named
    bound = inspect.signature(function).bind(*args, **named)
    container, provider = (bound.arguments.get(name) for name in ("cfg_container", "model_provider_func"))
    if (config := getattr(container, "model", None)) is not None:
        config.pre_wrap_hooks.append(functools.partial(user_errors_exit()(prepare), settings=settings))
    elif provider is not None:

        def prepared(*args: Any, **named: Any) -> Any:
            with user_errors_exit():
                return prepare([provider(*args, **named)], settings)[0]

        bound.arguments["model_provider_func"] = functools.wraps(provider)(prepared)
    return bound.args, bound.kwargs


def _refuse_another_megatron() -> None:
    """Refuse a Megatron that was imported before the script put another one first on Python's path."""
    import megatron.core

    loaded = Path(megatron.core.__file__).resolve()
    for folder in sys.path:
        found = Path(folder or ".", "megatron", "core", "__init__.py").resolve()
        if found.exists():
            if found != loaded:
                raise UserError(
                    f"the script puts {folder} in front of Python's path, but Megatron was imported before, "
                    f"from {loaded.parents[2]}; set PYTHONPATH to {folder} instead"
                )
            return


def _refuse_another_model_to_generate(args: Namespace, settings: tuple[Settings, ...]) -> None:
    """Refuse reinforcement learning: nothing is attached to its inference model."""
    for of_one in settings:
        if of_one.changes_model and getattr(args, "perform_rl_step", False):
            raise UserError(
                f"--perform-rl-step generates with its own model, which {of_one.name} does not change; leave "
                f"out {of_one.as_flags()}, or --perform-rl-step"
            )


def _refuse_optimizer(args: Namespace) -> None:
    """Refuse early what Megatron refuses in the optimizer's first step, or loses. The rules are for 0.19."""
    from jreg_megatron.mcore.preflight import optimizer

    if is_since_0_19():
        optimizer.combination(args)
        optimizer.resuming(args)


def _refuse_fusion_on_some_ranks(is_fused: bool) -> None:
    """Refuse fused gradient accumulation on only some ranks: a recipe's nodes decide alone whether to add the
    flag, by their Apex."""
    ranks = of_every_rank(is_fused)
    if len(set(ranks)) > 1:
        raise UserError(
            f"rank {ranks.index(False)} has --no-gradient-accumulation-fusion, but rank {ranks.index(True)} "
            "does not, so their gradients would round differently; give the flag to all ranks, or install "
            "NVIDIA's Apex on all nodes"
        )


def _current_iteration() -> int:
    """The current training iteration, 1-based as in the log.

    Raises:
        UserError: if Megatron does not set it.
    """
    from megatron.training import get_args

    before: int | None = getattr(get_args(), "curr_iteration", None)
    if before is None and _loop.attached is None:
        before = getattr(get_args(), "iteration", None)  # the checkpoint's, before the first step
    if before is None:
        raise UserError(
            "Megatron's args.curr_iteration is not set, so the methods' schedule is unknown; set it before "
            "each step as Megatron does, or use jreg_megatron.attach in the code"
        )
    return before + 1


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
