"""All settings of the regularizer: one frozen dataclass for Python, YAML and the command line."""

from __future__ import annotations

import argparse
import sys
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, NoReturn

import torch
from torch import Tensor

from jreg_megatron.methods.jreg import formulas
from jreg_megatron.runtime.errors import UserError

WEIGHT_RULES = ("softmax", "last", "uniform")
FINAL_STATES = ("pre_norm", "post_norm")
KERNELS = ("auto", "triton", "torch")
TOKENS = ("all", "unmasked")


FLAG_PREFIX = "--jreg-"


def flag_of(name: str) -> str:
    """The command-line flag of a setting: ``measure_interval`` -> ``--jreg-measure-interval``."""
    return FLAG_PREFIX + name.replace("_", "-")


def _weights_from_text(text: str) -> str | tuple[float, ...]:
    """``softmax`` stays a name, ``0,0.5,0.5`` becomes numbers; anything else is left for the checks."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


def _setting(default: Any, help: str, parse: Any = str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "parse": parse, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class JRegConfig:
    """Settings of the jump-suppressing regularizer: ``loss = CE + coeff * sum_l w_l * Psi_l``.

    Iterations are 1-based, as Megatron's log counts them. Every field is a command-line flag too
    (``--jreg-coeff`` and so on, see :meth:`add_arguments`) and a key for :meth:`from_mapping`.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    coeff: float = _setting(
        0.0,
        "lambda, the strength, >= 0. At 0 the displacement is only measured, and training is bit-identical "
        "to training without JREG. The paper takes 1.",
        float,
        "LAMBDA",
    )
    alpha: float = _setting(
        1.0,
        "sharpness of the layer weights softmax(alpha * [1..L]), >= 0. 0 weighs all layers alike. The paper"
        " takes 1.",
        float,
        "ALPHA",
    )
    weights: str | tuple[float, ...] = _setting(
        "softmax",
        "layer weights: 'softmax' of alpha (the paper's), 'last' (layer L alone), 'uniform' (1/L each), or "
        "one number per layer, first layer first, as in 0,0,0.3,0.7.",
        _weights_from_text,
        "RULE",
    )
    final_state: str = _setting(
        "pre_norm",
        "the last layer's output: 'pre_norm', before the final norm (the paper's), or 'post_norm', after "
        "it. The numbers differ several-fold.",
        metavar="STATE",
    )
    negligible_weight: float = _setting(
        1e-6,
        "the lightest layers get no gradient if their weights together are at most this share of all "
        "weights. 0 leaves none out.",
        float,
        "SHARE",
    )
    loss_weight: float = _setting(
        1.0,
        "the factor by which the script multiplies its cross-entropy, as in 0.5 * CE + 0.5 * KD. JREG is "
        "not multiplied. The first step refuses another factor.",
        float,
        "WEIGHT",
    )
    tokens: str = _setting(
        "all",
        "the tokens that count: 'all', or 'unmasked', those that the loss mask keeps, averaged as "
        "cross-entropy is.",
        metavar="TOKENS",
    )
    start_iteration: int = _setting(1, "first training iteration with the regularizer.", int, "N")
    stop_iteration: int | None = _setting(None, "first training iteration without it again.", int, "N")
    warmup_iterations: int = _setting(
        0, "warm-up: the coefficient rises linearly over this many iterations.", int, "N"
    )
    measure_interval: int = _setting(
        1, "measure in every N-th training iteration. Validation always measures.", int, "N"
    )
    kernels: str = _setting(
        "auto",
        "what computes: 'triton' (fused, on a GPU), 'torch' (anywhere), or 'auto': triton where it runs. "
        "All ranks must run the same kind.",
        metavar="KERNELS",
    )
    log_per_layer: bool = _setting(
        False, "also log each layer as jreg/displacement_layer_NN to TensorBoard and W&B.", bool
    )

    def __post_init__(self) -> None:
        _require("coeff", self.coeff, _is_finite(self.coeff) and self.coeff >= 0, "a finite number >= 0")
        weight = self.loss_weight
        _require("loss_weight", weight, _is_finite(weight) and weight > 0, "a finite number > 0")
        _require("alpha", self.alpha, _is_finite(self.alpha) and self.alpha >= 0, "a finite number >= 0")
        if isinstance(self.weights, str):
            rules = ", ".join(WEIGHT_RULES)
            known = self.weights in WEIGHT_RULES
            _require("weights", self.weights, known, f"one of {rules}, or one number per layer")
        else:
            is_list = isinstance(self.weights, list | tuple)
            _require("weights", self.weights, is_list, "a rule's name or a list of numbers, one per layer")
            numbers = tuple(self.weights)
            allowed = all(_is_finite(w) and w >= 0 for w in numbers) and any(numbers)
            _require("weights", _shown(numbers), allowed, "finite numbers >= 0, one per layer, not all 0")
            # A list from YAML or Python becomes what the frozen dataclass can hash and compare.
            object.__setattr__(self, "weights", tuple(float(w) for w in numbers))
        _require("final_state", self.final_state, self.final_state in FINAL_STATES, " or ".join(FINAL_STATES))
        share = self.negligible_weight
        _require(
            "negligible_weight", share, _is_finite(share) and 0 <= share < 1, "a number >= 0 and below 1"
        )
        _require("tokens", self.tokens, self.tokens in TOKENS, " or ".join(TOKENS))
        _require("kernels", self.kernels, self.kernels in KERNELS, ", ".join(KERNELS))
        for name, least in (("start_iteration", 1), ("warmup_iterations", 0), ("measure_interval", 1)):
            value = getattr(self, name)
            _require(name, value, _is_integer(value) and value >= least, f"a whole number >= {least}")
        if self.stop_iteration is not None:
            after = _is_integer(self.stop_iteration) and self.stop_iteration > self.start_iteration
            fix = f"a whole number above {flag_of('start_iteration')} ({self.start_iteration}), or left out"
            _require("stop_iteration", self.stop_iteration, after, fix)
        _require("log_per_layer", self.log_per_layer, isinstance(self.log_per_layer, bool), "true or false")

    def layer_weights(self, num_layers: int) -> Tensor:
        """The weights ``w_1..w_L`` of the regularizer.

        Returns:
            ``[num_layers]`` float64; sums to 1 except for explicit numbers, which are used as given.

        Raises:
            UserError: if explicit weights are not one per layer.
        """
        if not isinstance(self.weights, str):
            fix = f"{num_layers} numbers, one for each layer of the model, not {len(self.weights)}"
            _require("weights", _shown(self.weights), len(self.weights) == num_layers, fix)
            return torch.tensor(self.weights, dtype=torch.float64)
        if self.weights == "last":
            weights = torch.zeros(num_layers, dtype=torch.float64)
            weights[-1] = 1.0
            return weights
        return formulas.layer_weights(num_layers, 0.0 if self.weights == "uniform" else self.alpha)

    def gradient_weights(self, num_layers: int) -> Tensor:
        """:meth:`layer_weights`, with 0 for layers whose gradient is left out.

        Those are the lightest ones, as many as weigh at most ``negligible_weight`` of all together. Since no
        displacement is above 1, they hold at most ``coeff * negligible_weight * sum(w)`` of the loss; and
        since its gradient at a state ``h`` is no longer than ``1 / (2 |h|)``, at most so much over ``2 |h|``
        of a token's gradient.

        Returns:
            ``[num_layers]`` float64.

        Raises:
            UserError: if explicit weights are not one per layer.
        """
        weights = self.layer_weights(num_layers)
        order = weights.argsort(stable=True)
        is_left_out = weights[order].cumsum(0) <= self.negligible_weight * weights.sum()
        weights[order[is_left_out]] = 0.0
        return weights

    @property
    def has_schedule(self) -> bool:
        """Whether the coefficient or the measuring depends on the iteration."""
        constant = self.start_iteration == 1 and self.stop_iteration is None and self.warmup_iterations == 0
        return self.measure_interval != 1 or (self.coeff > 0 and not constant)

    def coeff_at(self, iteration: int) -> float:
        """lambda in training iteration ``iteration`` (1-based): 0 before the start and from the stop on.

        With a warm-up of N iterations the first one has ``coeff / N`` and the N-th the full ``coeff``.
        """
        step = iteration - self.start_iteration + 1
        if step < 1 or (self.stop_iteration is not None and iteration >= self.stop_iteration):
            return 0.0
        return self.coeff * min(1.0, step / self.warmup_iterations) if self.warmup_iterations else self.coeff

    def measures_at(self, iteration: int) -> bool:
        """Whether training iteration ``iteration`` (1-based) measures the displacement."""
        return iteration % self.measure_interval == 0

    def measured_iterations(self, last: int, log_interval: int) -> list[int]:
        """The iterations that a whole log interval measures; none if ``last`` does not end an interval."""
        whole = range(last - log_interval + 1, last + 1)
        return [*filter(self.measures_at, whole)] if last % log_interval == 0 else []

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> JRegConfig:
        """Build from field names and values, as YAML gives them.

        Raises:
            UserError: for an unknown name, with the nearest known one, or a value that is not allowed.
        """
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"unknown JREG setting '{name}'; {_nearest(name, known)}")
        return cls(**settings)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add one ``--jreg-...`` flag per setting, in a group of their own; returns the parser.

        A flag that is not given leaves nothing in the namespace, so a job without JREG does not know of it.
        """
        group = parser.add_argument_group(
            "JREG, the jump-suppressing regularizer",
            "loss = cross-entropy + lambda * sum over layers of weight * displacement (arXiv 2601.18302)",
        )
        for f in fields(cls):
            if f.metadata["parse"] is bool:
                group.add_argument(
                    flag_of(f.name), action="store_true", default=SUPPRESS, help=f.metadata["help"]
                )
                continue
            group.add_argument(
                flag_of(f.name),
                type=f.metadata["parse"],
                default=SUPPRESS,
                metavar=f.metadata["metavar"],
                help=f"{f.metadata['help']} Default: {default_text(f)}.",
            )
        return parser

    @classmethod
    def with_a_flag(cls, argv: list[str]) -> list[str]:
        """``argv``, with ``--jreg-coeff 0`` behind it if it has none of the flags: then JREG measures."""
        is_asked = any(word.startswith(FLAG_PREFIX) for word in argv)
        return argv if is_asked else [*argv, flag_of("coeff"), "0"]

    @classmethod
    def check_flags(cls, argv: list[str]) -> None:
        """Check the ``--jreg-...`` flags among a command line's words, before anything else is parsed.

        Raises:
            UserError: for an unknown flag, with the nearest known one, or a value that is not allowed.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)

        def refuse(message: str) -> NoReturn:
            raise UserError(message)

        parser.error = refuse  # type: ignore[method-assign]
        namespace, rest = cls.add_arguments(parser).parse_known_args(argv)
        for flag in (word.partition("=")[0] for word in rest if word.startswith(FLAG_PREFIX)):
            raise UserError(f"unknown flag {flag}; {_nearest(flag, [flag_of(f.name) for f in fields(cls)])}")
        cls.from_args(namespace)

    @classmethod
    def is_in(cls, args: argparse.Namespace) -> bool:
        """Whether any of the flags was given."""
        return any(hasattr(args, f"jreg_{f.name}") for f in fields(cls))

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> JRegConfig:
        """Build from a namespace that a parser with :meth:`add_arguments` filled.

        Raises:
            UserError: for a value that is not allowed.
        """
        names = {f.name: f"jreg_{f.name}" for f in fields(cls)}
        return cls(**{name: getattr(args, key) for name, key in names.items() if hasattr(args, key)})


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def default_text(f: Field[Any]) -> str:
    """A setting's default as users read it."""
    assert f.default is not MISSING
    return "none" if f.default is None else str(f.default)


def _shown(numbers: tuple[Any, ...]) -> str:
    return ",".join(str(n) for n in numbers)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(name: str, value: Any, allowed: bool, what: str) -> None:
    if not allowed:
        raise UserError(f"{flag_of(name)} (JRegConfig.{name}) is {value}; it must be {what}")
