"""The self-test that users run on their own machines: its layouts, its report, its exit status."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks

from jreg_megatron.selftest import __main__ as selftest
from jreg_megatron.selftest.layouts import layouts_for

ENTRY = "jreg_megatron.selftest.__main__:main"


def run(ranks: int, *argv: str, entry: str = ENTRY) -> tuple[int, str]:
    """Status and report of the self-test on that many ranks."""
    finished = run_ranks(argv, ranks, entry=entry, check=False, timeout=200)
    return max(finished.status), finished.output[0]


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), 2, 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_every_layout_passes_on(ranks: int) -> None:
    _, report = run(ranks)
    names = [layout.name for layout in layouts_for(ranks)]
    assert [row for row in report.splitlines() if row.endswith(("PASS", "FAIL"))] == [
        row for name in names for row in report.splitlines() if row.startswith(name + "  ")
    ]
    assert f"{len(names)} layouts: {len(names)} passed, 0 failed" in report
    assert "TransformerLayer.self_attn_bda to TransformerLayer.mlp_bda" in report
    assert re.search(r"^jreg_megatron \S+, Megatron-Core 0\.\S+, torch \S+", report, re.MULTILINE)


def with_half_the_gradient(argv: list[str]) -> int:
    from jreg_megatron.methods.jreg import penalty
    from jreg_megatron.selftest.__main__ import main

    node = penalty._AddDisplacementGradient
    backward = node.backward

    def half(ctx: Any, *gradients: Any) -> Any:
        ctx.strength = replace(ctx.strength, factor=ctx.strength.factor / 2)
        return backward(ctx, *gradients)

    node.backward = staticmethod(half)
    return main(argv)


def broken_on_one_rank(argv: list[str]) -> int:
    from jreg_megatron.selftest import step
    from jreg_megatron.selftest.__main__ import main

    build = step.build_chunk

    def build_chunk(*args: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise RuntimeError("the second rank cannot build a model")
        return build(*args)

    step.build_chunk = build_chunk
    return main(argv)


def test_a_wrong_gradient_fails_every_layout_and_the_report_names_the_worst_parameter() -> None:
    _, report = run(2, "--tp", "2", entry="test_selftest:with_half_the_gradient")
    assert "PASS" not in report
    assert re.search(r"^TP2, SP.*: gradient differ; worst: \S+weight.* \(rank 0\)$", report, re.MULTILINE)
    assert re.search(r"^\d+ layouts: 0 passed, \d+ failed$", report, re.MULTILINE)


def test_an_error_on_one_rank_is_printed_and_does_not_hang() -> None:
    argv = ["--pp", "2", "--precision", "bf16", "--timeout", "3"]
    _, report = run(2, *argv, entry="test_selftest:broken_on_one_rank")
    assert "RuntimeError: the second rank cannot build a model (rank 1)" in report
    assert re.search(r"^\d+ layouts: 0 passed, 1 failed, \d+ not run$", report, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--pp", "0"], "--pp is 0; it must be a whole number >= 1"),
        (["--timeout", "nan"], "--timeout is nan; it must be"),
        (["--tp", "8"], "--tp 8: "),
        (["--transformer-impl", "transformer_engine"], "add --precision bf16"),
        (["--cuda-graph", "transformer_engine"], "--transformer-impl transformer_engine --precision bf16"),
        (["--cuda-graph", "local"], "--transformer-impl transformer_engine --precision bf16"),
        (["--cuda-graph", "full_iteration"], "--cuda-graph is full_iteration, which runs on GPUs only"),
        (
            ["--cuda-graph", "full_iteration", "--precision", "fp16"],
            "--precision fp16 .*--cuda-graph full_iteration",
        ),
        (
            ["--transformer-impl", "transformer_engine", "--precision", "bf16"],
            "--transformer-impl is transformer_engine",
        ),
        (["--nproc", "2"], "--nproc .*torchrun"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv: list[str], says: str) -> None:
    status, report = run(2, *argv)
    assert status == 2
    assert re.search(says, report) and "Traceback" not in report


@pytest.mark.parametrize("has_gpu", [False, True])
def test_on_a_cpu_transformer_engine_is_refused_also_where_it_is_installed(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jreg_megatron.mcore.installed.find_spec", lambda name: ModuleSpec(name, None))
    argv = ["--transformer-impl", "transformer_engine", "--precision", "bf16"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for on_cpu in ([], ["--cpu"], ["--nproc", "2"])[has_gpu:]:
        with pytest.raises(SystemExit):
            selftest.main([*argv, *on_cpu])
        line = capsys.readouterr().err
        assert "--transformer-impl is transformer_engine" in line and "GPU" in line


def test_one_command_starts_all_ranks_and_leaves_packages_alone_whose_kernels_need_a_gpu(
    tmp_path: Path,
) -> None:
    for name in ("transformer_engine", "apex", "amp_C"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} found no GPU')")
    done = subprocess.run(
        [sys.executable, "-m", "jreg_megatron.selftest", "--nproc", "2", "--tp", "2"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
    assert "Warning" not in done.stderr
