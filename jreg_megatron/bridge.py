"""Methods in Megatron-Bridge, the training loop of NVIDIA's NeMo framework: two lines in a recipe's script.

    from jreg_megatron.bridge import JRegCallback, JRegConfig

    pretrain(config, forward_step, callbacks=[JRegCallback(config, JRegConfig(coeff=1.0))])

Bridge finds a callback's events by their names, so this module does not import Bridge. Tested with
Megatron-Bridge 0.6.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.anatomy import unwrap
from jreg_megatron.stream.attachment import attach, refuse_settings
from jreg_megatron.stream.handle import Handle
from jreg_megatron.stream.method import Metrics
from jreg_megatron.stream.preparation import prepare, prepares
from jreg_megatron.stream.settings import Settings
from jreg_megatron.stream.support import LAYER_NOT_SEEN, refuse_unsupported

__all__ = ["JRegCallback", "JRegConfig"]

_NOT_ATTACHED = (
    "jreg_megatron is not attached to the model that Megatron-Bridge trains; the run stops: give "
    "JRegCallback and pretrain the same config, and give pretrain the callback"
)


class JRegCallback:
    """Attaches methods to the model that Bridge builds, and logs their values while Bridge's loop runs.

    Each log interval and each validation has one collective. Then the last rank prints one console line per
    method. TensorBoard, W&B, MLflow and Comet get the same values if Bridge uses them. One all-reduce after
    the first step of a run checks that every layer was seen. Other steps have no collective.

    A log interval that the last iteration or ``exit_interval`` cuts off is logged too. Bridge sends no event
    on SIGTERM or after ``exit_duration_in_mins``. Then the values since the last line are not logged, and the
    first line after the resume names its iterations.

    Make one callback per call of ``pretrain`` or ``finetune``.

    ``tokens="unmasked"`` needs a padding mask or a loss mask in the model's call, on every pipeline stage.
    Bridge's own forward steps pass no loss mask. Those after version 0.6.2 pass a padding mask with packed
    sequences. Without a mask the first step raises a :class:`UserError`.
    """

    def __init__(self, config: Any, *settings: Settings) -> None:
        """Refuse settings that are not supported, and add hooks to Bridge's model configuration.

        If Bridge changes the configuration later, the built model is checked again.

        Args:
            config: the ``ConfigContainer`` of ``pretrain``.
            settings: one for each method, such as ``JRegConfig(coeff=1.0)``.

        Raises:
            UserError: if a setting of Bridge is not supported, or ``config`` is no ``ConfigContainer``.
        """
        refuse_settings(settings, knows_iteration=True)
        self._settings = settings
        self._handle: Handle | None = None
        self._chunks: list[nn.Module] = []
        self._state: Any = None
        refuse_unsupported(_Parts(config), *settings)

        # Plain functions. A copy of the configuration would copy the object of a bound method, and its model.
        def attach_to(model: list[nn.Module]) -> list[nn.Module]:
            self._attach(model)
            return model

        def prepare_for(model: list[nn.Module]) -> list[nn.Module]:
            return prepare(model, settings)

        _when_built(getattr(config, "model", None), prepare_for if prepares(settings) else None, attach_to)

    @property
    def handle(self) -> Handle:
        """The handle of the attached model.

        Raises:
            UserError: if nothing is attached, so that no run continues silently without its methods.
        """
        if self._handle is None:
            raise UserError(_NOT_ATTACHED)
        return self._handle

    # -- Bridge's events ---------------------------------------------------------------------------

    def on_train_start(self, context: Any) -> None:
        """Raises:
        UserError: if Bridge trains another model than the one with JREG.
        """
        if [unwrap(chunk) for chunk in context.model] != self._chunks:
            raise UserError(_NOT_ATTACHED)
        self._state = context.state
        if context.optimizer is not None:
            self.handle.use_optimizer(context.optimizer)
        self.handle.reset_training_metrics()

    def on_train_step_end(self, context: Any) -> None:
        """At the end of a log interval report the mean over its micro-batches. Collective.

        Raises:
            UserError: if a layer was not seen.
        """
        iteration, config = self._iteration(), context.state.cfg
        every, exit_interval = config.logger.log_interval, config.train.exit_interval
        # Bridge sends no event when it exits.
        is_end = iteration % every == 0 or bool(exit_interval and iteration % exit_interval == 0)
        metrics = self.handle.end_iteration(iteration, is_end)
        if is_end and metrics is not None:
            interval = range(iteration - every + 1, iteration + 1) if iteration % every == 0 else ()
            self._report(context.state, metrics, iteration, "", interval)

    def on_train_end(self, context: Any) -> None:
        """Report the rest of a log interval at the end of training. Collective.

        Raises:
            UserError: if a layer was not seen.
        """
        metrics = self.handle.end_training()
        if metrics is not None:
            self._report(context.state, metrics, int(context.state.train_state.step), "", [])

    def on_eval_start(self, context: Any) -> None:
        """Begin a validation or a test."""
        self.handle.reset_validation_metrics()

    def on_eval_end(self, context: Any) -> None:
        """Report the mean over the validation's micro-batches. Collective.

        Raises:
            UserError: if a layer was not seen.
        """
        self._report_evaluation(context.state, " validation")

    on_test_start = on_eval_start

    def on_test_end(self, context: Any) -> None:
        """Report the mean over the test's micro-batches. Collective.

        Raises:
            UserError: if a layer was not seen.
        """
        self._report_evaluation(context.state, " test")

    # -- what they do ------------------------------------------------------------------------------

    def _attach(self, model: list[nn.Module]) -> None:
        self._handle = attach(model, *self._settings, iteration=self._iteration)
        self._chunks = [unwrap(chunk) for chunk in model]
        if _rank() == 0:
            print(self._handle.describe(), flush=True)

    def _iteration(self) -> int:
        """The current training iteration, 1-based. Bridge increments its step after ``on_train_step_end``."""
        if self._state is None:  # the model trains, but no event came
            raise UserError(_NOT_ATTACHED)
        return int(self._state.train_state.step) + 1

    def _report_evaluation(self, state: Any, suffix: str) -> None:
        metrics = self.handle.reduce_validation_metrics()
        if not self.handle.is_whole(metrics):
            raise UserError(LAYER_NOT_SEEN)
        self._report(state, metrics, int(state.train_state.step), suffix)

    def _report(
        self,
        state: Any,
        metrics: Metrics | None,
        iteration: int,
        suffix: str,
        interval: Sequence[int] | None = None,
    ) -> None:
        """Log the values, with ``suffix`` after their names. Only the last rank has Bridge's writers."""
        if metrics is None:
            return
        for reading in metrics.readings if _rank() == _num_ranks() - 1 else ():
            name, line = reading.settings.name, reading.line(interval)
            print(f" {name}{suffix} at iteration {iteration} | {line} |", flush=True)
        named = {f"{name}{suffix}": value for name, value in metrics.scalars().items()}
        if writer := state.tensorboard_logger:
            for name, value in named.items():
                writer.add_scalar(name, value, iteration)
            writer.flush()  # Bridge flushes before the last validation only
        if wandb := state.wandb_logger:
            wandb.log(named, iteration)
        for logger in (state.mlflow_logger, state.comet_logger):
            if logger:
                logger.log_metrics(named, step=iteration)


