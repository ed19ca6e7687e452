"""recipes/fineweb_edu.sh as a user starts it, on a small corpus instead of FineWeb-Edu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from data_toy import documents, sentencepiece_model, write_jsonl

from jreg_megatron.data.token_file import TokenFile

pytest.importorskip("megatron.core")
pyarrow = pytest.importorskip("pyarrow", reason="the extra data is not installed (jreg_megatron[data])")

RECIPES = Path(__file__).parent.parent / "recipes"


def run(*argv: str, **environment: object) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHON": sys.executable} | {k: str(v) for k, v in environment.items()}
    return subprocess.run(
        ["bash", str(RECIPES / "fineweb_edu.sh"), *argv],
        check=False,
        capture_output=True,
        text=True,
        env=variables,
        timeout=300,
    )


def test_it_makes_the_files_that_the_training_recipes_look_for(tmp_path: Path) -> None:
    import pyarrow.parquet

    texts = documents(400)
    table = pyarrow.table({"text": texts, "score": [3.0] * len(texts)})
    (tmp_path / "source").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "source" / "000_00000.parquet", row_group_size=50)
    settings = {
        "SOURCE": tmp_path / "source",
        "DATA": tmp_path / "data",
        "TOKENIZER": "train",
        "VOCABULARY": 400,
        "VALIDATION": 0.1,
    }
    done = run("10BT", **settings)
    assert done.returncode == 0, done.stderr
    counts = {}
    recipe = (RECIPES / "llama_170m.sh").read_text()
    for split in ("train", "validation"):
        assert f"$DATA/{split}_text_document" in recipe
        counts[split] = TokenFile(f"{tmp_path}/data/{split}_text_document").documents
    assert sum(counts.values()) == 400
    assert 20 < counts["validation"] < 60
    assert "TOKENIZER:-$DATA/tokenizer.model" in recipe
    assert (tmp_path / "data" / "tokenizer.model").is_file()
    assert json.loads((tmp_path / "data" / "train.manifest.json").read_text())["vocab_size"] == 400
    again = run("10BT", **settings)
    assert again.returncode == 0, again.stderr
    assert "is done already" in again.stdout


@pytest.mark.parametrize("argv", [(), ("350BT",), ("10BT", "100BT")])
def test_another_sample_is_refused_by_name(argv: tuple[str, ...]) -> None:
    done = run(*argv)
    assert done.returncode == 2
    assert done.stderr == f"jreg_megatron: error: the sample is '{' '.join(argv)}'; give 10BT or 100BT\n"


def test_a_missing_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    done = run("10BT", TOKENIZER=tmp_path / "none.model", DATA=tmp_path / "data")
    assert done.returncode == 2
    assert f"\njreg_megatron: error: TOKENIZER is {tmp_path}/none.model, " in f"\n{done.stderr}"


def test_mistrals_tokenizer_is_taken_from_its_package_and_no_other_one_is_replaced(tmp_path: Path) -> None:
    """With a package of that name and a file of that name, for the true one is 37 MB on the network."""
    model = sentencepiece_model(tmp_path / "made.model")
    about = "mistral_common-1.13.1.dist-info"
    with zipfile.ZipFile(tmp_path / "mistral_common-1.13.1-py3-none-any.whl", "w") as wheel:
        wheel.write(model, "mistral_common/data/tokenizer.model.v1")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: mistral-common\nVersion: 1.13.1\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    (tmp_path / "source").mkdir()
    settings = {
        "PIP_NO_INDEX": 1,
        "PIP_FIND_LINKS": tmp_path,
        "SOURCE": write_jsonl(tmp_path / "source" / "texts.jsonl", documents(50)).parent,
        "DATA": tmp_path / "data",
        "VALIDATION": 0.1,
    }
    done = run("10BT", **settings)
    assert done.returncode == 0, done.stderr
    taken = tmp_path / "data" / "tokenizer.model"
    assert taken.read_bytes() == model.read_bytes()
    taken.write_bytes(b"another one")
    refused = run("10BT", **settings)
    assert refused.returncode == 2 and taken.read_bytes() == b"another one"
    assert f"{taken} is another one; set TOKENIZER to that file" in refused.stderr
