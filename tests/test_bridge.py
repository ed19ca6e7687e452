"""JREG in Megatron-Bridge as a contract: Bridge is not installed here, so its behaviour is mirrored.

Mirrored is version 0.6.2: `callbacks.CallbackManager.add`, the order of events in `pretrain`, `train` and
`eval.evaluate`, the hooks of `model_provider.ModelProviderMixin`, and who holds which writer. That Bridge
has these names, and the same promises with Bridge itself, are in real_bridge.py (`make test-versions`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import test_attach
import torch
import torch.distributed as dist
from harness import run_function

from jreg_megatron import Handle, JRegConfig, UserError
from jreg_megatron.bridge import JRegCallback
from jreg_megatron.methods.slowqk.settings import SlowQKConfig
from jreg_megatron.selftest import compare, step
from jreg_megatron.selftest.compare import Comparison
from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.stream.support import LAYER_NOT_SEEN

EVENTS = (
    *("on_data_init_start", "on_train_start", "on_train_step_start", "on_train_step_end", "on_train_end"),
    *("on_eval_start", "on_eval_step_start", "on_eval_step_end", "on_eval_end"),
    *("on_test_start", "on_test_step_start", "on_test_step_end", "on_test_end", "on_checkpoint_save"),
)


class Provider:
    """A model provider, as far as it has hooks."""

    cuda_graph_impl = "none"

    def __init__(self) -> None:
        self._post_wrap_hooks: list[Callable[[Any], Any]] = []

    def register_post_wrap_hook(self, hook: Callable[[Any], Any]) -> None:
        self._post_wrap_hooks.append(hook)

    def provide_distributed_model(self, built: list[Any]) -> list[Any]:
        for hook in self._post_wrap_hooks:
            built = hook(built)
        return built


def container(**parts: Any) -> Any:
    """A ``ConfigContainer``, as far as JREG reads it."""
    empty = SimpleNamespace()
    given = {"model": Provider(), "ddp": empty, "dist": empty, "comm_overlap": None}
    train = SimpleNamespace(exit_interval=None)
    return SimpleNamespace(**given | parts, logger=SimpleNamespace(log_interval=2), train=train)


class Writer:
    """TensorBoard, W&B, MLflow or Comet: keeps ``{iteration: {name: value}}``."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, values: dict[str, float], step: int) -> None:
        assert not self.rows.setdefault(step, {}).keys() & values.keys(), "logged twice"
        self.rows[step] |= values

    log_metrics = log

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def flush(self) -> None:
        pass


@dataclass
class State:
    """Bridge's ``GlobalState``; the writers are there on the last rank only."""

    cfg: Any
    train_state: Any = field(default_factory=lambda: SimpleNamespace(step=0))
    tensorboard_logger: Writer | None = None
    wandb_logger: Writer | None = None
    mlflow_logger: Writer | None = None
    comet_logger: Writer | None = None


@dataclass
class Context:
    state: State
    model: list[Any]
    optimizer: Any = None


class Manager:
    """Bridge's ``CallbackManager``: events are found by the names of a callback's methods."""

    def __init__(self, callback: Any, state: State, model: list[Any]) -> None:
        self.context = Context(state, model)
        self.methods = {event: getattr(callback, event) for event in EVENTS if hasattr(callback, event)}
        assert all(method.__func__ for method in self.methods.values())

    def fire(self, event: str) -> None:
        if event in self.methods:
            self.methods[event](self.context)


def evaluate(manager: Manager, event: str, micro_batches: Callable[[], None]) -> None:
    for chunk in manager.context.model:
        chunk.eval()
    manager.fire(f"on_{event}_start")
    with torch.no_grad():
        micro_batches()
    manager.fire(f"on_{event}_end")
    for chunk in manager.context.model:
        chunk.train()


# -- the step ------------------------------------------------------------------------------------------


