"""JREG in Megatron-Bridge itself, version 0.6.2. `make test-versions` runs this and tests/test_bridge.py.

Its name keeps it out of `make test`, for which Bridge is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import pytest
import test_lora
from harness import read_scalars, run_function

from jreg_megatron import JRegConfig, UserError, attach
from jreg_megatron.bridge import JRegCallback
from jreg_megatron.stream.anatomy import unwrap

harness._context.set_forkserver_preload(["bridge_toy"])

SETTINGS = JRegConfig(coeff=5.0, alpha=1.0, start_iteration=3, log_per_layer=True)
LOGGED = [("", 2), (" validation", 2), ("", 4), *[(" validation", 4)] * 2, (" test", 4)]


def attached_by_hand(config: Any, settings: JRegConfig) -> Any:
    """A callback that attaches JREG with ``attach`` and keeps its metrics at the end of every second step."""
    from bridge_toy import Callback

    class ByHand(Callback):  # type: ignore[misc]
        def attach_to(self, model: Any) -> Any:
            self.metrics: list[Any] = []
            self.step = 0
            self.handle = attach(model, settings, iteration=lambda: self.step)
            return model

        def on_train_step_start(self, context: Any) -> None:
            self.step = context.state.train_state.step + 1

        def on_train_step_end(self, context: Any) -> None:
            if self.step % 2 == 0:
                self.metrics.append(self.handle.reduce_training_metrics())
                self.handle.reset_training_metrics()

    callback = ByHand()
    if hasattr(config.model, "post_wrap_hooks"):
        config.model.post_wrap_hooks.append(callback.attach_to)
    else:
        config.model.register_post_wrap_hook(callback.attach_to)
    return callback


def three_runs(folder: Path, options: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Train with the callback, with ``attach`` and without JREG: the first's lines, the second's metrics."""
    from bridge_toy import recipe, train

    config = recipe(folder / "callback", **options)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(config, [JRegCallback(config, SETTINGS)])
    config = recipe(folder / "attach", **options)
    by_hand = attached_by_hand(config, SETTINGS)
    train(config, [by_hand])
    train(recipe(folder / "without", **options), [])
    return [line for line in printed.getvalue().splitlines() if "JREG" in line], by_hand.metrics


@pytest.mark.parametrize(
    "options",
    [{"cut": (1, 2, 2)}, {"cut": (2, 1, None), "with_builder": True, "precision": "bf16_mixed"}],
    ids=["provider, PP2, VPP2", "builder, TP2, SP, bf16"],
)
def test_two_lines_of_a_recipe_train_and_log_as_attach_does(tmp_path: Path, options: dict[str, Any]) -> None:
    (first_rank, _), (last_rank, metrics) = run_function(three_runs, 2, tmp_path, options)
    with_callback, by_hand, without = (
        read_scalars(tmp_path / name) for name in ("callback", "attach", "without")
    )
    assert with_callback["lm loss"] == by_hand["lm loss"]
    assert with_callback["grad-norm"] == by_hand["grad-norm"]
    assert with_callback["grad-norm"][:2] == without["grad-norm"][:2]
    assert with_callback["grad-norm"][2] > 1.01 * without["grad-norm"][2], "it starts in iteration 3"

    for tag in metrics[0].scalars(per_layer=True):
        expected = [interval.scalars(per_layer=True)[tag] for interval in metrics]
        assert with_callback[tag] == pytest.approx(expected, rel=1e-6), tag
        assert len(with_callback[f"{tag} validation"]) == 3  # after iterations 2 and 4, and after training
        assert len(with_callback[f"{tag} test"]) == 1
    logged = set(with_callback) - set(without)
    assert len(logged) == 3 * (2 + 4)

    (attached,) = first_rank
    assert attached.startswith("> JREG attached: lambda 5, alpha 1, last state pre_norm, 4 layers")
    for line, (suffix, iteration) in zip(last_rank, LOGGED, strict=True):
        assert line.startswith(f" JREG{suffix} at iteration {iteration} |")
    assert f"jreg loss: {metrics[0].jreg_loss:.6E} | jump rate: {metrics[0].jump_rate:.6E} |" in last_rank[0]


def train_and_resume(folder: Path) -> None:
    from bridge_toy import recipe, train

    for name, first_step in (("whole", None), ("resumed", 2)):
        config = recipe(folder / name, cut=(1, 2, 2))
        config.checkpoint.save_interval = 2
        config.checkpoint.save = str(folder / f"{name} checkpoints")
        config.checkpoint.load = str(folder / "whole checkpoints")
        config.checkpoint.ckpt_step = first_step
        train(config, [JRegCallback(config, SETTINGS)])


