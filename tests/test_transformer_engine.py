"""In Megatron's Transformer Engine layers the residual stream is at the same place as in its own layers.

Without a GPU: Megatron's code is real, Transformer Engine is a stand-in in plain torch.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from test_equivalence import CORE, runs_here
from transformer_engine_step import CASES

HERE = [
    name
    for name, case in CASES.items()
    if runs_here(case.layout) and not ("fused_residual_rmsnorm" in case.config and Version("0.17") > CORE)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case's comparison with the reference, from one process that found Transformer Engine."""
    path = tmp_path_factory.mktemp("transformer_engine") / "results"
    script = Path(__file__).with_name("transformer_engine_step.py")
    command = [sys.executable, script, path, *HERE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = pickle.loads(path.read_bytes())
    return found


@pytest.mark.parametrize("name", HERE)
def test_step_in_transformer_engine_layers_equals_the_reference(name: str, results: dict[str, Any]) -> None:
    assert not isinstance(results[name], str), results[name]
    comparison, calls = results[name]
    assert calls >= set(CASES[name].calls), "this is not Transformer Engine's path"
    assert not comparison.found.exceeds(comparison.limit), f"{comparison.found} exceeds {comparison.limit}"
