"""What the host does for each layer and micro-batch: Python and launches, in microseconds.

The model's tensors are so small that nothing else takes time. On a GPU that waits for its host this is what a
method costs. Kernels that do nothing show the share of Python and autograd alone.
"""

from __future__ import annotations

import random
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jreg_megatron.methods.jreg.kernels.handed import Above, Gradients
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.runtime.errors import UserError

UNMODIFIED, AGAIN = "unmodified", "unmodified_again"
_SEQUENCE, _BATCH, _HEADS, _VOCABULARY = 8, 2, 2, 32
_NEVER = 10**6
_FASTEST = 0.05
"""The share of rounds, the fastest ones, whose mean counts: what else the machine does only ever adds."""
_FEWEST = 5


@dataclass(frozen=True)
class _Way:
    about: str
    config: JRegConfig | None = None
    with_kernels: bool = True


_REGULARIZED = JRegConfig(coeff=1.0, weights="uniform", measure_interval=_NEVER)
_MEASURED = JRegConfig(measure_interval=1)

WAYS = {
    UNMODIFIED: _Way("nothing attached"),
    AGAIN: _Way("the same once more: how much is noise"),
    "regularized": _Way("a gradient in every layer", _REGULARIZED),
    "regularized_no_kernels": _Way("the same with kernels that do nothing", _REGULARIZED, False),
    "measured": _Way("every layer measured", _MEASURED),
    "measured_no_kernels": _Way("the same with kernels that do nothing", _MEASURED, False),
    "neither": _Way(
        "a gradient in the last layer alone, so most layers have neither",
        JRegConfig(coeff=1.0, weights="last", measure_interval=_NEVER),
        False,
    ),
    "resting": _Way("attached, in a step that does nothing", JRegConfig(measure_interval=_NEVER)),
}


class _NoKernels:
    """Kernels that do nothing."""

    kind = name = "nothing"

    def __init__(self) -> None:
        self._psi = torch.zeros(_SEQUENCE, _BATCH)

    def displacement(self, h_in: Tensor, h_out: Tensor) -> Tensor:
        return self._psi

    def gradients(
        self, h_in: Tensor, h_out: Tensor, grad_out: Tensor, *_: Any, hands_down: bool = False, **__: Any
    ) -> Gradients:
        handed = Above(h_out, ()) if hands_down else None
        return Gradients(None if hands_down else grad_out, grad_out, self._psi, handed)


def run(args: Namespace) -> dict[str, Any]:
    """Measure.

    Returns:
        Sizes, and ``microseconds``: of a layer and micro-batch, forward and backward; of the unmodified way
        all, of the others what is beyond that.

    Raises:
        UserError: for a size that cannot be.
    """
    for name, least in (("layers", 1), ("width", 2), ("rounds", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    if args.width % _HEADS:
        raise UserError(f"--width is {args.width}; it must be even")
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = _step_of(_model(args.layers, args.width, device), device)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        for name in random.sample(list(WAYS), len(WAYS)):
            seconds[name].append(step(name))
    each = {name: _fastest(of_way, args.layers) for name, of_way in seconds.items()}
    plain = each[UNMODIFIED]
    beyond = {
        name: {part: value - plain[part] for part, value in of_way.items()} for name, of_way in each.items()
    }
    return {
        "device": str(device),
        **{name: getattr(args, name) for name in ("layers", "width", "rounds")},
        "microseconds": beyond | {UNMODIFIED: plain},
    }


def _model(layers: int, width: int, device: torch.device) -> Any:
    from jreg_megatron.decoder.checkpoint.model import import_megatron, without_noise
    from jreg_megatron.mcore.one_process import single_process

    with without_noise():
        import_megatron(device)
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.transformer_config import TransformerConfig

        single_process()
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=width,
            num_attention_heads=_HEADS,
            use_cpu_initialization=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            gradient_accumulation_fusion=False,
        )
        spec = get_gpt_layer_local_spec()
        model = GPTModel(config, spec, vocab_size=_VOCABULARY, max_sequence_length=_SEQUENCE)
    return model.to(device)


def _step_of(model: Any, device: torch.device) -> Callable[[str], tuple[float, float]]:
    """A function that runs a micro-batch one way and tells the seconds of its two passes."""
    from jreg_megatron.stream.attachment import Handle, attach
    from jreg_megatron.stream.tap import tap_residual_stream

    tokens = torch.arange(_BATCH * _SEQUENCE, device=device).view(_BATCH, _SEQUENCE)
    positions = torch.arange(_SEQUENCE, device=device).expand_as(tokens)
    mask = torch.ones(_BATCH, 1, _SEQUENCE, _SEQUENCE, dtype=torch.bool, device=device).triu(1)

    def passes() -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = model(tokens, positions, mask, labels=tokens).mean()
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return middle - start, end - middle

    def attached(way: _Way) -> Handle | None:
        if way.config is None:
            return None
        handle = attach(model, way.config, num_microbatches=1, iteration=lambda: 1)
        if not way.with_kernels:
            handle.methods[0].kernels = _NoKernels()  # type: ignore[attr-defined]
        passes()
        handle.end_iteration(1)  # the first step's checks are over
        handle.detach()
        return handle

    handles = {name: attached(way) for name, way in WAYS.items()}

    def step(name: str) -> tuple[float, float]:
        handle = handles[name]
        if handle is None:
            return passes()
        tap = tap_residual_stream([model], handle)
        try:
            passes()  # taps go where they are needed
            return passes()
        finally:
            tap.remove()
            handle.reset_training_metrics()

    return step


def _fastest(seconds: list[tuple[float, float]], layers: int) -> dict[str, float]:
    """Microseconds of a layer: the mean over the fastest rounds."""
    count = min(len(seconds), max(_FEWEST, round(_FASTEST * len(seconds))))
    return {
        part: 1e6 * sum(sorted(of_part)[:count]) / count / layers
        for part, of_part in zip(("forward", "backward"), zip(*seconds, strict=True), strict=True)
    }


def print_table(console: Console, host: dict[str, Any]) -> None:
    """Print a line for each way."""
    table = Table(title="Microseconds of a layer and micro-batch", title_justify="left", box=SIMPLE_HEAD)
    for column in ("way", "forward", "backward"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for name, of_way in host["microseconds"].items():
        sign = "" if name == UNMODIFIED else "+"
        table.add_row(name, *(f"{of_way[part]:{sign}.1f}" for part in ("forward", "backward")))
    console.print(
        f"{host['layers']} layers of width {host['width']} on {host['device']}, {_BATCH} x {_SEQUENCE} "
        f"tokens, {host['rounds']} rounds",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    for name in host["microseconds"]:
        console.print(f" {name:22}  {WAYS[name].about}", highlight=False, soft_wrap=True)
    console.print(" All but the first are beyond it. The mean of the fastest twentieth.", highlight=False)
