"""Checks before the start that the teacher and the trained model have the same tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jreg_megatron.methods.let.settings import LETConfig
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.imports import errors_alone, need

_HUGGING_FACE = "HuggingFaceTokenizer"
_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_FLAG = LETConfig.flag("teacher")


def refuse_other_tokens(teacher: str, args: Any) -> None:
    """Refuse a tokenizer with a piece that has another id in the teacher's tokenizer.

    With ``NullTokenizer`` the data has only ids; then the vocabularies must have the same size.

    Args:
        teacher: the folder of a teacher that can be loaded.
        args: Megatron's arguments.

    Raises:
        UserError: naming both, and the first piece that differs.
    """
    kind, size = args.tokenizer_type, int(getattr(args, "vocab_size", None) or 0)
    if kind.startswith("Null"):
        known = json.loads((Path(teacher) / "config.json").read_text(encoding="utf-8")).get("vocab_size")
        sizes = {known, len(_pieces_of(_HUGGING_FACE, teacher))}
        if not sizes & {size, size + 1}:  # Megatron before 0.18 adds a token that ends a document
            raise UserError(
                f"--vocab-size is {size}, and {_FLAG} {teacher} has {known} tokens; give a teacher with the "
                "tokenizer of the data"
            )
        return
    file = args.vocab_file if kind == "GPT2BPETokenizer" else args.tokenizer_model
    added = getattr(args, "special_tokens", None) or getattr(args, "tokenizer_special_tokens", None) or ()
    own = {} if file is None else _pieces_of(kind, str(file), tuple(added))
    known_pieces = _pieces_of(_HUGGING_FACE, teacher)
    if not own or not known_pieces:
        lacking = f"--tokenizer-type {kind} {file}" if not own else f"{_FLAG} {teacher}"
        raise UserError(
            f"{LETConfig.name} cannot read the tokenizer of {lacking}, so it cannot compare the two; give "
            f"a teacher with its tokenizer's files, and --tokenizer-type {_HUGGING_FACE} with the same files"
        )
    differs = [piece for piece, own_id in own.items() if known_pieces.get(piece) != own_id]
    if differs:
        first = min(differs, key=own.__getitem__)
        raise UserError(
            f"the tokenizer {file} has the id {own[first]} for {first!r}, and that of {_FLAG} {teacher} has "
            f"{known_pieces.get(first, 'none')} ({len(differs)} of {len(own)} pieces differ); give a teacher "
            "with the same tokenizer"
        )


@cache
def _pieces_of(kind: str, place: str, added: tuple[str, ...] = ()) -> dict[str, int]:
    """The pieces of a tokenizer with their ids; empty if it has no files there or is of another type."""
    try:
        if kind in _SENTENCEPIECE:
            model = need("sentencepiece", kind, "data").SentencePieceProcessor(model_file=place)
            return {model.id_to_piece(number): number for number in range(model.get_piece_size())}
        if kind == "GPT2BPETokenizer":
            return dict(json.loads(Path(place).read_text(encoding="utf-8")))
        if kind == _HUGGING_FACE:
            transformers = need("transformers", kind, "analysis")
            with errors_alone("transformers"):
                tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            tokenizer.add_tokens(list(added), special_tokens=True)
            # A folder without a tokenizer may give one that knows only special tokens.
            return dict(tokenizer.get_vocab()) if len(tokenizer) > len(tokenizer.added_tokens_decoder) else {}
    except UserError:
        raise
    except Exception:  # of several libraries, where there are no files
        return {}
    return {}
