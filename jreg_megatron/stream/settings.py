"""The settings of a method: one frozen dataclass for Python, YAML and the command line.

A method's settings are a subclass of :class:`Settings` with a field for each setting. The fields define the
flags of Megatron's parser, the keys of :meth:`Settings.from_mapping` and the README's table.
"""

from __future__ import annotations

import argparse
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from jreg_megatron.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from jreg_megatron.stream.method import Method, Place


OTHER_LAYERS = {
    **dict.fromkeys(
        ("is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern"),
        "the layers of a HybridModel are not those of a GPTModel",
    ),
    "mtp_num_layers": "the layers of multi-token prediction would stay as they are",
    "use_transformer_engine_op_fuser": "an MLP is then one operation",
}
"""For :attr:`Settings.refused` of a method that changes only the layers of a ``GPTModel``."""

LAYER_RULES = ("mixer", "sublayer")
"""Definitions of a hybrid model's layer; see :mod:`jreg_megatron.stream.anatomy`."""


def setting(
    default: Any, help: str, parse: Any = str, metavar: str | None = None, required: bool = False
) -> Any:
    """A field of a method's settings.

    Args:
        default: the value if none is given.
        help: what it sets, for ``--help`` and the README.
        parse: turns a flag's text into the value; ``bool`` for a flag without a value.
        metavar: the placeholder of the value in ``--help``.
        required: whether the method's own checks refuse the default, for ``--help``.
    """
    given = {"help": help, "parse": parse, "metavar": metavar, "required": required}
    return field(default=default, metadata=given)


def layer_setting() -> Any:
    """The field ``layer`` of a method's settings; all methods on a model need the same value."""
    return setting(
        LAYER_RULES[0],
        "what one layer of a HybridModel is. With 'mixer': a mixer (attention, Mamba) and the MLPs and "
        "experts after it. With 'sublayer': each sub-layer. All methods need the same value.",
        metavar="RULE",
    )


