"""Tasks for lm-evaluation-harness made of held-out speeches. They need no network.

They distinguish similar models, and a trained model from an untrained one. They are not a public benchmark,
so their figures are not comparable with published ones.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from jreg_megatron.data.texts import Text

_SEED = 1790
_PER_SPEECH = 10
_CONTEXT_WORDS = (40, 120)
_ENDING_WORDS = (12, 50)
_CHOICES = 4
_CHARACTERS = 4000
_SPACE_AFTER_SENTENCE = re.compile(r"(?<=[a-z]{3}[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"\b[a-z]{5,}\b")
_LAST_WORD = re.compile(r"(.*) ([a-z]{5,})[.!?]")


def write_speech_tasks(folder: Path, speeches: list[Text]) -> None:
    """Write each task as YAML and JSON lines, for ``lm_eval --include_path``."""
    for name, (make, config) in SPEECH_TASKS.items():
        rng = random.Random(_SEED)
        samples = make(speeches, rng)
        rng.shuffle(samples)  # so that the first N come from all speeches
        data = folder / f"{name}.jsonl"
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        data.write_text("".join(lines), encoding="utf-8")
        files = {"data_files": {"test": str(data.absolute())}, "cache_dir": str(folder / ".cache")}
        task = {
            **{"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"},
            **config,
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2), encoding="utf-8")  # JSON is YAML


def _continuations(speeches: list[Text], rng: random.Random) -> list[dict[str, Any]]:
    passages = {speech.name: _some(list(_passages(speech)), rng) for speech in speeches}
    samples = []
    for name, own in passages.items():
        foreign = [ending for other, pairs in passages.items() if other != name for _, ending in pairs]
        for context, ending in own:
            samples.append({"speech": name, "context": context, **_choose(ending, foreign, rng)})
    return samples


def _last_words(speeches: list[Text], rng: random.Random) -> list[dict[str, Any]]:
    samples = []
    for speech in speeches:
        found = []
        for passage, _ in _passages(speech):
            match = _LAST_WORD.fullmatch(passage)
            said = set(_WORD.findall(match[1])) if match else set()
            # Greedy decoding, as in LAMBADA, is too hard: a model of 135M got one of 40 such words.
            if match and match[2] in said and len(said) >= _CHOICES:
                found.append({"speech": speech.name, "context": match[1], **_choose(match[2], said, rng)})
        samples += _some(found, rng)
    return samples


def _beginnings(speeches: list[Text], _: random.Random) -> list[dict[str, Any]]:
    return [{"speech": speech.name, "text": str(speech.content)[:_CHARACTERS]} for speech in speeches]


def _passages(speech: Text) -> Iterator[tuple[str, str]]:
    """Passages of whole sentences, each with the sentences after it. They do not overlap."""
    sentences = _SPACE_AFTER_SENTENCE.split(" ".join(str(speech.content).split()))
    while sentences:
        context, sentences = _take(sentences, _CONTEXT_WORDS[0])
        ending, sentences = _take(sentences, _ENDING_WORDS[0])
        sizes = len(context.split()), len(ending.split())
        limits = _CONTEXT_WORDS, _ENDING_WORDS
        if all(low <= size <= high for size, (low, high) in zip(sizes, limits, strict=True)):
            yield context, ending


def _take(sentences: list[str], least: int) -> tuple[str, list[str]]:
    """The first sentences, which together have at least ``least`` words, and the other sentences."""
    words = 0
    for number, sentence in enumerate(sentences, start=1):
        words += len(sentence.split())
        if words >= least:
            return " ".join(sentences[:number]), sentences[number:]
    return " ".join(sentences), []


def _choose(right: str, among: Collection[str], rng: random.Random) -> dict[str, Any]:
    """The choices, and the index of the right choice."""
    choices = rng.sample(sorted(set(among) - {right}), _CHOICES - 1)
    gold = rng.randrange(_CHOICES)
    choices.insert(gold, right)
    return {"choices": choices, "gold": gold}


def _some[T](of: list[T], rng: random.Random) -> list[T]:
    return rng.sample(of, min(_PER_SPEECH, len(of)))


_CHOICE = {
    **{"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices"},
    "doc_to_target": "gold",
}
_BITS = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}


def _metrics(*names: str, **how: Any) -> dict[str, Any]:
    return {"metric_list": [{"metric": name, **how} for name in names]}


_MEAN = {"aggregation": "mean", "higher_is_better": True}
_Maker = Callable[[list[Text], random.Random], list[dict[str, Any]]]

SPEECH_TASKS: dict[str, tuple[_Maker, dict[str, Any]]] = {
    # Which of four passages continues a speech? The wrong ones are from other speeches.
    "speeches_continuation": (_continuations, _CHOICE | _metrics("acc", "acc_norm", **_MEAN)),
    # Which of four words ends a sentence? All four are in the passage before it.
    "speeches_last_word": (_last_words, _CHOICE | _metrics("acc", **_MEAN)),
    # Bits per byte of the first 4,000 characters of each speech.
    "speeches_bits_per_byte": (_beginnings, _BITS | _metrics("bits_per_byte")),
}
"""By name: the function that makes the samples, and the task's settings."""
