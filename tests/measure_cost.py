"""The cost of measuring: time relative to the model's forward pass, and memory and time by number of texts.

    python tests/measure_cost.py MODEL

Rounds with and without measuring alternate in one process, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import date
from statistics import median

import psutil
import torch

from jreg_megatron.data.speeches import read_speeches
from jreg_megatron.data.texts import Text
from jreg_megatron.data.windows import batches
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.load import load
from jreg_megatron.decoder.reference import find_models
from jreg_megatron.measure.measurement import BatchSums, measure
from jreg_megatron.runtime.output import versions


def main() -> None:
    """Measure the costs and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each of three texts in a round")
    parser.add_argument("--short", type=int, default=24, help="tokens of each of the many texts")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000])
    args = parser.parse_args()
    (reference,) = find_models([args.model])
    decoder = load(reference, argparse.Namespace(dtype="float32", device="cpu", trust_remote_code=False))
    packages = ", ".join(" ".join(pair) for pair in versions("torch", "transformers").items())
    print(
        f"{reference.name}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{packages}, {date.today()}"
    )
    _overhead(decoder, args.tokens, args.rounds)
    _growth(decoder, args.short, args.counts)


def _overhead(decoder: Decoder, tokens: int, rounds: int) -> None:
    assert decoder.encode is not None
    texts = [Text(name, text) for name, text in list(read_speeches().items())[:3]]
    (batch,) = batches(decoder.windows(texts, tokens), 3)

    def forward() -> None:
        decoder.logits(batch.tokens)

    def layers_alone() -> None:
        decoder.run(batch.tokens)

    def measured() -> None:
        sums = BatchSums(batch)
        with decoder.observed(sums):
            decoder.run(batch.tokens)
        sums.table()

    forward()
    over_forward, over_layers = [], []
    for _ in range(rounds):
        whole, alone, with_measuring = _seconds(forward), _seconds(layers_alone), _seconds(measured)
        over_forward.append(with_measuring / whole)
        over_layers.append(with_measuring / alone)
    for what, ratios in (("forward pass", over_forward), ("layers without the head", over_layers)):
        print(
            f"measuring over the {what}: {median(ratios):.3f} (median of {rounds} rounds, "
            f"{min(ratios):.3f} to {max(ratios):.3f}; processor time, 3 x {tokens} tokens)"
        )


def _growth(decoder: Decoder, tokens: int, counts: list[int]) -> None:
    speech = next(iter(read_speeches().values()))

    def texts(count: int) -> Iterator[Text]:
        for number in range(count):
            yield Text(str(number), speech[number:])

    for count in (counts[0], *counts):
        peak = 0

        def look(_: int) -> None:
            nonlocal peak
            peak = max(peak, psutil.Process().memory_info().rss)

        seconds = _seconds(lambda: measure(decoder, texts(count), max_tokens=tokens, on_tokens=look))  # noqa: B023
        print(
            f"{count} texts of {tokens} tokens: {1e3 * seconds / count:.1f} ms a text, "
            f"peak {peak / 2**20:.0f} MiB"
        )


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
