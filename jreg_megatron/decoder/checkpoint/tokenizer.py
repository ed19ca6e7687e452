"""A Megatron training's tokenizer, if its files still exist."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jreg_megatron.data.tokenizing import TYPES, Tokenizer, TokenizerSettings, build, told_vocab_size
from jreg_megatron.runtime.errors import UserError


@dataclass(frozen=True)
class TrainingTokenizer(Tokenizer):
    """A training's tokenizer. It adds no special tokens, because the training's data has none."""

    settings: TokenizerSettings

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> TrainingTokenizer | None:
        """The tokenizer in Megatron's arguments; None if it no longer exists, or its type takes no text."""
        settings = settings_of(arguments)
        with suppress(UserError):
            return cls(**vars(build(settings)), settings=settings) if settings else None
        return None


def vocab_size_of(arguments: dict[str, Any], rows: int, tokenizer: TrainingTokenizer | None) -> int | None:
    """The number of the embedding's rows without padding, by Megatron's saved arguments; None if not known.

    ``rows`` is the number of all rows. ``tokenizer`` is the training's, if it still exists.
    """
    kind, given, size = arguments.get("tokenizer_type"), arguments.get("vocab_size"), None
    if arguments.get("make_vocab_size_divisible_by", 0) * arguments.get("tensor_model_parallel_size", 0) == 1:
        size = rows
    elif tokenizer and tokenizer.vocab_size <= rows and pads_to(arguments, tokenizer.vocab_size, rows):
        size = tokenizer.vocab_size
    elif (told := told_vocab_size(arguments)) is not None:
        size = told
    # With other types Megatron ignores --vocab-size and pads the tokenizer's size.
    elif given and kind not in TYPES and pads_to(arguments, given, rows, if_unknown=False):
        size = given
    return None if size is None else min(size, rows)


def pads_to(arguments: dict[str, Any], size: int, rows: int, if_unknown: bool = True) -> bool:
    """Whether Megatron, with these arguments, pads a vocabulary of ``size`` tokens to ``rows`` rows."""
    multiple = arguments.get("make_vocab_size_divisible_by", 0)
    multiple *= arguments.get("tensor_model_parallel_size", 0)
    return math.ceil(size / multiple) * multiple == rows if multiple else if_unknown


def settings_of(arguments: dict[str, Any]) -> TokenizerSettings | None:
    """The tokenizer's settings in Megatron's arguments; None for a type that takes no text here."""
    kind, model = arguments.get("tokenizer_type"), arguments.get("tokenizer_model")
    if kind not in TYPES or not model:
        return None
    if arguments.get("metadata_path") or arguments.get("tokenizer_metadata"):
        return None  # it may name another class
    if not arguments.get("tokenizer_sentencepiece_ignore_extra_whitespaces", True):
        return None  # not known to TokenizerSettings
    if "legacy_tokenizer" in arguments and not arguments["legacy_tokenizer"]:  # 0.15 and 0.16
        without_special_tokens = not arguments.get("tokenizer_hf_include_special_tokens")
    else:
        without_special_tokens = bool(arguments.get("tokenizer_hf_no_include_special_tokens"))
    settings = TokenizerSettings(
        kind,
        str(model),
        tuple(arguments.get("special_tokens") or arguments.get("tokenizer_special_tokens") or ()),
        bool(arguments.get("tokenizer_sentencepiece_legacy")),
        bool(arguments.get("tokenizer_hf_no_use_fast")),
        without_special_tokens,
    )
    if settings.is_sentencepiece and not Path(settings.tokenizer_model).is_file():
        return None
    return settings
