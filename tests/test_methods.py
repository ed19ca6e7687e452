"""Methods other than JREG: their measurements and changes, several at once, and a user's own method."""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import layout_rows
import pytest
import torch
from harness import MEGATRON_FSDP, read_scalars, run_function, run_ranks
from test_attach import build_model, build_model_like, forward, step

from jreg_megatron import (
    AttenuationConfig,
    DepthConfig,
    JRegConfig,
    LayerNormScalingConfig,
    LETConfig,
    NormsConfig,
    PeriLNConfig,
    SlowQKConfig,
    UserError,
    attach,
    prepare,
)
from jreg_megatron.examples.own_method import ShortConfig
from jreg_megatron.methods import known
from jreg_megatron.stream.meter import Meter

ROOT = Path(__file__).parents[1]


def states_of(model: Any) -> list[Any]:
    """h_0, h_1, ... of the next forward passes, ``[s, b, h]`` each, as hooks of the layers see them."""
    states: list[Any] = []
    layers = model.decoder.layers

    def before(_: Any, given: Any, named: Any) -> None:
        states.append(named["hidden_states"] if "hidden_states" in named else given[0])

    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: states.append(output[0]))
    return states


def attenuates_in_every_run(recompute: str) -> None:
    model = build_model(recompute)
    states = states_of(model)
    tokens, positions = torch.arange(16).view(2, 8), torch.arange(8).expand(2, 8)
    model.eval()
    with torch.no_grad():
        model(tokens, positions, None)
        h_0, h_1 = (state.clone() for state in states[:2])
        handle = attach(model, AttenuationConfig(factor=0.3, layers=(1,)), num_microbatches=1)
        states.clear()
        model(tokens, positions, None)
        torch.testing.assert_close(states[1], h_1 - 0.7 * h_0)
    model.train()
    for iteration in (1, 2):  # in the first step all layers are observed
        states.clear()
        forward(model).backward()
        runs = [at for at, state in enumerate(states) if torch.equal(state, h_0)]
        assert len(runs) == (1 if recompute == "none" else 2), "the first layer ran again"
        for at in runs:
            torch.testing.assert_close(states[at + 1].detach(), h_1 - 0.7 * h_0)
        handle.end_iteration(iteration)
    for is_training in (True, False):
        model.train(is_training)
        states.clear()
        with torch.no_grad():
            model(tokens, positions, None)
        torch.testing.assert_close(states[1], h_1 - 0.7 * h_0)
    handle.detach()
    states.clear()
    with torch.no_grad():
        forward(model)
    torch.testing.assert_close(states[1], h_1)


@pytest.mark.parametrize("recompute", ["none", "uniform"])
def test_attenuation_is_in_training_recompute_and_evaluation_alike(recompute: str) -> None:
    run_function(attenuates_in_every_run, 1, recompute)


def keeps_every_bit() -> None:
    model = build_model()
    loss, gradients = step(model)
    attach(model, AttenuationConfig(factor=1.0), NormsConfig(), JRegConfig(), num_microbatches=1)
    same, measured = step(model)
    assert torch.equal(loss, same)
    assert all(torch.equal(gradients[name], measured[name]) for name in gradients)


def test_norms_and_an_attenuation_of_factor_1_change_no_bit() -> None:
    run_function(keeps_every_bit)


def counts_collectives() -> list[int]:
    import torch.distributed as dist

    collectives = ("all_", "reduce", "broadcast", "gather", "scatter")
    names = [name for name in dir(dist) if name.startswith(collectives)]
    called: list[str] = []

    def count(name: str) -> None:
        function = getattr(dist, name)
        if callable(function):
            setattr(dist, name, lambda *args, **named: (called.append(name), function(*args, **named))[1])

    model = build_model()
    for name in names:
        count(name)
    step(model)
    of_the_model = len(called)
    now = {"iteration": 0}
    settings = (
        JRegConfig(coeff=1.0, measure_interval=2),
        NormsConfig(measure_interval=2),
        AttenuationConfig(factor=0.5),
    )
    handle = attach(model, *settings, num_microbatches=1, iteration=lambda: now["iteration"])
    counts = []
    for now["iteration"] in range(1, 9):
        called.clear()
        step(model)
        metrics = handle.end_iteration(now["iteration"], now["iteration"] % 4 == 0)
        counts.append(len(called) - of_the_model)
        if now["iteration"] % 4 == 0:
            assert metrics is not None and metrics.iterations == (now["iteration"] - 2, now["iteration"])
            assert {reading.settings.name for reading in metrics.readings} == {"JREG", "norms"}
    return counts