class _Parts:
    """All parts of a ``ConfigContainer`` as one object: settings that conflict may be in different parts.

    If several parts have a setting, the first value that turns it on counts. Bridge later copies it to the
    other parts.
    """

    def __init__(self, config: Any) -> None:
        named = ("model", "ddp", "dist", "comm_overlap", "optimizer")
        self._all = [part for name in named if (part := getattr(config, name, None)) is not None]

    def __getattr__(self, name: str) -> Any:
        values = [getattr(part, name) for part in self._all if hasattr(part, name)]
        if not values:
            raise AttributeError(name)
        return next((value for value in values if value and value != "none"), values[0])


def _when_built(model_config: Any, before: Any, hook: Any) -> None:
    """Register hooks, which Bridge calls with a rank's chunks before and after it wraps them.

    Before the wrapping, the model is not on its device yet.
    """
    if hasattr(model_config, "register_post_wrap_hook"):  # a model provider
        if before is not None:
            model_config.register_pre_wrap_hook(before)
        model_config.register_post_wrap_hook(hook)
    elif hasattr(model_config, "post_wrap_hooks"):  # a ModelConfig with a ModelBuilder
        if before is not None:
            model_config.pre_wrap_hooks.append(before)
        model_config.post_wrap_hooks.append(hook)
    else:
        raise UserError(
            f"config.model is a {type(model_config).__name__}, which has no hook for the built model; "
            "JRegCallback(config, settings) takes the ConfigContainer of Megatron-Bridge 0.6"
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
