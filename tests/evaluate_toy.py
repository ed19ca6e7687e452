"""A model with random weights, a tokenizer of real text, as transformers saves them, and a task."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jreg_megatron.data.speeches import read_speeches

VOCABULARY, CONTEXT = 384, 192


def toy_model(layers: int = 3, seed: int = 0) -> Any:
    """A Llama in evaluation mode; its weights are large, so that its predictions are anything but even."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def toy_tokenizer(begins: bool = False) -> PreTrainedTokenizerFast:
    """A BPE of bytes; with ``begins`` every text begins with a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([read_speeches()["1790-Washington-1"]], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if begins else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_toy(folder: Path, layers: int = 3, seed: int = 0) -> Path:
    """A folder that ``from_pretrained`` reads."""
    toy_model(layers, seed).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def own_task(folder: Path, start: int = 0, **more: Any) -> Path:
    """A folder with a task called ``mine``, of eight questions about numbers from ``start`` on."""
    folder.mkdir()
    lines = [
        json.dumps({"question": f"{n} and {n}", "choices": ["a", "b"], "answer": n % 2})
        for n in range(start, start + 8)
    ]
    (folder / "mine.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "mine.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "mine.yaml").write_text(json.dumps(task | more))  # JSON is YAML
    return folder
