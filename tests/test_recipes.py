"""The promises of the files in ``recipes/``: sizes, layouts, early checks, resume after a crash."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import kubernetes_validate
import psutil
import pytest
import torch
import yaml
from harness import Finished, read_scalars, run_ranks

from jreg_megatron.decoder.checkpoint.folder import last_checkpoint
from jreg_megatron.recipe import machine
from jreg_megatron.recipe.announcement import torchrun
from jreg_megatron.recipe.plan import Plan
from jreg_megatron.recipe.request import Rendezvous, read, rendezvous
from jreg_megatron.runtime.errors import UserError

NO_FUSION = "--no-gradient-accumulation-fusion"
RECIPES = Path(__file__).parents[1] / "recipes"
# Of the paper's tables 8 and 9 and the text beside them; with the sequences, a step has 524,288 tokens.
TABLES = {
    "llama_170m": ("12 layers x 768, FFN 2048, 12 heads of 64", "0.0009 to 9e-05", 134.1e6, "1 x 4 GPUs", 16),
    "llama_1b": ("16 layers x 2048, FFN 5376, 16 heads of 128", "0.0007 to 7e-05", 928e6, "1 x 8 GPUs", 55),
    "llama_3b4": (
        "30 layers x 3072, FFN 8192, 24 heads of 128",
        "0.0005 to 5e-05",
        3594e6,
        "1 x 8 GPUs",
        159,
    ),
}
COMMON = {
    "JREG": "lambda 1, alpha 1",
    "length": "105B tokens .*: 200,000 iterations of 512 sequences of 1,024",
    "optimizer": "adam 0.9, 0.95, epsilon 1e-08, weight decay 0.1, clip 1; cosine from {rates}, 1,000 ",
    "model": "{shape}, vocabulary 32,000",
    "layout": "{gpus}: TP 1 x PP 1 x CP 1",
}


@pytest.fixture(scope="session")
def words_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """A recipe's arguments for ``python -m jreg_megatron.recipe``, seen by a stand-in for Python."""
    stand_in = tmp_path_factory.mktemp("stand-in") / "python"
    stand_in.write_text('#!/bin/sh\ntest "$1" = -c || printf "%s\\0" "$@"\n')
    stand_in.chmod(0o755)

    def words(recipe: str, *typed: object, **knobs: object) -> list[str]:
        environment = os.environ | {name: str(value) for name, value in knobs.items()}
        run = subprocess.run(
            [RECIPES / f"{recipe}.sh", *map(str, typed)],
            env=environment | {"PYTHON": str(stand_in)},
            capture_output=True,
            text=True,
            check=True,
        )
        module, *rest = run.stdout.split("\0")[1:-1]
        assert module == "jreg_megatron.recipe"
        return rest

    return words


def plan(words: list[str], check: bool = True) -> Finished:
    """Run the recipe's Python code, in a process that has imported Megatron."""
    return run_ranks(words, entry="jreg_megatron.recipe.__main__:main", check=check, timeout=120)


def command_in(printed: str) -> str:
    found = re.search(r"^(\w+=\S+ )*\S+bin/(torchrun|python)", printed, re.MULTILINE)
    assert found, printed
    return printed[found.start() :]


def ranks_and_flags(printed: str) -> tuple[int, list[str]]:
    """Number of ranks and Megatron's flags of the command that a dry run prints last."""
    command = shlex.split(command_in(printed).replace("\\\n", " "))
    module = command.index("jreg_megatron.pretrain")
    number = {"--nproc", "--nproc-per-node"} & set(command[:module])
    return int(command[command.index(number.pop()) + 1]), command[module + 1 :]


def llama_parameters(layers: int, width: int, ffn: int) -> int:
    """Per layer four matrices of attention, three of SwiGLU and two norms; then the final norm."""
    return layers * (4 * width**2 + 3 * width * ffn + 2 * width) + width


