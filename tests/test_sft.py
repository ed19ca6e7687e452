"""recipes/sft.sh: the paper's settings, Tulu's format, labels only on the answers, mistakes in one line."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_toy import documents

from jreg_megatron.recipe import machine
from jreg_megatron.runtime.errors import EXIT_CODE, LINE_START
from jreg_megatron.sft import __main__ as sft

pytest.importorskip("trl", reason="the extra sft is not installed (jreg_megatron[sft])")

RECIPE = Path(__file__).parents[1] / "recipes" / "sft.sh"
FLAGS = [*sft.SMOKE_FLAGS.split(), "--chat_template_path", str(sft.TEMPLATE), "--assistant_only_loss", "true"]
MIXTURE = 489_818  # conversations that the data set's page counts
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is\ntwo and two? "},
    {"role": "assistant", "content": " Four,\n\nI think.\n"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
SHORT = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run's model, instead of an exported one."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    sft.make_toy(folder)
    return folder


@pytest.fixture
def words_of(tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments that the recipe passes to ``python -m jreg_megatron.sft``, from a stand-in for Python."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\ntest "$1" = -c || printf "%s\\0" "$@"\n')
    stand_in.chmod(0o755)

    def words(*typed: object, **knobs: object) -> list[str]:
        settings = {"RUN": tmp_path / "run", "PYTHON": stand_in} | knobs
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        command = [RECIPE, *map(str, typed)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        module, *rest = run.stdout.split("\0")[1:-1]
        assert module == "jreg_megatron.sft"
        return rest

    return words


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that this process was to become."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    return commands


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(path: Path, *conversations: Any) -> Path:
    return write(path, *({"messages": messages} for messages in conversations))


def with_other_tokenizer(toy: Path, folder: Path) -> Path:
    """The toy with a tokenizer that puts a space before a text, as Llama 2's and Mistral's."""
    import sentencepiece

    from jreg_megatron.convert.tokenizer import write_sentencepiece
    from jreg_megatron.data import vocabulary

    shutil.copytree(toy, folder)
    with (folder / "tokenizer.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents(300)),
            model_writer=stream,
            vocab_size=400,
            minloglevel=2,
            **vocabulary.TRAINER | {"add_dummy_prefix": True},
        )
    write_sentencepiece(folder / "tokenizer.model", folder)
    return folder


def tokens_and_answers(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """Tulu's format written out, and how many tokens each answer makes the text longer by."""
    text, counted = "", 0

    def tokens(of: str) -> list[int]:
        ids: list[int] = tokenizer(of, add_special_tokens=False)["input_ids"]
        return ids

    for message in messages:
        text += f"<|{message['role']}|>\n"
        if message["role"] == "assistant":
            before = len(tokens(text))
            text += message["content"].strip() + tokenizer.eos_token
            counted += len(tokens(text)) - before
        else:
            text += message["content"].strip()
        text += "\n"
    return tokens(text), counted


@pytest.mark.parametrize("is_prefixed", [False, True])
def test_the_answers_and_their_end_tokens_alone_have_labels(
    is_prefixed: bool, toy: Path, tmp_path: Path
) -> None:
    model = with_other_tokenizer(toy, tmp_path / "other") if is_prefixed else toy
    data = chats(tmp_path / "chats.jsonl", CHAT, SHORT)
    trainer = sft.make_trainer(str(model), str(data), [*FLAGS, "--output_dir", str(tmp_path / "run")])
    tokenizer, eos = trainer.processing_class, trainer.processing_class.eos_token
    for row, messages in zip(trainer.train_dataset, [CHAT, SHORT], strict=True):
        tokens, count = tokens_and_answers(tokenizer, messages)
        assert row["input_ids"] == tokens
        pairs = list(zip(tokens, row["labels"], strict=True))
        learned = [label for _, label in pairs if label != -100]
        assert len(learned) == count
        assert all(label in (-100, token) for token, label in pairs)
        texts = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        assert [text.strip() for text in tokenizer.decode(learned).split(eos)] == [*texts, ""]
    (batch,) = trainer.get_train_dataloader()
    assert batch["labels"].shape == batch["input_ids"].shape
    assert int((batch["labels"] != -100).sum()) == sum(
        tokens_and_answers(tokenizer, messages)[1] for messages in (CHAT, SHORT)
    )