def test_a_resumed_run_continues_at_its_iteration_of_the_schedule(tmp_path: Path) -> None:
    run_function(train_and_resume, 2, tmp_path)
    whole, resumed = (read_scalars(tmp_path / name) for name in ("whole", "resumed"))
    for tag, steps in (("lm loss", 2), ("grad-norm", 2), ("jreg loss", 1), ("jump rate", 1)):
        assert len(resumed[tag]) == steps
        assert resumed[tag] == whole[tag][-steps:], tag


def exit_and_resume(folder: Path) -> list[str]:
    from bridge_toy import recipe, train

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for exit_interval in (2, None):
            config = recipe(folder)
            config.logger.log_interval = 3
            config.train.exit_interval = exit_interval
            config.checkpoint.save = config.checkpoint.load = str(folder / "checkpoints")
            with pytest.raises(SystemExit) if exit_interval else contextlib.nullcontext():
                train(config, [JRegCallback(config, SETTINGS)])
    return re.findall(r"^ JREG at (iteration \d) .* (\| .*) \|$", printed.getvalue(), re.MULTILINE)


def test_an_interval_that_an_exit_cuts_off_is_logged_before_it_and_the_rest_after_the_resume(
    tmp_path: Path,
) -> None:
    _, lines = run_function(exit_and_resume, 2, tmp_path)
    assert lines == [
        ("iteration 2", "| measured in 2 iterations, 1 to 2"),
        ("iteration 3", "| measured in iteration 3"),
        ("iteration 4", "| measured in iteration 4"),
    ]
    assert len(read_scalars(tmp_path)["jreg loss"]) == 3


def train_refused(folder: Path) -> list[str]:
    from bridge_toy import Callback, recipe, train

    class Steps(Callback):  # type: ignore[misc]
        count = 0

        def on_train_step_end(self, context: Any) -> None:
            self.count += 1

    def refusal(config: Any, callbacks: list[Any]) -> str:
        steps = Steps()
        with pytest.raises(UserError) as caught:
            train(config, [steps, *callbacks])
        assert steps.count == 0
        return str(caught.value)

    changed = recipe(folder)
    callback = JRegCallback(changed, SETTINGS)
    changed.model.distribute_saved_activations = True  # as Bridge may do, once it has the recipe
    forgotten = recipe(folder)
    JRegCallback(forgotten, SETTINGS)
    return [
        refusal(recipe(folder), [JRegCallback(recipe(folder), SETTINGS)]),
        refusal(forgotten, []),
        refusal(changed, [callback]),
    ]


def test_no_step_is_trained_without_the_regularizer_on_any_rank(tmp_path: Path) -> None:
    for other_config, forgotten, changed in run_function(train_refused, 2, tmp_path):
        assert other_config == forgotten and "JRegCallback" in forgotten and "pretrain" in forgotten
        assert "distribute_saved_activations" in changed


def in_megatron_fsdp(config: Any, shards: str = "optim_grads_params") -> Any:
    config.ddp.use_megatron_fsdp = True
    config.ddp.data_parallel_sharding_strategy = shards
    config.ddp.gradient_reduce_div_fusion = False  # gloo does not know it
    return config


