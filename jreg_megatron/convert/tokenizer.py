"""A Megatron training's tokenizer as a folder that ``AutoTokenizer`` loads, held against the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jreg_megatron.decoder.checkpoint.tokenizer import TrainingTokenizer
from jreg_megatron.runtime.errors import UserError

SAMPLE = (
    "The union has  two spaces here, a tab\there, and a line\nthat ends.\n\n A line may begin with a space, "
    "and end with one. \n1776, 3.14159 and $1,000,000 (50 %) are numbers; don't, can't, e.g. and U.S.A. are "
    "words.\nÄpfel, naïve, façade, Žižek, Ελληνικά, русский, עברית, العربية, हिन्दी, 中文, 日本語, 한국어.\n"
    "Emoji: \N{GRINNING FACE} \N{FAMILY}\N{ZERO WIDTH JOINER}\N{VARIATION SELECTOR-16}; combining: e\u0301; "
    "no-break\u00a0space, ﬁ, ½, Å.\n\tint main() { return x != 0 ? a[0] : b->c; }  // code\n"
)
"""Text of many kinds that is always at hand, to hold tokenizers against each other."""

_BPE, _UNIGRAM = 2, 1
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"


def save_tokenizer(tokenizer: TrainingTokenizer, folder: Path) -> list[str]:
    """Write the tokenizer's files into a folder, and see that they give the ids that training used.

    The text of a control piece, such as ``</s>``, is that piece for Hugging Face and plain text for
    SentencePiece.

    Returns:
        What the user should know about it.

    Raises:
        UserError: if transformers' tokenizer gives other ids or another text back.
    """
    from transformers import AutoTokenizer

    settings, notes = tokenizer.settings, []
    if settings.is_sentencepiece:
        if write_sentencepiece(Path(settings.tokenizer_model), folder) == _UNIGRAM:
            notes.append(
                "the tokenizer is of type unigram, whose scores transformers adds with other rounding than "
                "SentencePiece: a long text may be cut otherwise in a few places"
            )
    else:
        AutoTokenizer.from_pretrained(settings.tokenizer_model, trust_remote_code=False).save_pretrained(
            folder
        )
    _hold_against(tokenizer, folder)
    return notes


def write_sentencepiece(tokenizer_model: Path, folder: Path) -> int:
    """Write a SentencePiece model as the files that ``AutoTokenizer`` loads; its model type is returned."""
    from transformers import PreTrainedTokenizerFast

    model = _read_model(tokenizer_model)
    pieces = {name: _control_piece(model, name) for name in ("unk", "bos", "eos", "pad")}
    PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(model),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": piece for name, piece in pieces.items() if piece is not None},
    ).save_pretrained(folder)
    _name_class_as_before(folder / "tokenizer_config.json")
    return int(model.trainer_spec.model_type)


def _name_class_as_before(path: Path) -> None:
    """The class has a new name in transformers 5, which knows the old one, as older programs do."""
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def begin_of_text(tokenizer: TrainingTokenizer) -> int | None:
    """Id of the piece that begins a document, where the tokenizer has one."""
    settings = tokenizer.settings
    if settings.is_sentencepiece:
        from sentencepiece import SentencePieceProcessor

        found = SentencePieceProcessor(model_file=settings.tokenizer_model).bos_id()
        return int(found) if found >= 0 else None
    from transformers import AutoTokenizer

    bos: int | None = AutoTokenizer.from_pretrained(settings.tokenizer_model).bos_token_id
    return bos


def sample_texts() -> list[str]:
    """Texts to hold tokenizers against each other with: the sample, and speeches where they are installed."""
    from jreg_megatron.data.texts import held_out_speeches

    try:
        speeches = [str(text.content) for text in held_out_speeches()[::4]]
    except UserError:
        speeches = []
    return [SAMPLE, *SAMPLE.splitlines(), *speeches]


def _hold_against(tokenizer: TrainingTokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder)
    for text in sample_texts():
        expected = tokenizer.encode(text)
        found = ours(text, add_special_tokens=False, verbose=False)["input_ids"]
        if found != expected:
            place = next(
                (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
                min(len(expected), len(found)),
            )
            raise UserError(
                "transformers gives other ids than the training's tokenizer "
                f"{tokenizer.settings.tokenizer_model} near "
                f"{tokenizer.decode(expected[max(0, place - 2) : place + 3])!r}; export with --no-tokenizer"
            )


def _read_model(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    return model


def _control_piece(model: Any, name: str) -> str | None:
    number = getattr(model.trainer_spec, f"{name}_id")
    return str(model.pieces[number].piece) if 0 <= number < len(model.pieces) else None


def _fast_tokenizer(model: Any) -> Any:
    """SentencePiece's algorithm in the library ``tokenizers``."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    trainer, rules = model.trainer_spec, model.normalizer_spec
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    unknown = model.pieces[trainer.unk_id].piece
    algorithm: Any
    if trainer.model_type == _BPE:
        algorithm = models.BPE(
            vocab=vocabulary,
            merges=_merges(model, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == _UNIGRAM:
        algorithm = models.Unigram(
            [(piece.piece, piece.score) for piece in model.pieces], trainer.unk_id, trainer.byte_fallback
        )
    else:
        raise UserError(
            "the training's SentencePiece model is of words or characters; export with --no-tokenizer"
        )
    tokenizer = Tokenizer(algorithm)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    for piece in model.pieces:
        if piece.type in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=True, special=False)])
    return tokenizer


def _merges(model: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Which pairs become one piece, best first: SentencePiece scores the piece, not the pair."""
    found = [
        (-piece.score, vocabulary[left], vocabulary[right], left, right)
        for piece in model.pieces
        if piece.type == _NORMAL
        for cut in range(1, len(piece.piece))
        if (left := piece.piece[:cut]) in vocabulary and (right := piece.piece[cut:]) in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(found)]
