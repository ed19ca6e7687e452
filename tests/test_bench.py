"""The benchmark that users run: it measures what it names, and it refuses mistakes."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_steps
import numpy as np
import on_gpu
import pytest
import torch
from harness import Finished, run_function, run_ranks
from rich.box import SIMPLE_HEAD
from rich.console import Console

from jreg_megatron import UserError
from jreg_megatron.bench import counting, megatron, options, results, step, table
from jreg_megatron.bench.__main__ import main
from jreg_megatron.bench.options import KINDS, SHAPES, WAYS
from jreg_megatron.bench.rounds import median_ratio
from jreg_megatron.bench.step import Measured, summarize
from jreg_megatron.bench.variants import Variant
from jreg_megatron.demo import training as demo
from jreg_megatron.demo.data import prepare
from jreg_megatron.mcore import installed
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.runtime import output

ROOT = Path(__file__).parents[1]
ENTRY = "jreg_megatron.bench.__main__:main"
RESULTS = ROOT / "jreg_megatron/bench/results"
KEPT = sorted(RESULTS.glob("*.json"))
WHOLE = ("--rounds", "10", "--count")


def measured(folder: Path, *argv: str, ranks: int = 1, entry: str = ENTRY) -> tuple[dict[str, Any], Finished]:
    """The document and the output of a tiny model's steps."""
    path = folder / "step.json"
    words = ["step", *bench_steps.TINY, "--json", path, *argv]
    finished = run_ranks(words, ranks, entry=entry)
    return json.loads(path.read_text()), finished


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Finished]:
    """A whole run of one log interval on one rank."""
    return measured(tmp_path_factory.mktemp("one"), *WHOLE)


# The host


def test_the_host_is_timed_in_every_way_and_a_measured_layer_costs_more_than_a_resting_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "host.json"
    run_ranks(["host", "--layers", 4, "--rounds", 40, "--json", path], entry=ENTRY)
    host = json.loads(path.read_text())["host"]["microseconds"]
    both = {name: of_way["forward"] + of_way["backward"] for name, of_way in host.items()}
    assert {"unmodified_again", "regularized", "regularized_no_kernels", "neither"} <= both.keys()
    # On a busy machine a way is known to a tenth of a layer. test_attach shows without a clock that a layer
    # with which nothing is done runs as it is.
    assert both["measured"] > both["measured_no_kernels"]
    assert both["measured"] > both["resting"]
    assert abs(both["resting"]) < 0.25 * both["unmodified"]


def test_host_refuses_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["host", "--layers", "0"])
    assert "--layers is 0" in capsys.readouterr().err


# The step


def test_every_way_but_the_unmodified_has_a_ratio_and_its_spread(
    one_rank: tuple[dict[str, Any], Finished],
) -> None:
    step = one_rank[0]["step"]
    assert set(step["ratio"]) == set(step["spread"]) == set(WAYS) - {"unmodified"}
    for name, ratio in step["ratio"].items():
        low, high = step["spread"][name]["confidence_95"]
        assert 0 < low <= high and ratio > 0
        assert step["spread"][name]["steps"] == 10


def test_every_step_runs_between_two_unmodified_ones_and_its_ratio_is_to_their_mean(
    one_rank: tuple[dict[str, Any], Finished],
) -> None:
    step = one_rank[0]["step"]
    names, (seconds,) = step["steps"]["variant"], step["steps"][step["clock"]]
    assert step["clock"] == "processor"
    assert set(names[::2]) == {"unmodified"}
    assert "unmodified" not in names[1::2]
    # Neither measures in some of its steps only, so the plain median is the ratio.
    for way in ("unmodified_again", "naive"):
        places = [i for i, name in enumerate(names) if name == way]
        ratios = [2 * seconds[i] / (seconds[i - 1] + seconds[i + 1]) for i in places]
        assert step["ratio"][way] == pytest.approx(statistics.median(ratios))
        assert step["spread"][way]["steps"] == len(ratios) == 10