def test_all_methods_together_have_one_collective_in_a_log_interval() -> None:
    # The first step compares layers and the loss's scale; the first that measures makes sure that all are
    # seen.
    for counts in run_function(counts_collectives, 2):
        assert counts[2:] == [0, 1, 0, 0, 0, 1]


def logs_by_name() -> dict[str, float]:
    model = build_model()
    states = states_of(model)
    handle = attach(model, NormsConfig(), num_microbatches=1)
    step(model)
    metrics = handle.end_iteration(1)
    assert metrics is not None
    lengths = [state.detach().double().norm(dim=-1) for state in states]
    for at, length in enumerate(lengths):
        assert metrics.norm_mean[at].item() == pytest.approx(length.mean().item())
        assert metrics.norm_rms[at].item() == pytest.approx(length.square().mean().sqrt().item())
        assert metrics.norm_largest[at].item() == pytest.approx(length.max().item())
    added = (states[2] - states[1]).detach().double().norm(dim=-1)
    assert metrics.update_ratio[1].item() == pytest.approx((added / lengths[1]).mean().item())
    with pytest.raises(AttributeError, match="jump_rate"):
        _ = metrics.jump_rate
    # A state that is not finite is reported, by its layer.
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = float("inf")
    step(model)
    broken = handle.end_iteration(2)
    assert broken is not None
    assert "norm not finite in layers: 2" in broken.readings[0].remarks()
    return metrics.scalars()


def test_norms_are_those_of_the_states_and_logged_by_layer_from_the_embedding_on() -> None:
    (named,) = run_function(logs_by_name)
    rows = {f"norms/{what}_layer_{at:02}" for what in ("mean", "rms", "largest") for at in range(3)}
    rows |= {"norms/update_ratio_layer_01", "norms/update_ratio_layer_02"}
    assert named.keys() == rows | {"last residual norm", "largest residual norm"}


def takes_norms_once() -> None:
    from jreg_megatron.methods.norms import norms as module

    taken: list[torch.Tensor] = []
    norms_of = module.norms

    def counted(state: torch.Tensor) -> torch.Tensor:
        taken.append(state)
        return norms_of(state)

    with mock.patch.object(module, "norms", counted):
        model = build_model()
        handle = attach(model, NormsConfig(), num_microbatches=1)
        forward(model)
        assert len(taken) == 3  # of the embedding's output and those of two layers
        before, whole = torch.randn(8, 1, 16), torch.randn(9, 1, 16)
        (method,) = handle.methods
        for state, is_written, is_known in (
            (whole[:8], False, True),
            (whole[1:], False, False),
            (whole[:8], True, False),
        ):
            method.layer(method.training_meter, 1, before, whole[:8])
            taken.clear()
            if is_written:
                whole.zero_()
            method.layer(method.training_meter, 2, state, before)
            assert (len(taken) == 1) == is_known


def test_the_norms_of_a_state_between_two_layers_are_taken_once_if_nothing_was_written_to_it() -> None:
    run_function(takes_norms_once)


