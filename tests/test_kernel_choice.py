"""The kernels that a model gets, and the lines about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import run_ranks

from jreg_megatron import JRegConfig, UserError
from jreg_megatron.methods.jreg import kernels
from jreg_megatron.methods.jreg.kernels import check, choose, eager

CPU = torch.device("cpu")


def test_a_cpu_gets_torch_and_the_start_up_line_says_so(toy_arguments: list[str]) -> None:
    run = run_ranks([*toy_arguments, "--train-iters", 1, "--jreg-coeff", 0.1])
    (line,) = (line for line in run.output[0].splitlines() if line.startswith("> JREG attached"))
    assert line.endswith(", kernels torch")


def test_triton_on_a_cpu_is_refused_in_one_line(toy_arguments: list[str]) -> None:
    run = run_ranks([*toy_arguments, "--train-iters", 1, "--jreg-kernels", "triton"], check=False)
    assert run.status == [2]
    (line,) = (line for line in run.output[0].splitlines() if line.startswith("jreg_megatron: error"))
    assert "--jreg-kernels is 'triton'" in line and "cpu" in line and "'torch'" in line


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"kernels\) is cuda; it must be auto, triton, torch"):
        JRegConfig(kernels="cuda")


@dataclass(frozen=True)
class Wrong(eager.TorchKernels):
    """Wrong by a hundredth in Psi, in one of three results, or by a tenth in the handed-down numbers."""

    name: str = "wrong"
    which: int = 0

    def displacement(self, *states: torch.Tensor) -> torch.Tensor:
        return super().displacement(*states) * (1.01 if self.which == 0 else 1.0)

    def gradients(self, *given: Any, **named: Any) -> Any:
        found = super().gradients(*given, **named)
        if self.which == 4 and found.handed is not None:
            across, *others = found.handed.numbers
            return found._replace(handed=found.handed._replace(numbers=(1.1 * across, *others)))
        is_linked = named.get("above") is not None
        name = {1: "grad_in", 2: "total", 3: "psi", 5: "total" if is_linked else ""}.get(self.which, "")
        value = getattr(found, name, None)
        return found if value is None else found._replace(**{name: 1.01 * value})


@dataclass(frozen=True)
class Deaf(eager.TorchKernels):
    """Passes on the output's incoming gradient with nothing added, or with the wrong sign."""

    name: str = "deaf"
    times: float = 0.0

    def gradients(self, a: Any, b: Any, grad_out: torch.Tensor, *given: Any, **named: Any) -> Any:
        found = super().gradients(a, b, grad_out, *given, **named)
        return found._replace(total=grad_out + self.times * (found.total - grad_out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [96, 4096, 12288])
def test_the_self_check_knows_right_kernels_and_those_that_add_nothing_to_the_outputs_gradient(
    width: int, dtype: torch.dtype
) -> None:
    check(eager.KERNELS, CPU, width, dtype)
    for times in (0.0, -1.0, 0.9):
        with pytest.raises(UserError, match="deaf"):
            check(Deaf(times=times), CPU, width, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_give_wrong_numbers_on_the_machine_are_refused_before_the_training(
    dtype: torch.dtype,
) -> None:
    check(eager.KERNELS, CPU, 96, dtype)
    for which in range(6):
        with pytest.raises(UserError, match=r"wrong .*\bcpu\b.* 96 in torch"):
            check(Wrong(which=which), CPU, 96, dtype)


@pytest.mark.parametrize("kind", ["auto", "triton"])
def test_a_device_that_fails_in_the_self_check_ends_the_run_there(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(kernels, "check", fault)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(kernels.DeviceFault, match=r"cuda:0 .*memory access was encountered.*'torch'"):
        choose(kind, torch.device("cuda", 0), 96, torch.bfloat16)
