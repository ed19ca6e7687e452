"""Every mistake that preflight knows ends in one line that names the flag and the value."""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from data_toy import write_documents

from jreg_megatron.mcore.preflight import check_arguments, optimizer
from jreg_megatron.runtime.errors import UserError

pytest.importorskip("megatron.training")

GOOD = """--num-layers 8 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 96 --train-iters 100 --lr 1e-3 --eval-interval 10
    --tokenizer-type NullTokenizer --vocab-size 100 --mock-data"""


@pytest.fixture(scope="module")
def parsed() -> argparse.Namespace:
    from megatron.training.arguments import parse_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *GOOD.split()])
        patch.setenv("WORLD_SIZE", "1")
        return parse_args()


@pytest.fixture
def args_with(parsed: argparse.Namespace) -> Callable[..., argparse.Namespace]:
    def make(**changes: Any) -> argparse.Namespace:
        args = copy.deepcopy(parsed)
        for name, value in changes.items():
            assert hasattr(args, name), name
            setattr(args, name, value)
        return args

    return make


def complaint(args: argparse.Namespace) -> str:
    before = copy.deepcopy(args)
    with pytest.raises(UserError) as caught:
        check_arguments(args)
    assert args == before
    message = str(caught.value)
    assert "\n" not in message
    return message


TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
PER_VIRTUAL, VIRTUAL = "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
LAYOUT, SHARDED = "pipeline_model_parallel_layout", "use_distributed_optimizer"
FSDP, MEGATRON_FSDP = "use_torch_fsdp2", "use_megatron_fsdp"

GOOD_CHANGES: list[dict[str, Any]] = [
    {},
    {TP: 4, "world_size": 4, "sequence_parallel": True},
    {TP: 2, PP: 2, CP: 2, "world_size": 16, "sequence_parallel": True},
    {"kv_channels": 32, "hidden_size": 60},
    {"group_query_attention": True, "num_query_groups": 2, TP: 4, "world_size": 4},
    {"num_layers": None, "encoder_num_layers": 8},
    {"train_iters": None, "train_samples": 500, "lr_warmup_samples": 10},
    {"lr_warmup_fraction": 0.1},
    {"skip_train": True, "train_iters": None, "lr": None, "eval_interval": None},
    {"global_batch_size": None, "world_size": 3},
    {"global_batch_size": 97, "decrease_batch_size_if_needed": True, "eval_global_batch_size": 2},
    {PP: 4, "world_size": 4, PER_VIRTUAL: 1},
    {PP: 4, "world_size": 4, VIRTUAL: 2},
    {PP: 3, "world_size": 3, FIRST: 2, LAST: 2},
    {PP: 3, "world_size": 3, FIRST: 2},
    {PP: 2, "world_size": 2, FIRST: 5, LAST: 3},
    {PP: 5, "world_size": 5, EMBEDDING: True, LOSS: True, "num_layers": 13, "global_batch_size": None},
    {PP: 4, "world_size": 4, LAYOUT: "Ett|tt|tt|ttL"},
    {PP: 4, "world_size": 4, LAYOUT: "Et|(t|)*6tL"},
    {"num_layers": None, "hybrid_layer_pattern": "M*M*"},
    {"use_checkpoint_args": True, "num_layers": None},
    {"padded_vocab_size": 100},
    {"full_validation": True, "multiple_validation_sets": True},
    {"num_experts": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "world_size": 2},
    {"wandb_project": "toy", "wandb_save_dir": "logs"},
    {"num_experts": 2},
    {FSDP: True, "save": "out", "save_interval": 9, "no_save_optim": True, "load": "in", "finetune": True},
    {FSDP: True, "load": "in", "no_load_optim": True},
    {MEGATRON_FSDP: True},
    {"vocab_size": 70_000},
    {"sft": True, "mock_data": False, "data_path": ["chats.jsonl"], "split": "1,0,0"},
    {"mock_data": False, "data_path": ["s3://bucket/text_document"]},
]


