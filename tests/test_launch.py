"""``jreg_megatron.launch`` puts JREG into a script that knows nothing of it, or says why it cannot."""

from __future__ import annotations

import functools
import inspect
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from harness import Finished, read_scalars, run_ranks

SCRIPT = Path(__file__).with_name("unmodified_pretrain.py")
LAUNCH = "jreg_megatron.launch:main"
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1)
CUT = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)


def launch(*argv: object, world_size: int = 1, check: bool = True, timeout: float = 120) -> Finished:
    return run_ranks(argv, world_size, entry=LAUNCH, check=check, timeout=timeout)


def refusal(run: Finished) -> str:
    """The single line with which every rank ends."""
    lines = []
    for output in run.output:
        assert "Traceback" not in output, output
        lines += [line for line in output.splitlines() if line.startswith("jreg_megatron: error: ")]
    assert set(run.status) == {2} and len(lines) == len(run.status) and len(set(lines)) == 1, run
    return lines[0]


def test_a_launched_script_gives_the_same_values_as_jreg_megatron_pretrain(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *CUT, "--train-iters", 3, "--eval-interval", 3, "--eval-iters", 1]
    argv += ["--jreg-coeff", 0.5, "--jreg-alpha", 0.5, "--jreg-log-per-layer", "--tensorboard-dir"]
    run = launch(SCRIPT, *argv, tmp_path / "launched", world_size=4)
    run_ranks([*argv, tmp_path / "ours"], 4)
    launched, ours = read_scalars(tmp_path / "launched"), read_scalars(tmp_path / "ours")
    for tag in (
        *("lm loss", "grad-norm", "jreg loss", "jump rate", "jreg/displacement_layer_04"),
        *("jreg loss validation", "jump rate validation"),
    ):
        assert launched[tag] == ours[tag] and len(launched[tag]) > 0, tag
    assert "JREG attached: lambda 0.5" in run.output[0]
    assert re.search(r"iteration +3/.*\| jreg loss: \S+ \|", run.output[-1])


def test_with_coeff_zero_or_no_flag_the_script_is_bit_identical_to_itself(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *CUT, "--train-iters", 3, "--eval-interval", 2, "--eval-iters", 1, "--bf16"]
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "own"], 4, entry="unmodified_pretrain:main")
    launch(SCRIPT, *argv, "--tensorboard-dir", tmp_path / "zero", "--jreg-coeff", 0, world_size=4)
    launch(SCRIPT, *argv, "--tensorboard-dir", tmp_path / "none", world_size=4)
    own = read_scalars(tmp_path / "own")
    assert "jreg loss" not in own
    for name in ("zero", "none"):
        values = read_scalars(tmp_path / name)
        for tag in ("lm loss", "grad-norm", "lm loss validation"):
            assert values[tag] == own[tag] and len(own[tag]) > 0, tag
        assert len(values["jreg loss"]) == 3