def compare_step_in_bridge(layout: Layout) -> Comparison:
    """A step at the layout and its reference, where the step's JREG comes from the callback."""
    from megatron.core import num_microbatches_calculator as calculator

    def attach(model: list[Any], settings: JRegConfig, num_microbatches: int, **_: Any) -> Handle:
        calculator.init_num_microbatches_calculator(dist.get_rank(), None, num_microbatches, 1, 1)
        config = container()
        callback = JRegCallback(config, settings)
        built = config.model.provide_distributed_model(model)
        Manager(callback, State(config), built).fire("on_train_start")
        return callback.handle

    step.attach = attach  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    return compare.compare_step(layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, sequence_parallel=True),
        Layout(pipeline=2, virtual=2, num_microbatches=4, precision="fp16"),
        Layout(data=2, megatron_fsdp="optim_grads_params", recompute="uniform"),
    ],
    ids=lambda layout: layout.name,
)
def test_step_equals_the_reference_at(layout: Layout) -> None:
    comparison = run_function(compare_step_in_bridge, layout.world_size, layout, timeout=120)[0]
    assert not comparison.found.exceeds(comparison.limit)


# -- the log -------------------------------------------------------------------------------------------


def build_noting(seen: list[list[float]]) -> tuple[Any, Callable[[], None]]:
    """A model of two layers, and a function that runs two micro-batches and notes their displacement."""
    model = test_attach.build_model()

    def note_displacement(layer: Any, args: Any, named: dict[str, Any], output: Any) -> None:
        cosine = torch.cosine_similarity(named["hidden_states"].double(), output[0].double(), dim=-1)
        seen[-1][layer.layer_number - 1] = ((1 - cosine) / 2).mean().item()

    for layer in model.decoder.layers:
        layer.register_forward_hook(note_displacement, with_kwargs=True)

    def micro_batches() -> None:
        for _ in range(2):
            seen.append([0.0, 0.0])
            tokens = torch.randint(0, 32, (2, 8))
            loss = model(tokens, torch.arange(8).expand(2, 8), None, labels=tokens).mean()
            if torch.is_grad_enabled():
                (loss / 2).backward()

    return model, micro_batches


def run_four_iterations() -> dict[str, Any]:
    """Train for four iterations on two data-parallel ranks, and note what happens."""
    seen: list[list[float]] = []
    model, micro_batches = build_noting(seen)
    collectives = [0]
    all_reduce = dist.all_reduce

    def counted(*args: Any, **named: Any) -> Any:
        collectives[0] += 1
        return all_reduce(*args, **named)

    config = container()
    callback = JRegCallback(config, JRegConfig(coeff=0.1, alpha=1.0, log_per_layer=True))
    state = State(config)
    if dist.get_rank() == 1:
        state = State(config, state.train_state, *(Writer() for _ in range(4)))
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(dist.get_rank(), None, 8, 2, 2)
    torch.manual_seed(dist.get_rank())
    reductions = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        manager = Manager(callback, state, config.model.provide_distributed_model([model]))
        manager.fire("on_train_start")
        for _ in range(4):
            micro_batches()
            patch.setattr(dist, "all_reduce", counted)
            before = collectives[0]
            manager.fire("on_train_step_end")
            reductions.append(collectives[0] - before)
            state.train_state.step += 1
        manager.fire("on_train_end")
        evaluate(manager, "eval", micro_batches)
        evaluate(manager, "test", micro_batches)
    writers = [state.tensorboard_logger, state.wandb_logger, state.mlflow_logger, state.comet_logger]
    return {
        "displacement": seen,
        "reductions": reductions,
        "rows": [writer and writer.rows for writer in writers],
        "printed": printed.getvalue().splitlines(),
    }