@pytest.mark.parametrize("changes", GOOD_CHANGES, ids=str)
def test_good_arguments_pass(args_with: Callable[..., argparse.Namespace], changes: dict[str, Any]) -> None:
    check_arguments(args_with(**changes))


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_layers": None}, ["--num-layers is missing"]),
    ({"hidden_size": None}, ["--hidden-size is missing"]),
    ({"num_attention_heads": None}, ["--num-attention-heads is missing"]),
    ({"seq_length": None}, ["--seq-length is missing"]),
    ({"max_position_embeddings": None}, ["--max-position-embeddings is missing"]),
    ({"micro_batch_size": None}, ["--micro-batch-size is missing"]),
    ({"micro_batch_size": 0}, ["--micro-batch-size is 0"]),
    ({TP: 0}, ["--tensor-model-parallel-size is 0"]),
    ({"train_iters": None}, ["--train-iters is missing"]),
    ({"train_iters": 0}, ["--train-iters is 0"]),
    ({"train_samples": 5}, ["--train-iters is 100", "--train-samples is 5"]),
    ({"lr": None}, ["--lr is missing"]),
    ({"lr": float("nan")}, ["--lr is nan"]),
    ({"min_lr": 0.1}, ["--min-lr is 0.1", "--lr 0.001"]),
    ({"lr_warmup_iters": 100}, ["--lr-warmup-iters is 100", "--train-iters 100"]),
    ({"lr_warmup_iters": 50, "lr_decay_iters": 50}, ["--lr-warmup-iters is 50", "--lr-decay-iters 50"]),
    ({"lr_warmup_fraction": 1.0}, ["--lr-warmup-fraction is 1.0"]),
    ({"lr_warmup_samples": 7}, ["--lr-warmup-samples is 7", "use --lr-warmup-iters"]),
    ({"lr_decay_samples": 7}, ["--lr-decay-samples is 7", "use --lr-decay-iters"]),
    ({"train_iters": None, "train_samples": 9, "lr_decay_iters": 7}, ["--lr-decay-iters is 7"]),
    ({"eval_interval": None}, ["--eval-interval is missing"]),
    ({"eval_interval": 0}, ["--eval-interval is 0"]),
    ({"save": "out"}, ["--save is out", "--save-interval is missing"]),
    (
        {FSDP: True, "save": "out", "save_interval": 9},
        ["--save is out with --use-torch-fsdp2", "give --no-save-optim to save"],
    ),
    ({MEGATRON_FSDP: True, PP: 2, "world_size": 2}, ["-parallel-size is 2 with --use-megatron-fsdp"]),
    ({MEGATRON_FSDP: True, "save": "out", "save_interval": 9}, ["--save is out with --use-megatron-fsdp"]),
    ({MEGATRON_FSDP: True, "load": "in"}, ["--load is in with --use-megatron-fsdp", "leave --load out"]),
    ({MEGATRON_FSDP: True, "pretrained_checkpoint": "in"}, ["--pretrained-checkpoint is in with --use"]),
    ({FSDP: True, "load": "in"}, ["--load is in with --use-torch-fsdp2", "give --no-load-optim to load"]),
    (
        {FSDP: True, "load": "in", "finetune": True, "ckpt_format": "torch_dcp"},
        ["--load is in with --ckpt-format torch_dcp", "give --ckpt-format torch_dist"],
    ),
    ({TP: 2, PP: 2, "world_size": 6}, ["parallel-size 2 x", "is 4", "the 6 started processes"]),
    ({TP: 2, "world_size": 1}, ["--tensor-model-parallel-size 2", "the 1 started processes"]),
    ({"hidden_size": 60}, ["--hidden-size 60", "--num-attention-heads 8"]),
    ({TP: 3, "world_size": 3}, ["--num-attention-heads 8", "--tensor-model-parallel-size 3"]),
    (
        {"group_query_attention": True, "num_query_groups": 3},
        ["--num-attention-heads 8", "--num-query-groups 3"],
    ),
    ({"ffn_hidden_size": 99, TP: 2, "world_size": 2}, ["--ffn-hidden-size 99", "size 2"]),
    ({PP: 3, "world_size": 3}, ["--num-layers 8", "--pipeline-model-parallel-size 3"]),
    ({PP: 4, "world_size": 4, LOSS: True}, ["--num-layers 8 plus loss", "size 4"]),
    ({PP: 2, "world_size": 2, PER_VIRTUAL: 3}, ["--num-layers-per-virtual-pipeline-stage is 3", "4 layers"]),
    ({PP: 2, "world_size": 2, VIRTUAL: 3}, ["--num-virtual-stages-per-pipeline-rank is 3", "4 layers"]),
    ({PP: 2, "world_size": 2, FIRST: 9}, ["--decoder-first-pipeline-num-layers 9", "-1 of 8 layers"]),
    ({FIRST: 2, LAST: 2}, ["--decoder-last-pipeline-num-layers 2", "-1 other pipeline stages"]),
    ({PP: 2, "world_size": 2, FIRST: 5, VIRTUAL: 0}, ["--num-virtual-stages-per-pipeline-rank is 0"]),
    ({"optimizer": "sgd", SHARDED: True}, ["--optimizer is sgd", "--use-distributed-optimizer"]),
    ({"kv_channels": 0}, ["--kv-channels is 0; it must be >= 1"]),
    ({"log_interval": 0}, ["--log-interval is 0; it must be >= 1"]),
    ({"tensorboard_log_interval": 0}, ["--tensorboard-log-interval is 0; it must be >= 1"]),
    ({"full_validation": True}, ["--full-validation", "--multiple-validation-sets"]),
    ({"wandb_project": "toy"}, ["--wandb-project is toy", "--wandb-save-dir"]),
    ({"multiple_validation_sets": True}, ["--multiple-validation-sets", "needs --full-validation"]),
    ({"num_experts": 4, TP: 2, "world_size": 2}, ["--num-experts is 4", "--sequence-parallel"]),
    ({"num_experts": 1}, ["--moe-router-topk is 2", "--num-experts 1"]),
    ({CP: 2, "world_size": 2, "seq_length": 62}, ["--seq-length is 62", "multiple of 4", "context"]),
    (
        {CP: 2, TP: 4, "world_size": 8, "seq_length": 60, "sequence_parallel": True},
        ["--seq-length is 60", "multiple of 8", "--sequence-parallel over --tensor-model-parallel-size 4"],
    ),
    ({"world_size": 5}, ["--global-batch-size is 96", "--micro-batch-size 2 x 5", "= 10"]),
    ({"global_batch_size": 1, "decrease_batch_size_if_needed": True}, ["--global-batch-size is 1"]),
    ({"mock_data": False}, ["--data-path is missing", "--mock-data"]),
    ({"data_path": ["a"]}, ["--data-path and --mock-data"]),
    (
        {"mock_data": False, "data_path": ["a"], "train_data_path": ["b"]},
        ["--data-path and --train-data-path"],
    ),
    ({"mock_data": False, "train_data_path": ["a"], "split": "9,1"}, ["--split is 9,1", "drop --split"]),
    ({"mock_data": False, "valid_data_path": ["a"]}, ["--train-data-path is missing"]),
    ({"mock_data": False, "data_args_path": "f"}, ["--split is missing"]),
    ({"mock_data": False, "data_args_path": "no/f", "split": "1"}, ["--data-args-path no/f cannot be read"]),
    ({"mock_data": False, "data_path": []}, ["--data-path is empty"]),
    ({"mock_data": False, "data_path": ["no/where"]}, ["--data-path names no/where", "no/where.idx"]),
    ({"mock_data": False, "data_path": ["no/w.bin"]}, ["--data-path names no/w.bin", "leave .bin out"]),
    ({"mock_data": False, "data_path": ["0.3", "a", "b", "c"]}, ["--data-path is 0.3 a b c", "a weight"]),
    (
        {"mock_data": False, "data_path": ["0.3", "a", "b"]},
        ["--data-path names 0.3", "a weight"],
    ),
    ({"tokenizer_type": None}, ["--tokenizer-type is missing"]),
    ({"vocab_size": None}, ["--vocab-size is missing", "NullTokenizer"]),
    ({"tokenizer_type": "HuggingFaceTokenizer"}, ["--tokenizer-model is missing", "HuggingFaceTokenizer"]),
    (
        {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "no/t.model"},
        ["--tokenizer-model is no/t.model", "not a file"],
    ),
    ({"vocab_file": "no/vocab.json"}, ["--vocab-file is no/vocab.json"]),
    ({"metadata_path": "no/meta.json"}, ["--tokenizer-metadata is no/meta.json"]),
    ({"padded_vocab_size": 99}, ["--padded-vocab-size is 99", "100 tokens"]),
    ({"padded_vocab_size": 129, TP: 2, "world_size": 2}, ["--padded-vocab-size 129", "size 2"]),
    ({"vocab_size": 0}, ["--vocab-size is"]),
]


