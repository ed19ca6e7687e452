"""The differences of a step to the reference, and the largest that are allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.selftest.step import DTYPES, run_step
from jreg_megatron.selftest.toy import (
    STACKED,
    Batch,
    Place,
    Step,
    draw_batch,
    draw_weights,
    reference_step,
    shape_of,
)

TOLERANCE = 1e-5
"""Allowed relative difference of float32 to float64."""
HALF_MARGIN = 2.0
"""Allowed error of a 16-bit step, as a multiple of the error of the reference in the same type."""


@dataclass(frozen=True)
class Difference:
    """Relative differences of a step to the reference, each a norm of the difference over the norm."""

    lm_loss: float
    jreg_loss: float
    displacement: float
    """The worst layer's."""
    jump_rate: float
    norms: float
    """The worst of the norms and update ratios; 0 where they are not measured."""
    gradient: float
    """The worst parameter's. Each layer's parameter counts alone."""
    worst_parameter: str

    @property
    def values(self) -> dict[str, float]:
        """The differences by name."""
        return {name: getattr(self, name) for name in _VALUES}

    @property
    def losses(self) -> float:
        """The largest difference, without the gradient's."""
        return max(value for name, value in self.values.items() if name != "gradient")

    def exceeds(self, limit: Difference) -> list[str]:
        """The names of the values that are above those of ``limit``, or NaN."""
        return [name for name, value in self.values.items() if not value <= getattr(limit, name)]


_VALUES = [f.name for f in fields(Difference) if f.name != "worst_parameter"]


def _limit(values: dict[str, float]) -> Difference:
    return Difference(**values, worst_parameter="")


@dataclass(frozen=True)
class Comparison:
    """A step at a layout, compared with the reference."""

    found: Difference
    limit: Difference
    """The largest allowed differences."""
    captured: str
    """Where in the model the residual stream was read."""


def compare_step(
    layout: Layout, transformer_impl: str = "local", timeout: timedelta = timedelta(minutes=1)
) -> Comparison:
    """Run a step at the layout on the ranks of the default process group, and compare it. Collective.

    A rank that waits for the others longer than ``timeout`` raises an error.
    """
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    weights = {name: value.to(device) for name, value in draw_weights(shape_of(layout)).items()}
    batch = draw_batch(layout.masked, layout.padded).to(device)
    exact, limit = expected_step(layout, weights, batch)
    step = run_step(layout, weights, batch, transformer_impl, timeout)

    def sum_over_ranks(sums: Tensor) -> None:
        on_device = sums.to(device)
        dist.all_reduce(on_device)
        sums.copy_(on_device)

    return Comparison(difference(step, exact, sum_over_ranks), limit, step.captured)


def expected_step(layout: Layout, weights: dict[str, Tensor], batch: Batch) -> tuple[Step, Difference]:
    """The reference in float64, and the allowed differences of a step in the layout's type."""
    exact = reference_step(layout, weights, batch, torch.float64)
    dtype = DTYPES[layout.precision]
    if dtype == torch.float32:
        return exact, _limit(dict.fromkeys(_VALUES, TOLERANCE))
    in_type = difference(reference_step(layout, weights, batch, dtype), exact)
    # The reference's error in a value can be small by chance, so the rounding of the type is a lower bound.
    # It is higher for the largest norm, which is one token's: no mean reduces its rounding.
    eps = torch.finfo(dtype).eps
    least = dict.fromkeys(_VALUES, eps / 4) | {"norms": eps}
    limits = {name: HALF_MARGIN * max(value, least[name]) for name, value in in_type.values.items()}
    return exact, _limit(limits)


def difference(
    found: Step, exact: Step, sum_over_ranks: Callable[[Tensor], None] | None = None
) -> Difference:
    """Compare a step with the reference.

    Args:
        found: the step, with at least this rank's pieces of the gradients.
        exact: the reference, with whole gradients.
        sum_over_ranks: sums a float64 CPU tensor over ranks in place; None if this rank has all pieces.

    Raises:
        AssertionError: if no rank holds some part of some parameter.
    """
    wanted = {
        _row(name, place): (name, place, gradient.double().cpu()) for name, place, gradient in exact.gradients
    }
    number = {row: i for i, row in enumerate(wanted)}
    # Squared difference, squared norm and number of elements. A copy adds to both, so the ratio stays.
    sums = torch.zeros(len(wanted), 3, dtype=torch.float64)
    for name, place, piece in found.gradients:
        row = _row(name, place)
        own = wanted[row][2][place[len(wanted[row][1]) :]]
        error = (piece.double().cpu() - own).square().sum()
        sums[number[row]] += torch.tensor([error, own.square().sum(), own.numel()], dtype=torch.float64)
    if sum_over_ranks is not None:
        sum_over_ranks(sums)
    missing = [row for row, (*_, whole) in wanted.items() if sums[number[row], 2] < whole.numel()]
    assert not missing, f"no rank holds all of {', '.join(missing)}"
    relative = (sums[:, 0] / sums[:, 1]).sqrt().nan_to_num(nan=float("inf"))
    worst = int(relative.argmax())
    layers = zip(found.displacement.tolist(), exact.displacement.tolist(), strict=True)
    norms = zip(found.norms.flatten().tolist(), exact.norms.flatten().tolist(), strict=True)
    return Difference(
        lm_loss=_relative(found.lm_loss, exact.lm_loss),
        jreg_loss=_relative(found.jreg_loss, exact.jreg_loss),
        displacement=max(_relative(*layer) for layer in layers),
        jump_rate=_relative(found.jump_rate, exact.jump_rate),
        norms=max(itertools.starmap(_relative, norms), default=0.0),
        gradient=float(relative[worst]),
        worst_parameter=list(wanted)[worst],
    )


def _row(name: str, place: Place) -> str:
    """A parameter's name, with the 1-based number of its layer."""
    return f"{name} of layer {int(place[0]) + 1}" if name.startswith(STACKED) else name  # type: ignore[arg-type]


def _relative(found: float, wanted: float) -> float:
    if found == wanted:
        return 0.0
    return abs(found - wanted) / abs(wanted) if found == found and wanted != 0 else float("inf")