OWN_METHOD = """
import runpy
import sys
from jreg_megatron.examples.own_method import ShortConfig
from jreg_megatron.methods import known
known.METHODS.append(ShortConfig)
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_flag_of_a_users_own_method_turns_on_that_method_alone(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN_METHOD.format(script=str(SCRIPT)))
    argv = [*toy_arguments, *CUT, "--train-iters", 2, "--eval-iters", 0]
    for given, is_measured in ((["--short-coeff", "1e-2"], False), ([], True)):
        run = launch(script, *argv, *given, "--tensorboard-dir", tmp_path / str(is_measured), world_size=4)
        assert ("jreg loss" in read_scalars(tmp_path / str(is_measured))) == is_measured, run
    line = refusal(launch(script, *argv, "--short-coef", "1", world_size=4, check=False))
    assert "--short-coef;" in line and "--short-coeff" in line


def log_by_the_condition(argv: list[str]) -> None:
    """Megatron's line has averages for which ``condition`` holds; the last layer turns nothing.

    Prints which totals its line was made of.
    """
    from megatron.training import training

    from jreg_megatron import launch

    (condition, *rest) = argv
    source = inspect.getsource(training.training_log)
    assert source.count("if avg >= 0.0:") == 1
    exec(source.replace("avg >= 0.0", condition), vars(training))
    training_log, build = training.training_log, training.setup_model_and_optimizer

    @functools.wraps(training_log)
    def naming_totals(losses: Any, totals: dict[str, Any], *args: Any, **named: Any) -> Any:
        result = training_log(losses, totals, *args, **named)
        print("totals", [name for name in totals if not name.endswith("iterations")], flush=True)
        return result

    @functools.wraps(build)
    def without_the_last_layer(*args: Any, **named: Any) -> Any:
        built = build(*args, **named)
        for layer in built[0][0].module.decoder.layers:
            if layer.layer_number == 4:
                for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
                    linear.weight.data.zero_()
        return built

    training.training_log, training.setup_model_and_optimizer = naming_totals, without_the_last_layer
    launch.main(rest)


@pytest.mark.parametrize(
    ("condition", "layers", "rate"),
    [("avg > 0.0", 4, "0.000000E+00"), ("avg > 0.0", 1, "NAN"), ("avg >= 0.0", 4, "0.000000E+00")],
    ids=["0.16", "0.16, one layer", "0.17 and later"],
)
def test_a_jump_rate_of_zero_or_none_is_in_the_line_of_every_megatron_after_its_own_losses(
    condition: str, layers: int, rate: str, toy_arguments: list[str]
) -> None:
    argv = [condition, SCRIPT, *toy_arguments, "--num-layers", layers, "--train-iters", 3]
    argv += ["--lr", 0, "--min-lr", 0, "--pipeline-model-parallel-size", min(2, layers), "--log-interval", 2]
    run = run_ranks(argv, min(2, layers), entry="test_launch:log_by_the_condition")
    lines = [line for line in run.output[-1].splitlines() if re.search(r" iteration +\d/", line)]
    assert len(lines) == 2  # one of the first iteration and one of the interval
    for line in lines:
        assert f" | jump rate: {rate} | " in line, line
        assert re.search(r" lm loss: 5\.\d+E\+00 \| jreg loss: \d\.\d+E-\d+ \|", line), line
    shown = re.findall("^totals (.*)", run.output[-1], re.MULTILINE)
    assert shown == ["['lm loss', 'jreg loss', 'jump rate']"] * 2 + ["['lm loss']"]
    if layers > 1:
        assert "jreg loss" not in "".join(re.findall("^totals .*", run.output[0], re.MULTILINE))


MISTAKES = {
    "a value that is not allowed": (("--jreg-coeff", -1), r"--jreg-coeff .* is -1.0; it must be"),
    "text for a number": (("--jreg-coeff", "high"), "argument --jreg-coeff: invalid float value: 'high'"),
    "an unknown flag": (("--jreg-coef", 1), "unknown flag --jreg-coef; did you mean --jreg-coeff?"),
    "what JREG does not support": (
        ("--jreg-coeff", 1, *RECOMPUTE, "--distribute-saved-activations", *CUT[:2]),
        " does not support distribute_saved_activations yet",
    ),
    "weights for another depth": (("--jreg-weights", "0,0,1"), r"--jreg-weights .* 4 numbers.* not 3"),
    "an optimizer whose package is missing": (("--optimizer=soap",), "is soap, .* emerging_optimizers"),
    "an optimizer with what it does not run with": (
        ("--optimizer", "sgd", "--use-distributed-optimizer"),
        "--optimizer is sgd, which does not run with --use-distributed-optimizer",
    ),
    "a loss mask that the script has on one stage only": (
        ("--jreg-tokens", "unmasked", "--pipeline-model-parallel-size", 2),
        "without a loss mask or padding mask on some pipeline stage",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_every_rank_with_one_line(mistake: str, toy_arguments: list[str]) -> None:
    flags, expected = MISTAKES[mistake]
    script = LOSS_MASK_ON_LAST_STAGE if "loss mask" in mistake else SCRIPT
    run = launch(script, *toy_arguments, "--train-iters", 2, *flags, world_size=2, check=False)
    assert re.search(expected, refusal(run)), refusal(run)


def test_a_flag_before_the_script_gets_an_error_with_its_right_place() -> None:
    line = refusal(launch("--jreg-coeff", 1, SCRIPT, check=False))
    assert "put it after the script" in line


def test_a_missing_script_is_named() -> None:
    assert "script no/such.py not found" in refusal(launch("no/such.py", check=False))


def test_a_file_that_is_not_a_python_script_or_module_is_named(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text("torchrun --nproc-per-node 8 pretrain_gpt.py\n")
    assert "train.sh is not a Python script (" in refusal(launch(script, check=False))
    assert "module no_such_module not found" in refusal(launch("-m", "no_such_module", check=False))


# -- a tree that has drifted -----------------------------------------------------------------------

LOSS_MASK_ON_LAST_STAGE = Path(__file__)
"""This file is a script too: the unmodified one, with the loss mask where Megatron's own script has it."""