@pytest.mark.parametrize(("changes", "parts"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_mistake_ends_in_one_line(
    args_with: Callable[..., argparse.Namespace], changes: dict[str, Any], parts: list[str]
) -> None:
    message = complaint(args_with(**changes))
    for part in parts:
        assert part in message


LEFT_TO_MEGATRON: list[tuple[dict[str, Any], str]] = [
    ({"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, "only specify one of lr-warmup-fraction and"),
    (
        {"tensor_parallel_num_weight_shards": 3, TP: 2, "world_size": 6},
        "tensor_parallel_num_weight_shards (3)",
    ),
    (
        {"group_query_attention": True, "num_query_groups": 3, "num_attention_heads": 6, "hidden_size": 96}
        | {TP: 2, "world_size": 2},
        "num_query_groups (3) must be a multiple or divisor of tensor_model_parallel_size (2)",
    ),
    ({VIRTUAL: 2}, "interleaved schedule is used, pipeline-model-parallel size should be greater than 1"),
    ({PP: 2, "world_size": 2, VIRTUAL: 2, "overlap_p2p_comm": False}, "size should be greater than 2"),
    ({PP: 2, "world_size": 2, VIRTUAL: 2, PER_VIRTUAL: 2}, "No more than one of the following arguments"),
    ({PP: 2, "world_size": 2, FIRST: 2, LOSS: True}, "num_layers_in_first_pipeline_stage and num_layers_in"),
    ({PP: 2, "world_size": 2, FIRST: 4, PER_VIRTUAL: 2}, "please use --num-virtual-stages-per-pipeline"),
    ({PP: 3, "world_size": 3, FIRST: 3}, "number of layers at middle stage: 5 must be divisible"),
    ({PP: 2, "world_size": 2, FIRST: 3, LAST: 3}, "2 middle layers remaining but 0 middle PP stages"),
    ({PP: 2, "world_size": 2, FIRST: 3, VIRTUAL: 2}, "number of layers at first stage: 3"),
    ({LAYOUT: "EtxL"}, "Invalid layer character: x (stage='EtxL'"),
    (
        {PP: 2, "world_size": 2, LAYOUT: "Et|t|tL"},
        "pipeline_model_parallel_layout must be divisible",
    ),
    ({PP: 2, "world_size": 2, LAYOUT: "Et|tL"}, "Number of decoder layers 2"),
    ({PP: 2, "world_size": 2, LAYOUT: "tttt|ttttL"}, "The first layer must be embedding"),
    ({PP: 2, "world_size": 2, LAYOUT: "Etttt|tttt"}, "The last layer must be loss"),
    ({"seq_length": 65}, "max_position_embeddings (64) must be greater than or equal to seq_length (65)"),
    ({"eval_global_batch_size": 5}, "eval_global_batch_size (5) must be divisible by eval_micro_batch_size"),
    (
        {"step_batch_size_schedule": "0:8"},
        "both --step-batch-size-schedule and --global-batch-size",
    ),
]


@pytest.mark.parametrize(("changes", "said"), LEFT_TO_MEGATRON, ids=[said for _, said in LEFT_TO_MEGATRON])
def test_an_error_that_megatron_explains_before_the_start_is_left_to_megatron(
    args_with: Callable[..., argparse.Namespace],
    changes: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = args_with(**changes)
    check_arguments(args)
    assert said in str(megatrons_words(args, monkeypatch))


EMERGING = ("muon", "dist_muon", "adaptive_muon", "lion", "soap")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Megatron's parser
def test_every_optimizer_of_megatrons_but_adam_and_sgd_needs_the_package(
    args_with: Callable[..., argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser())
    (action,) = (action for action in parser._actions if action.dest == "optimizer")
    assert set(action.choices or ()) == {"adam", "sgd", *EMERGING}
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    for name in EMERGING:
        for more in ({}, {"use_checkpoint_args": True}):
            message = complaint(args_with(optimizer=name, bf16=True, **more))
            assert f"--optimizer is {name}, " in message and "pip install emerging-optimizers" in message
    check_arguments(args_with(optimizer="sgd"))


def test_megatron_fsdp_needs_the_package_einops(
    args_with: Callable[..., argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    message = complaint(args_with(use_megatron_fsdp=True))
    assert message.startswith("--use-megatron-fsdp ") and "pip install einops" in message


def test_a_tree_with_an_optimizer_of_its_own_needs_no_package_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "optimizer"
    folder.mkdir()
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    monkeypatch.setattr(optimizer, "core_folder", lambda: tmp_path)
    (folder / "muon.py").write_text("class Muon: ...")
    optimizer.package("muon")
    (folder / "muon.py").write_text("from emerging_optimizers import muon")
    with pytest.raises(UserError, match="--optimizer is muon, which needs the package"):
        optimizer.package("muon")


def test_an_older_package_of_optimizers_is_refused_by_its_version(
    args_with: Callable[..., argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda name: True)
    monkeypatch.setattr(optimizer, "version", lambda name: "0.1.0")
    message = complaint(args_with(optimizer="muon", bf16=True))
    assert "--optimizer is muon" in message and "0.2 or later, and 0.1 is installed" in message


@pytest.mark.parametrize(
    ("changes", "version", "parts"),
    [
        ({"optimizer": "lion", "fp16": True}, "0.3.0", ["--optimizer is lion", "--fp16"]),
        ({"optimizer": "muon", SHARDED: True}, "0.3.0", ["--optimizer is muon", "bf16 only"]),
        ({"optimizer": "dist_muon"}, "0.3.0", ["--optimizer is dist_muon", "bf16 only"]),
        (
            {"optimizer": "adaptive_muon"},
            "0.3.0",
            ["--optimizer is adaptive_muon", "0.2", "0.3 is installed"],
        ),
        ({"optimizer": "adaptive_muon"}, "0.2.0", []),
        ({"optimizer": "muon", SHARDED: True, "bf16": True}, "0.3.0", []),
        ({"optimizer": "dist_muon", "bf16": True}, "0.3.0", []),
        ({"optimizer": "soap"}, "0.3.0", []),
    ],
    ids=str,
)
def test_flags_that_an_optimizer_of_the_package_does_not_support_are_refused(
    changes: dict[str, Any],
    version: str,
    parts: list[str],
    args_with: Callable[..., argparse.Namespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda name: object())
    monkeypatch.setattr(optimizer, "version", lambda name: version)
    if parts:
        message = complaint(args_with(**changes))
        assert all(part in message for part in parts), message
    else:
        check_arguments(args_with(**changes))


def test_heterogeneous_layers_are_left_to_megatron(args_with: Callable[..., argparse.Namespace]) -> None:
    check_arguments(
        args_with(heterogeneous_layers_config_path="layers.json", num_layers=None, hidden_size=None)
    )


# Against Megatron itself


def megatrons_words(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """By which Megatron refuses the arguments; empty if that is when the layers are built."""
    from megatron.training import arguments

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(arguments, "get_device_arch_version", lambda: 9)
    args.transformer_impl = "local"
    args.gradient_accumulation_fusion = False
    try:
        arguments.validate_args(args)
        config = arguments.core_transformer_config_from_args(args)
    except (AssertionError, ValueError) as error:
        return str(error)
    uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
    if not uneven and not args.pipeline_model_parallel_layout:
        total = config.num_layers
        total += config.account_for_embedding_in_pipeline_split + config.account_for_loss_in_pipeline_split
        stages = args.virtual_pipeline_model_parallel_size or 1
        if total % (config.pipeline_model_parallel_size * stages):
            return ""
    return None


def test_nothing_that_megatron_accepts_is_refused_and_no_silent_refusal_is_left_to_it(
    args_with: Callable[..., argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(1)
    refused = 0
    for _ in range(300):
        changes: dict[str, Any] = {
            TP: choose.choice([1, 1, 2, 3]),
            PP: choose.choice([1, 2, 3, 4]),
            CP: choose.choice([1, 1, 1, 2]),
            "num_layers": choose.choice([4, 6, 8, 10, 12]),
            "num_attention_heads": choose.choice([4, 6, 8]),
            "hidden_size": choose.choice([48, 64, 96]),
            "seq_length": choose.choice([32, 64, 62, 63]),
            "global_batch_size": None,
            "lr_warmup_iters": 1,
            "overlap_p2p_comm": choose.choice([True, True, False]),
        }
        for name, values in (
            (FIRST, [1, 2, 3]),
            (LAST, [1, 2, 4]),
            (PER_VIRTUAL, [1, 2, 3]),
            (VIRTUAL, [1, 2, 3]),
            (EMBEDDING, [True]),
            (LOSS, [True]),
            ("group_query_attention", [True]),
        ):
            if choose.random() < 0.2:
                changes[name] = choose.choice(values)
        changes["num_query_groups"] = choose.choice([1, 2, 4])
        whole = changes[TP] * changes[PP] * changes[CP]
        changes["world_size"] = choose.choice([whole, 2 * whole, 12])
        args = args_with(**changes)
        try:
            check_arguments(args)
            mine = ""
        except UserError as error:
            mine = str(error)
        theirs = megatrons_words(args, monkeypatch)
        # Heads that a query group does not divide fail in Megatron only when attention is built.
        groups_late = args.group_query_attention and args.num_attention_heads % args.num_query_groups
        assert mine or theirs != "", changes
        assert not mine or theirs is not None or groups_late, (changes, mine)
        refused += bool(mine)
    assert 60 < refused < 240, "the sample should hold both kinds"


# Data and vocabulary


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def make(documents: list[list[int]], name: str = "text_document", dtype: Any = numpy.uint16) -> str:
        write_documents(tmp_path / name, documents, dtype)
        return str(tmp_path / name)

    return make


@pytest.fixture
def args_on(args_with: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
    def make(*data: str, **changes: Any) -> argparse.Namespace:
        return args_with(mock_data=False, data_path=list(data), **changes)

    return make


Make = Callable[..., argparse.Namespace]


def test_good_data_pass_however_they_are_named(
    args_with: Make, args_on: Make, write: Any, tmp_path: Path
) -> None:
    first, second = write([[1, 2], [3]], "a"), write([[4]], "b", numpy.int32)
    check_arguments(args_on(first))
    check_arguments(args_on(first, second))
    check_arguments(args_on("0.3", first, "0.7", second))
    check_arguments(args_on(first, second, first))
    check_arguments(args_with(mock_data=False, train_data_path=[first], valid_data_path=["1", second]))
    (tmp_path / "blend").write_text(f"0.3 {first}\n0.7 {second}\n")
    check_arguments(args_with(mock_data=False, data_args_path=str(tmp_path / "blend"), split="1,0,0"))
    (tmp_path / "splits").write_text(json.dumps({"train": ["1", first], "valid": second, "test": None}))
    check_arguments(args_with(mock_data=False, per_split_data_args_path=str(tmp_path / "splits")))


@pytest.mark.parametrize(
    ("file", "keep", "part"),
    [
        (".bin", 5, "5 bytes of the 6 that"),
        (".bin", 0, "0 bytes of the 6 that"),
        (".idx", 40, ".idx is cut short"),
        (".idx", 20, ".idx is cut short"),
        (".idx", 0, ".idx is not a Megatron"),
    ],
)
def test_files_cut_short(args_on: Make, write: Any, file: str, keep: int, part: str) -> None:
    prefix = write([[1, 2], [3]])
    path = Path(prefix + file)
    path.write_bytes(path.read_bytes()[:keep])
    message = complaint(args_on(prefix))
    assert message.startswith(f"--data-path names {prefix}, but {prefix}{file}")
    assert part in message


def test_other_broken_data(args_with: Make, args_on: Make, write: Any, tmp_path: Path) -> None:
    prefix = write([[1]])
    empty = write([], "empty")
    assert f"but {empty}.idx has no tokens" in complaint(args_on(empty))
    index = Path(f"{prefix}.idx")
    good = index.read_bytes()
    index.write_bytes(b"\x00" * 9 + good[9:])
    assert f"{index} is not a Megatron" in complaint(args_on(prefix))
    index.write_bytes(good[:9] + b"\x02" + good[10:])
    assert "version 2" in complaint(args_on(prefix))
    index.write_bytes(good)
    Path(f"{prefix}.bin").unlink()
    message = complaint(args_with(mock_data=False, train_data_path=[prefix]))
    assert message.startswith(f"--train-data-path names {prefix}, but {prefix}.bin is not a file")
    for content, part in (("[]", "no key train"), ("{", "is not JSON"), ('{"train": "x"}', "no key valid")):
        (tmp_path / "splits").write_text(content)
        bad = args_with(mock_data=False, per_split_data_args_path=str(tmp_path / "splits"))
        assert part in complaint(bad)


def test_token_beyond_the_vocabulary(args_on: Make, write: Any) -> None:
    check_arguments(args_on(write([[127]])))  # 100 tokens are padded to 128
    prefix = write([[1, 2], [128]])
    message = complaint(args_on(prefix))
    assert message.startswith(f"--data-path names {prefix}, ")
    assert "token id 128" in message and "vocabulary is 128" in message
    check_arguments(args_on(prefix, tensor_model_parallel_size=2, world_size=2))  # padded to 256
    check_arguments(args_on(prefix, padded_vocab_size=129))
    assert "vocabulary is 101" in complaint(args_on(prefix, padded_vocab_size=101))
    assert "token id -1" in complaint(args_on(write([[-1]], "negative", numpy.int32)))
    # It adds a token that ends a document, so that 129 are padded to 256.
    check_arguments(args_on(prefix, tokenizer_type="NullMultimodalTokenizer", vocab_size=128))


@pytest.mark.parametrize("place", [0, 1_500_000, 2_999_999])
def test_large_data_are_sampled_over_the_whole_length(args_on: Make, write: Any, place: int) -> None:
    tokens = numpy.zeros(3_000_000, dtype=numpy.uint16)
    tokens[max(0, place - 40_000) : place + 40_000] = 60_000
    assert "token id 60000" in complaint(args_on(write([tokens])))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import sentencepiece

    prefix = str(tmp_path_factory.mktemp("tokenizer") / "small")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to learn from"] * 3),
        model_prefix=prefix,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return f"{prefix}.model"


def test_sentencepiece_vocabulary(
    args_on: Make, write: Any, sentencepiece_model: str, tmp_path: Path
) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    settings = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": sentencepiece_model}
    good = args_on(write([[383]]), **settings, vocab_size=None)
    check_arguments(good)
    build_tokenizer(good)
    assert good.padded_vocab_size == 384, "what the check assumes of Megatron's padding"
    prefix = write([[384]])
    assert "vocabulary is 384" in complaint(args_on(prefix, **settings, vocab_size=None))
    message = complaint(args_on(prefix, **settings, vocab_size=299))
    assert message.startswith("--vocab-size is 299, ") and "300 tokens" in message
    message = complaint(args_on(prefix, **settings, vocab_size=None, padded_vocab_size=256))
    assert message.startswith("--padded-vocab-size is 256, ") and "300 tokens" in message
    legacy = {"tokenizer_sentencepiece_legacy": True, "special_tokens": [f"<x{i}>" for i in range(90)]}
    check_arguments(args_on(prefix, **settings, **legacy, vocab_size=None))  # 390 tokens, padded to 512
    unpadded = {"pad_vocab_size": False, "vocab_size": None}
    assert "--vocab-size is missing" in complaint(args_on(prefix, **settings, **unpadded))
    (tmp_path / "text.model").write_text("not a model")
    message = complaint(args_on(prefix, **settings | {"tokenizer_model": str(tmp_path / "text.model")}))
    assert f"--tokenizer-model is {tmp_path}/text.model, " in message and "SentencePiece" in message


def test_hugging_face_vocabulary(args_on: Make, write: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}
    prefix = write([[128]])
    assert "vocabulary is 128" in complaint(args_on(prefix, **settings, tokenizer_model=str(tmp_path)))
    check_arguments(args_on(prefix, **settings, tokenizer_model="some-org/on-the-hub"))
