"""Megatron's own tokenizers, so that data and training have the same ids."""

from __future__ import annotations

import hashlib
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.imports import need, without_compilation, without_noise

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
"""Megatron's types that read a SentencePiece model."""
TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")
"""Megatron's types that can encode text here."""
NULL_TYPES = ("NullTokenizer", "NullMultimodalTokenizer")
"""Megatron's types without a vocabulary, for data that is already encoded."""
_TIKTOKEN_DEFAULT_VOCAB = 2**17

_HUGGING_FACE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class TokenizerSettings:
    """The values of Megatron's flags of the same names."""

    tokenizer_type: str
    tokenizer_model: str
    special_tokens: Sequence[str] = ()
    tokenizer_sentencepiece_legacy: bool = False
    tokenizer_hf_no_use_fast: bool = False
    tokenizer_hf_no_include_special_tokens: bool = False

    @classmethod
    def from_args(cls, args: Namespace) -> TokenizerSettings:
        """The settings in arguments that :func:`add_arguments` has defined."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    @property
    def is_sentencepiece(self) -> bool:
        """Whether the model is one SentencePiece file."""
        return self.tokenizer_type in SENTENCEPIECE_TYPES

    def megatron_arguments(self) -> Namespace:
        """The namespace from which Megatron builds a tokenizer. It forbids code from the hub."""
        unused = ("vocab_file", "merge_file", "metadata_path", "chat_template", "vocab_size")
        # In Megatron's preprocessing tool these have the same values.
        same = {"rank": 1, "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1}
        same |= {"pad_vocab_size": True, "vocab_extra_ids": 0, "trust_remote_code": False}
        same |= {"tokenizer_sentencepiece_ignore_extra_whitespaces": True}
        given = asdict(self) | {"special_tokens": list(self.special_tokens) or None}
        return Namespace(**given, **same, **dict.fromkeys((*unused, "padded_vocab_size")))


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that Megatron has built."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    vocab_size: int  # every id is below it
    eod: int | None  # the id that ends a document


def add_arguments(parser: ArgumentParser, required: bool) -> None:
    """Define the tokenizer's flags, with Megatron's names."""
    add = parser.add_argument_group("tokenizer, by Megatron's own flags").add_argument
    types = f"one of {', '.join(TYPES)} (default: %(default)s)"
    add("--tokenizer-type", choices=TYPES, default=TYPES[0], metavar="TYPE", help=types)
    model = "SentencePiece model, or for HuggingFaceTokenizer a folder or a name on the hub"
    add("--tokenizer-model", required=required, metavar="PATH", help=model)
    tokens: dict[str, Any] = {"dest": "special_tokens", "nargs": "+", "default": [], "metavar": "TOKEN"}
    add("--tokenizer-special-tokens", **tokens, help="tokens to add")
    for flag in ("sentencepiece-legacy", "hf-no-use-fast", "hf-no-include-special-tokens"):
        add(f"--tokenizer-{flag}", action="store_true", help="as in Megatron")


def sentencepiece_model(path: str) -> Any:
    """Load a SentencePiece model from a file.

    Raises:
        UserError: if the file is not a SentencePiece model.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--tokenizer-model is {path}, which is not a SentencePiece model ({one_line(error)}); correct "
            "the path, or give --tokenizer-type HuggingFaceTokenizer with a folder"
        ) from error
    return model


def identify(settings: TokenizerSettings) -> dict[str, Any]:
    """All that decides the ids: the settings, the files' SHA-256, and the version of the library.

    It does not import Megatron.

    Raises:
        UserError: if the model does not exist, or is not of its type.
    """
    model, libraries = Path(settings.tokenizer_model), ["sentencepiece"]
    if settings.is_sentencepiece:
        sentencepiece_model(str(model))
        files = [model]
    else:
        libraries = ["transformers", "tokenizers"]
        try:
            if not model.exists():
                hub = need("huggingface_hub", "HuggingFaceTokenizer", "data")
                model = Path(hub.snapshot_download(str(model), allow_patterns=[*_HUGGING_FACE_FILES]))
        except (OSError, ValueError, RuntimeError) as error:
            raise _not_loadable(settings, error) from error
        files = sorted(path for each in _HUGGING_FACE_FILES for path in model.glob(each) if path.is_file())
    return asdict(settings) | {
        "sha256": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        "library": ", ".join(f"{library} {version(library)}" for library in libraries),
    }


def build(settings: TokenizerSettings) -> Tokenizer:
    """Let Megatron build the tokenizer. The first call takes seconds, because it imports Megatron.

    Raises:
        UserError: if Megatron is too old or cannot build it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    with without_noise(), without_compilation():
        try:
            from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
        except ModuleNotFoundError as error:
            raise UserError(
                f"Megatron-Core {version('megatron-core')} has no tokenizers of its own; "
                "install 0.17 or later"
            ) from error
    if not settings.is_sentencepiece:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # it warns of every document longer than a model's context
    try:
        built = build_tokenizer(settings.megatron_arguments())
        eod = built.eod
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _not_loadable(settings, error) from error
    # For a Hugging Face tokenizer Megatron returns the number of tokens. Its ids may have gaps.
    ids = [] if settings.is_sentencepiece else built._tokenizer.tokenizer.get_vocab().values()
    return Tokenizer(
        built.tokenize,
        built.detokenize,
        max(int(built.vocab_size), 1 + max(ids, default=-1)),
        None if eod is None or eod < 0 else int(eod),
    )


def told_vocab_size(arguments: Mapping[str, Any]) -> int | None:
    """The vocabulary size of a type for which Megatron takes it from ``--vocab-size``; None for other types.

    Args:
        arguments: Megatron's arguments by name, from any version of it.
    """
    kind, size = arguments.get("tokenizer_type"), arguments.get("vocab_size")
    if kind == "TikTokenizer":
        return int(size or _TIKTOKEN_DEFAULT_VOCAB)
    if kind not in NULL_TYPES or not size:
        return None
    # Before 0.18 the NullTokenizer added an end-of-document token. The multimodal one still does.
    adds_end = kind != "NullTokenizer" or "null_tokenizer_eod_id" not in arguments
    return int(size) + adds_end


def _not_loadable(settings: TokenizerSettings, error: Exception) -> UserError:
    return UserError(
        f"--tokenizer-model {settings.tokenizer_model} cannot be loaded as {settings.tokenizer_type} "
        f"({one_line(error, 300)}); correct the path or the type"
    )