def test_a_long_conversation_is_cut_and_left_out_if_no_answer_remains(toy: Path, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "Say " + "a " * 200}, {"role": "assistant", "content": "a"}]
    data = chats(tmp_path / "chats.jsonl", CHAT, long, SHORT)
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run"), "--max_length", "128"]
    trainer = sft.make_trainer(str(toy), str(data), flags)
    assert [row["messages"] for row in trainer.train_dataset] == [CHAT, SHORT]
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) <= 128


def test_the_settings_are_the_papers(words_of: Callable[..., list[str]]) -> None:
    options, flags = sft.read_request(words_of("model"))
    asked = sft.parse(flags)
    assert (asked.learning_rate, asked.lr_scheduler_type, asked.max_steps) == (2e-5, "linear", 957)
    assert options.batch == 512 and options.data == "allenai/tulu-v1-sft-mixture"
    assert not asked.packing and asked.assistant_only_loss and asked.bf16 and asked.max_length == 1024
    # The paper's number of steps is one pass over the mixture, unpacked.
    assert asked.max_steps == math.ceil(MIXTURE / options.batch)


def test_a_dry_run_prints_the_table_and_the_torchrun_command_and_starts_nothing(
    words_of: Callable[..., list[str]],
    started: list[list[str]],
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the recipe does
    data = chats(tmp_path / "chats.jsonl", CHAT, SHORT, CHAT[:2], [{"role": "human", "content": "x"}])
    typed = (toy, "--dry-run", "--", "--learning_rate", "1e-5")
    sft.main(words_of(*typed, DATA=data, GPUS=4, STEPS=3))
    printed = re.sub(r" *│\n│ {2,}│ ", " ", capsys.readouterr().out)  # a row's further lines
    assert "│ 2 conversations" in printed and "read 768.00 times; 2 left out" in printed
    assert "would be refused: GPUS is 4" in printed
    command = shlex.split(printed[printed.index("OMP_NUM_THREADS") :].replace("\\\n", " "))
    assert command[command.index("--nproc-per-node") + 1] == "4"
    module, step, *rest = command[command.index("-m", 4) + 1 :]
    assert (module, step, *rest[:2]) == ("jreg_megatron.sft", "train", str(toy), str(data))
    asked = sft.parse(rest[2:])
    assert asked.gradient_accumulation_steps * asked.per_device_train_batch_size * 4 == 512
    assert asked.learning_rate == 1e-5
    assert not started and not (tmp_path / "run").exists()


def test_a_smoke_run_learns_and_continues_from_a_checkpoint_to_the_same_weights(
    words_of: Callable[..., list[str]], started: list[list[str]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sft.main(words_of("--smoke", 4, "--", "--save_steps", 3))
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "jreg_megatron.sft"]
    sft.main(command[3:])
    run = tmp_path / "run" / "smoke" / "run"
    assert sft.last_checkpoint(run) == (4, run / "checkpoint-4")
    history = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] < 1.1 * math.log(512)
    weights = AutoModelForCausalLM.from_pretrained(run / "checkpoint-4").state_dict()
    prompt = AutoTokenizer.from_pretrained(run / "checkpoint-4").apply_chat_template(
        SHORT[:1], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>\nSay a.\n<|assistant|>\n"

    for name in ("trainer_state.json", "model.safetensors"):  # killed while it was written
        (run / "checkpoint-4" / name).unlink()
    step, checkpoint = sft.last_checkpoint(run)
    assert step == 3
    sft.main([*command[3:], "--resume_from_checkpoint", str(checkpoint)])
    resumed = AutoModelForCausalLM.from_pretrained(run / "checkpoint-4").state_dict()
    assert weights.keys() == resumed.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0, msg=name)


def test_a_run_resumes_by_itself_and_reports_when_it_is_complete(
    words_of: Callable[..., list[str]],
    started: list[list[str]],
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine.Gpus, "of_this_node", lambda: machine.Gpus(8))
    words = words_of(toy, DATA=chats(tmp_path / "chats.jsonl", CHAT), STEPS=5)
    run = tmp_path / "run"
    sft.main(words)
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "trainer_state.json").touch()
    sft.main(words)
    assert "going on from step 3" in capsys.readouterr().out
    first, second = started
    assert second == [*first, "--resume_from_checkpoint", str(run / "checkpoint-3")]
    (run / "checkpoint-3").rename(run / "checkpoint-5")
    sft.main(words)
    assert "nothing to do" in capsys.readouterr().out and len(started) == 2


