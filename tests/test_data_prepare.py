"""The promises of preparation: the bytes of Megatron's tool, from any kind of input, with any pieces."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_toy import (
    ODD,
    Text,
    call,
    documents,
    files,
    hugging_face_folder,
    of_tool,
    reference,
    sentencepiece_model,
    write_jsonl,
)

pytest.importorskip("megatron.core")
pytest.importorskip("datasets", reason="the extra data is not installed (jreg_megatron[data])")

DOCUMENTS: list[Text] = [*documents(60), *ODD, *documents(40, seed=1)]
STRINGS = [text for text in DOCUMENTS if isinstance(text, str)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def strings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes that Megatron's tool makes of the documents that are no lists."""
    return of_tool(tmp_path_factory.mktemp("wanted"), STRINGS, model)


def prepare(output: Path, model: Path, *argv: object) -> dict[str, bytes]:
    """Prepare into ``output`` and return the files of the key text."""
    assert call("prepare", "--workers", 2, *argv, "--tokenizer-model", model, "--output", output) == 0
    return files(f"{output}_text_document")


def manifest(output: Path) -> dict[str, Any]:
    return dict(json.loads(Path(f"{output}.manifest.json").read_text()))


@pytest.mark.parametrize(("workers", "piece_bytes"), [(1, 1 << 20), (3, 997), (2, 64), (2, 1)])
def test_any_cut_gives_the_bytes_of_megatrons_tool(
    model: Path, tmp_path: Path, workers: int, piece_bytes: int
) -> None:
    texts = DOCUMENTS[58:66] if piece_bytes == 1 else DOCUMENTS  # there are as many pieces as bytes then
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    argv = ("--workers", workers, "--piece-bytes", piece_bytes)
    made = prepare(tmp_path / "out", model, source, *argv)
    left = {"text.jsonl", "out.manifest.json", "out.refused.jsonl"}
    left |= {"out_text_document.bin", "out_text_document.idx"}
    assert set(os.listdir(tmp_path)) == left, "something is left behind"
    assert made == of_tool(tmp_path, texts, model)


def as_gz(folder: Path) -> list[Path]:
    text = write_jsonl(folder / "text.jsonl", STRINGS).read_bytes()
    # Two members, as concatenated files have them.
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(text[:3001]) + gzip.compress(text[3001:]))
    return [folder / "text.jsonl.gz"]


def as_zst(folder: Path) -> list[Path]:
    import pyarrow

    text = write_jsonl(folder / "text.jsonl", STRINGS).read_bytes()
    parts = (pyarrow.compress(part, codec="zstd", asbytes=True) for part in (text[:3001], text[3001:]))
    (folder / "text.json.zst").write_bytes(b"".join(parts))
    return [folder / "text.json.zst"]


def as_parquet(folder: Path) -> list[Path]:
    import pyarrow
    import pyarrow.parquet

    half = len(STRINGS) // 2
    kinds = [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    for number, (part, kind) in enumerate(zip((STRINGS[:half], STRINGS[half:]), kinds, strict=True)):
        table = pyarrow.table({"id": range(len(part)), "text": pyarrow.array(part).cast(kind)})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=7)
    return [folder / "0.parquet", folder / "1.parquet"]


def as_text(folder: Path) -> list[Path]:
    (folder / "texts" / "deeper").mkdir(parents=True)
    for number, text in enumerate(STRINGS):
        name = f"{number:03d}.txt" if number < 50 else f"deeper/{number:03d}.md"
        (folder / "texts" / name).write_bytes(text.encode())
    (folder / "texts" / "ignored.html").touch()
    (folder / "texts" / ".hidden.txt").write_text("hidden")
    return [folder / "texts"]