def test_one_step_in_ten_of_measuring_and_of_jreg_measures(
    one_rank: tuple[dict[str, Any], Finished],
) -> None:
    step = one_rank[0]["step"]
    names, seconds = np.array(step["steps"]["variant"]), np.array(step["steps"]["processor"][0])
    ratios = 2 * seconds[1:-1] / (seconds[:-2] + seconds[2:])
    for way in ("measure", "jreg"):
        own = ratios[names[1:-1] == way]
        assert len(own) == 10
        expected = 0.9 * np.median(own[1:]) + 0.1 * own[0]
        assert step["ratio"][way] == pytest.approx(expected)
        assert step["kernels"][way]["logging"] > step["kernels"][way]["ordinary"]
    assert step["kernels"]["measure"]["ordinary"] == step["kernels"]["unmodified"]["ordinary"]
    assert step["kernels"]["jreg_every_step"]["ordinary"] > step["kernels"]["jreg"]["ordinary"]


def test_jreg_waits_and_communicates_in_no_ordinary_step_and_reduces_once_where_it_logs(
    one_rank: tuple[dict[str, Any], Finished],
) -> None:
    step = one_rank[0]["step"]
    collectives, waits = step["collectives"], step["synchronisations"]
    assert waits["unmodified"]["ordinary"][0] > 0, "the counting works"
    for way in ("measure", "jreg", "jreg_every_step"):
        assert collectives[way]["ordinary"] == collectives["unmodified"]["ordinary"]
        assert waits[way]["ordinary"] == waits["unmodified"]["ordinary"]
        assert collectives[way]["logging"][0] == collectives["unmodified"]["logging"][0] + 1


def test_a_result_names_its_command_machine_and_versions(one_rank: tuple[dict[str, Any], Finished]) -> None:
    document, _ = one_rank
    assert document["command"] == " ".join(["python -m jreg_megatron.bench step", *bench_steps.TINY, *WHOLE])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", document["date"])
    assert {"torch", "megatron-core", "jreg_megatron"} <= set(document["versions"])
    assert document["machine"]["cores"] >= 1
    step = document["step"]
    assert step["model"]["num_layers"] == 4
    assert step["tokens"] == 2 * 16
    assert step["jreg"]["alpha"] == 1.0
    assert step["jreg"]["measure_interval"] == 10


def test_the_table_has_every_way_and_nothing_of_what_megatron_prints(
    one_rank: tuple[dict[str, Any], Finished],
) -> None:
    document, finished = one_rank
    printed = finished.output[0]
    for way, ratio in document["step"]["ratio"].items():
        assert re.search(rf"^ +{way} +{ratio:.4f} ", printed, re.MULTILINE)
    assert "setting random seeds" not in printed
    assert len(printed.splitlines()) < 50


def test_extra_work_of_a_way_shows_in_its_ratio_and_in_no_other(tmp_path: Path) -> None:
    document, _ = measured(
        tmp_path,
        *("--ways", "unmodified_again,measure,jreg", "--rounds", "5"),
        entry="bench_steps:jreg_twice_as_slow",
    )
    step = document["step"]
    plain = step["median_seconds"]["unmodified"]
    assert step["ratio"]["jreg"] == pytest.approx(1 + bench_steps.SECONDS / plain, rel=0.25)
    assert step["ratio"]["jreg"] > 1.5
    assert step["ratio"]["measure"] < 1.3
    assert step["ratio"]["unmodified_again"] < 1.3


def test_the_naive_way_has_jregs_gradient_and_every_way_leaves_the_model_as_it_was() -> None:
    ways = ["unmodified", "naive", "jreg", "measure", "unmodified"]
    ((found),) = run_function(bench_steps.gradients, 1, ways)
    plain, again = found["unmodified"]
    naive, jreg, measuring = (found[way][0] for way in ("naive", "jreg", "measure"))
    assert (plain == again).all()
    assert (plain == measuring).all()
    assert [found[f"touched {way}"] for way in ways] == [False, True, True, True, False]
    assert not any(found[f"left {way}"] for way in ways)
    added = naive - plain
    assert added.norm() > 1e-3 * plain.norm()
    # In float32. The effect of the layers that JREG leaves out for negligible weight is below a millionth.
    assert (jreg - naive).norm() < 1e-4 * added.norm()