@pytest.mark.parametrize(
    ("prepare", "typed", "knobs", "named"),
    [
        (None, (), {}, ["model is missing", "sft.sh MODEL"]),
        (None, ("nowhere",), {}, ["MODEL is nowhere", "export"]),
        ("no config", ("{model}",), {}, ["MODEL is {model}", "jreg-megatron export"]),
        ("no tokenizer", ("{model}",), {}, ["MODEL is {model}", "--no-tokenizer"]),
        ("no end token", ("{model}",), {}, ["MODEL is {model}", "(eos)"]),
        (None, ("{model}",), {"LENGTH": 4096}, ["--max_length is 4,096", "LENGTH"]),
        (None, ("{model}",), {"DATA": "gone.jsonl"}, ["DATA is gone.jsonl", "does not exist"]),
        ("offline", ("{model}",), {"DATA": "a/b"}, ["DATA is a/b", "ConnectionError", "JSON-lines"]),
        ("no messages", ("{model}",), {"DATA": "{data}"}, ["DATA is {data}", "have text", '"role"']),
        ("other roles", ("{model}",), {"DATA": "{data}"}, ["DATA is {data}", "assistant", "human"]),
        (None, ("{model}",), {"GPUS": 3}, ["BATCH is 512", "3 GPUs", "multiple of 24"]),
        (None, ("{model}",), {"GPUS": "x"}, ["GPUS is x"]),
        (None, ("{model}",), {"STEPS": 0}, ["--max_steps is 0", "STEPS"]),
        (None, ("{model}",), {}, ["GPUS is 8", "has 0"]),
        (None, ("{model}", "--", "--learning_rat", "1"), {}, ["--learning_rat"]),
        ("no trl", ("{model}",), {}, ["trl", "jreg_megatron[sft]"]),
        ("another run", ("{model}",), {"SEED": 2}, ["seed 1", "now it is 2", "RUN"]),
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_starts(
    prepare: str | None,
    typed: tuple[str, ...],
    knobs: dict[str, Any],
    named: list[str],
    words_of: Callable[..., list[str]],
    started: list[list[str]],
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data = tmp_path / "model", chats(tmp_path / "chats.jsonl", SHORT)
    shutil.copytree(toy, model)
    if prepare == "no config":
        (model / "config.json").unlink()
    elif prepare == "no tokenizer":
        for file in model.glob("tokenizer*"):
            file.unlink()
    elif prepare == "no end token":
        config = json.loads((model / "tokenizer_config.json").read_text())
        del config["eos_token"]
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    elif prepare == "offline":

        def load(*_: object, **__: object) -> None:
            raise ConnectionError("Couldn't reach it\non the Hub")

        monkeypatch.setattr("datasets.load_dataset", load)
    elif prepare == "no messages":
        write(data, {"text": "a"})
    elif prepare == "other roles":
        chats(data, [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}])
    elif prepare == "no trl":
        monkeypatch.setitem(sys.modules, "trl", None)
    elif prepare == "another run":
        (tmp_path / "run").mkdir()
        _, flags = sft.read_request(words_of("x"))
        held = {name: getattr(sft.parse(flags), name) for name in sft.IDENTITY}
        (tmp_path / "run" / "sft.json").write_text(json.dumps(held))
    places = {"model": model, "data": data}
    filled = {name: str(value).format(**places) for name, value in ({"DATA": data} | knobs).items()}
    with pytest.raises(SystemExit) as exit:
        sft.main(words_of(*(word.format(**places) for word in typed), **filled))
    assert exit.value.code == EXIT_CODE
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(LINE_START)]
    for words in named:
        assert words.format(**places) in line if "{" in words else words in line
    assert not started
