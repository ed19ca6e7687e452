"""Megatron's own tokenizers, so that the ids in the data are those that training expects."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.extras import without_compilation

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
"""Megatron's types that read a SentencePiece model."""
TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")
"""Megatron's types that text can be prepared with here."""
NULL_TYPES = ("NullTokenizer", "NullMultimodalTokenizer")
"""Megatron's types without a vocabulary, for data that holds ids already."""
_TIKTOKEN_DEFAULT_VOCAB = 2**17

_HUGGING_FACE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class TokenizerSettings:
    """What Megatron's flags of the same names say about the tokenizer."""

    tokenizer_type: str
    tokenizer_model: str
    special_tokens: tuple[str, ...] = ()
    tokenizer_sentencepiece_legacy: bool = False
    tokenizer_hf_no_use_fast: bool = False
    tokenizer_hf_no_include_special_tokens: bool = False

    @classmethod
    def from_args(cls, args: Namespace) -> TokenizerSettings:
        """Take them from arguments that :func:`add_arguments` has defined."""
        return cls(
            args.tokenizer_type,
            args.tokenizer_model,
            tuple(args.tokenizer_special_tokens),
            args.tokenizer_sentencepiece_legacy,
            args.tokenizer_hf_no_use_fast,
            args.tokenizer_hf_no_include_special_tokens,
        )

    @property
    def is_sentencepiece(self) -> bool:
        """Whether the model is one SentencePiece file."""
        return self.tokenizer_type in SENTENCEPIECE_TYPES

    def megatron_arguments(self) -> Namespace:
        """The namespace that Megatron builds a tokenizer from. No code of the hub is executed."""
        values = asdict(self) | {"special_tokens": list(self.special_tokens) or None}
        # In Megatron's preprocessing tool these have the same values.
        padding = {"rank": 1, "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1}
        unused = ("vocab_file", "merge_file", "metadata_path", "chat_template", "vocab_size")
        return Namespace(
            **values,
            **padding,
            **dict.fromkeys((*unused, "padded_vocab_size")),
            trust_remote_code=False,
            pad_vocab_size=True,
            vocab_extra_ids=0,
            tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        )


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that Megatron has built.

    Attributes:
        encode: the ids of a text.
        decode: the text of ids.
        vocab_size: every id is below it.
        eod: id that ends a document; None if the tokenizer has none.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    vocab_size: int
    eod: int | None


def add_arguments(parser: ArgumentParser, required: bool) -> None:
    """Define the flags, named as Megatron names them."""
    group = parser.add_argument_group("tokenizer, by Megatron's own flags")
    group.add_argument(
        "--tokenizer-type",
        choices=TYPES,
        default=TYPES[0],
        metavar="TYPE",
        help=f"one of {', '.join(TYPES)} (default: %(default)s)",
    )
    group.add_argument(
        "--tokenizer-model",
        required=required,
        metavar="PATH",
        help="SentencePiece model, or for HuggingFaceTokenizer a folder or a name on the hub",
    )
    group.add_argument(
        "--tokenizer-special-tokens", nargs="+", default=[], metavar="TOKEN", help="tokens to add"
    )
    for flag in ("sentencepiece-legacy", "hf-no-use-fast", "hf-no-include-special-tokens"):
        group.add_argument(f"--tokenizer-{flag}", action="store_true", help="as in Megatron")


def identify(settings: TokenizerSettings) -> dict[str, Any]:
    """What decides the ids: the settings, the sum of the files, and the version of the library.

    Raises:
        UserError: if the model is not there or not one of its type; found without importing Megatron.
    """
    identity = asdict(settings) | {"special_tokens": list(settings.special_tokens)}
    if settings.is_sentencepiece:
        _check_sentencepiece(settings.tokenizer_model)
        return identity | {
            "sha256": _sum_of([Path(settings.tokenizer_model)]),
            "library": f"sentencepiece {version('sentencepiece')}",
        }
    folder = Path(settings.tokenizer_model)
    if folder.exists() and not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"--tokenizer-model is {folder}, which has no tokenizer_config.json; "
            "name the folder that a Hugging Face tokenizer was saved to"
        )
    files = sorted(path for pattern in _HUGGING_FACE_FILES for path in folder.glob(pattern) if path.is_file())
    return identity | {
        "sha256": _sum_of(files) if files else _sum_of_vocabulary(settings),
        "library": f"transformers {version('transformers')}, tokenizers {version('tokenizers')}",
    }


def build(settings: TokenizerSettings) -> Tokenizer:
    """Let Megatron build the tokenizer; the first call takes seconds, since it imports Megatron.

    Raises:
        UserError: if Megatron is too old or cannot build it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings(), without_compilation():
        warnings.simplefilter("ignore")
        try:
            from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
        except ModuleNotFoundError as error:
            raise UserError(
                f"Megatron-Core {version('megatron-core')} has no tokenizers of its own; "
                "install 0.17 or later"
            ) from error
    if not settings.is_sentencepiece:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # it warns of every document beyond a model's length
    try:
        built = build_tokenizer(settings.megatron_arguments())
        eod = built.eod
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _not_loadable(settings, error) from error
    # Megatron counts the tokens of Hugging Face's, among whose ids there may be gaps.
    ids = [] if settings.is_sentencepiece else built._tokenizer.tokenizer.get_vocab().values()
    return Tokenizer(
        built.tokenize,
        built.detokenize,
        max(int(built.vocab_size), 1 + max(ids, default=-1)),
        None if eod is None or eod < 0 else int(eod),
    )


def told_vocab_size(arguments: Mapping[str, Any]) -> int | None:
    """Tokens of those types whose size Megatron takes from ``--vocab-size``; None for other types.

    Args:
        arguments: Megatron's, by name, as some version of it has made them.
    """
    kind, size = arguments.get("tokenizer_type"), arguments.get("vocab_size")
    if kind == "TikTokenizer":
        return int(size or _TIKTOKEN_DEFAULT_VOCAB)
    if kind not in NULL_TYPES or not size:
        return None
    # Before 0.18 the NullTokenizer added a token that ends a document. The multimodal one still does.
    adds_end = kind != "NullTokenizer" or "null_tokenizer_eod_id" not in arguments
    return int(size) + adds_end


def _sum_of(files: list[Path]) -> str:
    """SHA-256 of the contents, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); fix its access") from error
    return digest.hexdigest()


def _check_sentencepiece(path: str) -> None:
    import sentencepiece

    if not os.path.isfile(path):
        raise UserError(f"--tokenizer-model is {path}, which is not a file; correct the path")
    try:
        sentencepiece.SentencePieceProcessor().Load(path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--tokenizer-model is {path}, which is not a SentencePiece model; correct the path, or give "
            "--tokenizer-type HuggingFaceTokenizer with a folder"
        ) from error


def _not_loadable(settings: TokenizerSettings, error: Exception) -> UserError:
    return UserError(
        f"--tokenizer-model {settings.tokenizer_model} cannot be loaded as {settings.tokenizer_type} "
        f"({one_line(error, 300)}); correct the path or the type"
    )


def _sum_of_vocabulary(settings: TokenizerSettings) -> str:
    """SHA-256 of a tokenizer of the hub, which has no files here."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer_model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_loadable(settings, error) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