def as_mixture(folder: Path) -> list[Path]:
    write_jsonl(folder / "a.jsonl", STRINGS[:10])
    (folder / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes()[:-1])  # no end of line at the end
    (folder / "b.txt").write_bytes(STRINGS[10].encode())
    lines = write_jsonl(folder / "c.jsonl", STRINGS[11:]).read_bytes()
    # Windows' ends of line, a byte-order mark, empty lines: no part of any text.
    (folder / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n \n"))
    return [folder / "a.jsonl", folder / "b.txt", folder / "c.jsonl"]


@pytest.mark.parametrize("kind", [as_gz, as_zst, as_parquet, as_text, as_mixture])
def test_every_kind_of_input_gives_the_same_bytes(
    kind: Callable[[Path], list[Path]], strings: dict[str, bytes], model: Path, tmp_path: Path
) -> None:
    assert prepare(tmp_path / "out", model, *kind(tmp_path), "--piece-bytes", 2000) == strings


def test_a_hub_dataset_gives_the_same_bytes_and_none_of_its_code_is_run(
    strings: dict[str, bytes], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for number, path in enumerate(as_parquet(tmp_path)):
        path.rename(tmp_path / "hub" / "data" / f"train-{number}.parquet")
    assert prepare(tmp_path / "out", model, "--hub", tmp_path / "hub") == strings
    (tmp_path / "hub" / "hub.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    argv = ("--hub", tmp_path / "hub", "--tokenizer-model", model, "--output", tmp_path / "other")
    assert call("prepare", *argv) == 2
    assert "hub cannot be found (Dataset scripts are no longer supported" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("vocab_size", [400, 65500])
def test_hugging_face_tokenizers_give_the_bytes_of_megatrons_tool(tmp_path: Path, vocab_size: int) -> None:
    from transformers import AutoTokenizer

    folder = hugging_face_folder(tmp_path / "tokenizer", vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == vocab_size
    texts = [*DOCUMENTS, f"<{vocab_size - 401}>"] if vocab_size > 400 else DOCUMENTS
    wanted = reference(
        tmp_path / "wanted", texts, lambda text: tokenizer(text).input_ids, tokenizer.eos_token_id, vocab_size
    )
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    argv = ("--tokenizer-type", "HuggingFaceTokenizer")
    assert prepare(tmp_path / "out", folder, source, *argv) == wanted
    dtype = manifest(tmp_path / "out")["outputs"]["out_text_document"]["dtype"]
    assert dtype == ("uint16" if vocab_size == 400 else "int32")


def test_end_of_document_can_be_left_out(model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    made = prepare(tmp_path / "out", model, source, "--no-append-eod")
    assert made == of_tool(tmp_path, DOCUMENTS, model, eod=False)


def test_every_key_makes_files_of_its_own(model: Path, tmp_path: Path) -> None:
    pairs = list(itertools.pairwise(STRINGS[:30]))
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    argv = ("--keys", "question", "answer", "--tokenizer-model", model, "--output", tmp_path / "out")
    assert call("prepare", source, *argv, "--piece-bytes", 500) == 0
    for column, key in enumerate(("question", "answer")):
        texts = [pair[column] for pair in pairs]
        assert files(tmp_path / f"out_{key}_document") == of_tool(tmp_path, texts, model)


def test_held_out_documents_are_the_others_and_copies_stay_together(model: Path, tmp_path: Path) -> None:
    texts = documents(300)
    source = write_jsonl(tmp_path / "text.jsonl", [*texts, *texts])
    argv = ("--validation-share", 0.1, "--validation-output", tmp_path / "valid" / "held")
    prepare(tmp_path / "train", model, source, *argv, "--piece-bytes", 3000)
    # Only the hash of a document's text decides whether it is held out.
    held = [t for t in texts if int(hashlib.blake2b(t.encode(), digest_size=8).hexdigest(), 16) < 0.1 * 2**64]
    kept = [t for t in texts if t not in held]
    assert 15 < len(held) < 45
    outputs = {"train_text_document": kept, "valid/held_text_document": held}
    for name, part in outputs.items():
        assert files(tmp_path / name) == of_tool(tmp_path, part * 2, model)
    assert list(manifest(tmp_path / "train")["outputs"]) == list(outputs)


def test_order_is_that_of_the_command_and_by_path_within_folders_and_patterns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ["z/a/x.jsonl", "z/a/y.jsonl", "z/b.jsonl", "p10.jsonl", "p9.jsonl", "a.jsonl"]
    for name in sorted(order, reverse=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [name])
    monkeypatch.chdir(tmp_path)
    assert prepare(Path("out"), model, "z", "p*.jsonl", "a.jsonl") == of_tool(tmp_path, order, model)


def test_megatron_reads_it(model: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from sentencepiece import SentencePieceProcessor

    texts, encoder = documents(20), SentencePieceProcessor(model_file=str(model))
    prepare(tmp_path / "out", model, write_jsonl(tmp_path / "text.jsonl", texts))
    stored = IndexedDataset(str(tmp_path / "out_text_document"))
    assert [encoder.decode(stored[number].tolist()[:-1]) for number in range(len(stored))] == texts


def test_the_manifest_names_sources_and_settings(model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    made = prepare(tmp_path / "out", model, source)
    told = manifest(tmp_path / "out")
    output, (told_source,) = told["outputs"]["out_text_document"], told["sources"]
    sums = {ending: hashlib.sha256(content).hexdigest() for ending, content in made.items()}
    assert output["sha256"] == sums
    assert (output["documents"], output["tokens"]) == (len(DOCUMENTS), len(made["bin"]) // 2)
    assert output["dtype"] == "uint16"
    assert (told_source["path"], told_source["size"]) == (str(source), source.stat().st_size)
    assert told["tokenizer"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert (told["vocab_size"], told["eod"], told["refused"]) == (400, 2, {})


def state_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_second_run_says_that_it_is_done_and_does_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    made = prepare(tmp_path / "out", model, source)
    before = state_of(tmp_path)
    monkeypatch.setattr("jreg_megatron.data.tokenizing.build", None)  # calling it fails
    assert prepare(tmp_path / "out", model, source) == made
    assert "out is done already" in capsys.readouterr().out
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("change", ["sources", "tokenizer", "settings", "files"])
def test_changed_inputs_are_named_and_prepared_again(
    change: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, argv = DOCUMENTS, ["--no-append-eod"] if change == "settings" else []
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    prepare(tmp_path / "out", model, source)
    if change == "sources":
        texts = [*documents(5), *DOCUMENTS]
        write_jsonl(source, texts)
    elif change == "tokenizer":
        model = sentencepiece_model(tmp_path / "other.model", 380)
    elif change == "files":
        (tmp_path / "out_text_document.idx").unlink()
    capsys.readouterr()
    assert prepare(tmp_path / "out", model, source, *argv) == of_tool(tmp_path, texts, model, eod=not argv)
    assert f"the {change} changed" in capsys.readouterr().out


def test_bad_records_are_listed_by_line_without_their_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = documents(40)
    bad = {
        3: (b"{'text': 'secret'}", "not JSON"),
        4: (b'"secret"', "not an object"),
        5: (b'{"body": "secret"}', "no such key"),
        11: (b'{"text": 17}', "not text"),
        12: (b'{"text": ["secret", null]}', "not text"),
        13: (b'{"text": "secret \\ud83d"}', "lone surrogate"),
        30: (b'{"text": "secret \xff"}', "not UTF-8"),
        31: (b'{"text": "' + b"secret" * 1000 + b'"}', "too large"),
        32: (b"[" * 3000, "not JSON"),
        33: (b" " * 5000 + b'{"text": "secret"}', "too large"),
    }
    lines = [json.dumps({"text": text}).encode() for text in good]
    for line, (content, _) in bad.items():
        lines.insert(line - 1, content)
    (tmp_path / "first.txt").write_text("first")
    (tmp_path / "text.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "last.txt").write_bytes(b"one\ntw\xffo")
    inputs = [tmp_path / name for name in ("first.txt", "text.jsonl", "last.txt")]
    limits = ("--piece-bytes", 300, "--max-refused", 11, "--max-record-bytes", 4000)
    made = prepare(tmp_path / "out", model, *inputs, *limits)
    assert made == of_tool(tmp_path, ["first", *good], model)
    text = (tmp_path / "out.refused.jsonl").read_text()
    told = [json.loads(line) for line in text.splitlines()]
    assert [(row["file"], row["line"], row["kind"]) for row in told] == [
        *((str(tmp_path / "text.jsonl"), line, kind) for line, (_, kind) in bad.items()),
        (str(tmp_path / "last.txt"), 2, "not UTF-8"),
    ]
    assert "secret" not in text
    counts = Counter(row["kind"] for row in told)
    assert manifest(tmp_path / "out")["refused"] == dict(sorted(counts.items()))
    assert "Refused: 1 lone surrogate, 1 no such key, 2 not JSON, 2 not UTF-8" in capsys.readouterr().out


def test_bad_rows_of_parquet_are_refused_by_row(model: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    values = [b"one", None, b"tw\xffo", b"three", b"x" * 500]
    raw = pyarrow.array(values, pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 5, raw.buffers())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    argv = ("--piece-bytes", 1, "--max-refused", 3, "--max-record-bytes", 100)
    prepare(tmp_path / "out", model, tmp_path / "a.parquet", *argv)
    told = [json.loads(line) for line in (tmp_path / "out.refused.jsonl").read_text().splitlines()]
    assert [(row["line"], row["kind"]) for row in told] == [
        (2, "not text"),
        (3, "not UTF-8"),
        (5, "too large"),
    ]
    assert manifest(tmp_path / "out")["outputs"]["out_text_document"]["documents"] == 2


def test_a_run_stopped_by_bad_records_continues_with_a_higher_limit(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = documents(200)
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    with source.open("a") as stream:
        stream.write("nonsense\n")
    argv = ("--tokenizer-model", model, "--output", tmp_path / "out", "--piece-bytes", 2000)
    assert call("prepare", source, *argv, "--workers", 1) == 2
    assert f"{source} line 201 is not JSON (Expecting value" in capfd.readouterr().err
    assert call("prepare", source, *argv, "--workers", 3, "--max-refused", 1) == 0
    assert "continuing with 1 of" in capfd.readouterr().out
    assert files(tmp_path / "out_text_document") == of_tool(tmp_path, texts, model)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    import tracemalloc

    from jreg_megatron.data.corpus import cut, find_sources, records

    line = json.dumps({"text": "some words " * 1000}).encode() + b"\n"
    with gzip.open(tmp_path / "large.jsonl.gz", "wb", compresslevel=1) as stream:
        for _ in range(4000):
            stream.write(line)  # 44 MB
    (piece,) = cut(find_sources([str(tmp_path / "large.jsonl.gz")]), 1, ["text"])
    tracemalloc.start()
    read = sum(len(record.texts[0]) for record in records(piece, ["text"], 1 << 20))
    assert read == 44_000_000
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_many_small_files_of_text_are_cut_in_a_moment() -> None:
    from jreg_megatron.data.corpus import Source, cut

    files = [Source(f"/texts/{number}.txt", "text", "", 1000, 0) for number in range(30_000)]
    before = time.process_time()
    assert [len(piece.sources) for piece in cut(files, 29_000_000, ["text"])] == [29_000, 1_000]
    assert time.process_time() - before < 2
