"""The host's time for a launch of the fused kernels, prepared and by Triton: ``python tests/launch_cost.py``.

The driver does nothing, and the states are on the ``meta`` device. So only Python counts, Triton's and ours.
The two take turns. A row is the fastest of many rounds, in microseconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from unittest import mock

import torch
import triton
from test_compiled_kernels import BF16, OfflineDriver, operands
from triton.runtime import driver

from jreg_megatron.methods.jreg.kernels import fused

ROUNDS, CALLS = 40, 500


def microseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begun) / CALLS * 1e6


def main() -> None:
    torch.set_grad_enabled(False)
    *states, above = operands("linked", 768, (BF16, BF16))
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for way, is_known in (("prepared", True), ("Triton's own", False)):
        with mock.patch.object(fused, "_IS_KNOWN", is_known):
            kernels = fused.TritonKernels()
            calls["gradients", way] = lambda k=kernels: k.gradients(*states, above=above, hands_down=True)
            calls["displacement", way] = lambda k=kernels: k.displacement(*states[:2])
            for call in (calls["gradients", way], calls["displacement", way]):
                call()  # compiles
    fastest = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            fastest[name] = min(fastest[name], microseconds(call))
    for name, found in fastest.items():
        print(*name, f"{found:.1f}", sep="\t")


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(driver, "_active", OfflineDriver(90)) as gpu,
    ):
        triton.knobs.cache.dir = folder
        gpu.launcher_cls = lambda *_: lambda *_: None
        main()
