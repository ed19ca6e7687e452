"""Settings of slower queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jreg_megatron.stream.settings import Settings, is_finite, is_integer, setting

if TYPE_CHECKING:
    from jreg_megatron.stream.method import Method, Place


@dataclass(frozen=True, kw_only=True)
class SlowQKConfig(Settings):
    """Settings of slower queries and keys in the upper layers (arXiv 2605.10504, *Learning Less Is More*).

    In each training iteration the optimizer's update of W_Q and W_K is multiplied by a number: by
    ``multiplier`` for the first iterations, then by one that rises linearly to 1. The update has the weight
    decay in it. ``jreg_megatron/methods/README.md`` says what is published. The authors end the first phase
    by a rule whose formula we do not know, so here it is a number.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "slow Q/K"
    prefix: ClassVar[str] = "slowqk"
    title: ClassVar[str] = "slower queries and keys"
    about: ClassVar[str] = (
        "in the upper layers W_Q and W_K learn more slowly at first (arXiv 2605.10504). It needs "
        "--slowqk-hold-iterations."
    )

    in_full_graphs: ClassVar[bool] = True
    in_overlap: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        "multi_latent_attention": "it has no W_Q and W_K of that kind",
        "attention_output_gate": "one weight then holds queries and gates",
        "use_precision_aware_optimizer": "the updated weights are then inside the optimizer",
        "optimizer_cpu_offload": "the updated weights are then copies on the host",
        "optimizer_cuda_graph": "its graph keeps the multiplier of the iteration that it was captured in",
        **dict.fromkeys(("use_torch_fsdp2", "use_megatron_fsdp"), "each rank has other rows of a weight"),
    }

    multiplier: float = setting(
        0.25,
        "multiplies the optimizer's update of W_Q and W_K, weight decay included, 0 to 1. At 1 nothing "
        "changes.",
        float,
        "FACTOR",
    )
    share: float = setting(
        0.5, "the share of the layers, from the last one down, above 0 and at most 1.", float, "SHARE"
    )
    hold_iterations: int | None = setting(
        None,
        "how many iterations the multiplier holds. Published: 4% of the training.",
        int,
        "N",
        required=True,
    )
    ramp_iterations: int | None = setting(
        None,
        "the iterations over which the multiplier then rises to 1. Without it: a quarter of "
        "--slowqk-hold-iterations, as published.",
        int,
        "N",
    )

    def __post_init__(self) -> None:
        multiplier, share = self.multiplier, self.share
        allowed = is_finite(multiplier) and 0 <= multiplier <= 1
        self.require("multiplier", multiplier, allowed, "a number from 0 to 1")
        allowed = is_finite(share) and 0 < share <= 1
        self.require("share", share, allowed, "a number above 0 and at most 1")
        hold, ramp = self.hold_iterations, self.ramp_iterations
        what = "a whole number >= 0; published is 4% of the training"
        self.require("hold_iterations", hold, is_integer(hold) and hold >= 0, what)  # type: ignore[operator]
        allowed = ramp is None or (is_integer(ramp) and ramp >= 0)
        self.require("ramp_iterations", ramp, allowed, "a whole number >= 0, or left out")
        allowed = hold != 0 or bool(ramp)
        self.require("hold_iterations", hold, allowed, "above 0; or give a ramp above 0")

    @property
    def has_schedule(self) -> bool:
        """True: the multiplier depends on the iteration."""
        return True

    def multiplier_at(self, iteration: int) -> float:
        """What the update is multiplied by in training iteration ``iteration``, 1-based; in [0, 1]."""
        assert self.hold_iterations is not None
        ramp = self.hold_iterations // 4 if self.ramp_iterations is None else self.ramp_iterations
        beyond = iteration - self.hold_iterations
        if beyond >= ramp and beyond > 0:
            return 1.0
        return self.multiplier + (1 - self.multiplier) * max(0, beyond) / max(1, ramp)

    def is_slow(self, layer_number: int, num_layers: int) -> bool:
        """Whether a layer, 1-based, is one of the upper ones."""
        return layer_number > num_layers * (1 - self.share) + 1e-9

    def make(self, place: Place) -> Method:
        """Slower queries and keys of a built model."""
        from jreg_megatron.methods.slowqk.slowqk import SlowQK

        return SlowQK(self, place)