def adds_its_own_loss() -> None:
    model = build_model()
    states = states_of(model)
    model.zero_grad()
    loss = forward(model)
    wanted = loss + 0.3 * sum(state.square().sum(-1).mean() / (2 * 16) for state in states[1:])
    wanted.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    attach(model, ShortConfig(coeff=0.3), num_microbatches=1)
    _, found = step(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_the_method_of_the_readme_adds_the_gradient_of_its_loss() -> None:
    run_function(adds_its_own_loss)


def test_the_readme_holds_the_whole_of_that_method() -> None:
    code = (ROOT / "jreg_megatron" / "examples" / "own_method.py").read_text()
    assert code in (ROOT / "jreg_megatron" / "methods" / "README.md").read_text()


def refuses() -> list[str]:
    model = build_model()
    lines = []
    for settings in (
        (),
        (JRegConfig(), JRegConfig()),
        (AttenuationConfig(layers=(3,)),),
        (NormsConfig(measure_interval=10),),
        (AttenuationConfig(learned=0.9),),
        (LayerNormScalingConfig(),),
        (PeriLNConfig(),),
    ):
        with pytest.raises(UserError) as caught:
            attach(model, *settings, num_microbatches=1)
        lines.append(str(caught.value))
    for wrong in ([JRegConfig(), NormsConfig()], JRegConfig):
        with pytest.raises(UserError) as caught:
            attach(model, wrong, num_microbatches=1)  # type: ignore[arg-type]
        lines.append(str(caught.value))
    attach(model, NormsConfig(), num_microbatches=1)
    with pytest.raises(UserError) as caught:
        attach(model, JRegConfig(), num_microbatches=1)
    return [*lines, str(caught.value)]


def test_settings_that_cannot_be_attached_are_refused_by_name() -> None:
    (lines,) = run_function(refuses)
    for line, named in zip(
        lines,
        (
            "no settings",
            "two JRegConfig",
            "--attenuation-layers names layer 3, and the model has 2 layers",
            "settings of norms depend on the iteration",
            "is attached with --attenuation-factor 0.5 --attenuation-learned 0.9",
            "is attached with --lns-power 0.5",
            "is attached with --periln-gain 1.0",
            "was given [JRegConfig(",
            "was given <class",
            "norms is attached to this model already",
        ),
        strict=True,
    ):
        assert named in line and "\n" not in line


def attaches_other_settings() -> str:
    import torch.distributed as dist

    settings = (JRegConfig(), NormsConfig()) if dist.get_rank() == 0 else (JRegConfig(coeff=0.5),)
    with pytest.raises(UserError) as caught:
        attach(build_model(), *settings, num_microbatches=1)
    return str(caught.value)


def test_settings_that_differ_between_ranks_are_refused_on_every_rank() -> None:
    said = run_function(attaches_other_settings, 2)
    assert said[0] == said[1]
    assert "rank 0 has the settings JRegConfig: " in said[0] and "rank 1 has" in said[0]
    assert "--norms-measure-interval 1" in said[0] and "--jreg-coeff 0.5" in said[0]


WIDTH = 131
"""Of a micro-batch; no other tensor has it."""


def test_values_of_micro_batches_of_different_lengths_do_not_accumulate() -> None:
    meter = Meter(4, torch.device("cpu"))
    tokens = 0
    for length in range(1, 40):
        for layer in (1, 2):  # a pipeline stage's
            meter.add(layer, torch.full((length, WIDTH), float(layer)))
        tokens += WIDTH * length
        tensors = (kept for kept in gc.get_objects() if type(kept) is torch.Tensor)
        assert 0 < sum(kept.shape[1:] == (WIDTH,) for kept in tensors) <= 2, "of the last micro-batch"
    sums, _ = meter.totals()
    assert sums.tolist() == [[tokens, tokens, 39], [2 * tokens, tokens, 39], [0, 0, 0], [0, 0, 0]]


NEEDED: dict[Any, dict[str, Any]] = {
    LETConfig: {"teacher": "folder", "stop_iterations": 1},
    SlowQKConfig: {"hold_iterations": 1},
}
"""Settings without a default."""


@pytest.mark.parametrize(
    ("kind", "setting", "values"),
    [
        (NormsConfig, "measure_interval", (0, True)),
        (DepthConfig, "measure_interval", (0,)),
        (DepthConfig, "metrics", ("", "void", None)),
        (AttenuationConfig, "factor", (-0.1, 1.1, float("nan"))),
        (AttenuationConfig, "layers", ("first", (), (0,), (2, 2), 2)),
        (AttenuationConfig, "learned", (1.0, 0, 1 - 1e-9)),
        (SlowQKConfig, "multiplier", (1.5, -0.1)),
        (SlowQKConfig, "share", (0, 1.1)),
        (SlowQKConfig, "hold_iterations", (None, -1, 0)),
        (SlowQKConfig, "ramp_iterations", (0.5,)),
        (LETConfig, "teacher", (None, "")),
        (LETConfig, "coeff", (-1, float("nan"))),
        (LETConfig, "layer", (0, 1.5)),
        (LETConfig, "stop_iterations", (None, 0)),
        (LETConfig, "tokens", ("some",)),
        (LayerNormScalingConfig, "power", (-1, float("inf"))),
        (PeriLNConfig, "gain", (0, None)),
    ],
)
def test_a_bad_value_is_one_line_with_setting_value_and_fix(
    kind: Any, setting: str, values: tuple[Any, ...]
) -> None:
    for value in values:
        with pytest.raises(UserError) as caught:
            kind(**NEEDED.get(kind, {}) | {setting: value})
        line = str(caught.value)
        assert kind.flag(setting) in line and "it must be" in line and "\n" not in line


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            SlowQKConfig,
            "multi_latent_attention attention_output_gate use_torch_fsdp2 use_megatron_fsdp "
            "optimizer_cpu_offload use_precision_aware_optimizer optimizer_cuda_graph",
        ),
        (LETConfig, "reset_attention_mask reset_position_ids dataloader_inter_document_masking"),
        (LayerNormScalingConfig, "hybrid_layer_pattern mtp_num_layers fused_residual_rmsnorm"),
        (PeriLNConfig, "hybrid_layer_pattern mtp_num_layers use_transformer_engine_op_fuser"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(kind: Any, names: str) -> None:
    for name in names.split():
        with pytest.raises(UserError, match=f"{kind.name} does not support {name} "):
            kind(**NEEDED.get(kind, {})).refuse(argparse.Namespace(**{name: True}))


@pytest.mark.parametrize(("setting", "value"), [("factor", 0.9), ("layers", (2,))])
def test_a_learned_factor_excludes_a_given_one(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"--attenuation-{setting}.*left out.*--attenuation-learned"):
        AttenuationConfig(learned=0.9, **{setting: value})


def test_each_method_has_its_own_flags_and_one_flag_turns_it_on() -> None:
    parser = known.add_arguments(argparse.ArgumentParser())
    assert known.settings_in(parser.parse_args([])) == ()
    args = parser.parse_args("--attenuation-layers 2,3 --norms-measure-interval 5".split())
    assert known.settings_in(args) == (NormsConfig(measure_interval=5), AttenuationConfig(layers=(2, 3)))
    with pytest.raises(UserError, match="--attenuation-factr; did you mean --attenuation-factor"):
        known.check_flags(["--attenuation-factr", "0.5"])


def test_every_method_has_a_row_in_the_readme() -> None:
    text = (ROOT / "jreg_megatron" / "methods" / "README.md").read_text()
    for method in known.METHODS:
        assert f"| [{method.prefix}]({method.prefix}) | `--{method.prefix}-" in text


def test_the_readme_says_at_how_many_layouts_each_method_is_compared() -> None:
    text = (ROOT / "jreg_megatron" / "methods" / "README.md").read_text()
    methods = [row.methods for row in layout_rows.rows() if row.precision == "fp32"]
    for names, count in (
        ("jreg", len(methods)),
        ("norms, attenuation (learned)", methods.count("all")),
        ("lns, periln", methods.count("blocks")),
    ):
        assert f"| {names} | {count} |" in text


def test_the_tests_that_the_readme_names_exist() -> None:
    text = (ROOT / "jreg_megatron" / "methods" / "README.md").read_text()
    named = re.findall(r"`(test_\w+)::(\w+)`", text)
    assert len(named) > 10
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), name


