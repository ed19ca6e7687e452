"""JREG's addition to the communication and the waits of a run: one all-reduce per log interval."""

from __future__ import annotations

import json
from typing import Any

from harness import run_ranks

STEPS, INTERVAL = 6, 3


def counts(entry: str, argv: list[Any]) -> list[dict[str, list[dict[str, int]]]]:
    """Each rank's counts in and after its training steps."""
    run = run_ranks([entry, *argv], 2, entry="counted:main")
    lines = ([line for line in output.splitlines() if line.startswith("COUNTED")] for output in run.output)
    return [json.loads(line.removeprefix("COUNTED ")) for (line,) in lines]


def test_a_step_after_the_first_has_no_collective_and_no_host_sync_more_and_a_log_interval_has_one(
    toy_arguments: list[str],
) -> None:
    argv = [*toy_arguments, "--pipeline-model-parallel-size", 2, "--bf16", "--train-iters", STEPS]
    argv += ["--log-interval", INTERVAL]
    jreg = ["--jreg-coeff", 0.1, "--jreg-log-per-layer"]
    for ours, own in zip(
        counts("jreg_megatron.pretrain:main", [*argv, *jreg]),
        counts("unmodified_pretrain:main", argv),
        strict=True,
    ):
        assert len(own["in_step"]) == STEPS
        assert own["in_step"][0]["collectives"] > 0, "the counting works"
        assert own["in_step"][0]["synchronisations"] > 0
        # In the first step all ranks exchange their findings, and read the loss's gradient.
        first, own_first = ours["in_step"].pop(0), own["in_step"].pop(0)
        assert first["collectives"] == own_first["collectives"] + 1
        assert ours["in_step"] == own["in_step"]
        pairs = zip(ours["after_step"], own["after_step"], strict=True)
        more = [with_jreg["collectives"] - without["collectives"] for with_jreg, without in pairs]
        # Megatron logs the first iteration too. After the last log there is no step to be counted.
        assert more == [1, 0, 1, 0, 0]