def with_and_without_shards(folder: Path, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Train with JREG in copies and in shards, then in shards with coefficient 0 and without the callback.

    Returns:
        The whole weights after each run, by their names.
    """
    from bridge_toy import Callback, recipe, train
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import uneven_dtensor_to_full_tensor

    class Weights(Callback):  # type: ignore[misc]
        def on_train_end(self, context: Any) -> None:
            (chunk,) = context.model
            self.is_sharded = isinstance(chunk, FullyShardedDataParallel)
            self.found = {
                name: (uneven_dtensor_to_full_tensor(weight) if self.is_sharded else weight).detach().clone()
                for name, weight in unwrap(chunk).named_parameters()
            }

    weights = {}
    for name, settings in (
        ("copies", SETTINGS),
        ("shards", SETTINGS),
        ("measured", JRegConfig(coeff=0.0)),
        ("without", None),
    ):
        config = recipe(folder / name, **options)
        if name != "copies":
            in_megatron_fsdp(config)
        end = Weights()
        train(config, [end, *([JRegCallback(config, settings)] if settings else [])])
        assert end.is_sharded == (name != "copies")
        weights[name] = end.found
    return weights


@pytest.mark.parametrize(
    ("ranks", "options", "allowed", "of_weights"),
    [
        (4, {"cut": (2, 1, None)}, 1e-5, 1e-3),
        (2, {"with_builder": True, "precision": "bf16_mixed"}, 5e-3, None),
    ],
    ids=["TP2, SP, DP2", "builder, DP2, bf16"],
)
def test_megatron_fsdp_trains_as_copies_of_the_model_do(
    tmp_path: Path, ranks: int, options: dict[str, Any], allowed: float, of_weights: float | None
) -> None:
    weights = run_function(with_and_without_shards, ranks, tmp_path, options, timeout=240)[0]
    copies, shards, measured, without = (read_scalars(tmp_path / name) for name in weights)
    for tag in (tag for tag in copies if tag.startswith(("lm loss", "grad-norm", "jreg", "jump"))):
        near = pytest.approx(copies[tag], rel=allowed, abs=allowed / 5 if "jump" in tag else 0)
        assert shards[tag] == near, tag
    assert shards["grad-norm"][2] > 1.01 * without["grad-norm"][2], "JREG starts in iteration 3"
    assert {tag: measured[tag] for tag in without if "time" not in tag} == without
    for name, copy in weights["copies"].items():
        first, measuring, plain = (weights[run][name] for run in ("shards", "measured", "without"))
        assert measuring.equal(plain), name
        if of_weights is not None:
            own = tuple(map(slice, copy.shape))  # the first rank's share in tensor parallelism
            assert (first[own] - copy).norm() < of_weights * (first - plain).norm(), name


EXPERTS = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 96,
    "moe_grouped_gemm": False,
    "expert_model_parallel_size": 2,
}
GRAPHS = {"cuda_graph_impl": "transformer_engine", "use_te_rng_tracker": True}
NOT_IN_MEGATRON_FSDP: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "optim_grads_params and experts that are not replicated": ("optim_grads_params", EXPERTS, {}),
    "no_shard and expert_model_parallel_size": ("no_shard", EXPERTS, {}),
    "num_distributed_optimizer_instances": ("optim", {}, {"num_distributed_optimizer_instances": 2}),
    "cuda_graph_impl transformer_engine": ("optim_grads", GRAPHS, {}),
}
"""By refused feature: the strategy, and changes of ``config.model`` and ``config.ddp``."""


def refused_in_megatron_fsdp(folder: Path) -> dict[str, str]:
    from bridge_toy import recipe, train
    from megatron.core import parallel_state

    said = {}
    for name, (shards, of_model, of_ddp) in NOT_IN_MEGATRON_FSDP.items():
        config = in_megatron_fsdp(recipe(folder), shards)
        vars(config.model).update(of_model)
        vars(config.ddp).update(of_ddp)
        with pytest.raises(UserError) as caught:
            train(config, [JRegCallback(config, JRegConfig(untested_cuda_graphs=True))])
        said[name] = str(caught.value)
        parallel_state.destroy_model_parallel()
    return said


def test_wrong_settings_in_megatron_fsdp_are_refused_before_a_step_on_every_rank(tmp_path: Path) -> None:
    for on_rank in run_function(refused_in_megatron_fsdp, 2, tmp_path):
        for name, said in on_rank.items():
            assert f"does not support FullyShardedDataParallel with {name} yet" in said


def adapt_as_bridge_does(chunk: Any, adapted: Sequence[int]) -> None:
    """Bridge's own LoRA instead of ``test_lora.adapt``, with the same weights."""
    import bridge_toy  # noqa: F401  (what Bridge imports and is not here)
    import torch
    from megatron.bridge.peft import recompute, utils
    from megatron.bridge.peft.lora import LoRA

    utils.HAVE_TE = False
    recompute.PEFT_RECOMPUTE_PATCHED.clear()  # it knows models by their ids, which return
    places = [
        (layer, linear, f"decoder.layers.{at}.{linear}")
        for at, layer in enumerate(chunk.decoder.layers)
        for linear in test_lora.LINEARS
        if layer.layer_number in adapted
    ]
    alpha = int(test_lora.SCALE * test_lora.RANK)
    LoRA(target_modules=[name for *_, name in places], dim=test_lora.RANK, alpha=alpha)([chunk])
    for layer, linear, _ in places:
        wrapper = layer.get_submodule(linear)
        drawn = test_lora.draw_adapter(layer.layer_number, linear, wrapper.to_wrap.weight.shape)
        with torch.no_grad():
            for matrix, values in zip(wrapper.adapter.parameters(), drawn, strict=True):
                matrix.copy_(values)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bridges_low_rank_adapters_get_the_references_gradients(ranks: int) -> None:
    test_lora.assert_equal_the_reference(ranks, adapt_as_bridge_does)


UNMASKED = JRegConfig(coeff=5.0, tokens="unmasked")


def train_on_padded_sequences(folder: Path) -> None:
    """With a padding mask on each stage, as in Bridge's forward steps after 0.6.2, or with a loss mask."""
    import torch
    from bridge_toy import LENGTH, recipe, train

    padding = torch.arange(LENGTH) >= torch.tensor([[20], [LENGTH]])
    for name, mask in (("padding_mask", padding), ("loss_mask", ~padding)):

        def give_mask(model: list[Any], given: dict[str, Any] = {name: mask}) -> list[Any]:  # noqa: B006
            for chunk in model:
                chunk.forward = functools.partial(chunk.forward, **given)
            return model

        config = recipe(folder / name, cut=(1, 2, None))
        callback = JRegCallback(config, UNMASKED)
        config.model.register_post_wrap_hook(give_mask)
        train(config, [callback])


def test_unmasked_tokens_follow_the_padding_mask_on_pipeline_stages_too(tmp_path: Path) -> None:
    run_function(train_on_padded_sequences, 2, tmp_path)
    padded, masked = (read_scalars(tmp_path / name) for name in ("padding_mask", "loss_mask"))
    for tag in ("jreg loss", "jump rate", "lm loss", "grad-norm", "jreg loss validation"):
        assert padded[tag] == masked[tag], tag


def train_without_a_mask(folder: Path) -> str:
    from bridge_toy import recipe, train

    config = recipe(folder, cut=(1, 2, None))
    with pytest.raises(UserError) as caught:
        train(config, [JRegCallback(config, UNMASKED)])
    return str(caught.value)


def test_unmasked_tokens_without_a_mask_are_refused_in_the_first_step_on_every_stage(tmp_path: Path) -> None:
    first, second = run_function(train_without_a_mask, 2, tmp_path)
    assert first == second
    assert all(named in first for named in ("--jreg-tokens is 'unmasked'", "loss mask", "'all'"))


def gemma_4() -> str:
    import torch
    from bridge_toy import TransformerConfig  # noqa: F401  (what Bridge imports and is not here)
    from megatron.bridge.models.gemma.gemma4_provider import Gemma4DenseProvider
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = Gemma4DenseProvider(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=2,
        num_query_groups=1,
        num_global_query_groups=1,
        kv_channels=16,
        global_kv_channels=16,
        num_kv_shared_layers=0,
        seq_length=16,
        vocab_size=63,
        per_layer_embed_vocab_size=64,
        per_layer_embed_dim=8,
        bf16=False,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        transformer_impl="local",
    ).provide()
    attach(model, JRegConfig(coeff=0.1), num_microbatches=1)
    tokens = torch.arange(32).view(2, 16)
    with pytest.raises(UserError) as caught:
        model(tokens, torch.arange(16).expand(2, 16), None, labels=tokens)
    return str(caught.value)


def test_a_stock_recipe_whose_layers_continue_after_their_mlp_is_refused_by_their_class() -> None:
    (said,) = run_function(gemma_4)
    assert said.startswith("layer 1 (Gemma4DenseTransformerLayer) returns another state")


def names_in_bridge(folder: Path) -> tuple[set[str], set[str], set[str]]:
    import dataclasses

    from bridge_toy import recipe
    from megatron.bridge.training.callbacks import CallbackContext, CallbackManager
    from megatron.bridge.training.state import GlobalState

    manager = CallbackManager()
    manager.add(JRegCallback(recipe(folder), SETTINGS))
    events = {event for event in manager.events if manager.list_callbacks(event)}
    return events, {field.name for field in dataclasses.fields(CallbackContext)}, set(dir(GlobalState))


def test_bridge_has_the_names_that_the_contract_tests_mirror(tmp_path: Path) -> None:
    import test_bridge

    ((events, context, state),) = run_function(names_in_bridge, 1, tmp_path)
    assert events == {name for name in dir(JRegCallback) if name.startswith("on_")}
    assert events <= set(test_bridge.EVENTS)
    assert set(vars(test_bridge.Context)["__annotations__"]) <= context
    assert set(vars(test_bridge.State)["__annotations__"]) <= state
