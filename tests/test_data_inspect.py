"""The promises of inspect: it reads every token file that Megatron reads, and reports its true numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toy import (
    ODD,
    call,
    documents,
    hugging_face_folder,
    megatrons_datasets,
    of_tool,
    sentencepiece_model,
    write_jsonl,
)
from sentencepiece import SentencePieceProcessor

pytest.importorskip("megatron.core")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def inspect(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert call("inspect", *argv, "--json") == 0
    return dict(json.loads(capsys.readouterr().out))


def histogram(lengths: Sequence[int]) -> list[int]:
    """Documents of 0, of 1, of 2 to 3, of 4 to 7 ... tokens."""
    return [sum(length.bit_length() == bits for length in lengths) for bits in range(33)]


def test_numbers_are_those_of_the_documents(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, encoder = [*documents(50), *ODD], SentencePieceProcessor(model_file=str(model))
    of_tool(tmp_path, texts, model)
    sentences = [[text] if isinstance(text, str) else text for text in texts]
    parts = [[ids for part in document if (ids := encoder.encode(part))] for document in sentences]
    lengths = [sum(map(len, document)) + bool(document) for document in parts]
    told = inspect(capsys, tmp_path / "wanted", "--tokenizer-model", model, "--samples", 2)
    assert told["documents"] == len(texts)
    assert told["sequences"] == sum(map(len, parts))
    assert told["tokens"] == sum(lengths)
    assert (told["shortest"], told["longest"]) == (0, max(lengths))
    assert told["histogram"] == histogram(lengths)
    assert told["largest_id"] == max(token for document in parts for ids in document for token in ids)
    assert (told["dtypes"], told["empty"], told["checked_sums"]) == (["uint16"], 0, 0)
    half = len(texts) // 2
    shown = [(row["document"], row["tokens"]) for row in told["samples"]]
    assert shown == [(0, lengths[0]), (half, lengths[half])]
    assert told["samples"][0]["text"] == encoder.decode(encoder.encode(texts[0])[:200])


def test_a_token_file_is_described_in_words_and_with_samples(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", ["the first document", *documents(9)])
    assert call("prepare", source, "--tokenizer-model", model, "--output", tmp_path / "out", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert call("inspect", tmp_path / "out_text_document", "--tokenizer-model", model, "--samples", 1) == 0
    out = capsys.readouterr().out
    for words in ("documents   10", "(uint16)", "SHA-256", "█"):
        assert words in out
    assert out.splitlines()[-1] == "the first document"


def test_a_control_character_in_a_sample_does_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from jreg_megatron.data import inspection

    sample = {"document": 0, "tokens": 1, "text": "red \x1b[31m and [bold]"}
    inspection.show(inspection.Summary(["one"], shortest=1), [sample])
    assert capsys.readouterr().out.endswith("red \\x1b[31m and [bold]\n")


def test_quick_reads_no_tokens(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, size = tmp_path / "wanted", len(of_tool(tmp_path, documents(5), model)["bin"])
    Path(f"{prefix}.bin").write_bytes(b"\xff" * size)
    assert inspect(capsys, prefix, "--quick")["largest_id"] is None
    assert inspect(capsys, prefix)["largest_id"] == 0xFFFF


def write_as_curator(folder: Path, parts: Sequence[Sequence[Sequence[int]]], vocab_size: int) -> list[Path]:
    """Token files as NeMo Curator 1.3's MegatronTokenizerWriter leaves them, from its documented layout.

    A pair of files per batch, named by a hash; every text is one sequence and one document, one without
    tokens too; int32 from a vocabulary of more than 65,536 on, which is later than in Megatron's own tool.
    """
    folder.mkdir()
    dtype, code = (np.dtype("int32"), 4) if vocab_size > 65536 else (np.dtype("uint16"), 8)
    prefixes = []
    for number, texts in enumerate(parts):
        prefix = folder / f"{number * 0x9E3779B1 % 2**32:08x}cafe"
        lengths = [len(ids) for ids in texts]
        starts = [sum(lengths[:n]) * dtype.itemsize for n in range(len(lengths))]
        tokens = np.concatenate([np.array(ids, dtype=dtype) for ids in texts])
        Path(f"{prefix}.bin").write_bytes(tokens.tobytes(order="C"))
        Path(f"{prefix}.idx").write_bytes(
            b"MMIDIDX\x00\x00"
            + struct.pack("<QB", 1, code)
            + struct.pack("<QQ", len(lengths), len(lengths) + 1)
            + np.array(lengths, dtype=np.int32).tobytes()
            + np.array(starts, dtype=np.int64).tobytes()
            + np.arange(len(lengths) + 1, dtype=np.int64).tobytes()
        )
        prefixes.append(prefix)
    return sorted(prefixes)


@pytest.mark.parametrize("vocab_size", [400, 65520, 70000])
def test_a_folder_as_nemo_curator_writes_it_is_accepted_summed_up_and_blended(
    vocab_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    parts = [
        [draw.integers(0, vocab_size, size=size).tolist() for size in draw.integers(0, 50, size=20)]
        for _ in range(3)
    ]
    parts[1][-1] = []  # the last sequence of a file without a token
    prefixes = write_as_curator(tmp_path / "curated", parts, vocab_size)
    lengths = [len(ids) for part in parts for ids in part]
    told = inspect(capsys, tmp_path / "curated", "--blend", tmp_path / "blend.txt")
    assert told["documents"] == told["sequences"] == 60
    assert told["tokens"] == sum(lengths)
    assert told["empty"] == lengths.count(0) > 0
    assert told["histogram"] == histogram(lengths)
    assert told["dtypes"] == ["int32" if vocab_size == 70000 else "uint16"]
    assert told["largest_id"] == max(token for part in parts for ids in part for token in ids)
    assert (tmp_path / "blend.txt").read_text().split() == [str(prefix) for prefix in prefixes]


def test_a_negative_id_is_refused_by_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (prefix,) = write_as_curator(tmp_path / "curated", [[[1, 2, -3], [4]]], 70000)
    assert call("inspect", prefix) == 2
    assert f"{prefix}.bin holds the id -3 as token 2, but no id is negative" in capsys.readouterr().err


def test_files_of_nemo_curators_own_writer_are_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs where nemo-curator is installed; the layout that the other tests write is this one."""
    writer = pytest.importorskip("nemo_curator.stages.text.io.writer.megatron_tokenizer")
    from nemo_curator.tasks import DocumentBatch
    from pandas import DataFrame
    from transformers import AutoTokenizer

    folder = hugging_face_folder(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [["", *documents(20)], documents(10, seed=1)]
    ids = [[[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in part] for part in texts]
    stage = writer.MegatronTokenizerWriter(
        path=str(tmp_path / "curated"), model_identifier=str(folder), append_eod=True
    )
    stage.setup()
    if not hasattr(stage.tokenizer, "batch_encode_plus"):  # transformers 5 has it as the call itself
        stage.tokenizer.batch_encode_plus = stage.tokenizer.__call__
    for number, part in enumerate(texts):
        metadata = {"source_files": [f"{number}.parquet"]}
        batch = DocumentBatch(dataset_name="test", data=DataFrame({"text": part}), _metadata=metadata)
        stage.process(batch)
    told = inspect(capsys, tmp_path / "curated", "--blend", tmp_path / "blend.txt")
    lengths = [len(document) for part in ids for document in part]
    assert (told["documents"], told["tokens"]) == (len(lengths), sum(lengths))
    assert told["histogram"] == histogram(lengths)
    written = {Path(f"{prefix}.bin").read_bytes(): prefix for prefix in told["prefixes"]}
    for number, part in enumerate(ids):
        made = write_as_curator(tmp_path / f"ours{number}", [part], len(tokenizer))[0]
        prefix = written[Path(f"{made}.bin").read_bytes()]
        assert Path(f"{made}.idx").read_bytes() == Path(f"{prefix}.idx").read_bytes()


def test_megatron_trains_on_the_blend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    from megatron.training.utils import get_blend_and_blend_per_split

    parts = [[[10 * part + token for token in range(9)] for _ in range(40)] for part in range(3)]
    write_as_curator(tmp_path / "curated", parts, 400)
    inspect(capsys, tmp_path / "curated", "--blend", tmp_path / "blend.txt")
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "per_split_data_args_path")
    args = Namespace(**dict.fromkeys(names), data_args_path=str(tmp_path / "blend.txt"))
    blend, _ = get_blend_and_blend_per_split(args)

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 400, 8, -1, {"class": "test"}

    train, _, _ = megatrons_datasets([60, 0, 0], 8, Tokenizer(), blend=blend, split="100,0,0")
    seen = {int(token) // 10 for number in range(60) for token in train[number]["tokens"]}
    assert seen == {0, 1, 2}, "a file of the blend is not trained on"
