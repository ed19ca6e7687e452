"""Between Megatron and Hugging Face, against transformers' own Llama and what trainings logged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toy import LLAMA_FLAGS, logits_of, made, some_tokens
from harness import TOY, read_scalars, run_function, run_ranks

from jreg_megatron import UserError
from jreg_megatron.convert import export, import_
from jreg_megatron.convert.command import check_place, made_beside
from jreg_megatron.convert.llama import LLAMA3_ROPE, from_megatron, refuse_other
from jreg_megatron.data import vocabulary
from jreg_megatron.data.speeches import read_speeches
from jreg_megatron.data.texts import Text, held_out_speeches

LAYOUT = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 512 pieces, made as the demo's."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    speeches = list(read_speeches().values())[:12]
    path.write_bytes(vocabulary.train((line for text in speeches for line in text.split("\n") if line), 512))
    return path


@pytest.fixture(scope="module")
def checkpoints(toy_data: Path, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped queries, heads wider than usual and padding, trained at TP2 x PP2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    own = {"--tokenizer-type": "SentencePieceTokenizer", "--make-vocab-size-divisible-by": "96"}
    flags = [own.get(before, word) for before, word in zip(["", *TOY], TOY, strict=False)]
    size = flags.index("--vocab-size")
    del flags[size : size + 2]
    options = ("--group-query-attention", "--num-query-groups", 2, "--kv-channels", 24, "--rotary-base", 5000)
    run_ranks(
        [
            *(*flags, "--tokenizer-model", tokenizer_model, "--data-path", toy_data, "--split", "80,20,0"),
            *("--train-iters", 2, "--save", folder, "--save-interval", 2, "--use-distributed-optimizer"),
            *("--norm-epsilon", 1e-4, *LAYOUT, *options),
        ],
        4,
    )
    return folder


def run(module: Any, *argv: object) -> dict[str, Any]:
    """A command's report; called in a rank."""
    options = module.parser().parse_args([str(word) for word in argv])
    report: dict[str, Any] = module.export(options) if module is export else module.import_folder(options)
    return report


def logits_of_export(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=tokens).logits.clone()


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def there_and_back(checkpoints: Path, work: Path) -> dict[str, Any]:
    """Export a checkpoint, import that, export it again, and compare the three."""
    from transformers import AutoTokenizer, GenerationConfig

    from jreg_megatron.decoder.checkpoint.model import load_megatron

    device = torch.device("cpu")
    reports = [
        run(export, checkpoints, work / "first"),
        run(import_, work / "first", work / "imported"),
        run(export, work / "imported", work / "second"),
    ]
    tokens = torch.randint(512, (3, 32), generator=torch.Generator().manual_seed(1))
    decoder = load_megatron(checkpoints, dtype=torch.float32, device=device)
    imported = load_megatron(work / "imported", dtype=torch.float32, device=device)
    theirs = logits_of_export(work / "first", tokens)
    tokenizer, speeches = AutoTokenizer.from_pretrained(work / "first"), held_out_speeches()
    encode = decoder.encode
    assert encode is not None

    def ids_of(text: Text) -> list[int]:
        return list(tokenizer(text.content)["input_ids"])

    return {
        "reports": reports,
        "exported": (decoder.logits(tokens) - theirs).abs().max().item(),
        "imported": (imported.logits(tokens) - theirs).abs().max().item(),
        "same weights": same_weights(work / "first", work / "second"),
        "other ids": [text.name for text in speeches if ids_of(text) != encode(text.content)],
        "other text": [text.name for text in speeches if tokenizer.decode(ids_of(text)) != text.content],
        "ids": (tokenizer.bos_token_id, tokenizer.eos_token_id, decoder.end_of_text),
        "generation": GenerationConfig.from_pretrained(work / "first").eos_token_id,
        "vocabulary": (decoder.vocab_size, imported.vocab_size, decoder.logits(tokens).shape[-1]),
    }


