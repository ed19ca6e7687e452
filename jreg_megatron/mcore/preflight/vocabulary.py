"""Checks of the tokenizer, the model's vocabulary, and the ids in the data."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from typing import Any

from jreg_megatron.data.tokenizing import NULL_TYPES, SENTENCEPIECE_TYPES, told_vocab_size
from jreg_megatron.mcore.preflight.asked import divisible, flag_of, tensor_parallel
from jreg_megatron.mcore.preflight.data import local_prefixes, token_file_of
from jreg_megatron.runtime.errors import UserError, check_least


def tokenizer(args: Namespace) -> None:
    if args.tokenizer_type is None:
        raise UserError(
            "--tokenizer-type is missing; give one, for example SentencePieceTokenizer and --tokenizer-model"
        )
    if args.tokenizer_type in NULL_TYPES and not args.vocab_size:
        raise UserError(f"--vocab-size is missing; --tokenizer-type {args.tokenizer_type} needs it")
    of_file = (*SENTENCEPIECE_TYPES, "TikTokenizer")  # for the others it may also be a name on the hub
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

    The first and the last token are always read; all tokens if the pieces cover them.
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
    multiple = args.make_vocab_size_divisible_by * tensor_parallel(args)
    return int(math.ceil(size / multiple) * multiple)


def _exact_tokenizer_size(args: Namespace) -> int | None:
    """Number of tokens of Megatron's tokenizer, for the types where it is cheap to know."""
    if args.metadata_path is not None:
        return None  # it may name another class
    if args.tokenizer_type not in SENTENCEPIECE_TYPES:
        return told_vocab_size(vars(args))
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(args.tokenizer_model)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--tokenizer-model is {args.tokenizer_model}, which is not a SentencePiece model; "
            "correct the path"
        ) from error
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
    except Exception:  # tokenizers has no class of its own
        return None
    return max(ids, default=-1) + 1 + len(args.special_tokens or [])
