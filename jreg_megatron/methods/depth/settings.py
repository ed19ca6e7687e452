"""Settings of the metrics of depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.settings import Settings, is_integer, layer_setting, setting

if TYPE_CHECKING:
    from jreg_megatron.stream.method import Method, Place

METRICS = ("voids", "contributions", "entropy", "curvature")
WHOLE_SEQUENCE = ("entropy", "curvature")
"""Those that need all tokens of a sequence on one rank."""


@dataclass(frozen=True, kw_only=True)
class DepthConfig(Settings):
    """Settings of the metrics of depth, which are logged per layer in training and validation.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "depth"
    prefix: ClassVar[str] = "depth"
    title: ClassVar[str] = "metrics of depth"
    about: ClassVar[str] = (
        "how each layer is used: voids (arXiv 2505.14467), what attention and MLP add (arXiv 2505.13898), "
        "matrix entropy and curvature of a sequence's states (arXiv 2502.02013). All tokens count. One flag "
        "turns them on."
    )
    only_measures: ClassVar[bool] = True
    in_full_graphs: ClassVar[bool] = True
    in_overlap: ClassVar[bool] = True

    measure_interval: int = setting(
        1, "measure in every N-th training iteration. Validation always measures.", int, "N"
    )
    metrics: str = setting(
        "voids,contributions",
        f"one or more of {', '.join(METRICS)}. voids needs all layers on one pipeline stage. entropy and "
        "curvature need whole sequences on one rank; entropy is slow.",
        metavar="METRIC,...",
    )
    layer: str = layer_setting()

    def __post_init__(self) -> None:
        self.require_layer()
        allowed = is_integer(self.measure_interval) and self.measure_interval >= 1
        self.require("measure_interval", self.measure_interval, allowed, "a whole number >= 1")
        known = isinstance(self.metrics, str) and {*self.chosen} <= {*METRICS}
        self.require("metrics", self.metrics, known, f"one or several of {','.join(METRICS)}")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The metrics, in the order of :data:`METRICS`; unknown ones last, for the error that names them."""
        given = dict.fromkeys(name.strip() for name in self.metrics.split(","))
        return tuple(sorted(given, key=lambda name: (*METRICS, name).index(name)))

    def refuse(self, model_config: Any) -> None:
        """Refuse the metrics that a layout cannot give."""
        super().refuse(model_config)

        def refuse(names: Sequence[str], setting: str, least: int, reason: str) -> None:
            asked = [name for name in self.chosen if name in names]
            if asked and (value := getattr(model_config, setting, None) or 0) >= least:
                rest = ",".join(name for name in self.chosen if name not in asked) or "contributions"
                flag = self.flag("metrics")
                raise UserError(
                    f"{flag} has {' and '.join(asked)}, which {reason}, and {setting} is {value}; give "
                    f"{flag} {rest}"
                )

        refuse(("voids",), "pipeline_model_parallel_size", 2, "need all layers on one pipeline stage")
        refuse(WHOLE_SEQUENCE, "context_parallel_size", 2, "need whole sequences on one rank")
        refuse(WHOLE_SEQUENCE, "sequence_parallel", 1, "need whole sequences on one rank")
        graphs = getattr(model_config, "cuda_graph_impl", "none")
        for metric, of_graphs, reason in (
            (
                "contributions",
                ("transformer_engine", "local"),
                "the state between attention and MLP is in its graphs",
            ),
            ("entropy", ("full_iteration",), "the host waits for the eigenvalues, and a graph cannot wait"),
        ):
            if metric in self.chosen and graphs in of_graphs:
                raise UserError(
                    f"{self.flag('metrics')} has {metric}, and cuda_graph_impl is {graphs}: {reason}; "
                    f"give {self.flag('metrics')} voids, or turn the graphs off"
                )

    def refuse_model(self, chunks: Sequence[Any]) -> None:
        """Refuse contributions of layers that are not attention (or another mixer) followed by an MLP."""
        from jreg_megatron.stream.anatomy import residual_layers  # it brings torch

        layers = (layer for chunk in chunks for layer in residual_layers(chunk))
        lone = [layer for layer in layers if len(layer.adds) < 2]
        if lone and "contributions" in self.chosen:
            raise UserError(
                f"{self.flag('metrics')} has contributions, and layer {lone[0].number} is one sub-layer "
                f"('{lone[0].kinds}'), not a mixer followed by an MLP; give {self.flag('metrics')} voids"
            )

    def make(self, place: Place) -> Method:
        """The metrics of a built model."""
        from jreg_megatron.methods.depth.depth import Depth

        return Depth(self, place)
