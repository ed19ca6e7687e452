"""The tokenizer that a Megatron training names, as long as it is where it was."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jreg_megatron.data.tokenizing import TYPES, Tokenizer, TokenizerSettings, build
from jreg_megatron.errors import UserError


@dataclass(frozen=True)
class TrainingTokenizer:
    """A training's tokenizer; no special tokens are added, as none are in the training's data."""

    settings: TokenizerSettings
    _tokenizer: Tokenizer

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> TrainingTokenizer | None:
        """The one that Megatron's arguments name; None if it is gone, or of a type that takes no text."""
        settings = settings_of(arguments)
        if settings is None:
            return None
        try:
            return cls(settings, build(settings))
        except UserError:
            return None

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        return self._tokenizer.vocab_size

    @property
    def end_of_text(self) -> int | None:
        """Id that ends a document."""
        return self._tokenizer.eod

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode(ids)


def settings_of(arguments: dict[str, Any]) -> TokenizerSettings | None:
    """What Megatron's arguments say about the tokenizer; None for a type that takes no text here."""
    kind, model = arguments.get("tokenizer_type"), arguments.get("tokenizer_model")
    if kind not in TYPES or not model:
        return None
    settings = TokenizerSettings(
        kind,
        str(model),
        tuple(arguments.get("special_tokens") or arguments.get("tokenizer_special_tokens") or ()),
        bool(arguments.get("tokenizer_sentencepiece_legacy")),
        bool(arguments.get("tokenizer_hf_no_use_fast")),
        bool(arguments.get("tokenizer_hf_no_include_special_tokens")),
    )
    if settings.is_sentencepiece and not Path(settings.tokenizer_model).is_file():
        return None
    return settings


def megatron_tokenizer(args: Namespace) -> Any | None:
    """The tokenizer object of Megatron's, of any type; None if it cannot be built."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    try:
        return build_tokenizer(args)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return None
