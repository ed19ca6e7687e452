"""One dataclass of settings: from Python, YAML and the command line, and its refusals."""

from __future__ import annotations

import argparse
import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import readme
import settings_table
import support_table
import torch
from hypothesis import given
from hypothesis import strategies as st

from jreg_megatron import JRegConfig, UserError, layer_weights
from jreg_megatron.methods import known


def from_command_line(*argv: str) -> JRegConfig:
    return JRegConfig.from_args(JRegConfig.add_arguments(argparse.ArgumentParser()).parse_args(argv))


def test_command_line_mapping_and_python_give_the_same_settings() -> None:
    expected = JRegConfig(
        coeff=0.1,
        alpha=0.5,
        weights=(0.0, 1.0),
        final_state="post_norm",
        stop_iteration=9,
        log_per_layer=True,
    )
    assert expected == from_command_line(
        *("--jreg-coeff", "0.1", "--jreg-alpha", "0.5", "--jreg-weights", "0,1", "--jreg-log-per-layer"),
        *("--jreg-final-state", "post_norm", "--jreg-stop-iteration", "9"),
    )
    assert expected == JRegConfig.from_mapping(
        {"coeff": 0.1, "alpha": 0.5, "weights": [0, 1], "final_state": "post_norm"}
        | {"stop_iteration": 9, "log_per_layer": True}
    )


def test_without_flags_the_settings_are_the_defaults() -> None:
    assert from_command_line() == JRegConfig()


def test_every_setting_is_a_flag_in_a_group_of_its_own() -> None:
    text = JRegConfig.add_arguments(argparse.ArgumentParser()).format_help()
    *_, group = text.split("\n\n")
    assert "--help" not in group
    for f in fields(JRegConfig):
        assert JRegConfig.flag(f.name) in group


def test_the_help_of_all_methods_can_be_printed() -> None:
    text = known.add_arguments(argparse.ArgumentParser()).format_help()
    assert "4% of" in " ".join(text.split())


def test_settings_cannot_be_changed_once_made() -> None:
    with pytest.raises(FrozenInstanceError):
        JRegConfig().coeff = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("coeff", -0.1),
        ("coeff", math.nan),
        ("coeff", math.inf),
        ("coeff", "0.1"),
        ("alpha", -1.0),
        ("alpha", math.nan),
        ("weights", "sofmax"),
        ("weights", ()),
        ("weights", (0, 0)),
        ("weights", None),
        ("weights", 1),
        ("coeff", 10**400),
        ("weights", (1.0, -1.0)),
        ("weights", (1.0, math.nan)),
        ("final_state", "after"),
        ("start_iteration", 0),
        ("stop_iteration", 1),
        ("warmup_iterations", -1),
        ("measure_interval", 0),
        ("measure_interval", 1.5),
        ("token_share", 0),
        ("token_share", 0.3),
        ("token_share", 2),
        ("log_per_layer", "yes"),
    ],
)
def test_a_bad_value_is_one_line_with_setting_value_and_fix(setting: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        JRegConfig(**{setting: value})
    line = str(caught.value)
    assert JRegConfig.flag(setting) in line and "must be" in line and "\n" not in line
    assert str(value) in line or isinstance(value, tuple)


def test_a_start_after_the_stop_names_both() -> None:
    with pytest.raises(UserError, match=r"--jreg-stop-iteration .* is 5; .*--jreg-start-iteration \(10\)"):
        JRegConfig(start_iteration=10, stop_iteration=5)


def test_a_misspelt_name_in_yaml_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match="'coef'; did you mean coeff"):
        JRegConfig.from_mapping({"coef": 0.1})


def test_layer_weights_follow_the_rule() -> None:
    assert JRegConfig(alpha=2.0).layer_weights(4).equal(layer_weights(4, 2.0))
    assert JRegConfig(weights="last").layer_weights(4).tolist() == [0, 0, 0, 1]
    assert JRegConfig(weights="uniform", alpha=9.0).layer_weights(4).tolist() == pytest.approx([0.25] * 4)
    assert JRegConfig(weights=(1, 2, 3)).layer_weights(3).tolist() == [1, 2, 3]


@given(
    layers=st.integers(1, 80),
    alpha=st.floats(0, 10),
    share=st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 0.3]),
)
def test_the_lightest_layers_are_left_out_up_to_the_stated_share_of_weight(
    layers: int, alpha: float, share: float
) -> None:
    config = JRegConfig(alpha=alpha, negligible_weight=share)
    weights, kept = config.layer_weights(layers), config.gradient_weights(layers)
    left_out = kept == 0
    assert torch.equal(kept[~left_out], weights[~left_out])
    rounding = 1e-12
    assert weights[left_out].sum() <= share + rounding
    # Weights rise with the layer: those left out are the first ones, and one more would be too much.
    first_kept = int(left_out.sum())
    assert first_kept < layers and bool(left_out[:first_kept].all())
    assert weights[: first_kept + 1].sum() > share - rounding


def test_at_alpha_3_the_last_five_layers_have_a_gradient_however_many_there_are() -> None:
    for layers in (12, 20, 32):
        assert int((JRegConfig(alpha=3.0).gradient_weights(layers) > 0).sum()) == 5
    every = JRegConfig(weights=(1e-12, 3e-12), coeff=1e12).gradient_weights(2)
    assert every.tolist() == [1e-12, 3e-12], "a share, not a size"


def test_a_weights_list_of_the_wrong_length_names_both_lengths() -> None:
    with pytest.raises(UserError, match=r"--jreg-weights .* is 1.0,2.0; it must be 3 numbers.* not 2"):
        JRegConfig(weights=(1, 2)).layer_weights(3)


def test_the_coefficient_follows_start_warmup_and_stop() -> None:
    config = JRegConfig(coeff=0.8, start_iteration=3, warmup_iterations=4, stop_iteration=9)
    at = [config.coeff_at(iteration) for iteration in range(1, 11)]
    assert at == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0, 0])
    assert JRegConfig(coeff=0.8).coeff_at(1) == 0.8


def test_measuring_follows_the_interval() -> None:
    config = JRegConfig(measure_interval=3)
    assert [n for n in range(1, 10) if config.measures_at(n)] == [3, 6, 9]


def test_the_readme_has_what_is_supported_and_refused_as_the_code_and_the_tests_have_it() -> None:
    for name, table in (("support", support_table.supported()), ("refusals", support_table.refused())):
        assert readme.read(name) == table, "run: python tests/support_table.py"


def test_the_readme_has_the_settings_as_they_are() -> None:
    assert readme.read("settings") == settings_table.table(), "run: python tests/settings_table.py"
