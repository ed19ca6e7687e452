"""What is logged: mean displacement per layer, and what follows from it, equal at every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from jreg_megatron.methods.jreg.formulas import jump_rate
from jreg_megatron.runtime.errors import UserError

LAYERS_SEEN_UNEQUALLY = (
    "JREG saw some layers in more micro-batches than others, so their means would be over other tokens: a "
    "regularized layer is measured in the backward pass, the others in the forward pass; ask for metrics "
    "between steps, and after a forward pass without a backward pass, or a step that was broken off, call "
    "reset_training_metrics() of the handle"
)

LOSS_NAME = "jreg loss"
RATE_NAME = "jump rate"


def displacement_name(layer_number: int, num_layers: int) -> str:
    """The name under which a layer's displacement is logged; equally long for all layers of a model."""
    return f"jreg/displacement_layer_{layer_number:0{max(2, len(str(num_layers)))}d}"


@dataclass(frozen=True)
class JRegMetrics:
    """Displacement of the whole model over the measured tokens. Unscaled: no lambda, no loss scale."""

    displacement: Tensor
    """Mean over tokens of Psi_l for layers 1..L, ``[L]`` float64 on the CPU, each in [0, 1]."""
    jreg_loss: float
    """``sum_l w_l * Psi_l``, before lambda."""
    jump_rate: float
    """zeta_L, the last layer's jump, in hundredths of displacement; NaN for a model of one layer."""
    iterations: tuple[int, ...] = ()
    """Training iterations that measured it, if the loop has told them."""

    def scalars(self, per_layer: bool) -> dict[str, float]:
        """The values by the names they are logged under."""
        named = {LOSS_NAME: self.jreg_loss, RATE_NAME: self.jump_rate}
        if per_layer:
            layers = len(self.displacement)
            for number, value in enumerate(self.displacement.tolist(), start=1):
                named[displacement_name(number, layers)] = value
        return named

    def remarks(self, interval: Sequence[int] | None = None) -> list[str]:
        """What a reader must know: layers without a value, and the iterations if they are not as expected.

        Args:
            interval: the iterations that a reader expects; None for no check.
        """
        said = []
        # One NaN or Inf in a state makes the layer's mean NaN.
        if bad := ((~torch.isfinite(self.displacement)).nonzero().flatten() + 1).tolist():
            said.append(f"displacement not finite in layers: {' '.join(map(str, bad))}")
        if interval is not None and self.iterations and self.iterations != tuple(interval):
            count, first, last = len(self.iterations), self.iterations[0], self.iterations[-1]
            named = f"{count} iterations, {first} to {last}" if count > 1 else f"iteration {first}"
            said.append(f"measured in {named}")
        return said


class DisplacementMeter:
    """Sums displacement per layer on the device; one all-reduce makes it the whole model's.

    Each rank adds what it saw: for every layer the sum of Psi and the number of tokens. Both are summed
    over *all* ranks and then divided. Ranks that hold copies of the same tokens (tensor parallelism
    without sequence parallelism) count alike above and below the line, shards (sequence, context, data
    parallelism) add up, and a layer that a pipeline stage does not hold has zeros there. So the mean is
    the same at every layout, and every rank takes part with a buffer of the same shape.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        # For each layer the sum of Psi, the number of tokens, and how often the layer was seen.
        self._sums = torch.zeros(num_layers, 3, dtype=torch.float64, device=device)
        self._psi_sum_of, self._counts_of = self._sums[:, 0].unbind(), self._sums[:, 1:].unbind()
        self._whole_counts: dict[int, Tensor] = {}

    def add(self, layer_number: int, psi: Tensor, mask: Tensor | None = None) -> None:
        """Add a layer's displacement of one micro-batch; no host synchronisation.

        Args:
            layer_number: 1-based over the whole model.
            psi: Psi of this rank's tokens, ``[s, b]``.
            mask: ``[s, b]``, 1 for the tokens that count and 0 for the others; by default all count.
        """
        psi_sum, counts = self._psi_sum_of[layer_number - 1], self._counts_of[layer_number - 1]
        if mask is None:
            psi_sum += psi.sum(dtype=torch.float64)
            counts += self._counts(psi.numel())
        else:
            psi_sum += torch.where(mask > 0, psi * mask, 0.0).sum(dtype=torch.float64)  # left out may be NaN
            counts += torch.stack((mask.sum(dtype=torch.float64), mask.new_ones((), dtype=torch.float64)))

    def _counts(self, num_tokens: int) -> Tensor:
        """A micro-batch's tokens, seen once, on the device; a run has few sizes of micro-batches."""
        if num_tokens not in self._whole_counts:
            counts = self._sums.new_ones(2)
            counts[0] = num_tokens  # fills on the device; a tensor made of both would be copied to it
            self._whole_counts[num_tokens] = counts
        return self._whole_counts[num_tokens]

    def reset(self) -> None:
        """Forget everything added so far."""
        self._sums.zero_()

    def reduce(self, weights: Tensor, group: dist.ProcessGroup | None = None) -> JRegMetrics | None:
        """Mean over everything that any rank has added since the last reset. A collective call.

        Args:
            weights: the regularizer's layer weights, ``[L]`` float64.
            group: the ranks that hold the model together; by default all.

        Returns:
            The metrics, the same on every rank, NaN if no token counted; None if some layer was not seen.

        Raises:
            UserError: if some layers were seen more often than others, so that they stand for other tokens.
        """
        total = self._sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total, group=group)
        psi_sum, num_tokens, times_seen = total.cpu().unbind(dim=1)
        if (times_seen == 0).any():
            return None
        if times_seen.min() != times_seen.max():
            raise UserError(LAYERS_SEEN_UNEQUALLY)
        mean = psi_sum / num_tokens
        return JRegMetrics(
            displacement=mean,
            jreg_loss=float(weights @ mean),
            jump_rate=float(jump_rate(mean)) if len(mean) > 1 else float("nan"),
        )