HOOKED = {
    "megatron.training.arguments": ("add_megatron_arguments",),
    "megatron.training.training": (
        *("setup_model_and_optimizer", "train_step", "training_log", "evaluate"),
        *("evaluate_and_print_results", "checkpoint_and_decide_exit", "train"),
    ),
}


def rename_and_launch(argv: list[str]) -> None:
    """``module:function`` has another name in this tree."""
    from jreg_megatron import launch

    (target, *rest) = argv
    module_name, name = target.split(":")
    module = __import__(module_name, fromlist=["_"])
    setattr(module, f"{name}_v2", vars(module)[name])
    delattr(module, name)
    launch.main(rest)


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in HOOKED.items() for name in names])
def test_a_tree_that_has_renamed_a_function_is_refused_by_its_name(module: str, name: str) -> None:
    argv = [f"{module}:{name}", SCRIPT, "--jreg-coeff", 1]
    run = run_ranks(argv, 2, entry="test_launch:rename_and_launch", check=False)
    assert f"{module} has no function {name} (" in refusal(run)


def change_and_launch(argv: list[str]) -> None:
    """A function of this tree has other arguments."""
    from megatron.training import training

    from jreg_megatron import launch

    (name, *rest) = argv

    def changed(losses: Any, iteration: int, skipped_iter: int) -> None: ...

    changed.__name__ = name
    setattr(training, name, changed)
    launch.main(rest)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("training_log", "loss_dict, total_loss_dict"),
        ("evaluate_and_print_results", "prefix, write_to_tensorboard"),
    ],
)
def test_a_tree_whose_function_has_other_arguments_is_refused_by_their_names(name: str, missing: str) -> None:
    run = run_ranks([name, SCRIPT, "--jreg-coeff", 1], entry="test_launch:change_and_launch", check=False)
    assert f"{name} has no argument {missing} (" in refusal(run)
    assert "it has losses, iteration, skipped_iter" in refusal(run)


def build_otherwise_and_launch(argv: list[str]) -> None:
    """This tree's ``pretrain`` builds its model by a function of its own."""
    from megatron.training import training

    from jreg_megatron import launch

    own = training.setup_model_and_optimizer
    source = training.pretrain.__globals__

    def pretrain(*args: Any, **named: Any) -> None:
        decorated, source["setup_model_and_optimizer"] = source["setup_model_and_optimizer"], own
        training_pretrain(*args, **named)
        source["setup_model_and_optimizer"] = decorated

    training_pretrain = training.pretrain
    training.pretrain = sys.modules["megatron.training"].pretrain = pretrain
    launch.main(argv)


def test_a_loop_that_builds_its_model_in_another_way_stops_before_the_first_step(
    toy_arguments: list[str],
) -> None:
    argv = [SCRIPT, *toy_arguments, "--train-iters", 2, "--jreg-coeff", 1]
    run = run_ranks(argv, 2, entry="test_launch:build_otherwise_and_launch", check=False)
    assert "megatron.training.training.setup_model_and_optimizer" in refusal(run)
    assert not re.search(r"iteration +1/", run.output[-1])


BUILDS_BY_ITSELF = """
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import arguments, checkpointing, initialize
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder

args = arguments.parse_and_validate_args(args_defaults=dict(no_load_rng=True, no_load_optim=True))
initialize.initialize_megatron()
groups = ProcessGroupCollection.use_mpu_process_groups()
model = GPTModelBuilder(gpt_config_from_args(args)).build_model(groups, pre_process=True, post_process=True)
{prepare}
checkpointing.load_checkpoint([model], None, None, strict=False)
print("it is loaded")
"""
"""As Megatron's scripts do that generate text."""

