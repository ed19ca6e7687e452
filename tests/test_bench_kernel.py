"""``bench kernel``: every way it times does the same work, and its bytes are those that must be moved."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from jreg_megatron import UserError
from jreg_megatron.bench import kernel, options, table
from jreg_megatron.methods.jreg.kernels import eager

CPU = torch.device("cpu")


def figures_of(*words: str) -> dict[str, Any]:
    figures: list[dict[str, Any]] = []
    kernel.run(options.parser().parse_args(["kernel", "--cpu", *words]), [], figures.append)
    return figures[0]


def sizes(**changes: Any) -> Namespace:
    usual = {"device": CPU, "dtype": torch.float32, "tokens": 2, "rounds": 1, "seconds": 1}
    return Namespace(**usual | changes)


def printed(figures: dict[str, Any]) -> str:
    console = Console(width=200)
    about = {"command": "", "date": "", "machine": {"device": "none", "threads": 1}, "versions": {}}
    with console.capture() as capture:
        table.print_document(console, {**about, "kernel": figures})
    return capture.get()


def tiny(dtype: torch.dtype) -> kernel.Tensors:
    return kernel.Tensors(sizes(dtype=dtype, tokens=1000), 12)


def assert_same_work(way: kernel.Way, dtype: torch.dtype) -> None:
    t = tiny(dtype)
    a, b = (h.detach().double().requires_grad_() for h in (t.h_in, t.h_out))
    loss = 1e-5 * ((1 - F.cosine_similarity(a, b, dim=-1)) / 2).sum()
    outputs, upstream = (loss, a, b), (None, t.grad_in.double(), t.grad_out.double())
    expected = torch.autograd.grad(outputs, (a, b), upstream)
    # A missing regularizer would be seen: without it the gradients would be off by more.
    for got, right, plain in zip(way(t), expected, upstream[1:], strict=True):
        assert got.dtype is dtype
        error, size = (got.double() - right).norm(), (right - plain).norm()
        assert error < 2 * torch.finfo(dtype).eps * right.norm()
        assert dtype is not torch.float32 or error < 0.1 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "way",
    [kernel.with_jreg(eager.KERNELS), kernel.with_autograd(kernel.textbook)],
    ids=[kernel.JREG, kernel.AUTOGRAD],
)
def test_each_way_adds_the_regularizers_gradient_to_the_incoming_one(
    way: kernel.Way, dtype: torch.dtype
) -> None:
    assert_same_work(way, dtype)


@pytest.mark.slow
def test_the_compiled_way_adds_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    with_autograd, made = kernel.with_autograd, list[kernel.Way]()

    def keeping(regularizer: Any) -> kernel.Way:
        made.append(with_autograd(regularizer))
        return made[-1]

    monkeypatch.setattr(kernel, "with_autograd", keeping)
    figures = figures_of(*"--tokens 10 --widths 12 --rounds 1 --dtype fp32".split())
    assert list(figures["widths"]["12"]["ways"]) == [kernel.JREG, kernel.AUTOGRAD, kernel.COMPILED]
    _, compiled = made
    assert_same_work(compiled, torch.float32)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_on_a_cpu_it_gives_times_bytes_and_shares_of_a_copy_for_every_width(
    dtype: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "SHORTEST_COPY", 0.0)
    words = f"--tokens 10 --widths 12,48 --rounds 4 --no-compile --dtype {dtype}"
    figures = json.loads(json.dumps(figures_of(*words.split()), allow_nan=False))
    assert list(figures["widths"]) == ["12", "48"] and figures["kernels"] == "torch"
    for width, of in figures["widths"].items():
        assert of["rounds"] == 4
        # Two states read; two states and a gradient read and two gradients written; Psi of every token.
        state = 10 * int(width) * size
        expected = {"displacement": 2 * state + 40, "gradients": 5 * state + 40}
        assert {name: found["bytes"] for name, found in of["kernels"].items()} == expected
        for found in of["kernels"].values():
            low, high = found["quartiles"]
            assert 0 < low <= found["seconds"] <= high and found["share_of_copy"] > 0
            assert found["bytes_per_second"] == pytest.approx(found["bytes"] / found["seconds"])
        assert list(of["ways"]) == [kernel.JREG, kernel.AUTOGRAD]
        assert of["ways"][kernel.JREG]["ratio"] == 1
    text = printed(figures)
    assert "of the copy's" in text and "times JREG's" in text
    assert "compiled is left out: --no-compile." in text


def test_a_copy_too_short_to_be_a_measure_gives_no_share_and_a_note() -> None:
    figures = figures_of(*"--tokens 3 --widths 8 --rounds 1 --no-compile".split())
    assert [found["share_of_copy"] for found in figures["widths"]["8"]["kernels"].values()] == [None, None]
    assert "less than 50 us" in printed(figures)


def test_a_way_that_cannot_be_compiled_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    figures = figures_of(*"--tokens 3 --widths 8,16 --rounds 1".split())
    assert [note for note in figures["notes"] if "left out" in note] == [
        "compiled is left out: TORCHDYNAMO_DISABLE=1."
    ]


def test_a_round_runs_everything_once_and_none_begins_after_the_time_is_up() -> None:
    ran: list[str] = []
    runs = {name: lambda name=name: ran.append(name) for name in "abc"}
    found = kernel.interleaved(sizes(rounds=7, seconds=60), runs)
    rounds = [ran[start : start + 3] for start in range(3, len(ran), 3)]  # after the warm-up
    assert len(rounds) == 7 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1, "the order changes"
    assert all(len(times) == 7 for times in found.values())
    short = kernel.interleaved(sizes(rounds=7, seconds=1e-9), runs)
    assert len(short["a"]) == 3, "enough for a spread"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--widths 768,x", "--widths is x; it must be a whole number in 1..65536"),
        ("--widths 0", "--widths is 0"),
        ("--tokens 0", "--tokens is 0; it must be a whole number >= 1"),
        ("--tokens 100000000000", "--tokens is 100000000000"),
        ("--rounds -1", "--rounds is -1"),
        ("--seconds nan", "--seconds is nan"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        figures_of(*words.split())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


class FakeEvent:
    """A device that runs launched work while the host's clock runs on. A cycle is a nanosecond."""

    host = device = 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = FakeEvent.launch(0)

    @classmethod
    def launch(cls, cycles: int) -> int:
        """The device starts launched work after all earlier work. Returns the time when it has finished."""
        cls.device = max(cls.device, cls.host) + cycles
        return cls.device

    def query(self) -> bool:
        return self.at <= FakeEvent.host

    def synchronize(self) -> None:
        FakeEvent.host = max(FakeEvent.host, self.at)

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.at - self.at) / 1e6


def test_a_gpu_waits_until_the_host_has_launched_all_timed_work(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []

    def sleep(cycles: int) -> None:
        waits.append(cycles)
        FakeEvent.launch(cycles)

    def launches(host: int, device: int) -> None:
        FakeEvent.host += host
        FakeEvent.launch(device)

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("L2", (), {"L2_cache_size": 1}))
    clock = kernel._CudaClock(CPU)
    # If the wait is long enough, the ten milliseconds that the host needs to launch the work are not timed.
    slow, fast = (lambda: launches(10_000_000, 34_000)), (lambda: launches(10_000, 5_000_000))
    assert [clock(slow), clock(slow), clock(fast), clock(slow)] == pytest.approx(
        [34e-6, 34e-6, 5e-3, 34e-6], rel=1e-9
    )
    assert waits == [1_000_000 * 2**n for n in range(5)] + [16_000_000, 1_000_000, 16_000_000]
    with pytest.raises(UserError):
        clock(lambda: launches(10**10, 1))
