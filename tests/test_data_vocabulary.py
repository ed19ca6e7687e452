"""The promises of vocabulary training: the same bytes, no text lost, a sample from the whole corpus."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sentencepiece
from data_toy import call, documents, write_jsonl


def train(source: object, output: Path, *argv: object) -> bytes:
    assert call("tokenizer", source, "--output", output, "--vocab-size", 400, *argv) == 0
    return output.read_bytes()


def test_two_trainings_give_the_same_bytes_and_no_path(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", documents(200))
    one = train(source, tmp_path / "one" / "tokenizer.model")
    (tmp_path / "other").mkdir()
    other = train(source.rename(tmp_path / "other" / "x.jsonl"), tmp_path / "two.model")
    assert one == other
    assert str(tmp_path).encode() not in one


def test_a_second_call_is_a_no_op_and_a_changed_source_trains_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_jsonl(tmp_path / "text.jsonl", documents(200)), tmp_path / "tokenizer.model"
    one, before = train(source, output), output.stat().st_mtime_ns
    assert train(source, output) == one
    assert "done already" in capsys.readouterr().out
    assert output.stat().st_mtime_ns == before
    write_jsonl(source, documents(200, seed=1))
    assert train(source, output) != one
    told = json.loads((tmp_path / "tokenizer.model.manifest.json").read_text())
    assert told["trainer"]["vocab_size"] == 400
    assert told["sources"][0]["path"] == str(source)
    output.write_bytes(one)  # differs from the manifest
    assert train(source, output) != one


def test_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", [*documents(200), "a \x00 zero"])
    train(source, tmp_path / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("", "  two  spaces \n\n\ttab ", "漢字 🙂 ñ", "\x7f"):
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id() not in ids
        assert tokenizer.decode(ids) == text


def test_the_sample_is_taken_evenly_and_bounded(tmp_path: Path) -> None:
    from jreg_megatron.data.corpus import find_sources
    from jreg_megatron.data.vocabulary import sample_lines

    for number in range(8):  # 8 MB, of which every megabyte is a place
        line = json.dumps({"text": f"{number}" * 999}) + "\n"
        (tmp_path / f"{number}.jsonl").write_text(line * 1000)
    sources = find_sources([str(tmp_path)])
    lines = list(sample_lines(sources, ["text"], 80_000, 1 << 20))
    assert {line[0] for line in lines} == set("01234567")
    assert 80_000 <= sum(map(len, lines)) <= 90_000
    assert lines == list(sample_lines(sources, ["text"], 80_000, 1 << 20))


def test_bad_records_are_left_out(tmp_path: Path) -> None:
    clean = train(write_jsonl(tmp_path / "text.jsonl", documents(200)), tmp_path / "clean.model")
    lines = (tmp_path / "text.jsonl").read_bytes().splitlines(True)
    bad = [b"nonsense\n", b'{"text": 3}\n', b'{"text": "lone \\ud83d"}\n']
    (tmp_path / "text.jsonl").write_bytes(b"".join([*lines[:50], *bad, *lines[50:]]))
    assert train(tmp_path / "text.jsonl", tmp_path / "dirty.model") == clean


def test_the_model_is_what_megatron_takes(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    source = write_jsonl(tmp_path / "text.jsonl", documents(200))
    train(source, tmp_path / "tokenizer.model")
    argv = ("--tokenizer-model", tmp_path / "tokenizer.model", "--output", tmp_path / "out")
    assert call("prepare", source, *argv) == 0
    told = json.loads((tmp_path / "out.manifest.json").read_text())
    assert (told["vocab_size"], told["eod"]) == (400, 2)
    assert not [name for name in os.listdir(tmp_path) if "pieces" in name or name.endswith(".lock")]
