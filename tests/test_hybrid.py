"""Hybrid models of all kinds of sub-layers: displacement is that of plain hooks, the gradient autograd's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from harness import Finished, read_scalars, run_function, run_ranks

from jreg_megatron import JRegConfig, UserError, attach
from jreg_megatron.methods.norms.settings import NormsConfig
from jreg_megatron.stream.anatomy import residual_layers
from jreg_megatron.stream.preparation import prepare
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
"""Hybrid models, each layer's sub-layers together; after a slash those of multi-token prediction."""


def differences(layers: str, rule: str) -> tuple[float, float, str]:
    """The errors of displacement and gradient, relative to those written out, and the layers' description."""
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


@dataclass(frozen=True, kw_only=True)
class Counts(Settings):
    """A method that examines the layers before the model is wrapped, and accepts any layers."""

    name: ClassVar[str] = "counts"
    prefix: ClassVar[str] = "counts"

    def prepare(self, chunk: Any) -> None:
        chunk.counted = len(residual_layers(chunk))


def counted() -> list[int]:
    import hybrid_toy

    seen = []
    for rule in ("mixer", "sublayer"):
        model = hybrid_toy.build("*-M")
        prepare([model], [JRegConfig(layer=rule), NormsConfig(layer=rule), Counts()])
        seen.append(model.counted)
    return seen


def refusal_of_sublayers_in_a_gpt_model() -> str:
    import test_attach

    with pytest.raises(UserError) as refusal:
        attach(test_attach.build_model(), JRegConfig(layer="sublayer"), num_microbatches=1)
    return str(refusal.value)


def on_one_rank() -> tuple[str, dict[tuple[str, str], tuple[float, float, str]], list[int]]:
    said = refusal_of_sublayers_in_a_gpt_model()  # sets up Megatron's groups
    rules = ("mixer", "sublayer")
    return said, {(layers, rule): differences(layers, rule) for layers in LAYERS for rule in rules}, counted()


def test_sub_layers_of_every_kind_give_the_displacement_of_hooks_and_the_gradient_of_autograd() -> None:
    ((said, found, counts),) = run_function(on_one_rank)
    for model, (displacement, gradient, _) in found.items():
        assert displacement < 1e-5 and gradient < 1e-5, model
    assert found["*- *- *-", "mixer"][2] == (
        "> HybridModel: a layer is a mixer with the feed-forward sub-layers after it; layers 1 to 3: 3x*-"
    )
    assert found["-- ME *", "mixer"][2].endswith("layers 1 to 3: -- ME *")
    assert found["-- ME *", "sublayer"][2].endswith("a layer is a sub-layer; layers 1 to 5: 2x- M E *")
    assert "the setting layer is 'sublayer', but the layers of a GPTModel have no" in said
    assert counts == [2, 3], "a method that changes the model before it is wrapped sees other layers"


SCRIPT = Path(__file__).with_name("unmodified_pretrain.py")


def hybrid(arguments: list[str], pattern: str) -> list[str]:
    """The toy model's command line for a hybrid model of the pattern."""
    at = arguments.index("--num-layers")
    spec = ["--spec", "jreg_megatron.cpu.hybrid", "stack_spec"]
    return [*arguments[:at], *arguments[at + 2 :], *spec, "--hybrid-layer-pattern", pattern]


def launch(argv: list[Any], world_size: int = 1, **named: Any) -> Finished:
    return run_ranks([SCRIPT, *argv], world_size, entry="jreg_megatron.launch:main", **named)


def test_a_gpt_checkpoint_that_is_resumed_as_a_hybrid_model_gives_the_same_numbers(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    models = {"GPTModel": toy_arguments, "HybridModel": hybrid(toy_arguments, "*-*-*-*-")}
    flags = ["--jreg-coeff", 1, "--jreg-log-per-layer", "--dist-ckpt-optim-fully-reshardable"]
    flags += ["--train-iters", 4, "--save-interval", 2]
    launch([*toy_arguments, *flags, "--exit-interval", 2, "--save", tmp_path / "saved"])
    for name, model in models.items():
        launch([*model, *flags, "--load", tmp_path / "saved", "--tensorboard-dir", tmp_path / name])
    gpt, other = (read_scalars(tmp_path / name) for name in models)
    tags = ["lm loss", "jreg loss", "jump rate", "grad-norm"]
    tags += [f"jreg/displacement_layer_0{number}" for number in range(1, 5)]
    for tag in tags:
        assert len(other[tag]) == 2 and other[tag] == pytest.approx(gpt[tag], rel=1e-6), tag


def test_megatrons_loop_says_what_the_layers_are_and_logs_each(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*hybrid(toy_arguments, "*-*|E-*"), "--train-iters", 1]
    argv += ["--num-experts", 4, "--moe-ffn-hidden-size", 24, "--pipeline-model-parallel-size", 2]
    argv += ["--tensorboard-dir", tmp_path, "--jreg-log-per-layer"]
    run = launch([*argv, "--jreg-layer", "sublayer"], 2)
    line = "> HybridModel: a layer is a sub-layer; layers 1 to 6: * - * E - *"
    assert [output.count(line) for output in run.output] == [1, 0]
    assert "jreg/displacement_layer_06" in read_scalars(tmp_path)