def test_each_log_interval_and_each_validation_is_logged_once_with_the_mean_over_all_ranks() -> None:
    first, last = run_function(run_four_iterations, 2)
    assert first["rows"] == [None] * 4
    assert all(rows == last["rows"][0] for rows in last["rows"])

    def expected(micro_batches: slice, suffix: str) -> Iterator[tuple[str, float]]:
        both = torch.tensor([first["displacement"][micro_batches], last["displacement"][micro_batches]])
        psi = both.double().mean(dim=(0, 1))
        weights = torch.tensor([1.0, 2.0], dtype=torch.float64).softmax(0)
        yield f"jreg loss{suffix}", (weights * psi).sum().item()
        yield f"jump rate{suffix}", 100 * max(0.0, (psi[1] - psi[0]).item())
        yield f"jreg/displacement_layer_01{suffix}", psi[0].item()
        yield f"jreg/displacement_layer_02{suffix}", psi[1].item()

    rows = last["rows"][0]
    assert set(rows) == {2, 4}
    assert rows[2] == pytest.approx(dict(expected(slice(0, 4), "")), rel=1e-5)
    after_training = (
        *expected(slice(4, 8), ""),
        *expected(slice(8, 10), " validation"),
        *expected(slice(10, 12), " test"),
    )
    assert rows[4] == pytest.approx(dict(after_training), rel=1e-5)

    # After the first step of a run it is made sure that all layers are seen.
    assert first["reductions"] == last["reductions"] == [1, 1, 0, 1]
    (attached,) = first["printed"]
    assert attached.startswith("> JREG attached: lambda 0.1, alpha 1, last state pre_norm, 2 layers")
    assert len(last["printed"]) == 4
    assert last["printed"][0] == (
        f" JREG at iteration 2 | jreg loss: {rows[2]['jreg loss']:.6E} | "
        f"jump rate: {rows[2]['jump rate']:.6E} |"
    )
    assert last["printed"][-1].startswith(" JREG test at iteration 4 |")


def run_with_intervals_cut_off() -> list[Any]:
    """Three iterations, an exit after the third, and four more after a resume; a log interval has two."""
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(0, None, 2, 1, 1)
    seen: list[list[float]] = []
    model, micro_batches = build_noting(seen)
    found = []
    for first, last, interval in ((1, 3, 3), (4, 7, None)):
        config = container()
        config.train.exit_interval = interval
        callback = JRegCallback(config, JRegConfig(coeff=0.1, alpha=1.0))
        state = State(config, SimpleNamespace(step=first - 1), Writer())
        manager = Manager(callback, state, config.model.provide_distributed_model([model]))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            manager.fire("on_train_start")
            for _ in range(first, last + 1):
                micro_batches()
                manager.fire("on_train_step_end")
                state.train_state.step += 1
            if interval is None:  # after an exit there is no such event
                manager.fire("on_train_end")
        callback.handle.detach()
        assert state.tensorboard_logger
        found += [state.tensorboard_logger.rows, printed.getvalue().splitlines()]
    return [seen, *found]


def test_a_log_interval_that_an_exit_or_the_end_cuts_off_is_logged_and_its_iterations_are_named() -> None:
    ((seen, before, said_before, after, said_after),) = run_function(run_with_intervals_cut_off)
    logged, weights = before | after, torch.tensor([1.0, 2.0], dtype=torch.float64).softmax(0)
    for last, micro_batches in {2: (0, 4), 3: (4, 6), 4: (6, 8), 6: (8, 12), 7: (12, 14)}.items():
        psi = torch.tensor(seen[slice(*micro_batches)], dtype=torch.float64).mean(0)
        expected = {
            "jreg loss": (weights * psi).sum().item(),
            "jump rate": 100 * max(0, (psi[1] - psi[0]).item()),
        }
        assert logged.pop(last) == pytest.approx(expected, rel=1e-5), last
    assert not logged
    named = re.findall(r"iteration (\d) .*\| (measured in .*) \|", "\n".join(said_before + said_after))
    assert named == [(n, f"measured in iteration {n}") for n in "347"]


# -- what goes wrong -----------------------------------------------------------------------------------