class Settings:
    """Base of the settings of all methods; subclasses are frozen dataclasses.

    Iterations are 1-based, as Megatron's log counts them.
    """

    name: ClassVar[str]
    """The method's name in log lines and errors."""
    prefix: ClassVar[str]
    """The prefix of its flags, without dashes: ``short`` gives ``--short-coeff`` and so on."""
    title: ClassVar[str]
    """The title of its flags in ``--help``."""
    about: ClassVar[str]
    """One line under the title."""

    # -- what a method may declare -----------------------------------------------------------------

    only_measures: ClassVar[bool] = False
    """Whether the method never changes the training, with any settings."""
    in_full_graphs: ClassVar[bool] = False
    """Whether the method has been compared within Megatron's CUDA graph of a whole iteration."""
    in_overlap: ClassVar[bool] = False
    """Whether the method has been compared within Megatron's overlapped schedule for experts."""
    refused: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Megatron's settings that the method does not support: name -> reason."""

    @property
    def has_schedule(self) -> bool:
        """Whether the method needs the number of the training iteration."""
        return self._measure_interval > 1

    @property
    def changes_model(self) -> bool:
        """Whether a model that was trained with the method gives other results without it. By default the
        same as :attr:`changes_modules`."""
        return self.changes_modules

    @property
    def changes_modules(self) -> bool:
        """Whether :meth:`prepare` changes the model. By default true if a subclass defines it."""
        return type(self).prepare is not Settings.prepare

    @property
    def added_parameters(self) -> frozenset[str]:
        """Names of the parameters that :meth:`prepare` adds, or of the modules that hold them. A checkpoint
        without the method lacks them."""
        return frozenset()

    def adds(self, parameter: str) -> bool:
        """Whether the method adds a parameter, by its name in the model."""
        return any(f".{name}." in f".{parameter}." for name in self.added_parameters)

    def refuse(self, model_config: Any) -> None:
        """Refuse by name the settings that the method does not support; by default those in :attr:`refused`.

        Args:
            model_config: Megatron's ``TransformerConfig``, or parsed arguments, which use the same names. It
                need not have all of them.

        Raises:
            UserError: naming the setting, its value and what to do.
        """
        for name, reason in self.refused.items():
            if (value := getattr(model_config, name, None)) and value != "none":
                raise UserError(
                    f"{self.name} does not support {name} ({value!s:.40}), since {reason}; leave one "
                    "of the two out"
                )

    def refuse_layers(self, num_layers: int) -> None:
        """As :meth:`refuse`, for settings that do not fit a model of ``num_layers`` layers."""

    def refuse_model(self, chunks: Sequence[Any]) -> None:
        """As :meth:`refuse`, for properties that only the built model shows. Called on every rank.

        Args:
            chunks: the unwrapped model chunks of this rank.
        """

    def prepare(self, chunk: nn.Module) -> None:
        """Change a model chunk before its optimizer and its data-parallel wrapper are made.

        A parameter that is added to a layer here is trained, saved and loaded like the layer's own.

        Args:
            chunk: an unwrapped model chunk, which may still be on the CPU.
        """

    def make(self, place: Place) -> Method:
        """Make the method for a built model. The default is a method that only works in :meth:`prepare`.

        Raises:
            UserError: if the model does not allow it.
        """
        from jreg_megatron.stream.method import Method  # it imports torch

        if type(self).prepare is Settings.prepare:
            raise NotImplementedError
        return Method(self, place)

    def require_layer(self) -> None:
        """Refuse a field ``layer`` that is not one of ``LAYER_RULES``."""
        layer = self.layer_rule
        self.require("layer", layer, layer in (None, *LAYER_RULES), " or ".join(LAYER_RULES))

    @property
    def layer_rule(self) -> str | None:
        """The method's setting ``layer``; None if it has none and uses the layers of the other methods."""
        rule: str | None = getattr(self, "layer", None)
        return rule

    # -- when it measures --------------------------------------------------------------------------

    @property
    def _measure_interval(self) -> int:
        """The setting ``measure_interval``; 1 for a method without it."""
        interval: int = getattr(self, "measure_interval", 1)
        return interval

    def measures_at(self, iteration: int) -> bool:
        """Whether training iteration ``iteration`` (1-based) measures."""
        return iteration % self._measure_interval == 0

    # -- from YAML and from the command line -------------------------------------------------------

    @classmethod
    def flag(cls, name: str) -> str:
        """The command-line flag of a setting: ``measure_interval`` -> ``--PREFIX-measure-interval``."""
        return f"--{cls.prefix}-{name.replace('_', '-')}"

    @classmethod
    def is_flag(cls, word: str) -> bool:
        """Whether a word of a command line begins like one of the method's flags."""
        return word.startswith(f"--{cls.prefix}-")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Build from field names and values, such as those of a YAML file.

        Raises:
            UserError: for an unknown name, with the nearest known one, or a value that is not allowed.
        """
        known = [f.name for f in _fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"unknown {cls.name} setting '{name}'; {_nearest(name, known)}")
        return cls(**settings)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add one flag per setting, in a group of their own; returns the parser.

        A flag that is not given is not in the namespace.
        """
        group = parser.add_argument_group(cls.title, cls.about)
        for f in _fields(cls):
            options: dict[str, Any] = {"default": SUPPRESS, "help": f.metadata["help"].replace("%", "%%")}
            if f.metadata["parse"] is bool:
                options["action"] = "store_true"
            else:
                options |= {"type": f.metadata["parse"], "metavar": f.metadata["metavar"]}
                options["help"] += " Required." if f.metadata["required"] else f" Default: {default_text(f)}."
            group.add_argument(cls.flag(f.name), **options)
        return parser

    @classmethod
    def check_flags(cls, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Check the method's flags in a command line before all other flags are parsed.

        Returns:
            The given flags, and the other words.

        Raises:
            UserError: for an unknown flag, with the nearest known one, or a value that is not allowed.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)

        def refuse(message: str) -> NoReturn:
            raise UserError(message)

        parser.error = refuse  # type: ignore[method-assign]
        namespace, rest = cls.add_arguments(parser).parse_known_args(argv)
        for flag in (word.partition("=")[0] for word in rest if cls.is_flag(word)):
            known = [cls.flag(f.name) for f in _fields(cls)]
            raise UserError(f"unknown flag {flag}; {_nearest(flag, known)}")
        if cls.is_in(namespace):
            cls.from_args(namespace)
        return namespace, rest

    @classmethod
    def is_in(cls, args: argparse.Namespace) -> bool:
        """Whether any of the flags was given."""
        return any(hasattr(args, key) for key in cls._keys().values())

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """Build from a namespace that a parser with :meth:`add_arguments` filled.

        Raises:
            UserError: for a value that is not allowed.
        """
        return cls(**{name: getattr(args, key) for name, key in cls._keys().items() if hasattr(args, key)})

    def as_flags(self) -> str:
        """The settings as a user types them on a command line."""
        words = []
        for f in _fields(self):
            value = getattr(self, f.name)
            if f.name == "layer" and value == f.default:
                continue  # only hybrid models need it
            if f.metadata["parse"] is bool or value is None:
                words += [self.flag(f.name)] * bool(value)
            else:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words += [self.flag(f.name), text]
        return " ".join(words)

    @classmethod
    def _keys(cls) -> dict[str, str]:
        """The settings' names, and their names in parsed arguments."""
        return {f.name: f"{cls.prefix}_{f.name}" for f in _fields(cls)}

    @classmethod
    def require(cls, name: str, value: Any, allowed: bool, what: str) -> None:
        """Refuse a value unless it is allowed.

        Args:
            name: the setting's name.
            value: shown to the user.
            allowed: whether the value is allowed.
            what: the allowed values, to complete "it must be".
        """
        if not allowed:
            raise UserError(f"{cls.flag(name)} ({cls.__name__}.{name}) is {value}; it must be {what}")


def flags_of(settings: Sequence[Settings], none: str) -> str:
    """The settings of several methods as a user types them; ``none`` if there are none."""
    return " ".join(of_one.as_flags() for of_one in settings) or none


def _fields(of: Any) -> tuple[Field[Any], ...]:
    return fields(of)


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def default_text(f: Field[Any]) -> str:
    """A setting's default as users read it."""
    assert f.default is not MISSING
    return "none" if f.default is None else str(f.default)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def layer_rule(settings: Sequence[Settings]) -> str:
    """The definition of a hybrid model's layer that all methods share.

    Raises:
        UserError: if the methods' definitions differ.
    """
    for of_one in settings:
        of_one.require_layer()
    given = {of_one.layer_rule: of_one for of_one in settings if of_one.layer_rule is not None}
    if len(given) > 1:
        told = [f"{of_one.flag('layer')} is {rule}" for rule, of_one in given.items()]
        raise UserError(f"{' and '.join(told)}; give all methods on a model the same value")
    return next(iter(given), LAYER_RULES[0])
