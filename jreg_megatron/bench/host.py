"""What the host does for each layer and micro-batch: Python and launches, in microseconds.

The model's tensors are so small that nothing else takes time. On a GPU that waits for its host, this is the
cost of a method. With kernels that do nothing, only Python and autograd remain.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.bench.options import AGAIN, UNMODIFIED
from jreg_megatron.bench.rounds import rounds
from jreg_megatron.bench.variants import Attached, Variant
from jreg_megatron.methods.jreg.kernels.handed import Above, Gradients
from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.runtime.imports import without_noise

_WIDTH, _SEQUENCE, _BATCH, _HEADS, _VOCABULARY = 16, 8, 2, 2, 32
_NEVER = 10**6
_FASTEST = 0.05
"""The result is the mean of this share of rounds, the fastest ones: other work only adds time."""
_FEWEST = 5

_REGULARIZED = JRegConfig(coeff=1.0, weights="uniform", measure_interval=_NEVER)
_MEASURED = JRegConfig(measure_interval=1)
_LAST = JRegConfig(coeff=1.0, weights="last", measure_interval=_NEVER)
_RESTING = JRegConfig(measure_interval=_NEVER)
_IDLE = "the same with kernels that do nothing"
WAYS: dict[str, tuple[JRegConfig | None, bool, str]] = {
    UNMODIFIED: (None, True, "nothing attached"),
    AGAIN: (None, True, "the same once more, to show the noise"),
    "regularized": (_REGULARIZED, True, "a gradient in every layer"),
    "regularized_no_kernels": (_REGULARIZED, False, _IDLE),
    "measured": (_MEASURED, True, "every layer measured"),
    "measured_no_kernels": (_MEASURED, False, _IDLE),
    "neither": (_LAST, False, "a gradient only in the last layer: the cost of the other layers"),
    "resting": (_RESTING, True, "attached, in a step that neither measures nor regularizes"),
}
"""By way: the settings, whether the kernels do anything, and a description."""


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


def run(args: Namespace, more: list[str], finish: Callable[[dict[str, Any]], None]) -> int:
    """Measure.

    ``finish`` gets the sizes, and ``microseconds`` per layer and micro-batch, forward and backward: of the
    unmodified way all of them, of the others those in addition to it.
    """
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = _step_of(_model(args.layers, device), device)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _, name in rounds(list(WAYS), args.rounds):
        seconds[name].append(step(name))
    count = min(args.rounds, max(_FEWEST, round(_FASTEST * args.rounds)))
    each = {
        name: {
            part: 1e6 * sum(sorted(of_part)[:count]) / count / args.layers
            for part, of_part in zip(("forward", "backward"), zip(*of_way, strict=True), strict=True)
        }
        for name, of_way in seconds.items()
    }
    plain = each[UNMODIFIED]
    for name in each.keys() - {UNMODIFIED}:
        each[name] = {part: value - plain[part] for part, value in each[name].items()}
    sizes = {"layers": args.layers, "width": _WIDTH, "rounds": args.rounds}
    about = {name: words for name, (_, _, words) in WAYS.items()}
    finish({"device": str(device), **sizes, "microseconds": each, "about": about})
    return 0


def _model(layers: int, device: torch.device) -> Any:
    with without_noise():
        from jreg_megatron import cpu
        from jreg_megatron.mcore.one_process import single_process

        cpu.enable_for(device)
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.transformer_config import TransformerConfig

        single_process()
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=_WIDTH,
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
    """A function that runs a micro-batch in one variant and returns the seconds of both passes."""
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

    variants: dict[str, Variant] = {}
    for name, (config, with_kernels, _) in WAYS.items():
        if config is None:
            variants[name] = Variant()
            continue
        attached = variants[name] = Attached([model], config, num_microbatches=1)
        if not with_kernels:
            attached.handle.methods[0].kernels = _NoKernels()  # type: ignore[attr-defined]
        with attached.on(1):
            passes()
        attached.handle.end_iteration(1)  # the first step's checks are over

    def step(name: str) -> tuple[float, float]:
        variant = variants[name]
        with variant.on(1):
            passes()  # places the taps
            found = passes()
        if isinstance(variant, Attached):
            variant.handle.reset_training_metrics()
        return found

    return step