PREPARES = "import jreg_megatron as j; j.prepare([model], [j.LayerNormScalingConfig()])"


def test_a_script_that_builds_its_model_by_itself_loads_no_checkpoint_that_a_method_has_changed(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, "--lns-power", 0.5]
    run_ranks([*argv, "--train-iters", 1, "--save", tmp_path / "saved", "--save-interval", 1])
    script = tmp_path / "generate.py"
    for prepare in ("", PREPARES):
        script.write_text(BUILDS_BY_ITSELF.format(prepare=prepare))
        run = launch(script, *argv, "--load", tmp_path / "saved", "--train-iters", 1, check=False)
        assert ("it is loaded" in run.output[0]) is bool(prepare)
        if not prepare:
            line = refusal(run)
            assert "--lns-power 0.5" in line and "jreg_megatron.prepare" in line


FLAGS_LOST = """
import runpy, sys
sys.argv = [word for word in sys.argv if word not in ("--jreg-coeff", "7")]
runpy.run_path({script!r}, run_name="__main__")
"""
OTHER_MEGATRON = """
import runpy, sys
sys.path.insert(0, {tree!r})
runpy.run_path({script!r}, run_name="__main__")
"""
STUCK = """
import runpy, sys
from argparse import Namespace
Namespace.curr_iteration = property(lambda self: 0, lambda self, value: None)
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("wrapper", "named"),
    [
        (FLAGS_LOST, "--jreg-"),
        (OTHER_MEGATRON, "PYTHONPATH"),
        (STUCK, r"args\.curr_iteration\b.* 0\b"),
    ],
)
def test_a_wrapper_that_would_leave_jreg_out_is_stopped(
    wrapper: str, named: str, toy_arguments: list[str], tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / "megatron" / "core").mkdir(parents=True)
    (tree / "megatron" / "core" / "__init__.py").touch()
    script = tmp_path / "wrapper.py"
    script.write_text(wrapper.format(script=str(SCRIPT), tree=str(tree)))
    run = launch(script, *toy_arguments, "--train-iters", 2, "--jreg-coeff", 7, check=False)
    line = refusal(run)
    assert re.search(named, line) and (str(tree) in line) is (wrapper == OTHER_MEGATRON)
    assert not re.search(r"iteration +[12]/", run.output[-1]) or wrapper == STUCK


@pytest.mark.parametrize("end", ["", "import sys; sys.exit()", "raise SystemExit(0)"])
def test_a_script_that_trains_nothing_does_not_end_as_if_it_had(end: str, tmp_path: Path) -> None:
    script = tmp_path / "idle.py"
    script.write_text(f"print('idle')\n{end}\n")
    run = launch(script, check=False)
    assert "idle" in run.output[0].splitlines()
    assert "megatron.training.training.setup_model_and_optimizer" in refusal(run)


def test_a_scripts_own_failure_keeps_its_status(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text("raise SystemExit(3)\n")
    run = launch(script, check=False)
    assert run.status == [3] and "JREG" not in run.output[0]


# -- how it is installed ---------------------------------------------------------------------------


def install_beside_copies(_: list[str]) -> None:
    from megatron.training import training

    from jreg_megatron import training_loop

    originals = {name: getattr(training, name) for name in HOOKED["megatron.training.training"]}
    importer = sys.modules["megatron.fork"] = ModuleType("megatron.fork")
    importer.evaluate = training.evaluate
    sys.modules["megatron.absent"] = None  # as Python lets one forbid an import
    importer.train_step = lambda: None  # another function of the same name
    another = importer.train_step
    training_loop.install()
    for name, original in originals.items():
        assert getattr(training, name).__wrapped__ is original, name
    assert importer.evaluate is training.evaluate
    assert importer.train_step is another
    once = training.evaluate
    training_loop.install()
    assert training.evaluate is once, "decorated twice"


def test_copies_of_a_function_are_rebound_and_the_original_is_kept() -> None:
    run_ranks([], entry="test_launch:install_beside_copies")


if __name__ == "__main__":
    from jreg_megatron import gpt_pretraining

    gpt_pretraining.needs_loss_mask = lambda: False
    runpy.run_path(str(SCRIPT), run_name="__main__")