@pytest.fixture(scope="module")
def both_ways(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    work = tmp_path_factory.mktemp("work")
    (result,) = run_function(there_and_back, 1, checkpoints, work)
    return result, work


def test_logits_are_equal_at_every_position_both_ways(both_ways: tuple[dict[str, Any], Path]) -> None:
    result, _ = both_ways
    assert result["exported"] < 1e-4
    assert result["imported"] < 1e-4
    assert all(report["largest_logit_difference"] < 1e-4 for report in result["reports"])


def test_weights_that_came_from_a_folder_go_back_bit_for_bit(both_ways: tuple[dict[str, Any], Path]) -> None:
    assert both_ways[0]["same weights"]


def test_the_exported_tokenizer_gives_the_ids_of_training(both_ways: tuple[dict[str, Any], Path]) -> None:
    result, _ = both_ways
    assert result["other ids"] == []
    assert result["other text"] == []
    assert result["ids"] == (1, 2, 2)
    assert result["generation"] == 2


def test_padding_after_the_vocabulary_is_left_out(both_ways: tuple[dict[str, Any], Path]) -> None:
    result, _ = both_ways
    assert result["vocabulary"] == (512, 512, 512)
    assert [report.get("rows_of_padding_left_out") for report in result["reports"]] == [64, None, 0]


def check_rows_of_padding(tokenizer: Path, work: Path) -> None:
    """Exports without a tokenizer, of checkpoints whose number of padding rows is known or unknown."""
    ids = some_tokens()
    own = logits_of(made(work / "null"), ids)[..., :130]
    for module, source, output in ((export, "null", "1"), (import_, "1", "2"), (export, "2", "3")):
        assert run(module, work / source, work / output)["vocab_size"] == 130
    for name in ("1", "3"):
        assert float((logits_of_export(work / name, ids) - own).abs().max()) < 1e-4
    made(work / "old", remove=("null_tokenizer_eod_id",))
    told = run(export, work / "old", work / "4")
    assert told["vocab_size"] == 131, "before 0.18 the NullTokenizer had a token of its own"
    lost = {"tokenizer_type": "SentencePieceTokenizer", "vocab_size": None, "tokenizer_model": "gone.model"}
    there = lost | {"tokenizer_model": str(tokenizer)}  # of 512 tokens
    made(work / "lost", **lost)
    made(work / "narrow", **there)
    made(work / "wide", LLAMA_FLAGS.replace("130", "600"), **there, make_vocab_size_divisible_by=640)
    made(work / "unlike", LLAMA_FLAGS.replace("130", "600"), **there)  # 640 rows: no padding of 512
    told = run(export, work / "wide", work / "5", "--no-tokenizer")
    assert (told["vocab_size"], told["notes"]) == (512, [])
    told = run(export, work / "lost", work / "6", "--no-tokenizer")
    (note,) = told["notes"]
    assert told["vocab_size"] == 256 and "256" in note and "--vocab-size" in note
    told = run(export, work / "lost", work / "7", "--no-tokenizer", "--vocab-size", 200)
    assert (told["vocab_size"], told["notes"]) == (200, [])
    assert logits_of_export(work / "7", ids).shape[-1] == 200
    assert run(export, work / "unlike", work / "8", "--vocab-size", 600)["vocab_size"] == 600
    for argv, words in (
        (("lost", "--no-tokenizer", "--vocab-size", 257), ("--vocab-size is 257",)),
        (("lost", "--no-tokenizer", "--vocab-size", 0), ("--vocab-size is 0",)),
        (("null", "--vocab-size", 200), ("--vocab-size is 200", "130")),
        (("narrow",), ("has 512 tokens", "256")),
        (("unlike",), ("has 512 tokens", "640 rows")),
    ):
        with pytest.raises(UserError) as caught:
            run(export, work / argv[0], work / "x", *argv[1:])
        assert all(word in str(caught.value) for word in words)


def test_rows_of_padding_are_left_out_without_a_tokenizer_or_the_report_says_that_they_may_be_there(
    tokenizer_model: Path, tmp_path: Path
) -> None:
    run_function(check_rows_of_padding, 1, tokenizer_model, tmp_path)


def test_every_id_is_below_the_vocabulary_of_a_tokenizer_with_gaps(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from jreg_megatron.data.tokenizing import TokenizerSettings, build

    model = models.WordLevel({"<unk>": 0, "a": 1, "b": 40}, "<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="<unk>"
    ).save_pretrained(tmp_path)
    assert build(TokenizerSettings("HuggingFaceTokenizer", str(tmp_path))).vocab_size == 41


def check_older_arguments(work: Path) -> None:
    """The norm's epsilon and the kind of positions had other names."""
    ids = some_tokens()
    flags = f"{LLAMA_FLAGS} --norm-epsilon 0.003"
    rope = {"position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": True}
    model = made(work / "old", flags, remove=("layernorm_epsilon",), norm_epsilon=0.003, **rope)
    run(export, work / "old", work / "out")
    assert json.loads((work / "out" / "config.json").read_text())["rms_norm_eps"] == 0.003
    difference = logits_of_export(work / "out", ids) - logits_of(model, ids)[..., :130]
    assert float(difference.abs().max()) < 1e-4


def test_arguments_by_older_names_are_exported(tmp_path: Path) -> None:
    run_function(check_older_arguments, 1, tmp_path)


def test_older_programs_find_the_rotary_base_and_the_tokenizer(
    both_ways: tuple[dict[str, Any], Path],
) -> None:
    folder = both_ways[1] / "first"
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["head_dim"], config["rms_norm_eps"]) == (5000.0, 24, 1e-4)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_training_goes_on_from_an_import_at_another_layout_with_the_printed_flags(
    both_ways: tuple[dict[str, Any], Path], toy_data: Path, tmp_path: Path
) -> None:
    result, work = both_ways
    flags = result["reports"][1]["megatron_flags"]
    assert flags[: flags.index("--finetune") + 1] == ["--load", str(work / "imported"), "--finetune"]
    run_ranks(
        [
            *(*flags, "--data-path", toy_data, "--split", "80,20,0", "--seq-length", 32, *LAYOUT),
            *("--micro-batch-size", 2, "--global-batch-size", 8, "--lr", 0, "--min-lr", 0, "--seed", 3),
            *("--train-iters", 1, "--eval-iters", 1, "--eval-interval", 1),
            *("--make-vocab-size-divisible-by", 8, "--save", tmp_path / "saved", "--save-interval", 1),
            *("--tensorboard-dir", tmp_path / "tensorboard", "--tensorboard-log-interval", 1),
        ],
        4,
    )
    logged = read_scalars(tmp_path / "tensorboard")["lm loss validation"][-1]
    ((tokens, labels),) = run_function(validation_of, 1, tmp_path / "saved")
    loss = torch.nn.functional.cross_entropy(
        logits_of_export(work / "first", tokens).flatten(0, 1), labels.flatten()
    )
    assert logged == pytest.approx(loss.item(), abs=1e-5)


def validation_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from jreg_megatron.decoder.checkpoint.model import open_checkpoint
    from jreg_megatron.decoder.checkpoint.validation import last_validation_samples

    samples = last_validation_samples(open_checkpoint(folder, None, torch.device("cpu")))
    return samples["tokens"], samples["labels"]


SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "tied, one group": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "all biases, head_dim 16": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "Llama 3.1": {
        **{"rope_theta": 500000.0, "rope_scaling": dict(LLAMA3_ROPE), "max_position_embeddings": 128},
        "num_key_value_heads": 2,
    },
    "Qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    "Qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1000000.0},
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


