"""Tasks of lm-evaluation-harness: the same results as with its own model, and refusals."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import torch
from evaluate_toy import CONTEXT, own_task, toy_model, toy_tokenizer
from lm_eval.evaluator import evaluate as harness
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from jreg_megatron.data.speeches import is_validation, read_speeches
from jreg_megatron.data.texts import held_out_speeches
from jreg_megatron.decoder.hugging_face import decoder_of
from jreg_megatron.decoder.reference import Reference
from jreg_megatron.evaluate.language_model import DecoderLM
from jreg_megatron.evaluate.speech_tasks import SPEECH_TASKS, write_speech_tasks
from jreg_megatron.evaluate.tasks import SETS, load_tasks, run_tasks
from jreg_megatron.runtime.errors import UserError

LIMIT = 12


def toy(begins: bool = False) -> Any:
    return decoder_of(toy_model(), toy_tokenizer(begins), Reference("toy", "toy"))


def run(decoder: Any, tasks: dict[str, Any], batch_size: int = 5) -> Any:
    return run_tasks(tasks, decoder, Namespace(batch_size=batch_size, limit=LIMIT, quiet=True))


@pytest.fixture(scope="module")
def speech_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return load_tasks(["speeches"], [], tmp_path_factory.mktemp("tasks"))


def samples_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("begins", "more"), [(False, {}), (True, {}), (False, {"head": None})])
def test_results_are_those_of_the_harness_own_model(
    speech_tasks: dict[str, Any], begins: bool, more: dict[str, Any]
) -> None:
    # Where texts begin with a token of their own, its rolling log-likelihood counts that one too.
    tasks = {name: task for name, task in speech_tasks.items() if not begins or "bits" not in name}
    own = harness(
        HFLM(pretrained=toy_model(), tokenizer=toy_tokenizer(begins), batch_size=4),
        {"tasks": tasks, "groups": {}, "group_map": {}},
        limit=LIMIT,
        bootstrap_iters=0,
    )
    loglikelihoods = {
        name: [
            float(np.ravel(response)[0]) for sample in own["samples"][name] for response in sample["resps"]
        ]
        for name in tasks
    }
    found = run(replace(toy(begins), **more), tasks)
    for name, result in found.items():
        metrics = own["results"][name]
        assert result.value == pytest.approx(metrics[f"{result.metric},none"], rel=1e-5)
        for other, value in result.others.items():
            assert value == pytest.approx(metrics[f"{other},none"])
        answers = [float(np.ravel(request.resps[-1])[0]) for request in tasks[name].instances]
        assert answers == pytest.approx(loglikelihoods[name], rel=1e-4)
    assert set(found["speeches_continuation"].others) == {"acc"}


def test_neither_batches_nor_the_order_of_requests_change_a_result(speech_tasks: dict[str, Any]) -> None:
    one, other = run(toy(), speech_tasks, batch_size=1), run(toy(), speech_tasks, batch_size=64)
    for name, result in one.items():
        np.testing.assert_allclose(result.amounts, other[name].amounts, rtol=1e-5)
        assert result.samples == other[name].samples


def test_bits_per_byte_are_the_texts_cross_entropy_over_its_bytes(speech_tasks: dict[str, Any]) -> None:
    found = run(toy(), {"speeches_bits_per_byte": speech_tasks["speeches_bits_per_byte"]})
    result = found["speeches_bits_per_byte"]
    assert not result.higher_is_better
    text = speech_tasks["speeches_bits_per_byte"].test_docs()[0]["text"]
    ids = toy_tokenizer()(text)["input_ids"]
    sequence = [toy_tokenizer().eos_token_id, *ids]
    nats = 0.0
    for start in range(0, len(ids), CONTEXT):  # each token once, with as much before it as its window holds
        end = min(start + CONTEXT, len(ids))
        window = sequence[max(0, end - CONTEXT) : end]
        with torch.no_grad():
            logits = toy_model()(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
        predicted = sequence[start + 1 : end + 1]
        nats -= sum(
            float(row[token]) for row, token in zip(logits[-len(predicted) :], predicted, strict=True)
        )
    assert result.weights[0] == len(text.encode())
    assert result.amounts[0] == pytest.approx(nats / np.log(2), rel=1e-5)


def test_a_continuation_is_the_speechs_own_and_the_others_are_not(tmp_path: Path) -> None:
    write_speech_tasks(tmp_path, held_out_speeches())
    speeches = {name: " ".join(text.split()) for name, text in read_speeches().items()}
    samples = samples_of(tmp_path, "speeches_continuation")
    assert len(samples) > 100
    for sample in samples:
        assert is_validation(sample["speech"])
        for number, choice in enumerate(sample["choices"]):
            goes_on = f"{sample['context']} {choice}" in speeches[sample["speech"]]
            assert goes_on == (number == sample["gold"])
            assert (choice in speeches[sample["speech"]]) == goes_on
    golds = np.bincount([sample["gold"] for sample in samples], minlength=4)
    assert golds.min() > 0.15 * len(samples)


def test_only_the_right_one_of_the_earlier_words_ends_the_sentence(tmp_path: Path) -> None:
    write_speech_tasks(tmp_path, held_out_speeches())
    speeches = {name: " ".join(text.split()) for name, text in read_speeches().items()}
    samples = samples_of(tmp_path, "speeches_last_word")
    assert len(samples) > 40
    for sample in samples:
        for number, word in enumerate(sample["choices"]):
            assert word in sample["context"]
            goes_on = any(f"{sample['context']} {word}{end}" in speeches[sample["speech"]] for end in ".!?")
            assert goes_on == (number == sample["gold"])


def test_the_same_speeches_give_the_same_tasks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_speech_tasks(tmp_path / name, held_out_speeches())
    for task in SPEECH_TASKS:
        assert (tmp_path / f"a/{task}.jsonl").read_bytes() == (tmp_path / f"b/{task}.jsonl").read_bytes()


def test_a_model_that_knows_nothing_does_not_beat_chance(speech_tasks: dict[str, Any]) -> None:
    tasks = {"speeches_continuation": speech_tasks["speeches_continuation"]}
    found = run_tasks(tasks, toy(), Namespace(batch_size=32, limit=None, quiet=True))["speeches_continuation"]
    assert found.chance == 0.25
    assert found.value == pytest.approx(0.25, abs=0.1)  # three standard deviations


def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_most_likely() -> None:
    decoder = toy()
    with torch.no_grad():
        first = int(decoder.logits(torch.tensor([[5, 6, 7]]))[0, -1].argmax())
        second = int(decoder.logits(torch.tensor([[5, 6, 7, first]]))[0, -1].argmax())
    requests = [
        (None, [5, 6, 7], [first, second]),
        (None, [5, 6, 7], [first, second + 1]),
        (None, [5, 6, 7], [first + 1, second]),
        (None, [5, 6, 7, first], [second]),
    ]
    answers = DecoderLM(decoder, batch_size=3, quiet=True)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in answers] == [True, False, False, True]


def test_a_task_of_the_users_own_runs(tmp_path: Path) -> None:
    folder = own_task(tmp_path / "own")
    found = run(toy(), load_tasks(["mine"], [str(folder)], tmp_path))["mine"]
    assert (found.metric, len(found.samples), found.chance) == ("acc", 8, 0.5)


def test_a_task_that_has_the_model_write_is_refused_by_name(tmp_path: Path) -> None:
    folder = own_task(tmp_path / "own", output_type="generate_until", doc_to_choice=None)
    with pytest.raises(UserError, match=r"\bmine\b"):
        load_tasks(["mine"], [str(folder)], tmp_path)


def test_a_metric_that_is_no_mean_is_refused_by_name(tmp_path: Path) -> None:
    folder = own_task(tmp_path / "own", metric_list=[{"metric": "mcc"}])
    with pytest.raises(UserError, match=r"\bmine .*\bmcc\b"):
        load_tasks(["mine"], [str(folder)], tmp_path)


def test_a_task_with_another_aggregation_than_the_mean_is_refused_by_name(tmp_path: Path) -> None:
    folder = own_task(tmp_path / "own", metric_list=[{"metric": "acc", "aggregation": "median"}])
    with pytest.raises(UserError, match=r"\bmine .*\bacc \(median\)"):
        load_tasks(["mine"], [str(folder)], tmp_path)


def test_the_papers_nine_are_tasks_of_the_harness_zero_shot_by_its_own_metrics() -> None:
    place = Path(lm_eval.tasks.__file__).parent
    # Not all of its folders: reading thousands of files takes most of a minute.
    folders = "arc hellaswag lambada piqa race sciq siqa super_glue swag".split()
    manager = TaskManager(include_path=[str(place / name) for name in folders], include_defaults=False)
    metrics = {}
    for name in SETS["paper"]:
        config = manager.task_index[name].cfg
        assert config.get("num_fewshot", 0) == 0
        metrics[name] = {entry["metric"] for entry in config["metric_list"]} - {"perplexity"}
    plain, both = {"acc"}, {"acc", "acc_norm"}
    assert metrics == {
        **{"arc_easy": both, "boolq": plain, "hellaswag": both, "lambada_openai": plain, "piqa": both},
        **{"race": plain, "social_iqa": plain, "sciq": both, "swag": both},
    }


def test_an_unknown_task_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OfOneFolder(TaskManager):  # type: ignore[misc]
        """The harness's own, as if it had no other tasks: reading all its thousands of files takes long."""

        def __init__(self, include_path: list[str], include_defaults: bool = True) -> None:
            own = [str(Path(lm_eval.tasks.__file__).parent / "hellaswag")] if include_defaults else []
            super().__init__(include_path=[*include_path, *own], include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", OfOneFolder)
    with pytest.raises(UserError, match=r"--tasks .*hellaswagg.*`lm_eval ls tasks`"):
        load_tasks(["hellaswagg"], [], tmp_path)


def test_a_missing_folder_of_tasks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--include-path is .*/nowhere\b"):
        load_tasks(["mine"], [str(tmp_path / "nowhere")], tmp_path)


def test_missing_data_is_one_line_that_names_task_and_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    folder = own_task(tmp_path / "own")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as refused:
        load_tasks(["mine"], [str(folder)], tmp_path)
    assert str(refused.value).startswith(
        "the task mine cannot be loaded (ConnectionError: Couldn't reach the hub)"
    )
    assert "--tasks speeches" in str(refused.value) and "\n" not in str(refused.value)


def test_a_continuation_longer_than_the_models_context_is_refused(speech_tasks: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"\d+ tokens.* toy .*\b8\b"):
        run(replace(toy(), max_length=8), speech_tasks)


def test_a_model_without_a_tokenizer_is_refused_by_name(speech_tasks: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"\btoy .*tokenizer"):
        run(replace(toy(), encode=None), speech_tasks)


def test_a_tokenizer_without_beginning_and_end_is_refused_where_one_is_needed(
    speech_tasks: dict[str, Any],
) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*\btoy\b"):
        run(replace(toy(), end_of_text=None), speech_tasks)
