"""Checks of the training data's files, the tokenizer, the model's vocabulary, and the ids in the data."""

from __future__ import annotations

import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import batched
from typing import Any

from jreg_megatron.data.token_file import TokenFile
from jreg_megatron.data.tokenizing import (
    NULL_TYPES,
    SENTENCEPIECE_TYPES,
    sentencepiece_model,
    told_vocab_size,
)
from jreg_megatron.mcore.preflight.asked import divisible, given
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.flags import check_least, flag_of

_SPLITS = ("train", "valid", "test")
_DEFAULT_SPLIT = "969,30,1"  # Megatron's
_SPLIT_FLAGS = ("train_data_path", "valid_data_path", "test_data_path")


def data_source(args: Namespace) -> None:
    if args.perform_rl_step:
        return
    sources = given(args, "data_path", "data_args_path")
    sources += given(args, *_SPLIT_FLAGS)[:1] + given(args, "per_split_data_args_path")
    sources += ["--mock-data"] if args.mock_data else []
    if not sources:
        raise UserError(
            "--data-path is missing; give the prefix of .bin/.idx files (or --train-data-path and "
            "--valid-data-path), or --mock-data for random tokens"
        )
    if len(sources) > 1:
        raise UserError(f"{sources[0]} and {sources[1]} exclude each other; give one source of data")
    if sources[0] == "--data-args-path" and args.split is None:
        raise UserError("--split is missing; --data-args-path needs it, for example --split 99,1,0")
    split_by_file = sources[0] not in ("--data-path", "--data-args-path", "--mock-data")
    if split_by_file and args.split is not None:
        raise UserError(f"--split is {args.split}, but {sources[0]} gives the splits by file; drop --split")
    if any(given(args, *_SPLIT_FLAGS)) and args.train_data_path is None and not args.skip_train:
        raise UserError(f"--train-data-path is missing beside {sources[0]}; add it")


def data_files(args: Namespace) -> None:
    for flag, prefix in local_prefixes(args):
        token_file_of(flag, prefix)


def local_prefixes(args: Namespace) -> Iterator[tuple[str, str]]:
    """Each local dataset once, with the flag that names it."""
    # Fine-tuning data are JSON lines. Mock data have no files.
    if args.mock_data or args.sft:
        return
    seen = set()
    for flag, entries in _blends(args):
        for _, prefix in _weighted(flag, entries):
            if "://" not in prefix and prefix not in seen:
                seen.add(prefix)
                yield flag, prefix


