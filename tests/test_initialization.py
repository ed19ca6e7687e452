"""``--init-fan-in`` draws the weights that it names."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import TOY, run_ranks

from jreg_megatron.mcore.initialization import check, set_fan_in
from jreg_megatron.runtime.errors import UserError

WIDTH, FFN, CUT = 192, 320, 3.0
# Of a normal distribution cut at three standard deviations.
CUT_STD = math.sqrt(1 - 2 * CUT * math.exp(-(CUT**2) / 2) / math.sqrt(2 * math.pi) / math.erf(CUT / 2**0.5))


def print_weights(argv: list[str]) -> None:
    from megatron.training import training

    from jreg_megatron import pretrain

    def built(*args: Any, **kwargs: Any) -> Any:
        (model,) = build(*args, **kwargs)[0]
        named = model.named_parameters()
        stds = {name: [float(p.std()), float(p.abs().max())] for name, p in named if p.dim() == 2}
        print(f"\nweights {json.dumps(stds)}", flush=True)
        sys.exit(0)

    build, training.setup_model_and_optimizer = training.setup_model_and_optimizer, built
    pretrain.main(argv)


def test_every_matrix_of_the_built_model_is_drawn_by_its_inputs_whatever_its_depth() -> None:
    sizes = ["--hidden-size", WIDTH, "--ffn-hidden-size", FFN, "--num-layers", 2, "--mock-data"]
    argv = [*TOY, *sizes, "--train-iters", 1, "--tensor-model-parallel-size", 2, "--init-fan-in"]
    argv = [*argv[: argv.index("--init-method-std")], *argv[argv.index("--init-method-std") + 2 :]]
    run = run_ranks(argv, 2, entry="test_initialization:print_weights")
    for output in run.output:
        (line,) = (line for line in output.splitlines() if line.startswith("weights "))
        found = json.loads(line.removeprefix("weights "))
        assert len(found) == 2 + 2 * 4
        for name, (std, largest) in found.items():
            expected = (FFN if "linear_fc2" in name else WIDTH) ** -0.5
            assert std == pytest.approx(CUT_STD * expected, rel=0.03), name
            assert 2.9 * expected < largest <= CUT * expected, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_that_sees_only_its_share_of_the_inputs_counts_all_of_them(dtype: torch.dtype) -> None:
    config = SimpleNamespace()
    set_fan_in(config, Namespace(use_cpu_initialization=False, tensor_model_parallel_size=4))
    columns = torch.empty(400, 256, dtype=dtype, requires_grad=True)
    config.output_layer_init_method(columns)
    values = columns.detach().float() * 1024**0.5
    assert float(values.std()) == pytest.approx(CUT_STD, rel=0.01)
    assert float(values.abs().max()) <= CUT * 1.005
    assert len(values.unique()) > 800  # the tails of a draw in bfloat16 have far fewer
    for method in (config.init_method, config.embedding_init_method):
        method(columns)
        assert float(columns.detach().std()) == pytest.approx(CUT_STD / 16, rel=0.01)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("init_method_std", 0.01, "--init-method-std is 0.01"),
        ("embedding_init_method_std", 1.0, "--embedding-init-method-std is 1.0"),
        ("use_mup", True, "--use-mup is True"),
        ("num_experts", 8, "--num-experts is 8"),
    ],
)
def test_another_rule_for_initial_weights_is_refused_beside_it(name: str, value: object, flag: str) -> None:
    args = {"init_method_std": 0.02, "embedding_init_method_std": None, "use_mup": False, "num_experts": None}
    check(Namespace(init_fan_in=True, **args))
    check(Namespace(init_fan_in=False, **args | {name: value}))
    with pytest.raises(UserError, match=f"^{flag}, .*--init-fan-in"):
        check(Namespace(init_fan_in=True, **args | {name: value}))
