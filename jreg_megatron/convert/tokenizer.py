"""Export a Megatron training's tokenizer for ``AutoTokenizer``, and compare it with the original."""

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
"""Text of many kinds, to compare tokenizers."""

_BPE, _UNIGRAM = 2, 1
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"


def save_tokenizer(tokenizer: TrainingTokenizer, folder: Path) -> tuple[list[str], int | None]:
    """Write the tokenizer's files into a folder, and check that they give the training's ids.

    Hugging Face reads the text ``</s>`` as a control piece, and SentencePiece reads it as plain text.

    Returns:
        Notes for the user, and the id of the piece that begins a document, or None.

    Raises:
        UserError: if transformers' tokenizer gives other ids.
    """
    from transformers import AutoTokenizer

    model, notes = tokenizer.settings.tokenizer_model, []
    if not tokenizer.settings.is_sentencepiece:
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    elif write_sentencepiece(Path(model), folder) == _UNIGRAM:
        notes.append(
            "transformers and SentencePiece round the scores of a unigram tokenizer differently, so they may "
            "split a long text differently in a few places"
        )
    written = AutoTokenizer.from_pretrained(folder)
    for text in sample_texts():
        expected = tokenizer.encode(text)
        found = written(text, add_special_tokens=False, verbose=False)["input_ids"]
        if found != expected:
            pairs = enumerate(zip(expected, found, strict=False))
            same = next((at for at, (a, b) in pairs if a != b), min(len(expected), len(found)))
            raise UserError(
                f"transformers gives other ids than the training's tokenizer {model} near "
                f"{tokenizer.decode(expected[max(0, same - 2) : same + 3])!r}; export with --no-tokenizer"
            )
    return notes, written.bos_token_id


def write_sentencepiece(tokenizer_model: Path, folder: Path) -> int:
    """Write a SentencePiece model as files for ``AutoTokenizer``; returns its model type."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer_model.read_bytes())
    ids = {name: getattr(model.trainer_spec, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
    PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(model),
        clean_up_tokenization_spaces=False,
        **{
            f"{name}_token": model.pieces[number].piece
            for name, number in ids.items()
            if 0 <= number < len(model.pieces)
        },
    ).save_pretrained(folder)
    # Transformers 5 renamed the class. It still knows the old name, which older programs need.
    add_to_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return int(model.trainer_spec.model_type)


def add_to_json(path: Path, values: dict[str, Any]) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def sample_texts() -> list[str]:
    """Texts to compare tokenizers: the sample, its lines, and speeches if they are installed."""
    from jreg_megatron.data.texts import held_out_speeches

    try:
        speeches = [str(text.content) for text in held_out_speeches()[::4]]
    except UserError:
        speeches = []
    return [SAMPLE, *SAMPLE.splitlines(), *speeches]


def _fast_tokenizer(model: Any) -> Any:
    """SentencePiece's model as one of the library ``tokenizers``."""
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
            "the training's SentencePiece model is a word or character model, which cannot be exported; give "
            "--no-tokenizer"
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
    """Pairs that merge into one piece, best first. SentencePiece scores the piece, not the pair."""
    found = [
        (-piece.score, vocabulary[left], vocabulary[right], left, right)
        for piece in model.pieces
        if piece.type == _NORMAL
        for cut in range(1, len(piece.piece))
        if (left := piece.piece[:cut]) in vocabulary and (right := piece.piece[cut:]) in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(found)]