def loses_a_layer_or_is_not_used() -> list[str]:
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(0, None, 2, 2, 1)
    model = test_attach.build_model()
    config = container()
    callback = JRegCallback(config, JRegConfig(coeff=0.1))

    def refusal(function: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            function()
        return str(caught.value)

    manager = Manager(callback, State(config), [model])
    said = [refusal(lambda: manager.fire("on_train_start")), refusal(lambda: manager.fire("on_eval_start"))]
    config.model.provide_distributed_model([model])
    said.append(refusal(lambda: test_attach.step(model)))
    manager.context.model = [torch.nn.Identity()]
    said.append(refusal(lambda: manager.fire("on_train_start")))
    manager.context.model = [model]
    manager.fire("on_train_start")
    said.append(refusal(lambda: manager.fire("on_train_step_end")))
    return said


def test_a_run_without_the_regularizer_ends_in_a_line_before_its_first_step() -> None:
    ((not_built, not_built_for_validation, no_events, other_model, not_seen),) = run_function(
        loses_a_layer_or_is_not_used, 1
    )
    for said in (not_built, not_built_for_validation, no_events, other_model):
        assert "JRegCallback" in said and "pretrain" in said
    assert not_seen == LAYER_NOT_SEEN


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("model", "enable_hyper_connections"),
        ("comm_overlap", "overlap_moe_expert_parallel_comm"),
    ],
)
def test_unsupported_settings_are_refused_before_anything_is_built(part: str, setting: str) -> None:
    config = container(comm_overlap=SimpleNamespace())
    setattr(getattr(config, part), setting, True)
    with pytest.raises(UserError, match=f"does not support {setting} yet"):
        JRegCallback(config, JRegConfig())


@pytest.mark.parametrize(
    ("named", "parts"),
    [
        (
            "use_torch_fsdp2 with calculate_per_token_loss",
            {"dist": {"use_torch_fsdp2": True}, "model": {"calculate_per_token_loss": True}},
        ),
        (
            "cuda_graph_impl local with overlap_moe_expert_parallel_comm",
            {
                "comm_overlap": {"overlap_moe_expert_parallel_comm": True},
                "model": {"cuda_graph_impl": "local", "overlap_moe_expert_parallel_comm": False},
            },
        ),
        (
            "use_megatron_fsdp with overlap_moe_expert_parallel_comm",
            {
                "comm_overlap": {"overlap_moe_expert_parallel_comm": True},
                "ddp": {"use_megatron_fsdp": True},
            },
        ),
        ("--cuda-graph local on your GPU.*JRegConfig", {"model": {"enable_cuda_graph": True}}),
        (
            "--cuda-graph full_iteration on your GPU",
            {"model": {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}},
        ),
    ],
)
def test_settings_in_two_parts_or_by_an_older_name_are_refused_before_anything_is_built(
    named: str, parts: dict[str, dict[str, Any]]
) -> None:
    config = container(dist=SimpleNamespace(), comm_overlap=SimpleNamespace())
    for part, changes in parts.items():
        vars(getattr(config, part)).update(changes)
    taking = "comm_overlap" in parts
    with pytest.raises(UserError, match=named):
        JRegCallback(config, JRegConfig(untested_cuda_graphs=taking, untested_overlap=taking))


def test_slow_queries_and_keys_in_megatron_fsdp_are_refused_before_anything_is_built() -> None:
    config = container(ddp=SimpleNamespace(use_megatron_fsdp=True))
    JRegCallback(config, JRegConfig())
    with pytest.raises(UserError, match="use_megatron_fsdp"):
        JRegCallback(config, SlowQKConfig(hold_iterations=1, ramp_iterations=1))


def test_graphs_by_an_older_name_are_allowed_by_the_setting_that_allows_todays() -> None:
    config = container()
    vars(config.model).update(external_cuda_graph=True, cuda_graph_warmup_steps=3)
    JRegCallback(config, JRegConfig(untested_cuda_graphs=True))


def test_the_model_configuration_alone_is_refused() -> None:
    with pytest.raises(UserError, match="takes the ConfigContainer"):
        JRegCallback(Provider(), JRegConfig())


def attaches_to_the_model_of_a_copy() -> None:
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(0, None, 2, 2, 1)
    model, config = test_attach.build_model(), container()
    callback = JRegCallback(config, JRegConfig())
    copied = copy.deepcopy(config)
    assert copied.model._post_wrap_hooks == config.model._post_wrap_hooks
    with pytest.raises(UserError, match="JRegCallback"):
        _ = callback.handle
    assert copied.model.provide_distributed_model([model]) == [model]
    assert isinstance(callback.handle, Handle)


def test_a_copy_of_the_configuration_copies_no_model_and_attaches_too() -> None:
    run_function(attaches_to_the_model_of_a_copy, 1)


def test_a_recipe_can_import_it_before_megatron() -> None:
    program = "import sys, jreg_megatron.bridge; print(any(n.startswith('megatron.') for n in sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
