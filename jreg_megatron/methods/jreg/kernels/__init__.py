"""Displacement and its gradients for whole states, in plain torch or as fused kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from jreg_megatron.methods.jreg.kernels import eager
from jreg_megatron.methods.jreg.kernels.handed import Above, Gradients, Rows
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.runtime.errors import DeviceFault, UserError, one_line

__all__ = ["Above", "DeviceFault", "Gradients", "Kernels", "Rows", "check", "choose", "refuse_fault"]

_CHECKED_TOKENS = (4, 4)  # sequence and batch, so that rows are found by both


class Kernels(Protocol):
    """An implementation. States are ``[..., h]`` of any floating type; all of one call are on one device."""

    @property
    def kind(self) -> str:
        """``torch``, or ``triton`` and its version. Kernels of one kind round in the same way."""

    @property
    def name(self) -> str:
        """The kind, and for the start-up line why it is used, if there is a reason."""

    def displacement(self, h_in: Tensor, h_out: Tensor) -> Tensor:
        """Psi ``[...]`` of every token as in ``formulas.displacement``, without a graph."""

    def gradients(
        self,
        h_in: Tensor,
        h_out: Tensor,
        grad_out: Tensor,
        coefficient: Tensor,
        factor: float,
        token_weights: Tensor | None = None,
        needs_grad_in: bool = True,
        needs_psi: bool = True,
        above: Above | None = None,
        hands_down: bool = False,
        rows: Rows | None = None,
    ) -> Gradients:
        """The gradients of ``coefficient * factor * sum of weight * Psi``; the output's adds to ``grad_out``.

        ``Psi = (1 - u.v) / 2`` with ``u = a / |a|``, ``v = b / |b|`` has the gradients
        ``dPsi/da = -(v - (u.v) u) / (2 |a|)`` and ``dPsi/db = -(u - (u.v) v) / (2 |b|)``. With
        ``u.v = 1 - 2 Psi`` the brackets are ``(v - u) + 2 Psi u`` and ``(u - v) + 2 Psi v``, which keeps
        their digits where the two states nearly agree. Rows of norm zero get zero.

        Args:
            h_in: the layer's input ``[..., h]``.
            h_out: the layer's output, same shape; the type may differ.
            grad_out: the incoming gradient of ``h_out``, same shape.
            coefficient: float32 tensor of one element on the states' device.
            factor: multiplies the coefficient; float32 in the fused kernels.
            token_weights: ``[...]``, the weight of each token; 1 by default.
            needs_grad_in: whether to compute the gradient for ``h_in``.
            needs_psi: whether to compute Psi.
            above: what the same kernels handed down from the layer above, whose input is this ``h_out``. That
                layer's gradient for it is then added too.
            rows: the rows that have a gradient; without Psi. By default all rows have one.
            hands_down: the layer below will add the gradient for ``h_in``, so it is not computed here.

        Returns:
            The total is ``grad_out`` plus the gradient for ``h_out``; Psi is as :meth:`displacement` gives
            it. Computed in float32 (float64 for float64 states) and rounded once. None for what was not
            asked for.
        """


def choose(wanted: str, device: torch.device, width: int, dtype: torch.dtype) -> Kernels:
    """The kernels for a model: on a GPU Triton's, after a check of their numbers on that GPU.

    Args:
        wanted: "auto", "triton" or "torch".
        device: where the states are.
        width: their hidden size.
        dtype: their type.

    Raises:
        UserError: if Triton is asked for and does not run, or if its kernels give wrong numbers.
        DeviceFault: if its kernels make the device fail.
    """
    if wanted == "torch":
        return eager.KERNELS
    if wanted == "auto" and device.type != "cuda":
        return eager.KERNELS
    why_not = ""
    try:
        from jreg_megatron.methods.jreg.kernels import fused

        if device.type == "cuda" or fused.IS_INTERPRETED:
            check(fused.KERNELS, device, width, dtype)
            return fused.KERNELS
        why_not = f"Triton has no kernels for {device.type}"
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Triton compiles here for the first time: no compiler, no driver
        refuse_fault(device)
        why_not = f"Triton does not run here ({type(error).__name__}: {one_line(error, most=200)})"
    if wanted == "triton":
        raise UserError(
            f"{JRegConfig.flag('kernels')} is 'triton', but {why_not}; use 'torch', or 'auto' for "
            "what runs here"
        )
    return eager.TorchKernels(why_not)


def refuse_fault(device: torch.device) -> None:
    """Refuse to continue on a device on which nothing runs any more.

    Raises:
        DeviceFault: if ``device`` is such a device.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return  # nothing has run there
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceFault(
            f"Triton's kernels make {device} fail ({one_line(error, most=200)}); "
            f"set {JRegConfig.flag('kernels')} to 'torch', and report it"
        ) from error


def check(kernels: Kernels, device: torch.device, width: int, dtype: torch.dtype) -> None:
    """Compare kernels with plain torch in float64 on a few tokens, on this device and in this width and type.

    Raises:
        UserError: if they differ by more than the type's rounding.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(*_CHECKED_TOKENS, width, generator=generator) for _ in range(4))
    h_in, turned, turned_above, grad_out = (states.to(device, dtype) for states in drawn)
    h_out = h_in + turned
    states = (h_in, h_out, h_out + turned_above, grad_out)
    coefficient = torch.ones(1, device=device)
    factor = float(width)  # so large that what is added is as large as what it is added to
    weights = torch.rand(_CHECKED_TOKENS, generator=generator).to(device)

    def numbers(by: Kernels, a: Tensor, b: Tensor, above: Tensor, grad: Tensor) -> list[Tensor | None]:
        found: list[Tensor | None] = [by.displacement(a, b)]
        for each in (None, weights):
            alone = by.gradients(a, b, grad, coefficient, factor, each)
            upper = by.gradients(b, above, grad, coefficient, 2 * factor, each, hands_down=True)
            lower = by.gradients(a, b, grad, coefficient, factor, each, above=upper.handed)
            found += [*alone[:3], upper.total, upper.psi, *lower[:3]]
            found += by.gradients(a, b, grad, coefficient, factor, each, rows=Rows(2, 1))[:2]
        return found

    ours = numbers(kernels, *states)
    right = numbers(eager.KERNELS, *(state.double() for state in states))
    for got, expected in zip(ours, right, strict=True):
        assert got is not None and expected is not None
        error = (got.double() - expected).norm() / expected.norm()
        if not error <= max(1e-6, torch.finfo(got.dtype).eps):
            raise UserError(
                f"the kernels of {kernels.name} give wrong numbers on {device} for width {width} in {dtype} "
                f"(relative error {float(error):.1g}); set {JRegConfig.flag('kernels')} to 'torch', and "
                "report it"
            )
