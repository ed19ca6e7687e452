"""Settings of the norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jreg_megatron.stream.settings import Settings, is_integer, layer_setting, setting

if TYPE_CHECKING:
    from jreg_megatron.stream.method import Method, Place


@dataclass(frozen=True, kw_only=True)
class NormsConfig(Settings):
    """Settings of the norms and update ratios, which are logged per layer in training and validation.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "norms"
    prefix: ClassVar[str] = "norms"
    title: ClassVar[str] = "norms of the residual stream"
    about: ClassVar[str] = (
        "mean, RMS and largest norm of the states h_0..h_L, and update ratios |h_l - h_(l-1)| / |h_(l-1)|; "
        "all tokens count, also the first one of a sequence. One flag turns them on."
    )
    in_full_graphs: ClassVar[bool] = True
    in_overlap: ClassVar[bool] = True
    only_measures: ClassVar[bool] = True

    measure_interval: int = setting(
        1, "measure in every N-th training iteration. Validation always measures.", int, "N"
    )
    layer: str = layer_setting()

    def __post_init__(self) -> None:
        self.require_layer()
        allowed = is_integer(self.measure_interval) and self.measure_interval >= 1
        self.require("measure_interval", self.measure_interval, allowed, "a whole number >= 1")

    def make(self, place: Place) -> Method:
        """The norms of a built model."""
        from jreg_megatron.methods.norms.norms import Norms

        return Norms(self, place)