@pytest.mark.parametrize("recipe", TABLES)
def test_a_recipe_is_the_papers_line_by_line(
    recipe: str, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    shape, rates, parameters, gpus, hours = TABLES[recipe]
    words = words_of(recipe, "jreg", "--dry-run", RUN=tmp_path)
    printed = plan(words).output[0]
    table = re.sub(r" *│\n│ {2,}│ ", " ", printed)  # a row's further lines
    for row, expected in COMMON.items():
        (said,) = re.findall(rf"│ {row} +│ (.*?) *│", table)
        pattern = expected.format(shape=shape, rates=rates, gpus=gpus)
        assert re.search(pattern, said), (row, said)

    exact = llama_parameters(*map(int, re.findall(r"^(\d+) layers x (\d+), FFN (\d+)", shape)[0]))
    whole = exact + 2 * 32_000 * int(re.findall(r"x (\d+)", shape)[0])
    assert whole == pytest.approx(parameters, rel=1e-3)
    assert f"│ {whole:,} parameters" in table
    said_in_file = f"{whole:,} parameters, {exact:,} without embedding and output layer"
    assert said_in_file in (RECIPES / f"{recipe}.sh").read_text()

    assert words[words.index("--tokens") + 1] == str(200_000 * 512 * 1024)
    (operations,) = re.findall(r"(\S+) operations", table)
    tflops = float(words[words.index("--tflops") + 1])
    assert float(operations) / int(gpus.split()[2]) / (hours * 3600) / 1e12 == pytest.approx(tflops, rel=0.02)
    _, flags = ranks_and_flags(printed)
    assert {"--init-fan-in", "--untie-embeddings-and-output-weights", "--bf16"} <= set(flags)
    assert flags[flags.index("--norm-epsilon") + 1] == "1e-5"
    assert flags[flags.index("--rotary-base") + 1] == "10000"
    validation = int(flags[flags.index("--eval-iters") + 1]) * 2**19
    assert validation == pytest.approx(11e6, rel=0.01)


@pytest.mark.parametrize("recipe", TABLES)
def test_baseline_and_jreg_differ_in_lambda_and_their_folder_alone(
    recipe: str, words_of: Callable[..., list[str]]
) -> None:
    ours, baseline = words_of(recipe, "jreg"), words_of(recipe, "baseline")
    assert len(ours) == len(baseline)
    differences = [(a, b) for a, b in zip(ours, baseline, strict=True) if a != b]
    assert ("1", "0") in differences and ("jreg", "baseline") in differences
    for one, other in set(differences) - {("1", "0")}:
        assert one.replace(f"{recipe}_jreg", f"{recipe}_baseline").replace("jreg", "baseline") == other
    at = next(at for at, pair in enumerate(zip(ours, baseline, strict=True)) if pair == ("1", "0"))
    assert ours[at - 1] == "--jreg-coeff"


def test_a_dry_run_prints_the_torchrun_command_with_every_flag(
    words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = words_of("llama_1b", "jreg", "--dry-run", "--", "--lr", "1e-4", RUN=tmp_path / "run")
    printed = plan(words).output[0]
    command = command_in(printed)
    assert "bin/torchrun" in command and "--standalone" in command
    ranks, flags = ranks_and_flags(printed)
    assert ranks == 8
    asked = words[words.index("--") + 1 : words.index(":::")]
    iterations = words[words.index("--tokens") + 1]
    batch, length = (int(asked[asked.index(name) + 1]) for name in ("--global-batch-size", "--seq-length"))
    own = [*asked, "--train-iters", str(int(iterations) // (batch * length)), "--lr", "1e-4"]
    assert flags == [*own, NO_FUSION]  # Apex is not installed here
    assert not (tmp_path / "run").exists()


def plan_beside_apex(argv: list[str]) -> None:
    from jreg_megatron.mcore.installed import APEX_FUSION
    from jreg_megatron.recipe.__main__ import main

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{APEX_FUSION}.py").touch()
        sys.path.append(folder)
        main(argv)


@pytest.mark.parametrize(
    ("entry", "typed", "count", "is_said"),
    [
        ("jreg_megatron.recipe.__main__:main", (), 1, True),
        ("jreg_megatron.recipe.__main__:main", ("--", NO_FUSION), 1, False),
        ("test_recipes:plan_beside_apex", (), 0, False),
        ("test_recipes:plan_beside_apex", ("--", NO_FUSION), 1, False),
    ],
)
def test_a_recipe_does_without_apex_where_there_is_none_and_says_so(
    entry: str,
    typed: tuple[str, ...],
    count: int,
    is_said: bool,
    words_of: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    words = words_of("llama_170m", "jreg", "--dry-run", *typed, RUN=tmp_path)
    printed = run_ranks(words, entry=entry, timeout=120).output[0]
    assert ranks_and_flags(printed)[1].count(NO_FUSION) == count
    assert len(re.findall(rf"added +│ {NO_FUSION}, .*Apex", printed)) == is_said


def train_on_nodes_of_which_the_first_alone_has_apex(argv: list[str]) -> None:
    from jreg_megatron import pretrain, training_loop

    def take_a_gpus_arguments(args: argparse.Namespace, _: object) -> None:
        args.gradient_accumulation_fusion = os.environ["RANK"] == "0"

    training_loop.refuse_unsupported = take_a_gpus_arguments
    pretrain.main(argv)


def test_nodes_that_differ_in_apex_are_refused_on_every_rank(toy_arguments: list[str]) -> None:
    argv = [*toy_arguments, "--train-iters", 1]
    entry = "test_recipes:train_on_nodes_of_which_the_first_alone_has_apex"
    run = run_ranks(argv, 2, entry=entry, check=False, timeout=180)
    assert run.status == [2, 2]
    for output in run.output:
        assert "Traceback" not in output
        assert f"jreg_megatron: error: rank 1 has {NO_FUSION}, but rank 0 does not" in output


def plan_beside_transformer_engine(argv: list[str]) -> None:
    from jreg_megatron.recipe.__main__ import main

    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder, "transformer_engine-2.9.0.dist-info", "METADATA")
        about.parent.mkdir()
        about.write_text("Name: transformer_engine\nVersion: 2.9.0\n")
        sys.path.append(folder)
        main(argv)


def test_a_flag_that_needs_transformer_engine_is_accepted_if_it_is_installed(
    words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = words_of("llama_170m", "jreg", "--dry-run", "--", "--log-max-attention-logit", RUN=tmp_path)
    refused = plan(words, check=False)
    assert refused.status == [2] and "only supported with TE >= 2.9.0" in refused.output[0]
    entry = "test_recipes:plan_beside_transformer_engine"
    assert "--log-max-attention-logit" in ranks_and_flags(run_ranks(words, entry=entry).output[0])[1]


@dataclass(frozen=True)
class Toy:
    """A toy of a recipe, trained."""

    ranks: int
    flags: list[str]
    logged: dict[str, list[float]]


@pytest.fixture(scope="module")
def toy_of(
    words_of: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Toy]:
    """Trains a toy of a recipe by ``--smoke``; each once."""

    @cache
    def train(recipe: str, variant: str, *smoke: str, **layout: int) -> Toy:
        folder = tmp_path_factory.mktemp(recipe)
        words = words_of(recipe, variant, "--dry-run", "--smoke", *smoke, RUN=folder, **layout)
        ranks, flags = ranks_and_flags(plan(words).output[0])
        run_ranks(flags, ranks)
        return Toy(ranks, flags, read_scalars(folder / "smoke" / "tensorboard"))

    return train


# The variants differ only in lambda (above). Layouts are compared in test_layouts.py.
@pytest.mark.parametrize(
    ("recipe", "variant", "smoke", "layout"),
    [
        ("llama_170m", "jreg", ("8",), {}),
        ("llama_1b", "baseline", (), {"TP": 2}),
        ("llama_3b4", "jreg", (), {"PP": 2}),
    ],
)
def test_megatron_reads_every_flag_of_a_recipe_and_trains_a_toy_with_them(
    recipe: str, variant: str, smoke: tuple[str, ...], layout: dict[str, int], toy_of: Callable[..., Toy]
) -> None:
    toy = toy_of(recipe, variant, *smoke, **layout)
    flags, logged = toy.flags, toy.logged
    assert toy.ranks == 2 * math.prod(layout.values())  # two replicas of the model
    assert len(logged["lm loss"]) == len(logged["jump rate"]) == int(smoke[0] if smoke else 4)
    assert len(logged["lm loss validation"]) >= 2
    sizes = {"TP": "tensor-model-parallel-size", "PP": "pipeline-model-parallel-size"}
    for name, size in layout.items():
        assert flags[flags.index(f"--{sizes[name]}") + 1] == str(size)


@pytest.mark.slow
def test_a_killed_run_started_again_by_the_same_command_has_the_losses_of_one_that_went_through(
    toy_of: Callable[..., Toy], tmp_path: Path
) -> None:
    whole = toy_of("llama_170m", "jreg", "8").logged
    command = [RECIPES / "llama_170m.sh", "jreg", "--smoke", "8"]
    environment = os.environ | {"RUN": str(tmp_path / "killed"), "PYTHON": sys.executable}
    log = tmp_path / "log"
    with log.open("w") as stream:
        run = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
        while not re.search(r"iteration +[3-8]/", log.read_text()):
            assert run.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        run.wait()
    checkpoints = tmp_path / "killed" / "smoke" / "checkpoints"
    assert 2 <= last_checkpoint(checkpoints) < 8
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    resumed = read_scalars(tmp_path / "killed" / "smoke" / "tensorboard")
    for tag in ("lm loss", "jreg loss", "jump rate", "grad-norm"):
        assert len(whole[tag]) == 8
        # Lines that the killed run had logged after its last checkpoint come again.
        assert sorted(set(resumed[tag])) == sorted(set(whole[tag])), tag


MISTAKES: dict[str, tuple[tuple[object, ...], dict[str, object], str]] = {
    "no variant": ((), {}, r"required: jreg\|baseline"),
    "another variant": (("jerg",), {}, r"invalid choice: 'jerg'"),
    "an unknown option": (("jreg", "--dryrun"), {}, "unrecognized arguments: --dryrun"),
    "a flag that Megatron does not know": (("jreg", "--", "--lrr", 1), {}, "unrecognized arguments: --lrr"),
    "tokens in words": (("jreg",), {"TOKENS": "10B"}, "TOKENS is 10B; it must be a whole number >= 1"),
    "fewer tokens than a batch": (
        ("jreg",),
        {"TOKENS": 1000},
        "TOKENS is 1000, .* batch",
    ),
    "no GPU": (("jreg",), {}, "--tokenizer-model is .* not a file"),
    "no nodes": (("jreg",), {"NODES": 0}, "NODES is 0; it must be a whole number >= 1"),
    "a layout that the GPUs do not make": (
        ("jreg",),
        {"TP": 3},
        r"--tensor-model-parallel-size 3 .*4",
    ),
    "layers that stages cannot share": (
        ("jreg",),
        {"PP": 8, "GPUS": 8},
        r"--num-layers 12 is not divisible by .* 8",
    ),
    "a batch that the GPUs cannot share": (
        ("jreg",),
        {"MICRO_BATCH": 24},
        r"--global-batch-size is 512; it must be a multiple",
    ),
    "an option before the variant": (
        ("--dry-run", "baseline"),
        {},
        "baseline comes after --dry-run; it must come first: .* baseline --dry-run",
    ),
    "a lambda below 0": (("jreg",), {"LAMBDA": -1}, r"--jreg-coeff .* is -1\.0; it must be a finite number"),
    "two rules for initial weights": (
        ("jreg", "--", "--init-method-std", 0.01),
        {},
        "--init-method-std is 0.01, but --init-fan-in ",
    ),
    "a flag that Megatron refuses": (
        ("jreg", "--", "--recompute-granularity", "full"),
        {},
        "Megatron refuses the arguments: .*recompute",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_a_recipe_with_one_clear_line_before_anything_starts(
    mistake: str, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    typed, knobs, expected = MISTAKES[mistake]
    run = plan(words_of("llama_170m", *typed, **{"RUN": tmp_path / "run"} | knobs), check=False)
    assert run.status == [2]
    (line,) = run.output[0].splitlines()
    assert line.startswith("jreg_megatron: error: ")
    assert re.search(expected, line), line
    assert not (tmp_path / "run").exists()


NODE = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NODE_RANK": "1"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is missing; NODES is 2, so each node needs the host name"),
        ({"MASTER_PORT": "high"}, "MASTER_PORT is high; it must be a TCP port"),
        ({"NODE_RANK": "2"}, "NODE_RANK is 2; NODES is 2, so each node needs its own number in it, 0 to 1"),
        ({"NODE_RANK": ""}, "NODE_RANK is missing; NODES is 2"),
    ],
)
def test_nodes_that_could_not_meet_are_refused(changes: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        rendezvous(2, NODE | changes)


SHORT = ("--", "--lr-warmup-iters", 0)


@pytest.fixture(scope="module")
def demo_data() -> Path:
    from jreg_megatron.demo.data import prepare

    return prepare(Path("runs/data")).train_prefix.parent


def test_a_run_longer_than_its_data_is_refused_unless_epochs_allow_it(
    demo_data: Path, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    knobs = {"DATA": demo_data, "RUN": tmp_path / "run", "TOKENS": 4_000_000}
    run = plan(words_of("llama_170m", "jreg", *SHORT, **knobs), check=False)
    assert run.status == [2]
    assert re.search(
        r"TOKENS is [\d,]+, but there are .* passes over .*train_text_document, .* EPOCHS=2", run.output[0]
    )
    printed = plan(words_of("llama_170m", "jreg", "--dry-run", *SHORT, EPOCHS=2, **knobs)).output[0]
    assert re.search(r"data +│ .*M tokens, read 1\.\d\d times", printed)


def test_a_dry_run_refuses_the_same_methods_as_the_start(
    words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    let = ("--let-stop-iterations", 9, "--let-teacher", "gone")
    words = words_of("llama_170m", "baseline", "--dry-run", *SHORT, *let, RUN=tmp_path / "run")
    assert re.search(r"methods +│ would be refused: --let-teacher is gone", plan(words).output[0])


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused(
    demo_data: Path, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    knobs = {"DATA": demo_data, "RUN": tmp_path, "EPOCHS": 1e6}
    words = words_of("llama_170m", "jreg", "--", "--padded-vocab-size", 4000, **knobs)
    run = plan(words, check=False)
    assert run.status == [2]
    assert re.search(r"--padded-vocab-size is 4000, .* 4096 tokens", run.output[0])


def test_a_node_without_enough_gpus_is_refused_and_pointed_to_the_smoke_run(
    demo_data: Path, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = plan(
        words_of("llama_170m", "jreg", *SHORT, DATA=demo_data, RUN=tmp_path, TOKENS=10**6), check=False
    )
    assert run.status == [2]
    assert re.search(r"GPUS is 4, .* \d; .*--smoke", run.output[0])


def test_an_optimizer_whose_package_is_missing_is_refused_and_in_a_dry_run_named(
    demo_data: Path, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = (*SHORT, "--optimizer", "lion")
    knobs = {"DATA": demo_data, "RUN": tmp_path / "run", "TOKENS": 10**6}
    run = plan(words_of("llama_170m", "jreg", *more, **knobs), check=False)
    assert run.status == [2] and run.output[0].startswith("jreg_megatron: error: --optimizer is lion, ")
    printed = plan(words_of("llama_170m", "jreg", "--dry-run", *more, **knobs)).output[0]
    assert re.search(r"this node +│ would be refused: --optimizer is lion, ", printed)


def test_a_run_that_is_complete_says_so_and_starts_nothing(
    demo_data: Path, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    knobs = {"DATA": demo_data, "RUN": tmp_path, "TOKENS": 10**6}
    words = words_of("llama_170m", "jreg", "--dry-run", *SHORT, **knobs)
    _, flags = ranks_and_flags(plan(words).output[0])
    assert flags[flags.index("--train-iters") + 1] == "1"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    assert "resumes after iteration 1" in plan(words).output[0]
    started = plan(words_of("llama_170m", "jreg", *SHORT, **knobs)).output[0]
    assert started.endswith(" 1 iterations: nothing to do\n")


def blend_of(path: Path, *parts: object) -> Path:
    path.write_text(" ".join(map(str, parts)))
    return path


def test_passes_over_the_data_follow_the_weights_of_a_blend_and_its_split(
    demo_data: Path, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    train, small = demo_data / "train_text_document", demo_data / "validation_text_document"
    sizes = {path: Path(f"{path}.bin").stat().st_size / 2 for path in (train, small)}
    step = 512 * 1024
    for parts, passes in (
        ((0.5, train, 0.5, small), step * 0.5 / (0.999 * sizes[small])),
        ((train, small), step / (0.999 * sum(sizes.values()))),
    ):
        knobs = {"BLEND": blend_of(tmp_path / "blend.txt", *parts), "EPOCHS": 100, "TOKENS": step}
        words = words_of(
            "llama_170m", "jreg", "--dry-run", *SHORT, DATA=demo_data, RUN=tmp_path / "run", **knobs
        )
        printed = plan(words).output[0]
        assert f"read at most {passes:.2f} times" in printed
        # A toy has its own data, so that the rest can be tried.
        smoke = plan(words_of("llama_170m", "jreg", "--smoke", "--dry-run", RUN=tmp_path / "run", **knobs))
        assert "--data-args-path" not in smoke.output[0]


def test_a_tokenizer_that_did_not_make_the_data_is_refused(
    demo_data: Path, words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    for name in ("train_text_document.bin", "train_text_document.idx"):
        (tmp_path / name).symlink_to(demo_data.absolute() / name)
    for name in ("validation_text_document.bin", "validation_text_document.idx", "tokenizer.model"):
        (tmp_path / name).symlink_to(demo_data.absolute() / name)
    made_with = {"tokenizer_model": "other.model", "sha256": "0" * 64}
    (tmp_path / "train.manifest.json").write_text(json.dumps({"tokenizer": made_with}))
    words = words_of("llama_170m", "jreg", *SHORT, DATA=tmp_path, RUN=tmp_path / "run", TOKENS=10**6)
    run = plan(words, check=False)
    assert run.status == [2]
    assert re.search(
        r"--tokenizer-model is .*tokenizer.model, but .* made with another one, other.model", run.output[0]
    )


def test_a_folder_that_holds_another_run_is_refused_by_what_differs(
    words_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    from jreg_megatron.recipe import identity

    args = argparse.Namespace(seed=1234, train_iters=19073, jreg_coeff=0.1, jreg_alpha=3.0, num_layers=12)
    file = tmp_path / identity.FILE

    def refuse(file: Path = file, **changes: object) -> None:
        identity.refuse_another(file, identity.settings(argparse.Namespace(**vars(args) | changes)))

    identity.write(file, identity.settings(args))
    refuse()
    refuse(tmp_path / "new" / identity.FILE)
    refuse(jreg_measure_interval=10, jreg_kernels="torch", jreg_log_per_layer=True, norms_measure_interval=5)
    for name, value, expected in (
        ("jreg_coeff", 0.7, r"--jreg-coeff 0\.1, .* 0\.7; set RUN "),
        ("seed", 9, "--seed 1234, .* 9"),
        ("train_iters", 5, "--train-iters 19073, .* 5"),
        ("slowqk_multiplier", 0.0, r"--slowqk-multiplier None, .* 0\.0"),
        ("lns_power", 0.5, r"--lns-power None, .* 0\.5"),
    ):
        with pytest.raises(UserError, match=expected):
            refuse(**{name: value})
    run = plan(words_of("llama_170m", "jreg", RUN=tmp_path, LAMBDA=0.7), check=False)
    assert run.status == [2]
    assert "holds a run with --" in run.output[0]


def test_a_signal_before_training_starts_nothing_and_says_that_it_can_be_started_again(
    tmp_path: Path,
) -> None:
    environment = os.environ | {"RUN": str(tmp_path), "PYTHON": sys.executable}
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        with subprocess.Popen(
            [RECIPES / "llama_170m.sh", "jreg", "--smoke"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as run:
            # It has its handlers when it imports Megatron.
            while "jreg_megatron.recipe" not in " ".join(psutil.Process(run.pid).cmdline()) or not any(
                "libtorch" in part.path for part in psutil.Process(run.pid).memory_maps()
            ):
                time.sleep(0.05)
            run.send_signal(number)
            output, _ = run.communicate(timeout=180)
        assert run.returncode == status, output
        assert "Traceback" not in output
        assert ("SIGTERM before training began" in output) == (number == signal.SIGTERM)


A_PLAN = Plan(
    args=SimpleNamespace(  # type: ignore[arg-type]
        save="runs/x",
        load="runs/x",
        save_interval=500,
        save_retain_interval=2000,
        train_iters=5000,
        world_size=8,
    ),
    parameters=10**9,
    flops=1e20,
    state_bytes=8e9,
    activation_bytes=30e9,
)


def test_weights_that_no_gpu_can_hold_are_refused_and_activations_warned_of() -> None:
    told = machine.check_memory(A_PLAN, machine.Gpus(8, "H100", 80 * 10**9))
    assert told.startswith("about 38 GB a GPU: 8 GB weights") and told.endswith("of 80 GB")
    assert "lower MICRO_BATCH" in machine.check_memory(A_PLAN, machine.Gpus(8, "A30", 24 * 10**9))
    with pytest.raises(UserError, match=r"take 8 GB a GPU, and GTX has 6 GB; raise TP or PP"):
        machine.check_memory(A_PLAN, machine.Gpus(8, "GTX", 6 * 10**9))


def test_the_memory_is_that_of_the_gpus_that_the_run_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(
        """#!/bin/bash
case "$*" in
    *--id=1*) echo 'H100, 81559';;
    *--id=MIG*) echo 'No devices were found'; exit 6;;
    *) echo 'T400, 2048'; echo 'H100, 81559';;
esac
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for visible, order, found in (
        ("", "", machine.Gpus(2, "T400", 2048 * 2**20)),
        ("1", "PCI_BUS_ID", machine.Gpus(1, "H100", 81559 * 2**20)),
        ("1", "", machine.Gpus(1)),  # CUDA counts the fastest first
        ("MIG-0", "", machine.Gpus(1)),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found.count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
        assert machine.Gpus.of_this_node() == found


def test_checkpoints_that_the_disk_cannot_hold_are_refused(tmp_path: Path) -> None:
    args = SimpleNamespace(**vars(A_PLAN.args) | {"save": tmp_path / "run", "load": tmp_path / "run"})
    here = replace(A_PLAN, args=args, parameters=10**6)  # type: ignore[arg-type]
    # Those of 2000, 4000 and 5000 are kept. One more is written before the previous one is removed.
    assert machine.check_disk(here).startswith("4 x 14 MB, ")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("4500")
    assert machine.check_disk(here).startswith("2 x 14 MB, ")
    with pytest.raises(UserError, match=r"checkpoints will take 2.8 PB \(2 x 1.4 PB, .* free\)"):
        machine.check_disk(replace(here, parameters=10**14))


def test_signals_of_a_scheduler_reach_the_ranks_as_one_sigterm_and_the_status_asks_for_a_restart(
    tmp_path: Path,
) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, signal, time\n"
        "os.write(1, b'up\\n')\n"
        "time.sleep(1)\n"  # as long as this, there is no handler
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        "os.write(1, b'ready\\n')\n"
        "deadline = time.monotonic() + 60\n"
        "while not got and time.monotonic() < deadline: time.sleep(0.05)\n"
        "time.sleep(1.5)\n"
        "os.write(1, b'got %d\\n' % len(got))\n"
    )
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import subprocess, sys\n"
        f"ranks = [subprocess.Popen([sys.executable, {str(rank)!r}]) for _ in range(2)]\n"
        "sys.exit(max(rank.wait() for rank in ranks))\n"
    )
    # A signal to the whole job also reaches a rank directly, if it has a handler already.
    for number, when, times in ((signal.SIGUSR1, "up", "1"), (signal.SIGTERM, "ready", "[12]")):
        process = subprocess.Popen(
            [*supervisor(tmp_path), sys.executable, str(launcher)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout
        seen: list[str] = []
        while seen.count(f"{when}\n") < 2:
            seen.append(process.stdout.readline())
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 75, output
        assert len(re.findall(f"got {times}$", output, re.MULTILINE)) == 2, output
        assert re.search(rf"ended on {number.name};.* resumes", output)


@pytest.fixture
def under_torchrun(
    words_of: Callable[..., list[str]], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A toy on two ranks that torchrun started as on GPUs, past its fourth iteration; its run folder."""
    words = words_of("llama_170m", "jreg", "--dry-run", "--smoke", 200, RUN=tmp_path)
    _, flags = ranks_and_flags(plan(words).output[0])
    command = torchrun(2, 1, None, [*flags, "--cpu"])
    with subprocess.Popen([*supervisor(tmp_path), *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if re.search(r"iteration +4/", line):
                break
        yield process, tmp_path / "smoke"
        process.kill()


def test_sigterm_to_a_run_under_torchrun_saves_the_iteration_it_was_in(
    under_torchrun: tuple[subprocess.Popen[str], Path],
) -> None:
    process, run = under_torchrun
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output[-3000:]
    last = int(re.findall(r"iteration +(\d+)/", "iteration 4/" + output)[-1])
    assert last_checkpoint(run / "checkpoints") == last


@pytest.mark.slow
def test_no_rank_outlives_a_run_under_torchrun_that_is_killed(
    under_torchrun: tuple[subprocess.Popen[str], Path],
) -> None:
    process, _ = under_torchrun
    family = psutil.Process(process.pid).children(recursive=True)
    assert len([p for p in family if "jreg_megatron.pretrain" in p.cmdline()]) >= 3
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_a_second_run_in_the_same_folder_is_refused_by_name_while_the_first_one_lives(tmp_path: Path) -> None:
    *command, _ = supervisor(tmp_path)
    command += ["--lock", str(tmp_path / "run"), "--"]
    with subprocess.Popen([*command, "sleep", "60"]) as first:
        while not (tmp_path / "run" / "run.lock").exists() or not (tmp_path / "run" / "run.lock").read_text():
            time.sleep(0.05)
        second = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert re.fullmatch(
            rf"jreg_megatron: error: .*run is being trained by process {first.pid} on .*; wait for its end, "
            r"or set RUN to another folder\n",
            second.stderr,
        )
        first.kill()
    assert subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 75


def supervisor(checkpoints: Path) -> list[str]:
    module = [sys.executable, "-m", "jreg_megatron.recipe.supervise"]
    return [*module, "--iterations", "5", "--checkpoints", str(checkpoints), "--"]


def test_a_run_that_ends_well_or_badly_by_itself_keeps_its_status(tmp_path: Path) -> None:
    def status(*command: str) -> int:
        return subprocess.run([*supervisor(tmp_path), *command], capture_output=True, check=False).returncode

    assert status("false") == 1
    assert status("bash", "-c", "kill -KILL $$") == 137
    assert status("true") == 75  # no checkpoint of iteration 5
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert status("true") == 0


def test_a_slurm_job_starts_the_recipe_on_every_node_and_is_requeued_when_it_has_saved(
    tmp_path: Path,
) -> None:
    tools = {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$LOG"; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@" || status=$?; done; exit ${status:-0}',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    show = 'echo "$NODE_RANK of $NODES x $GPUS at $MASTER_ADDR:$MASTER_PORT" >> "$LOG"; exit '
    for status in (0, 75, 1):
        log.write_text("")
        run = subprocess.run(
            [RECIPES / "slurm.sh", "bash", "-c", f"{show}{status}"], env=environment, check=False
        )
        assert run.returncode == status
        started = ["0 of 2 x 4 at node7:20041", "1 of 2 x 4 at node7:20041"]
        assert log.read_text().splitlines() == started + (["requeue 41"] if status == 75 else [])


def test_the_kubernetes_job_is_valid_and_numbers_its_pods(tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text()))
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)
    service, job = documents
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    words = "--recipe x.sh --variant jreg --run x --tokens 1 --epochs 1 --tflops 1".split()
    words += ["--nodes", environment["NODES"], "--gpus", environment["GPUS"]]
    request = read([*words, "--", ":::", container["args"][1]])
    assert request.nodes == job["spec"]["completions"] == job["spec"]["parallelism"]
    # A pod of an indexed job is called JOB-INDEX, and found as JOB-INDEX.SERVICE.
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert pod["subdomain"] == subdomain and service["spec"]["selector"] == {"job-name": name}
    assert rendezvous(request.nodes, environment) == Rendezvous(f"{name}-0.{subdomain}", 29500, 1)
    assert (RECIPES / f"{container['args'][0]}.sh").exists()