def check_kinds(work: Path) -> None:
    """Each kind, to Megatron and back."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from jreg_megatron.decoder.checkpoint.model import load_megatron

    for name, options in KINDS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**({"model_type": "llama"} | SIZES | options))
        model = AutoModelForCausalLM.from_config(config).eval()
        for key, parameter in model.named_parameters():
            # Norms and biases that are not one and zero, and scores that are not all alike.
            torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.3)
        theirs, ours, back = work / name, work / f"{name} in Megatron", work / f"{name} back"
        model.save_pretrained(theirs)
        flags = run(import_, theirs, ours)["megatron_flags"]
        run(export, ours, back)
        tokens = torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(2))
        decoder = load_megatron(ours, dtype=torch.float32, device=torch.device("cpu"))
        with torch.inference_mode():
            expected = model(input_ids=tokens).logits
        assert float((decoder.logits(tokens) - expected).abs().max()) < 1e-5 * float(expected.abs().max()), (
            name
        )
        assert same_weights(theirs, back), name
        assert ("--use-rope-scaling" in flags) == (name == "Llama 3.1")
        assert ("--untie-embeddings-and-output-weights" in flags) == (name != "tied, one group")


def test_every_kind_of_llama_and_qwen_goes_to_megatron_and_back(tmp_path: Path) -> None:
    run_function(check_kinds, 1, tmp_path)


MEGATRON = {
    **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "kv_channels": 8},
    **{"group_query_attention": False, "max_position_embeddings": 64, "layernorm_epsilon": 1e-5},
    **{"rotary_base": 10000, "use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None},
    **{"untie_embeddings_and_output_weights": True, "add_bias_linear": False, "add_qkv_bias": False},
    **{"num_experts": None, "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope"},
}


@pytest.mark.parametrize(
    ("has", "named", "tool"),
    [
        ({"num_experts": 8}, "--num-experts", "Qwen3-MoE"),
        ({"normalization": "LayerNorm"}, "--normalization", "Nemotron"),
        ({"swiglu": False, "squared_relu": True}, "--squared-relu", "Nemotron"),
        ({"swiglu": False, "quick_geglu": True}, "--quick-geglu", "gpt-oss"),
        ({"swiglu": False}, "SwiGLU", None),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "--qk-layernorm", None),
        ({"multi_latent_attention": True}, "multi-latent attention", "DeepSeek-V3"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type", None),
        ({"rotary_percent": 0.5}, "--rotary-percent", "Nemotron"),
        ({"rotary_interleaved": True}, "--rotary-interleaved", "ERNIE 4.5"),
        ({"window_size": (16, 0)}, "--window-size", "gpt-oss"),
        ({"num_attention_heads": 5}, "5 heads", None),
    ],
)
def test_features_that_a_llama_cannot_express_are_refused_by_name_with_a_tool_that_can_export_them(
    has: dict[str, Any], named: str, tool: str | None
) -> None:
    from_megatron(Namespace(**MEGATRON), 100, "runs/x")
    with pytest.raises(UserError, match=f"^runs/x .*{named}") as caught:
        from_megatron(Namespace(**(MEGATRON | has)), 100, "runs/x")
    assert ("Megatron-Bridge's AutoBridge" in str(caught.value)) == (tool is not None)
    assert (tool or "jreg-megatron measure") in str(caught.value)


@pytest.mark.parametrize(
    ("has", "line"),
    [
        ({"model_type": "mistral"}, "of type mistral"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"attention_bias": True}, "biases in .* MLP"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "scaled by yarn"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}}, "factor 32.0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
            "low_freq_factor None",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "rope_theta of 0.5"),
    ],
)
def test_features_that_megatron_cannot_express_are_refused_by_name(has: dict[str, Any], line: str) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES)
    refuse_other(config, "x")
    for name, value in has.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=line):
        refuse_other(config, "x")


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_training_is_never_overwritten(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = tmp_path / "checkpoints"
    (training / "iter_0000100").mkdir(parents=True)
    (training / "latest_checkpointed_iteration.txt").write_text("100")
    (training / "config.json").touch()
    main = export.main if command == "export" else import_.main
    with pytest.raises(SystemExit):
        main([str(training), str(training), "--overwrite"])
    assert "holds " in capsys.readouterr().err
    assert (training / "iter_0000100").is_dir()


def test_an_existing_folder_is_left_alone_and_the_line_says_why(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").touch()
    with pytest.raises(UserError, match=r"OUTPUT is .*/notes, which holds a model.*--overwrite"):
        check_place(tmp_path / "notes", ("config.*",), overwrite=False)
    check_place(tmp_path / "notes", ("config.*",), overwrite=True)
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"which holds mine\.txt"):
        check_place(tmp_path / "notes", ("config.*",), overwrite=True)
    (tmp_path / "empty").mkdir()
    check_place(tmp_path / "empty", ("config.*",), overwrite=False)
    check_place(tmp_path / "new" / "deep", ("config.*",), overwrite=False)


def test_a_mistake_is_one_line_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text("raise SystemExit('torch is imported')")
    cases = (
        ("export", tmp_path / "nothing", "--save"),
        ("import_", tmp_path, "config.json"),
    )
    for module, source, named in cases:
        done = subprocess.run(
            [sys.executable, "-m", f"jreg_megatron.convert.{module}", source, tmp_path / "out"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "path")},
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"jreg_megatron: error: {source} ") and named in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_killed_export_leaves_no_partial_output(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal\n"
        "from jreg_megatron.convert.command import made_beside\n"
        f"with made_beside(pathlib.Path({str(tmp_path / 'out')!r})) as folder:\n"
        "    (folder / 'config.json').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert next(tmp_path.iterdir()).name.endswith(".part")


def test_a_folder_is_written_atomically(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def broken_off() -> None:
        with made_beside(output) as folder:
            (folder / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken_off()
    assert list(tmp_path.iterdir()) == []
    with made_beside(output) as folder:
        (folder / "whole").touch()
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["whole"]
    with made_beside(output) as folder:
        (folder / "newer").touch()
    assert [path.name for path in output.iterdir()] == ["newer"]
    assert list(tmp_path.iterdir()) == [output]
