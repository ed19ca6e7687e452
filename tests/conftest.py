"""Fixtures that several test files share: a tiny dataset and one set of initial weights."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toy import megatrons_datasets, write_documents
from harness import TOY, run_ranks

torch.set_num_threads(1)  # the ranks of a test have two cores to share
# In a shell's background Ctrl-C is ignored, which the processes that tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

ITERATIONS, BATCH, MICRO_BATCH, LENGTH, VOCABULARY = 10, 8, 2, 32, 256


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the toy dataset."""
    prefix = tmp_path_factory.mktemp("data") / "toy"
    write_toy_data(prefix)
    return prefix


def write_toy_data(prefix: Path) -> None:
    """A Megatron dataset of 20,000 random tokens below 255 in documents of 100, 255 ending each."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 1, size=(200, 100))
    tokens[:, -1] = VOCABULARY - 1
    write_documents(prefix, tokens)


@pytest.fixture(scope="session")
def toy_arguments(toy_data: Path) -> list[str]:
    """Command line of the toy model on the toy dataset, without its length of training."""
    return [*TOY, "--data-path", str(toy_data), "--split", "90,10,0"]


@pytest.fixture(scope="session")
def initial_weights(toy_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the toy model's initial weights, for every layout to start from."""
    folder = tmp_path_factory.mktemp("initial")
    run_ranks(
        [*toy_arguments, "--train-iters", 1, "--lr", 0, "--min-lr", 0, "--save", folder, "--save-interval", 1]
    )
    return folder


Steps = list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]


@pytest.fixture(scope="session")
def toy_steps(toy_data: Path) -> Steps:
    """The batches of Megatron's loop on the toy dataset: per step the micro-batches of (tokens, labels, loss
    mask), ``[b, s]`` each."""
    return read_steps(toy_data, eod_mask_loss=False)


@pytest.fixture(scope="session")
def toy_masked_steps(toy_data: Path) -> Steps:
    """The same with the loss of every document's last token left out."""
    return read_steps(toy_data, eod_mask_loss=True)


def read_steps(data: Path, eod_mask_loss: bool) -> Steps:
    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = VOCABULARY, VOCABULARY - 1, -1, {"class": "test"}

    how = {"random_seed": 3, "eod_mask_loss": eod_mask_loss, "blend": ([str(data)], None), "split": "90,10,0"}
    samples = megatrons_datasets([ITERATIONS * BATCH, 0, 0], LENGTH, Tokenizer(), **how)[0]
    steps = []
    for step in range(ITERATIONS):
        rows = [samples[step * BATCH + row] for row in range(BATCH)]
        keys = ("tokens", "labels", "loss_mask")
        parts = (torch.stack([row[key] for row in rows]).split(MICRO_BATCH) for key in keys)
        steps.append(list(zip(*parts, strict=True)))
    return steps


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``jreg-megatron report`` in a folder of its own; returns the page."""
    pytest.importorskip("vl_convert", reason="the report needs the extra 'analysis'")
    from report_toy import page_of

    monkeypatch.chdir(tmp_path)
    return page_of
