"""Small corpora and tokenizers for the tests of preparation, and the results of Megatron's own parts."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

Text = str | list[str]
ODD: list[Text] = [
    "",
    "漢字 🙂 ñ \u2028 \x85 end",
    ["one", "", "two three"],
    [],
    [""],
    "tabs\tand\n\nnew lines\r\n",
    "a \x00 zero",
    "  spaces  ",
]
"""Documents on which two programs could differ."""


def documents(count: int, seed: int = 0) -> list[str]:
    """Made-up text: words of 1 to 9 letters, documents of 1 to 80 words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(500)]
    return [" ".join(draw.choices(words, k=draw.randint(1, 80))) + "." for _ in range(count)]


def write_documents(prefix: Path | str, documents: Iterable[Sequence[int]], dtype: type = np.uint16) -> None:
    """A token file of documents of one sequence each, by Megatron's builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def megatrons_datasets(sizes: list[int], length: int, tokenizer: Any, **more: Any) -> Any:
    """Megatron's training, validation and test set: so many samples of so many tokens. ``more`` are fields of
    its configuration."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    plain = {"random_seed": 1, **dict.fromkeys(("reset_position_ids", "reset_attention_mask"), False)}
    how = {**plain, "eod_mask_loss": False, "tokenizer": tokenizer, "sequence_length": length} | more
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, GPTDatasetConfig(**how)).build()


def write_jsonl(path: Path, texts: Iterable[Text], key: str = "text") -> Path:
    """JSON lines, one in two of them with its text escaped."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        for number, text in enumerate(texts):
            stream.write(json.dumps({"id": number, key: text}, ensure_ascii=number % 2 == 0) + "\n")
    return path


def sentencepiece_model(path: Path, vocab_size: int = 400) -> Path:
    """A model trained by SentencePiece itself on the made-up text."""
    with path.open("wb") as stream:
        SentencePieceTrainer.train(
            sentence_iterator=iter(documents(300)),
            model_writer=stream,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    return path


def hugging_face_folder(path: Path, vocab_size: int = 400) -> Path:
    """A byte-level BPE as Hugging Face saves one, filled up with added tokens to ``vocab_size``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 400),
        special_tokens=["<end>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(300), trainer)
    extra = range(vocab_size - tokenizer.get_vocab_size())
    tokenizer.add_tokens([AddedToken(f"<{number}>") for number in extra])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


def reference(
    prefix: Path, texts: Iterable[Text], encode: Callable[[str], list[int]], eod: int | None, vocab_size: int
) -> dict[str, bytes]:
    """The ``.bin`` and ``.idx`` that Megatron's tool makes of ``texts``, by Megatron's own builder."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for text in texts:
        sentences = [encode(sentence) for sentence in (text if isinstance(text, list) else [text])]
        sentences = [ids for ids in sentences if ids]
        if sentences and eod is not None:
            sentences[-1] = [*sentences[-1], eod]
        builder.add_document(
            np.array([token for ids in sentences for token in ids]), [len(ids) for ids in sentences]
        )
    builder.data_file.close()
    builder.finalize(f"{prefix}.idx")
    return files(prefix)


def of_tool(folder: Path, texts: Iterable[Text], model: Path, eod: bool = True) -> dict[str, bytes]:
    """The files that Megatron's tool makes of ``texts`` with a SentencePiece model, in ``folder``."""
    encoder = SentencePieceProcessor(model_file=str(model))
    return reference(folder / "wanted", texts, encoder.encode, encoder.eos_id() if eod else None, 400)


def files(prefix: Path | str) -> dict[str, bytes]:
    """Contents of a dataset's two files."""
    return {ending: Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx")}


def call(*argv: object) -> int:
    """Run the command in this process, which has Megatron loaded; its exit status."""
    from jreg_megatron.data.__main__ import main

    try:
        main([str(argument) for argument in argv])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def start(
    argv: Sequence[object], before: Callable[[], None] = lambda: None, errors: Path | None = None
) -> multiprocessing.process.BaseProcess:
    """Run the command in a process of its own, forked from this one, after ``before()``.

    Args:
        argv: the command line.
        before: called in the new process.
        errors: a file for its standard error.
    """

    def body() -> None:
        if errors is not None:
            sys.stderr = errors.open("w", buffering=1)
        before()
        sys.exit(call(*argv))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def in_workers(action: Callable[[], object]) -> None:
    """Let the workers of this process call ``action`` before each text that they encode."""
    from jreg_megatron.data import tokenizing

    build, parent = tokenizing.build, os.getpid()

    def wrapped(settings: tokenizing.TokenizerSettings) -> tokenizing.Tokenizer:
        tokenizer = build(settings)

        def encode(text: str) -> list[int]:
            if os.getpid() != parent:
                action()
            return tokenizer.encode(text)

        return replace(tokenizer, encode=encode)

    tokenizing.build = wrapped