LAYOUT = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--use-distributed-optimizer")


def kept(log: dict[str, list[float]]) -> list[list[float]]:
    """Each layer's factor, by iteration."""
    return [log[f"attenuation/kept_layer_{layer:02}"] for layer in range(1, 5)]


def test_learned_attenuation_is_trained_and_logged_as_on_one_rank_and_where_fsdp_cuts_it(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    flags = ("--attenuation-learned", 0.8, "--lr", 0.01, "--train-iters", 4)

    def trained(board: str, *more: object, ranks: int = 1) -> dict[str, list[float]]:
        run_ranks([*toy_arguments, *flags, *more, "--tensorboard-dir", tmp_path / board], ranks)
        return read_scalars(tmp_path / board)

    whole = trained("whole", *LAYOUT, ranks=2)
    assert all(of_layer[0] == pytest.approx(0.8) for of_layer in kept(whole)), "it starts where it is told"
    assert all(abs(of_layer[-1] - 0.8) > 1e-3 for of_layer in kept(whole)), "it is trained"
    assert whole["least residual kept"] == [min(of_step) for of_step in zip(*kept(whole), strict=True)]
    cut = [trained(more[0], *more, ranks=2) for more in (("--use-torch-fsdp2",), MEGATRON_FSDP)]
    for other in (trained("alone"), *cut):
        for ours, its in zip(kept(whole), kept(other), strict=True):
            assert its == pytest.approx(ours, abs=1e-5)


def test_layernorm_scaling_and_peri_ln_in_megatrons_loop_are_as_on_one_rank_and_the_checkpoint_asks_for_them(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    flags = ("--lns-power", 0.5, "--periln-gain", 0.7)
    argv = (*toy_arguments, "--jreg-coeff", 1, "--train-iters", 3)
    load = (*argv, *LAYOUT, "--load", tmp_path / "saved")

    def trained(board: str, *more: object, ranks: int = 2) -> dict[str, list[float]]:
        layout = LAYOUT if ranks > 1 else ()
        run_ranks([*argv, *layout, *more, "--tensorboard-dir", tmp_path / board], ranks)
        return read_scalars(tmp_path / board)

    both = trained("both", *flags, "--save", tmp_path / "saved", "--save-interval", 3)
    with_embedding = trained("embedding", *flags, "--periln-embedding")
    alone = trained("alone", *flags, "--periln-embedding", ranks=1)
    for name in ("lm loss", "grad-norm", "jump rate"):
        assert with_embedding[name] == pytest.approx(alone[name], rel=1e-4), name
    of_torch = ("--ckpt-format", "torch", "--save", tmp_path / "plain", "--save-interval", 3)
    none = trained("none", *of_torch)
    assert none["lm loss"] == trained("power 0", "--lns-power", 0)["lm loss"] != both["lm loss"]
    other = run_ranks([*load, "--lns-power", 0.5], 2, check=False)
    assert "saved with --lns-power 0.5 --periln-gain 0.7, and this run has --lns-power 0.5" in other.output[0]
    for more in (("--attenuation-learned", 0.9), ("--periln-embedding",)):
        finetuned = run_ranks([*load, *flags, "--finetune", *more], 2, check=False)
        assert finetuned.status == [2, 2] and "leave out what adds parameters" in finetuned.output[1]
    plain = (*argv, *LAYOUT, "--ckpt-format", "torch", "--load", tmp_path / "plain", "--finetune")
    finetuned = run_ranks([*plain, *flags], 2, check=False)
    assert finetuned.status == [2, 2] and "leave out what adds parameters" in finetuned.output[1]
    finetuned = run_ranks([*load, "--finetune"], 2)
    assert "trained with --lns-power 0.5 --periln-gain 0.7, and this run has no flag" in finetuned.output[0]


def norms_all_outputs() -> None:
    from megatron.core import parallel_state

    settings = PeriLNConfig(gain=0.7, embedding=True)
    model = prepare([build_model()], [settings])[0]
    attach(model, settings, JRegConfig(), num_microbatches=1).detach()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(
                ".bias"
            ):  # a linear layer's bias is passed to the add separately from its output
                parameter.normal_(std=0.5)
    weights = model.state_dict()
    parallel_state.destroy_model_parallel()
    plain = build_model()
    normed = [(plain.embedding, "embedding.norm")]
    for number, layer in enumerate(plain.decoder.layers):
        normed.append((layer.self_attention, f"decoder.layers.{number}.post_attention_norm"))
        normed.append((layer.mlp, f"decoder.layers.{number}.post_mlp_norm"))
    own = {}
    for module, name in normed:
        gain, shift = (weights.pop(f"{name}.{kind}").clone().requires_grad_() for kind in ("weight", "bias"))
        assert torch.equal(gain, torch.full((16,), 0.7))
        own |= {f"{name}.weight": gain, f"{name}.bias": shift}
        module.forward = partial(norm_output, module.forward, gain, shift, model.config.layernorm_epsilon)
    plain.load_state_dict(weights)
    _, found = step(model)
    _, expected = step(plain)
    expected |= {name: parameter.grad for name, parameter in own.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def norm_output(
    run: Callable[..., Any], gain: torch.Tensor, shift: torch.Tensor, eps: float, *given: Any, **named: Any
) -> Any:
    output = run(*given, **named)
    added, bias = output if isinstance(output, tuple) else (output, None)
    normed = torch.nn.functional.layer_norm(added if bias is None else added + bias, (16,), gain, shift, eps)
    return (normed, None) if isinstance(output, tuple) else normed


def test_peri_ln_norms_what_attention_and_mlp_give_with_their_biases_and_the_embedding() -> None:
    run_function(norms_all_outputs)


def leaves_the_stream_its_type() -> None:
    half = {"bf16": True, "params_dtype": torch.bfloat16, "add_bias_linear": False}
    model = build_model(fp32_residual_connection=True, normalization="RMSNorm", **half).bfloat16()
    prepare([model], [PeriLNConfig(embedding=True)])
    states = states_of(model.bfloat16())
    forward(model)
    assert {state.dtype for state in states} == {torch.float32}


def test_a_norm_on_the_embedding_leaves_a_residual_stream_in_float32_as_it_is() -> None:
    run_function(leaves_the_stream_its_type)


def scales_what_transformer_engine_joins() -> None:
    class Joined(torch.nn.Linear):
        """Norm and linear layer in one, which returns a bias beside its output."""

        def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            return super().forward(torch.nn.functional.rms_norm(h, h.shape[-1:])), None

    model = build_model(add_bias_linear=False, gated_linear_unit=False)
    scaled = build_model_like(model, add_bias_linear=False, gated_linear_unit=False)
    for chunk in (model, scaled):
        for layer in chunk.decoder.layers:
            layer.input_layernorm, layer.pre_mlp_layernorm = torch.nn.Identity(), torch.nn.Identity()
            for holder, name in ((layer.self_attention, "linear_qkv"), (layer.mlp, "linear_fc1")):
                weight = getattr(holder, name).weight
                joined = Joined(*reversed(weight.shape), bias=False)
                joined.weight = weight
                setattr(holder, name, joined)
    prepare([scaled], [LayerNormScalingConfig()])
    with torch.no_grad():
        for holder, name in (("self_attention", "linear_qkv"), ("mlp", "linear_fc1")):
            getattr(getattr(model.decoder.layers[1], holder), name).weight /= 2**0.5
        torch.testing.assert_close(forward(scaled), forward(model))
    model.decoder.layers[1].mlp.linear_fc1.bias = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match=r"bias of linear_fc1.*--disable-bias-linear"):
        prepare([model], [LayerNormScalingConfig()])


def test_layernorm_scaling_finds_the_norm_in_transformer_engines_linear_layers() -> None:
    run_function(scales_what_transformer_engine_joins)


def prepares() -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.identity_op import IdentityOp

    def refused(named: str, act: Callable[[], object]) -> None:
        with pytest.raises(UserError, match=named):
            act()

    def anew() -> Any:
        parallel_state.destroy_model_parallel()
        return build_model(add_bias_linear=False)

    def built(*settings: Any) -> Any:
        return prepare([anew()], settings)[0]

    model = built(LayerNormScalingConfig())
    refused("called twice.*--lns-power 0.5", lambda: prepare([model], [LayerNormScalingConfig()]))
    for other in (LayerNormScalingConfig(power=2.0), JRegConfig()):
        named = "prepared for --lns-power 0.5, and is attached with"
        refused(named, lambda other=other: attach(model, other, num_microbatches=1))  # type: ignore[misc]
    attach(model, LayerNormScalingConfig(), JRegConfig(), num_microbatches=1).detach()
    learned = built(AttenuationConfig(learned=0.3))
    refused("prepared for", lambda: attach(learned, AttenuationConfig(factor=0.9), num_microbatches=1))
    forward(learned.eval())
    refused("--attenuation-learned 0.3.*attach", lambda: forward(learned.train()))
    for adding, added in (
        (AttenuationConfig(learned=0.3), "decoder.layers.0.attenuation_gate.weight"),
        (PeriLNConfig(), "decoder.layers.0.post_attention_norm.weight"),
    ):
        late = anew()
        optimizer = torch.optim.AdamW(late.parameters())
        prepare([late], [adding])
        made_before = partial(attach, late, adding, num_microbatches=1)
        refused(
            f"the optimizer does not have {added}",
            lambda: made_before(optimizer=optimizer),  # noqa: B023 (called at once)
        )
        made_before(optimizer=torch.optim.AdamW(late.parameters())).detach()
    wrapped = torch.nn.Module()
    wrapped.module = anew()
    refused("prepare was called for a model in Module", lambda: prepare([wrapped], [PeriLNConfig()]))
    adding = anew()
    del adding.decoder.layers[0].mlp_bda
    adding.decoder.layers[0].mlp_bda = torch.nn.Linear(1, 1)
    named = "mlp_bda of a TransformerLayer is a module, Linear"
    refused(named, lambda: prepare([adding], [PeriLNConfig()]))
    refused(named, lambda: attach(adding, JRegConfig(), num_microbatches=1))
    hybrid = anew()
    hybrid.decoder.layers[0].self_attention = IdentityOp()
    for of_one in (LayerNormScalingConfig(), PeriLNConfig()):
        refused("layer 1.*IdentityOp", lambda of_one=of_one: prepare([hybrid], [of_one]))  # type: ignore[misc]


def test_a_model_is_prepared_once_and_attached_with_the_same_settings() -> None:
    run_function(prepares)


def test_attenuation_in_megatrons_loop_is_in_the_log_and_the_checkpoint_asks_for_it(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    saved = ("--save", tmp_path / "saved", "--load", tmp_path / "saved", "--save-interval", 2)
    argv = (*toy_arguments, "--eval-iters", 1, "--eval-interval", 2, *saved)
    flags = ("--attenuation-factor", 0.7, "--attenuation-layers", "2,4")
    first = run_ranks(
        [*argv, *flags, "--norms-measure-interval", 2, "--train-iters", 4, "--exit-interval", 2]
    )
    (output,) = first.output
    assert "> attenuation attached: factor 0.7 at layers 2, 4" in output and "JREG attached" not in output
    assert re.search(r"iteration +2/ .* last residual norm: \S+ \| largest residual norm: ", output)
    assert re.search(r"validation norms at iteration 2 \| last residual norm value: ", output)
    other = run_ranks([*argv, "--attenuation-factor", 0.7, "--train-iters", 4], check=False)
    assert (
        "saved with --attenuation-factor 0.7 --attenuation-layers 2,4, and this run has "
        "--attenuation-factor 0.7 --attenuation-layers last" in other.output[0]
    )
    assert other.status == [2]
    run_ranks([*argv, *flags, "--train-iters", 4])
    export = [sys.executable, "-m", "jreg_megatron.cli", "export", tmp_path / "saved", tmp_path / "exported"]
    run = subprocess.run(export, capture_output=True, text=True, check=False)
    assert "was trained with --attenuation-factor 0.7 --attenuation-layers 2,4" in run.stderr
    assert run.returncode == 2 and not (tmp_path / "exported").exists()
