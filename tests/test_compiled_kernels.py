"""The kernels as Triton compiles them for GPUs that this machine lacks, launched as in the package.

The launches are real up to the last step: the driver names its GPU and keeps its arguments, and the code that
would run there is compiled and examined. States are on the ``meta`` device, or on the CPU where addresses
matter.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from jreg_megatron.methods.jreg.kernels import Above, Rows, fused

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (768, 2048, 3072, 3200, 4096, 8192)
TYPES = ((BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16), (BF16, FP32))
METHODS = ("displacement", "gradients", "linked")
"""The last is ``gradients`` between two layers that have gradients too."""

# An SM's registers and how many warps it can hold; the least of sm_80 to sm_120.
SM_REGISTERS, SM_WARPS = 65536, {80: 64, 90: 64, 100: 64, 103: 64, 120: 48}

FAST = [
    *product(METHODS, (80, 90, 100), (768, 2048, 3200, 8192), TYPES[:1]),
    *product(METHODS, (90,), (3200,), TYPES[1:]),
    *product(METHODS, (100,), (12288,), TYPES[2:3]),
]
ALL = [*product(METHODS, SM_WARPS, (*WIDTHS, 12288), TYPES)]


@dataclass
class OfflineDriver:
    """Replaces Triton's driver: names the GPU to compile for, and keeps launches."""

    arch: int
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    """Of each launch the compiled kernel's hash, the grid and the arguments."""
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 2**20},
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        unload_module=lambda module: None,
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*given: Any) -> None:
            self.launches.append((metadata.hash, *given[:3], *given[9:]))

        return launch


