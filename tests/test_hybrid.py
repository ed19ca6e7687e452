"""Hybrid models of all kinds of sub-layers: displacement is that of plain hooks, the gradient autograd's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from harness import read_scalars, run_function, run_ranks

from jreg_megatron import JRegConfig, UserError, attach
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.stream.anatomy import residual_layers
from jreg_megatron.stream.attachment import prepare
from jreg_megatron.stream.settings import Settings

COEFF = 5.0
LAYERS = [
    "*- *- *-",
    "+- + +E",
    "G- G *-",
    "D- D G-",
    "M- M *-- M",
    "-- ME *",
    "* *- M",
    "*E G M-E",
    "M *- M/*-",
]
"""Hybrid models, each layer's sub-layers together; behind a slash what predicts a token further ahead."""


def differences(layers: str, rule: str) -> tuple[float, float, str]:
    """How far displacement and gradient are from those written out, and what is said of the layers."""
    import hybrid_toy

    own = layers.partition("/")[0]
    pieces = own.split() if rule == "mixer" else list(own.replace(" ", ""))
    model = hybrid_toy.build(layers.replace(" ", ""))
    config = JRegConfig(coeff=COEFF, alpha=0.5, layer=rule)
    psi, wanted = hybrid_toy.written_out(model, pieces, COEFF, config.layer_weights(len(pieces)))
    before = [dict(vars(module)) for module in model.modules()]
    handle = attach(model, config, num_microbatches=1)
    model.zero_grad()
    hybrid_toy.losses(model).mean().backward()
    metrics = handle.end_iteration(1)
    assert metrics is not None
    found = hybrid_toy.gradients(model)
    assert found.keys() == wanted.keys()
    worst = max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)
    said = handle.describe().splitlines()[0]
    handle.detach()
    assert [dict(vars(module)) for module in model.modules()] == before
    return float((metrics.displacement / psi.double() - 1).abs().max()), worst, said


def all_differences() -> dict[tuple[str, str], tuple[float, float, str]]:
    return {(layers, rule): differences(layers, rule) for layers in LAYERS for rule in ("mixer", "sublayer")}


def test_sub_layers_of_every_kind_give_the_displacement_of_hooks_and_the_gradient_of_autograd() -> None:
    (found,) = run_function(all_differences)
    for model, (displacement, gradient, _) in found.items():
        assert displacement < 1e-5 and gradient < 1e-5, model
    assert found["*- *- *-", "mixer"][2] == (
        "> HybridModel: a layer is a mixer with the feed-forward sub-layers behind it; layers 1 to 3: 3x*-"
    )
    assert found["-- ME *", "mixer"][2].endswith("layers 1 to 3: -- ME *")
    assert found["-- ME *", "sublayer"][2].endswith("a layer is a sub-layer; layers 1 to 5: 2x- M E *")


@dataclass(frozen=True, kw_only=True)
class Counts(Settings):
    """A method that looks at the layers before the model is wrapped, and takes what layers there are."""

    name: ClassVar[str] = "counts"
    prefix: ClassVar[str] = "counts"

    def prepare(self, chunk: Any) -> None:
        chunk.counted = len(residual_layers(chunk))


def counted() -> list[int]:
    import hybrid_toy

    model = hybrid_toy.build("*-M")
    seen = []
    for rule in ("mixer", "sublayer"):
        prepare([model], [JRegConfig(layer=rule), NormsConfig(layer=rule), Counts()])
        seen.append(model.counted)
    return seen


def test_a_method_that_changes_the_model_before_it_is_wrapped_sees_the_layers_of_the_others() -> None:
    assert run_function(counted) == [[2, 3]]


def sublayers_of_another_model() -> None:
    import test_attach

    with pytest.raises(
        UserError, match="the setting layer is 'sublayer', and the layers of a GPTModel are not"
    ):
        attach(test_attach.build_model(), JRegConfig(layer="sublayer"), num_microbatches=1)


def test_a_gpt_model_has_no_sub_layers_to_be_taken_for_layers() -> None:
    run_function(sublayers_of_another_model)


def test_megatrons_loop_says_what_the_layers_are_and_refuses_a_stage_that_cuts_one(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    at = toy_arguments.index("--num-layers")
    script = Path(__file__).with_name("unmodified_pretrain.py")
    argv = [script, *toy_arguments[:at], *toy_arguments[at + 2 :], "--train-iters", 1]
    argv += ["--spec", "jreg_megatron.cpu.hybrid", "stack_spec", "--hybrid-layer-pattern", "*-*|E-*"]
    argv += ["--num-experts", 4, "--moe-ffn-hidden-size", 24, "--pipeline-model-parallel-size", 2]
    argv += ["--tensorboard-dir", tmp_path, "--jreg-log-per-layer"]
    cut = run_ranks(argv, 2, entry="jreg_megatron.launch:main", check=False)
    assert cut.status == [2, 2]
    for output in cut.output:
        assert "Traceback" not in output
    assert "layer 2, '*E-', is on two of them; begin each stage with a mixer" in "".join(cut.output)
    run = run_ranks([*argv, "--jreg-layer", "sublayer"], 2, entry="jreg_megatron.launch:main")
    line = "> HybridModel: a layer is a sub-layer; layers 1 to 6: * - * E - *"
    assert [output.count(line) for output in run.output] == [1, 0]
    assert "jreg/displacement_layer_06" in read_scalars(tmp_path)