BATCH, SEQUENCE, WIDTH = 4, 64, 64


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures of two pipeline stages, all of whose layers have a gradient."""
    shape = f"--pp 2 --layers 4 --width {WIDTH} --sequence {SEQUENCE} --micro-batch {BATCH} --micro-batches 4"
    words = f"{shape} --ways jreg,naive --rounds 1 --count -- --jreg-alpha 0".split()
    step: dict[str, Any] = measured(tmp_path_factory.mktemp("two"), *words, ranks=2)[0]["step"]
    return step


def test_pipeline_stages_are_measured_together_and_without_the_naive_way(two_stages: dict[str, Any]) -> None:
    assert list(two_stages["ratio"]) == ["jreg"]
    assert "naive is left out" in two_stages["notes"][0]
    assert two_stages["layout"] == {"ranks": 2, "tensor": 1, "pipeline": 2, "context": 1}
    kernels = two_stages["kernels"]
    for more, plain in zip(kernels["jreg"]["ordinary"], kernels["unmodified"]["ordinary"], strict=True):
        assert more > plain > 0
    assert all(len(two_stages["steps"][clock]) == 2 for clock in ("wall", "processor"))


def test_jreg_takes_one_state_and_at_a_stages_end_one_for_each_microbatch_in_flight(
    two_stages: dict[str, Any],
) -> None:
    peak, in_flight = two_stages["peak_bytes"], 2
    first, last = (
        more - without
        for more, without in zip(peak["jreg"]["ordinary"], peak["unmodified"]["ordinary"], strict=True)
    )
    tokens, layers = BATCH * SEQUENCE, 2
    state, beside, profiler = 4 * tokens * WIDTH, 16 * tokens * layers, 8192
    assert in_flight * state - profiler <= first <= (in_flight + 1) * state + beside + profiler
    assert abs(last) <= profiler, "its highest is at the loss, before the first gradient"


# Counting, ratios, models


def test_kernels_collectives_reads_and_peak_memory_of_a_step_are_counted() -> None:
    (found,) = run_function(bench_steps.counted, 1)
    assert found["collectives"] == 2
    assert found["synchronisations"] == 2
    # Two tensors of four MiB are alive at a time.
    assert 8 << 20 <= found["peak_bytes"] < (8 << 20) + 100_000
    # empty, fill, add, mul, and for each of two values read a view and the reading; empty in the barrier.
    # Their callers (ones, select, item) do not count.
    assert found["kernels"] == 4 + 2 * 2 + 1


def test_a_ratio_withstands_disturbed_steps_and_its_interval_holds_the_truth() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        ratios = generator.normal(1.02, 0.02, 100)
        ratios[generator.random(100) < 0.03] *= 3
        kinds = np.where(np.arange(1, 101) % 10 == 0, "measures", "ordinary")
        ratios[kinds == "measures"] += 0.1
        found = median_ratio(ratios, kinds, {"ordinary": 0.9, "measures": 0.1})
        assert found["ratio"] == pytest.approx(1.03, abs=0.015)
        low, high = found["confidence_95"]
        hits += low < 1.03 < high
    assert hits > 170


def test_a_kind_of_few_steps_has_its_share_and_scatters_as_all_do() -> None:
    generator = np.random.default_rng(1)
    halves = {"ordinary": 0.5, "measures": 0.5}
    hits = 0
    for _ in range(200):
        ratios = generator.normal(1.0, 0.02, 25)
        kinds = np.where(np.arange(25) == 12, "measures", "ordinary")
        ratios[kinds == "measures"] += 1
        found = median_ratio(ratios, kinds, halves)
        assert found["ratio"] == pytest.approx(1.5, abs=0.05)
        low, high = found["confidence_95"]
        hits += low < 1.5 < high
    assert hits > 170
    assert median_ratio(ratios[:9], kinds[:9], halves)["confidence_95"] is None
    assert median_ratio(ratios[kinds == "ordinary"], kinds[kinds == "ordinary"], halves)["ratio"] < 1.05


def test_the_overhead_of_measuring_and_logging_counts_for_its_share() -> None:
    rank = Measured(counts={"unmodified": COUNTS, "jreg": COUNTS})
    costs = {"ordinary": 0.02, "logging": 0.2}
    for iteration in range(1, 11):
        kind = step.kind_of_step("jreg", iteration)
        rank.names += ["unmodified", "jreg"]
        rank.kinds += ["ordinary", kind]
        rank.wall += [1.0, 1 + costs[kind]]
    rank.names, rank.kinds = [*rank.names, "unmodified"], [*rank.kinds, "ordinary"]
    rank.wall = rank.processor = [*rank.wall, 1.0]
    cost = 0.9 * 0.02 + 0.1 * 0.2
    assert summarize([rank], by_processor_time=False)["ratio"]["jreg"] == pytest.approx(1 + cost)


def ranks_that_need(*seconds: dict[str, float], noise: float = 0.01) -> list[Measured]:
    """For each rank and way the seconds of a step, in fifty rounds."""
    generator = np.random.default_rng(2)
    made = []
    for of_rank in seconds:
        rank = Measured(counts=dict.fromkeys(of_rank, COUNTS))
        ways = [way for way in of_rank if way != "unmodified"]
        rank.names = ["unmodified", *(name for way in ways * 50 for name in (way, "unmodified"))]
        rank.kinds = ["ordinary"] * len(rank.names)
        scatter = generator.normal(1, noise, len(rank.names))
        rank.processor = [of_rank[name] * by for name, by in zip(rank.names, scatter, strict=True)]
        rank.wall = rank.processor
        made.append(rank)
    return made


COUNTS = {kind: dict.fromkeys(counting.COUNTED, 0) for kind in KINDS}
BUSY = {"unmodified": 2.0, "unmodified_again": 2.0, "jreg": 2.0}
LAST = {"unmodified": 1.0, "unmodified_again": 1.0, "jreg": 1.4}


def test_a_step_of_several_ranks_ends_with_the_last_one() -> None:
    found = summarize(ranks_that_need(BUSY, LAST, noise=0), by_processor_time=False)
    assert found["ratio"]["jreg"] == 1
    assert found["median_seconds"]["unmodified"] == 2


def test_a_machine_too_busy_for_the_ratios_is_noted_and_too_few_steps_have_no_interval() -> None:
    busy = summarize(ranks_that_need(BUSY | {"unmodified_again": 2.2}), by_processor_time=True)
    assert "The machine was too busy: unmodified_again" in shown(document_of(busy))
    for way in busy["spread"].values():
        way["confidence_95"] = None
    text = shown(document_of(busy))
    assert "too busy" not in text
    assert text.count("too few") == 2


def document_of(figures: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    layout = {"ranks": ranks, "tensor": 1, "pipeline": ranks, "context": 1}
    about = {"model": asdict(SHAPES["demo"]), "dtype": "fp32", "layout": layout, "weighted_layers": 6}
    step = {**figures, **about, "jreg": {"coeff": 0.1}, "notes": [], "tokens": 512}
    return json.loads(json.dumps(results.document(["step"], "step", step), allow_nan=False))


def ran(
    ways: list[str],
    rounds: int,
    deadline: float,
    seconds: Callable[[], float] = lambda: 1.0,
) -> list[tuple[str, int]]:
    """The ways and iterations of the timed steps, each of which takes ``seconds``."""
    steps: list[tuple[str, int]] = []

    def run(name: str, iteration: int, _: object) -> tuple[float, float]:
        steps.append((name, iteration))
        return seconds(), seconds()

    args = Namespace(ways=ways, rounds=rounds, on_cpu=True, layout={"ranks": 1})
    step.time_rounds(args, run, deadline)
    return steps


def test_after_its_seconds_a_run_goes_on_until_each_way_has_run_and_measured() -> None:
    ways = [way for way in WAYS if way != "unmodified"]
    steps = ran(ways, 1000, time.monotonic())
    assert [name for name, _ in steps[::2]] == ["unmodified"] * (2 * len(ways) + 1)
    for way in ways:
        both = [iteration for name, iteration in steps if name == way]
        kinds = [step.kind_of_step(way, iteration) for iteration in both]
        assert kinds == ["logging" if way in options.ATTACHED else "ordinary", "ordinary"]


def test_steps_that_scatter_get_more_rounds_and_those_that_do_not_end_the_run() -> None:
    scattered = np.random.default_rng(0)
    rounds = []
    for scatter in (0.0, 0.005, 0.1):
        seconds = lambda scatter=scatter: scattered.normal(1, scatter)  # noqa: E731
        steps = ran(["jreg"], 40, time.monotonic() + 60, seconds=seconds)
        rounds.append(len(steps) // 2)
    assert rounds[0] == 10 < rounds[1] < rounds[2] == 40


def test_wide_intervals_get_a_note_of_too_few_rounds() -> None:
    wide = shown(document_of(summarize(ranks_that_need(BUSY, noise=0.1), by_processor_time=True)))
    assert "unmodified_again, jreg within 1%" in wide
    assert "Too few" not in shown(document_of(summarize(ranks_that_need(BUSY), by_processor_time=True)))


@dataclass
class Event:
    """As the profiler records it, in nanoseconds."""

    what: str
    start: int
    end: int
    is_kernel: bool = False
    is_span: bool = False

    def name(self) -> str:
        return self.what

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.end - self.start

    def device_type(self) -> Any:
        return torch.autograd.DeviceType.CUDA if self.is_kernel else torch.autograd.DeviceType.CPU

    def is_user_annotation(self) -> bool:
        return self.is_span


def test_the_device_is_busy_while_any_stream_is_and_the_host_unless_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = [
        Event("gemm", 0, 100_000_000, is_kernel=True),
        Event("ncclDevKernel_AllReduce", 50_000_000, 150_000_000, is_kernel=True),
        Event("Memcpy DtoH", 300_000_000, 310_000_000, is_kernel=True),
        Event("nccl:all_reduce", 0, 900_000_000, is_kernel=True),
        Event("a span of the user's", 0, 900_000_000, is_kernel=True, is_span=True),
        Event("cudaLaunchKernel", 0, 900_000_000),
        Event("cudaStreamSynchronize", 0, 20_000_000),
        Event("cudaMemcpyAsync", 10_000_000, 30_000_000),
    ]

    @contextmanager
    def profile(**_: Any) -> Iterator[Any]:
        recorded = SimpleNamespace(events=lambda: events)
        yield SimpleNamespace(profiler=SimpleNamespace(kineto_results=recorded))

    monkeypatch.setattr(counting, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = counting.busy(lambda: time.sleep(0.2))
    assert found["device"] == pytest.approx(0.16)
    assert found["whole"] >= 0.2 and found["host"] == pytest.approx(found["whole"] - 0.03)


@pytest.mark.parametrize(("device", "waits_for"), [(1.95, "device"), (1.0, "host"), (0.0, "unknown")])
def test_a_result_names_what_a_step_waits_for(device: float, waits_for: str) -> None:
    ranks = ranks_that_need(BUSY, BUSY, noise=0)
    for number, rank in enumerate(ranks):
        rank.busy = {way: [{"whole": 3.0, "device": device * number, "host": 1.5}] for way in BUSY}
    found = summarize(ranks, by_processor_time=False)
    assert found["waits_for"] == waits_for
    assert found["busy"]["jreg"] == {"whole": 3.0, "device": device, "host": 1.5}
    text = shown(document_of(found, ranks=2))
    assert re.search(rf"^ +jreg +1\.0000 .* {device:.4g} +1\.5 *$", text, re.MULTILINE)
    for rank in ranks:
        rank.busy = {}
    assert summarize(ranks, by_processor_time=True)["waits_for"] == "one"


def test_each_thing_that_a_step_can_wait_for_is_shown_in_other_words() -> None:
    found = summarize(ranks_that_need(BUSY), by_processor_time=False)
    texts = {shown(document_of(found | {"waits_for": it})) for it in ("device", "host", "unknown", "one")}
    assert len(texts) == 4


def test_on_a_gpu_each_way_is_looked_at_and_no_more_steps_run_than_there_are_data_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = [way for way in WAYS if way != "unmodified"]
    on: list[str] = []

    class Named(Variant):
        def __init__(self, name: str) -> None:
            self.name = name

        @contextmanager
        def on(self, iteration: int) -> Iterator[None]:
            on.append(self.name)
            yield
            on.append("off")

    looked, counts = {"whole": 3.0, "device": 2.0, "host": 1.0}, {"kernels": 1}

    monkeypatch.setattr(step, "make_variants", lambda *_: {name: Named(name) for name in WAYS})
    monkeypatch.setattr(step, "busy", lambda run: run() or looked)
    monkeypatch.setattr(step, "count", lambda run: run() or counts)
    monkeypatch.setattr(step, "seconds_of", lambda run: run() or (1.0, 1.0))
    given, steps = [object() for _ in range(5)], []
    config = JRegConfig(coeff=0.1, measure_interval=10)
    args = Namespace(config=config, ways=ways, rounds=3, on_cpu=False, count=True)
    train_step = lambda *of_step, **_: steps.append((on[-1], *of_step))  # noqa: E731
    found = step.measure(args, math.inf, lambda: None, train_step, *given, iteration=1)
    assert all(of_step == given for _, *of_step in steps), "Megatron's own arguments"
    assert [name for name, *_ in steps] == on[::2], "each step runs while its way is on"
    assert found.busy == {way: [looked] * 2 for way in WAYS}
    assert found.counts == {way: dict.fromkeys(KINDS, counts) for way in WAYS}
    assert len(found.names) == 1 + 2 * 3 * len(ways)
    assert len(steps) <= step.most_steps(3)


def flags_of(words: list[str]) -> dict[str, str | None]:
    """Flags with their values; a flag without a value has None."""
    found: dict[str, str | None] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word] = None if after.startswith("--") else after
    return found


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.recipe])
def test_a_model_is_that_of_its_recipe(name: str) -> None:
    shape = SHAPES[name]
    text = (ROOT / f"recipes/{shape.recipe}.sh").read_text()
    body = re.sub(r"\s#.*", "", text[text.index("FLAGS=(") :])
    recipe = flags_of(body.split())
    ours = flags_of(shape.megatron_arguments())
    assert {flag: recipe.get(flag, "absent") for flag in ours} == ours
    assert re.search(r"^SEQUENCE=(\d+)", text, re.MULTILINE)[1] == str(shape.sequence)  # type: ignore[index]
    architecture = flags_of(body[: body.index("--optimizer")].split())
    sizes = {"--seq-length", "--max-position-embeddings"}
    assert set(architecture) - set(ours) == sizes, "what the recipe's architecture says, and this does not"


def test_the_small_model_is_the_demos(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["demo"]
    theirs = flags_of([*demo._MODEL.split(), *demo._OPTIMIZER.split()])
    ours = flags_of(shape.megatron_arguments())
    own_defaults = {"--norm-epsilon": "1e-5", "--rotary-base": "10000"}  # Megatron's too
    vocabulary = ours.pop("--padded-vocab-size")
    assert {flag: theirs.get(flag, own_defaults.get(flag, "absent")) for flag in ours} == ours
    assert vocabulary == str(prepare.__kwdefaults__["vocab_size"])
    assert theirs["--seq-length"] == str(shape.sequence)
    assert theirs["--micro-batch-size"] == str(shape.micro_batch)
    assert theirs["--global-batch-size"] == str(shape.micro_batch * shape.micro_batches)
    assert (demo.COEFF, demo.ALPHA) == (1.0, 1.0)


# All that a GPU has to show


def test_the_script_for_a_gpu_runs_on_a_cpu_and_each_part_leaves_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DATA", raising=False)

    def forked(part: on_gpu.Part, output: Path, seconds: float) -> int:
        """In a process that has imported Megatron."""
        words = ["-m", *part.words]
        if part.words[0].endswith(".sh"):
            environment = os.environ | part.environment | {"PYTHON": "echo"}
            echoed = subprocess.run(part.words, env=environment, capture_output=True, text=True, check=True)
            words = echoed.stdout.splitlines()[-1].split()
        finished = run_ranks(words[2:], entry=f"{words[1]}.__main__:main", check=False, timeout=120)
        output.write_text(finished.output[0])
        return finished.status[0]

    assert on_gpu.run(tmp_path, is_toy=True, start=forked) == 0, capsys.readouterr().out
    names = ["selftest", "kernel", "host", "step_170m", "step_1b", "step_34b", "recipe_170m"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["part"] for row in summary] == names
    for row in summary:
        assert row["is_fine"] and (tmp_path / row["result"]).stat().st_size > 100
        if row["result"].endswith(".json"):
            assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d_{on_gpu.device()}_{row['part']}\.json", row["result"])
            assert json.loads((tmp_path / row["result"]).read_text())["format"] == "jreg_megatron benchmark"
    assert "passed, 0 failed" in (tmp_path / "selftest.log").read_text()
    log = (tmp_path / "recipe_170m.log").read_text()
    assert "nproc-per-node 1" in log and "--train-iters 1907" in log


def test_a_part_for_a_gpu_that_takes_too_long_is_terminated_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeper = tmp_path / "sleeper.sh"
    sleeper.write_text("#!/bin/sh\ntrap '' TERM\necho begun\nsleep 60 &\nwait\nsleep 60\n")
    sleeper.chmod(0o755)
    slow = on_gpu.Part("slow", 1.0, [str(sleeper)])
    monkeypatch.setattr(on_gpu, "GRACE", 1)
    monkeypatch.setattr(on_gpu, "parts", lambda *_: [slow, replace(slow, name="late", seconds=60)])
    began = time.monotonic()
    assert on_gpu.run(tmp_path / "results", is_toy=True, seconds=4) == 1
    assert time.monotonic() - began < 8
    slow_row, late_row = json.loads((tmp_path / "results/summary.json").read_text())
    assert (slow_row["status"], late_row["status"]) == (-9, -9) or late_row["status"] is None
    assert (tmp_path / "results/slow.log").read_text() == "begun\n"
    assert "FAILED, status -9" in capsys.readouterr().out


# What users see


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_result_names_its_command_and_no_path(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["command"].startswith("python -m jreg_megatron.bench ")
    assert "/" not in document["command"]


def shown(document: dict[str, Any]) -> str:
    text = StringIO()
    table.print_document(Console(file=text, width=100), document)
    return text.getvalue()


def test_the_place_of_a_result_is_not_part_of_its_command() -> None:
    words = "step --json somewhere/x.json --quiet --layers 2 --json=y.json -- --lr 1"
    assert results.command(words.split()) == "python -m jreg_megatron.bench step --layers 2 -- --lr 1"


REFUSED = {
    "--model 7b": "argument --model: invalid choice: '7b' (choose from",
    "--layers 0": "--layers is 0; it must be a whole number >= 1",
    "--rounds 0": "--rounds is 0; it must be a whole number in 1..10000",
    "--micro-batches -1": "--micro-batches is -1; it must be a whole number >= 1",
    "--seconds nan": "--seconds is nan; it must be a number > 0",
    "--width 100": "--width is 100; it must be a multiple of 8",
    "--ways jreg,fast": "--ways is jreg,fast; it must be some of unmodified_again,measure,jreg",
    "--pp 2": "--pp 2 x --cp 1 is 2, ... 1 rank; add --nproc 2",
    "--nproc 3 --pp 3": "--pp is 3, ... 8 layers",
    "--nproc 0": "--nproc is 0; it must be a whole number >= 1",
    "-- --num-layers 3": "--num-layers ... use --layers",
    "-- --hidden-size 256": "--hidden-size ... use --width",
    "-- --ffn-hidden-size=99": "--ffn-hidden-size belongs ... demo",
    "-- --num-attention-heads 2": "--num-attention-heads belongs",
    "-- --num-query-groups 2": "--num-query-groups belongs",
    "-- --vocab-size 99": "--vocab-size belongs",
    "-- --padded-vocab-size 99": "--padded-vocab-size belongs",
    "-- --exit-interval 9": "--exit-interval would end",
    "-- --exit-duration-in-mins 1": "--exit-duration-in-mins would end",
    "-- --exit-signal-handler": "--exit-signal-handler would end",
    "-- --help": "--help would end",
    "-- --cuda-graph-impl full_iteration": "--cuda-graph-impl cannot be measured",
    "--rounds 10001": "--rounds is 10001; it must be a whole number in 1..10000",
    "--ways naive --nproc 2": "--ways is naive, ... one rank",
    "-- --jreg-measure-interval 3": "--jreg-measure-interval is set",
    "-- --jreg-coeff 0": "--jreg-coeff is 0, ",
    "-- --jreg-coef 1": "unknown flag --jreg-coef; did you mean --jreg-coeff?",
    "-- --jreg-stop-iteration 5": "--jreg-stop-iteration is set",
    "-- --jreg-weights 0,1": "it must be 8 numbers",
    "--json /no/such/folder/x.json": "--json is /no/such/folder/x.json, ",
}
"""By words, what the line names; dots stand for any words."""


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_refused_in_one_line_before_megatron_starts(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["step", *words.split()])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("jreg_megatron: error: ")
    assert all(named in line for named in REFUSED[words].split(" ... "))


def test_a_refusal_of_megatron_is_one_line(tmp_path: Path) -> None:
    finished = run_ranks(["step", *bench_steps.TINY, "--", "--hidden-sise", 3], entry=ENTRY, check=False)
    assert finished.status == [2]
    (line,) = finished.output[0].splitlines()
    assert "--hidden-sise" in line


def test_megatron_that_exits_before_all_is_measured_is_a_users_mistake(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def exit_quietly() -> None:
        with megatron.quiet():
            os.write(1, b"why it exits\n\n")
            sys.exit(0)

    with pytest.raises(UserError, match=r"Megatron .*status 0 .*: why it exits"):
        exit_quietly()
    assert capfd.readouterr().out == ""


def default_options(on_cpu: bool = True) -> Namespace:
    return options.complete(options.parser().parse_args(["step", "--quiet"]), [], 1, on_cpu)


def test_a_model_too_large_for_the_device_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(megatron, "train", full)
    monkeypatch.setattr(megatron, "make_ready", lambda _: None)
    results: list[Any] = []
    with pytest.raises(UserError, match=r"CUDA out of memory.*--layers"):
        step.run(options.parser().parse_args(["step", "--quiet"]), [], results.append)
    assert results == []


def test_on_a_gpu_without_nvidias_packages_the_step_does_without_and_the_result_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda _: None)
    words = megatron.arguments_of(default_options(on_cpu=False), 3)
    assert "--no-gradient-accumulation-fusion" in words and "unfused" in words
    without_engine, without_apex = megatron.notes(on_cpu=False)
    assert "Transformer Engine" in without_engine and "Apex" in without_apex
    assert megatron.notes(on_cpu=True) == []
    monkeypatch.setattr(installed, "find_spec", lambda name: name)
    words = megatron.arguments_of(default_options(on_cpu=False), 3)
    assert "--no-gradient-accumulation-fusion" not in words and "transformer_engine" in words
    assert megatron.notes(on_cpu=False) == []


def test_steps_that_fp16s_loss_scale_skips_are_not_measured_and_those_alone_are_refused() -> None:
    ((said, skipped),) = run_function(bench_steps.skipped_alone, 1)
    assert skipped == [1, 1, 1]
    assert "fp16" in said and "bf16" in said and "\n" not in said


def test_a_reader_that_closes_the_pipe_gets_no_traceback() -> None:
    kernel = f"'{sys.executable}' -m jreg_megatron.bench kernel --cpu --tokens 3 --widths 8 --rounds 1"
    script = f"set -o pipefail; {kernel} --no-compile --quiet --json - | true"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_an_error_with_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    document = document_of(summarize(ranks_that_need(BUSY), by_processor_time=True))
    why = "[rank1]: RuntimeError: [/builds/gloo/pair.cc:561] closed"
    document["step"]["notes"] = [why]
    table.print_document(output.console(Namespace(json=None)), document)
    assert f" {why}\n" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["kernel", "host"])
def test_a_command_of_one_process_is_refused_under_torchrun(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        main([words])
    assert ended.value.code == 2
    assert "without torchrun" in capsys.readouterr().err


def test_no_title_is_wider_than_its_table(one_rank: tuple[dict[str, Any], Finished]) -> None:
    widths = []

    def without_title(title: str, columns: list[str], rows: Iterable[list[Any]]) -> None:
        text = StringIO()
        output.print_table("", columns, rows, console=Console(file=text, width=100), box=SIMPLE_HEAD)
        widths.append((len(title), max(map(len, text.getvalue().splitlines()))))

    table.print_step(without_title, Console(file=StringIO()), one_rank[0]["step"])
    assert len(widths) == 2, "of the times, and of what is counted"
    assert all(of_title <= of_table for of_title, of_table in widths)


@pytest.mark.parametrize("words", [["--help"], ["step", "--help"]])
def test_help_imports_neither_torch_nor_megatron(words: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['bench', *{words!r}]\n"
        "try:\n    runpy.run_module('jreg_megatron.bench', run_name='__main__')\n"
        "except SystemExit:\n    print('torch' in sys.modules, 'megatron' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False False"