@dataclass
class Compiled:
    """A kernel as the GPU would get it."""

    kernel: Any
    sass: str
    registers: int
    stack: int
    local: int

    @property
    def num_warps(self) -> int:
        return int(self.kernel.metadata.num_warps)

    def accesses(self, what: str) -> list[int]:
        """The width in bytes of every load (``LDG``) from or store (``STG``) to global memory."""
        found = re.findall(rf"\b{what}\.E(?:\.\w+)*", self.sass)
        bits = (re.search(r"\.[US]?(8|16|64|128|256)\b", name) for name in found)
        return [int(match[1]) // 8 if match else 4 for match in bits]

    def resident_blocks(self, arch: int) -> int:
        """How many programs an SM holds at a time; registers are given out to warps by 256."""
        of_warp = -(-self.registers * 32 // 256) * 256
        return min(SM_REGISTERS // (of_warp * self.num_warps), SM_WARPS[arch] // self.num_warps)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


def compiled(arch: int, method: str, *given: Any, **named: Any) -> Compiled:
    """The compiled kernels that ``KERNELS.method(*given)`` would run."""
    if method == "linked":
        *given_, above = given
        method, given, named = "gradients", tuple(given_), {**named, "above": above, "hands_down": True}
    assert not fused.IS_INTERPRETED
    kernels = []
    run = triton.JITFunction.run

    def kept(self: Any, *args: Any, **options: Any) -> Any:
        kernels.append(run(self, *args, **options))
        return kernels[-1]

    with (
        mock.patch.object(driver, "_active", OfflineDriver(arch)),
        mock.patch.object(triton.JITFunction, "run", kept),
    ):
        getattr(fused.TritonKernels(), method)(*given, **named)
    (kernel,) = kernels
    cubin = Path(triton.knobs.cache.dir) / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = (re.search(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    registers, stack, local = (int(match[1]) for match in found if match)
    return Compiled(kernel, kernel.asm["sass"], registers, stack, local)


def on_meta(width: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """A state ``[2048, 4, h]`` of a GPU that is not here."""
    if transposed:
        return torch.empty(4, 2048, width, dtype=dtype, device="meta").transpose(0, 1)
    return torch.empty(2048, 4, width, dtype=dtype, device="meta")


def operands(method: str, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Any, ...]:
    h_in, h_out = (on_meta(width, dtype) for dtype in dtypes)
    if method == "displacement":
        return h_in, h_out
    found = h_in, h_out, torch.empty_like(h_out), torch.empty(1, device="meta"), 0.3
    if method == "gradients":
        return found
    return *found, Above(torch.empty_like(h_out), (torch.empty(3, 2048, 4, device="meta"),))


def assert_good(
    found: Compiled, method: str, arch: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    spills = re.findall(r"\b(?:STL|LDL)\b", found.sass)
    # Where a program goes over its rows in parts, one number may wait until the last part.
    spilled = 0 if width <= fused.WIDEST else 1
    assert (found.stack <= 8 * spilled, found.local) == (True, 0), "nothing spills"
    assert spills in ([], ["STL", "LDL"][: 2 * spilled]), "nothing spills"
    size_in, size_out = (dtype.itemsize for dtype in dtypes)
    is_gradients, is_linked = method != "displacement", method == "linked"
    threads, rows = 32 * found.num_warps, fused.tile_for(width).rows
    # Of the states and gradients each number is read and written once, 16 bytes or more at a time.
    for what, of_a_column, scalars in (
        # The coefficient, and three numbers from above.
        ("LDG", size_in + (1 + is_gradients + is_linked) * size_out, 4 if is_linked else 1),
        # Psi, and two more numbers to hand down instead of the input's gradient.
        (
            "STG",
            (size_out if is_linked else size_in + size_out) if is_gradients else 0,
            3 if is_linked else 1,
        ),
    ):
        accesses = found.accesses(what)
        wide = [size for size in accesses if size >= 16]
        assert len(accesses) - len(wide) <= scalars, f"{what} of {accesses} bytes"
        if width <= fused.WIDEST:
            held = rows * triton.next_power_of_2(width)
            assert rows * width * of_a_column <= sum(wide) * threads <= held * of_a_column
        elif what == "STG":
            assert wide or not is_gradients
    assert ".ftz" not in found.kernel.asm["ptx"], "tiny rows keep their digits"
    if is_gradients and BF16 in (dtypes[1:] if is_linked else dtypes):
        assert re.search(r"cvt\.rn\.bf16", found.kernel.asm["ptx"]), "rounds to the nearest"
    assert ".rz." not in found.kernel.asm["ptx"]
    # While one program waits in its reductions another one must load. Where a row takes 16 warps the
    # registers of one program with gradients fill an SM: there its own 48 KB are on their way at once.
    blocks = found.resident_blocks(arch)
    assert blocks * found.num_warps >= 16, f"{found.registers} registers"
    assert blocks >= 2 or (is_gradients and found.num_warps == 16)
    assert found.kernel.metadata.shared <= 16384


@pytest.mark.parametrize(("method", "arch", "width", "dtypes"), FAST, ids=str)
def test_compiled_ahead_nothing_spills_and_memory_is_read_16_bytes_at_a_time(
    method: str, arch: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    found = compiled(arch, method, *operands(method, width, dtypes))
    assert_good(found, method, arch, width, dtypes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "arch", "width", "dtypes"), [case for case in ALL if case not in FAST], ids=str
)
def test_compiled_ahead_for_every_gpu_width_and_type_it_is_as_good(
    method: str, arch: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    found = compiled(arch, method, *operands(method, width, dtypes))
    assert_good(found, method, arch, width, dtypes)


def test_a_transposed_state_and_an_expanded_gradient_are_read_as_fast() -> None:
    states = [on_meta(2048, BF16, transposed=True) for _ in range(2)]
    coefficient = torch.empty(1, device="meta")
    found = compiled(90, "gradients", *states, on_meta(2048, BF16), coefficient, 0.3)
    assert_good(found, "gradients", 90, 2048, (BF16, BF16))


def test_token_weights_cost_one_load() -> None:
    given = operands("gradients", 2048, (BF16, BF16))
    plain = compiled(90, "gradients", *given)
    weighted = compiled(90, "gradients", *given, torch.empty(2048, 4, device="meta"))
    assert len(weighted.accesses("LDG")) == len(plain.accesses("LDG")) + 1


def test_leaving_out_the_inputs_gradient_saves_its_stores() -> None:
    given = operands("gradients", 2048, (BF16, BF16))
    plain = compiled(90, "gradients", *given)
    half = compiled(90, "gradients", *given, needs_grad_in=False)
    assert (sum(plain.accesses("STG")) - 4) == 2 * (sum(half.accesses("STG")) - 4)


def test_arithmetic_is_not_fused_so_a_gpu_rounds_as_the_interpreter_does() -> None:
    for method in METHODS:
        found = compiled(90, method, *operands(method, 2048, (BF16, BF16)))
        assert not found.kernel.metadata.enable_fp_fusion
        assert "fma." not in found.kernel.asm["ptx"]


def of_every_kind(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls whose launches differ in something on which Triton's choice of a compiled kernel may depend."""
    size_in, size_out = dtypes
    weights, coefficient = torch.ones(8, 16), torch.ones(1)
    input_memory, memory = (torch.ones(8 * 16 * 64 + 1, dtype=dtype) for dtype in dtypes)
    a, b, g = torch.ones(8, 16, 64, dtype=size_in), *(torch.ones(8, 16, 64, dtype=size_out) for _ in range(2))
    others = {
        "contiguous": (a, b, g),
        "output on an odd address": (a, memory[1:].view(8, 16, 64), g),
        "gradient on an odd address": (a, b, memory[1:].view(8, 16, 64)),
        "input on an odd address": (input_memory[1:].view(8, 16, 64), b, g),
        "transposed": (a.view(16, 8, 64).transpose(0, 1), b, g),
        "all transposed": tuple(x.view(16, 8, 64).transpose(0, 1) for x in (a, b, g)),
        "expanded": (a, b, g[:1, :1].expand(8, 16, 64)),
        "one sequence": (a[:, :1], b[:, :1], g[:, :1]),
        "fewer": (a[:5, :3], b[:5, :3], g[:5, :3]),
        "part of the width": (a[..., :40], b[..., :40], g[..., :40]),
    }
    for h_in, h_out, grad in others.values():
        yield "displacement", (h_in, h_out)
        for options in (
            (None, True, True, None, False, None),
            (weights[: h_in.shape[0], : h_in.shape[1]], False, True, None, True, None),
            (None, True, True, None, False, Rows(4, 0)),
            (None, True, True, None, False, Rows(4, 1)),
            (None, True, True, None, False, Rows(32, 16)),
        ):
            yield "gradients", (h_in, h_out, grad, coefficient, 0.3, *options)
        above = Above(h_out, (torch.ones(3, *h_in.shape[:2]),))
        yield "gradients", (h_in, h_out, grad, coefficient, 1.0, None, True, True, above, True)


def test_a_launch_that_was_prepared_gives_a_gpu_what_tritons_own_launch_gives_it() -> None:
    calls = [call for dtypes in ((BF16, BF16), (FP32, BF16)) for call in of_every_kind(dtypes)]

    def seen(launches: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        tensors = [[x for x in launch if isinstance(x, Tensor)] for launch in launches]
        kinds = [[(x.shape, x.stride(), x.dtype) for x in of_one] for of_one in tensors]
        others = [tuple(x for x in launch if not isinstance(x, Tensor)) for launch in launches]
        return list(zip(others, kinds, strict=True))

    with mock.patch.object(driver, "_active", OfflineDriver(90)) as offline:
        for method, given in calls:
            with mock.patch.object(fused, "_IS_KNOWN", False):
                getattr(fused.TritonKernels(), method)(*given)
        tritons, offline.launches = seen(offline.launches), []
        kernels = fused.TritonKernels()
        for method, given in (*calls, *reversed(calls)):
            getattr(kernels, method)(*given)
    assert seen(offline.launches) == [*tritons, *reversed(tritons)]
    assert len({launch[0][0] for launch in tritons}) > 8, "several compiled kernels"


def test_on_an_amd_gpu_triton_chooses_the_kernel_in_each_launch() -> None:
    launches = []

    def noted(self: Any, *_: Any, warmup: bool, **__: Any) -> None:
        launches.append(warmup)

    with (
        mock.patch.object(driver, "_active", OfflineDriver(90)) as offline,
        mock.patch.object(triton.JITFunction, "run", noted),
    ):
        offline.get_current_target = lambda: GPUTarget("hip", "gfx942", 64)
        for _ in range(2):
            fused.TritonKernels().displacement(on_meta(768, BF16), on_meta(768, BF16))
    assert launches == [False, False]
