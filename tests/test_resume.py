"""A resumed run is bit-identical to a run without interruption, with every method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import read_scalars, run_ranks
from reference_training import load_weights
from test_let import save_teacher

ITERATIONS, SAVED = 6, 3
METHODS = {
    "JREG": "--jreg-coeff 1 --jreg-alpha 1 --jreg-warmup-iterations 5 --jreg-token-share 0.5",
    "norms": "--norms-measure-interval 2",
    "depth": "--depth-measure-interval 1",
    "fixed attenuation": "--attenuation-factor 0.7 --attenuation-layers 2,4",
    "learned attenuation": "--attenuation-learned 0.8",
    "slow Q/K": "--slowqk-hold-iterations 2 --slowqk-ramp-iterations 3",
    "LET": "--let-teacher {teacher} --let-stop-iterations 6 --let-coeff 5",
    "LayerNorm scaling": "--lns-power 0.5",
    "Peri-LN": "--periln-gain 0.7 --periln-embedding",
}
PRECISIONS = {
    "fp32": "--context-parallel-size 2",
    "bf16": "--bf16 --tensor-model-parallel-size 2 --sequence-parallel",
    # The scale rises every two steps.
    "fp16": "--fp16 --initial-loss-scale 1024 --min-loss-scale 1 --loss-scale-window 2",
}


def expect_same_when_resumed(
    methods: str, precision: str, toy_arguments: list[str], folder: Path
) -> dict[str, list[float]]:
    """The log of the whole run."""
    teacher = save_teacher(folder / "teacher", 256)
    argv = [*toy_arguments, *PRECISIONS[precision].split(), "--use-distributed-optimizer", "--lr", 0.01]
    argv += [*methods.format(teacher=teacher).split(), "--train-iters", ITERATIONS, "--save-interval", SAVED]

    def trained(name: str, *more: object) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
        places = ("--save", folder / name, "--tensorboard-dir", folder / f"{name} board")
        run_ranks([*argv, *places, *more], 2)
        weights = load_weights(folder / name / f"iter_{ITERATIONS:07}")
        return read_scalars(folder / f"{name} board"), weights

    whole, weights = trained("whole")
    resumed, same = trained("resumed", "--load", folder / "whole", "--ckpt-step", SAVED)
    for name in whole:
        if "time" not in name:
            assert resumed[name] == whole[name][-len(resumed[name]) :], name
    for name in ("lm loss", "grad-norm"):
        assert len(resumed[name]) == ITERATIONS - SAVED, name
    assert weights.keys() == same.keys()
    for name, weight in weights.items():
        assert torch.equal(same[name], weight), name
    return whole


@pytest.mark.parametrize(
    ("precision", "left_out"),
    [
        pytest.param("fp32", "fixed attenuation", marks=pytest.mark.slow),
        ("bf16", "fixed attenuation"),
        pytest.param("fp16", "learned attenuation", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_with_all_methods_is_the_same_to_the_bit_in(
    precision: str, left_out: str, toy_arguments: list[str], tmp_path: Path
) -> None:
    all_of_them = " ".join(flags for name, flags in METHODS.items() if name != left_out)
    log = expect_same_when_resumed(all_of_them, precision, toy_arguments, tmp_path)
    for name in ("jump rate", "last residual norm", "void layers", "let loss"):
        assert name in log, "the method has run"
    if precision == "fp16":
        assert log["loss-scale"][-1] > log["loss-scale"][0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_with_one_method_is_the_same_to_the_bit(
    method: str, precision: str, toy_arguments: list[str], tmp_path: Path
) -> None:
    expect_same_when_resumed(METHODS[method], precision, toy_arguments, tmp_path)