def _blends(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    for name in ("data_path", *_SPLIT_FLAGS):
        if getattr(args, name) is not None:
            yield flag_of(name), getattr(args, name)
    if args.data_args_path is not None and "://" not in args.data_args_path:
        flag = f"--data-args-path {args.data_args_path}"
        yield flag, _read_text(flag, args.data_args_path).split()
    if args.per_split_data_args_path is not None and "://" not in args.per_split_data_args_path:
        flag = f"--per-split-data-args-path {args.per_split_data_args_path}"
        try:
            splits = json.loads(_read_text(flag, args.per_split_data_args_path))
        except ValueError as error:
            raise UserError(f"{flag} is not JSON ({one_line(error)}); correct the file") from error
        missing = [split for split in _SPLITS if not isinstance(splits, dict) or split not in splits]
        if missing:
            raise UserError(f"{flag} has no key {missing[0]}; it must have train, valid and test")
        for split in _SPLITS:
            entries = splits[split].split() if isinstance(splits[split], str) else splits[split]
            if entries is not None:
                yield f"{flag} ({split})", [str(entry) for entry in entries]


def training_blends(args: Namespace) -> Iterator[tuple[str, float, list[tuple[float | None, str]]]]:
    """For the training data: the flag, each dataset's share for training, and weights with prefixes."""
    if args.mock_data or args.sft:
        return
    parts = [float(part) for part in re.split(r"[,/]", args.split or _DEFAULT_SPLIT)]
    for flag, entries in _blends(args):
        name = flag.partition(" ")[0]
        if name in ("--valid-data-path", "--test-data-path") or flag.endswith(("(valid)", "(test)")):
            continue
        is_split = name in ("--data-path", "--data-args-path")
        yield flag, parts[0] / sum(parts) if is_split else 1.0, _weighted(flag, entries)


def _weighted(flag: str, entries: list[str]) -> list[tuple[float | None, str]]:
    """A blend's weights and prefixes. The weights are None if the blend has none."""
    if not entries:
        raise UserError(f"{flag} is empty; give the prefix of .bin/.idx files")
    if len(entries) % 2 == 0:
        weights = [_is_number(entry) for entry in entries[::2]]
        if all(weights):
            return [(float(weight), prefix.strip()) for weight, prefix in batched(entries, 2)]
        if any(weights):
            raise UserError(
                f"{flag} is {' '.join(entries)}; give a weight before every prefix or before none"
            )
    return [(None, entry.strip()) for entry in entries]


def token_file_of(flag: str, prefix: str) -> TokenFile:
    """The files of a dataset. Raises as :class:`TokenFile`, and names ``flag`` too."""
    try:
        return TokenFile(prefix)
    except UserError as error:
        hint = "; give a weight before every prefix or before none" if _is_number(prefix) else ""
        raise UserError(f"{flag} names {prefix}, but {error}{hint}") from error


def _read_text(flag: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} cannot be read ({one_line(error)}); correct the path") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def tokenizer(args: Namespace) -> None:
    if args.tokenizer_type is None:
        raise UserError(
            "--tokenizer-type is missing; give one, for example SentencePieceTokenizer and --tokenizer-model"
        )
    if args.tokenizer_type in NULL_TYPES and not args.vocab_size:
        raise UserError(f"--vocab-size is missing; --tokenizer-type {args.tokenizer_type} needs it")
    of_file = (*SENTENCEPIECE_TYPES, "TikTokenizer")  # other types also take a name on the hub
    needs_model = args.tokenizer_type in (*of_file, "HuggingFaceTokenizer", "SFTTokenizer")
    if needs_model and args.tokenizer_model is None:
        raise UserError(f"--tokenizer-model is missing; --tokenizer-type {args.tokenizer_type} needs it")
    model = ("tokenizer_model",) if args.tokenizer_type in of_file else ()
    for name in (*model, "vocab_file", "merge_file", "metadata_path"):
        path = getattr(args, name)
        if path is not None and not os.path.isfile(path):
            flag = "--tokenizer-metadata" if name == "metadata_path" else flag_of(name)
            raise UserError(f"{flag} is {path}, which is not a file; correct the path")


def vocabulary_sizes(args: Namespace) -> None:
    check_least(args, vocab_size=1, padded_vocab_size=1, make_vocab_size_divisible_by=1)
    divisible(args, "padded_vocab_size", "tensor_model_parallel_size", "round it up")
    if args.padded_vocab_size is None and not args.pad_vocab_size and args.vocab_size is None:
        raise UserError("--vocab-size is missing; --no-pad-vocab-size needs it (or --padded-vocab-size)")
    size = _exact_tokenizer_size(args)
    # Other tokenizers take their size from --vocab-size.
    named = ("vocab_size",) if args.tokenizer_type in SENTENCEPIECE_TYPES else ()
    for name in (*named, "padded_vocab_size"):
        value = getattr(args, name)
        if size is not None and value is not None and value < size:
            raise UserError(
                f"{flag_of(name)} is {value}, but the tokenizer has {size} tokens; "
                f"leave it out or give >= {size}"
            )


def token_ids(args: Namespace) -> None:
    vocabulary = _model_vocabulary(args)
    if vocabulary is None:
        return
    prefixes = list(local_prefixes(args))
    for flag, prefix in prefixes:
        file = token_file_of(flag, prefix)
        if file.dtype.startswith("float"):
            continue
        least, most = _extreme_ids(file.tokens, windows=max(8, min(64, 1024 // len(prefixes))))
        if least < 0 or most >= vocabulary:
            raise UserError(
                f"{flag} names {prefix}, which holds the token id {most if least >= 0 else least}, but the "
                f"model's vocabulary is {vocabulary} (ids 0 to {vocabulary - 1}); give the tokenizer of the "
                "data or a larger --padded-vocab-size"
            )


def _extreme_ids(tokens: Any, windows: int, width: int = 1 << 14) -> tuple[int, int]:
    """Smallest and largest token id in up to ``windows`` evenly spaced pieces of ``width`` tokens.

    The first and the last token are always read. All tokens are read if the pieces cover them.
    """
    if len(tokens) <= windows * width:
        starts, width = [0], len(tokens)
    else:
        starts = [piece * (len(tokens) - width) // (windows - 1) for piece in range(windows)]
    pieces = [tokens[start : start + width] for start in starts]
    return min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)


def _model_vocabulary(args: Namespace) -> int | None:
    """Rows of the embedding, as Megatron computes them; None if not known here."""
    if args.padded_vocab_size is not None:
        return int(args.padded_vocab_size)
    size = args.vocab_size
    if args.pad_vocab_size:
        size = _exact_tokenizer_size(args) or _hugging_face_size(args)
    if size is None:
        return None
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return int(math.ceil(size / multiple) * multiple)


def _exact_tokenizer_size(args: Namespace) -> int | None:
    """Number of tokens of Megatron's tokenizer, for types for which it is cheap to find; else None."""
    if args.metadata_path is not None:
        return None  # it may name another class
    if args.tokenizer_type not in SENTENCEPIECE_TYPES:
        return told_vocab_size(vars(args))
    model = sentencepiece_model(args.tokenizer_model)
    added = args.special_tokens if args.tokenizer_sentencepiece_legacy and args.special_tokens else []
    return int(model.get_piece_size()) + len({t for t in added if model.piece_to_id(t) == model.unk_id()})


def _hugging_face_size(args: Namespace) -> int | None:
    """Upper bound on the size of a Hugging Face tokenizer in a local folder; None if it cannot be read."""
    path = os.path.join(args.tokenizer_model or "", "tokenizer.json")
    if args.tokenizer_type != "HuggingFaceTokenizer" or args.metadata_path is not None:
        return None
    try:
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(path).get_vocab(with_added_tokens=True).values()
    except Exception:  # tokenizers has no exception class
        return None
    return max(ids, default=-1) + 1 + len(args.special_tokens or [])
