"""Train with real Megatron-LM trees in the three ways that JREG gets into them, and compare the three.

    python tests/ways_in.py CLONE [TAG...]

CLONE is a git clone of Megatron-LM. For each tag its scripts run ten steps at TP2 x PP2 on the CPU:
unchanged, by the launcher and with the patch applied. The example of a custom loop runs the steps of
``pretrain_gpt.py`` on the tree's ``megatron.core``. Without a TAG all tags run, and the table goes into
``patches/README.md``. The exit status is the number of rows in which two ways differ.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import readme
from harness import TOY, read_scalars

ROOT = Path(__file__).parents[1]
TAGS = ("core_v0.16.1", "core_v0.17.1", "core_v0.18.2", "core_v0.19.0", "main")
TOLERANCE = 1e-6
# Before 0.18 the NullTokenizer adds a token of its own to these 255; padded they are 256 everywhere.
SAME = "--vocab-size 255 --split 90,10,0 --train-iters 10".split()
CUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", *SAME]
JREG = "--jreg-coeff 0.5 --jreg-alpha 0.5".split()
ZERO = ["--jreg-coeff", "0"]
CPU, LAUNCH = "jreg_megatron.cpu", "jreg_megatron.launch"
VALUES = ("lm loss", "jreg loss", "jump rate")

Log = dict[str, list[float]]


def extract(clone: Path, tag: str, folder: Path) -> Path:
    """The tree of a tag, with the C++ dataset helper of the wheel that fits it."""
    tree = folder / tag
    tree.mkdir()
    archive = subprocess.run(["git", "-C", clone, "archive", tag], check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", tree], input=archive, check=True)
    helpers = Path("megatron/core/datasets")
    wheel = ROOT / ".versions" / tag.removeprefix("core_v")
    if not wheel.exists():
        import megatron.core

        wheel = Path(megatron.core.__file__).parents[2]
    for built in (wheel / helpers).glob("helpers_cpp*.so"):
        shutil.copy(built, tree / helpers)
    return tree


def run(module: str, *argv: object, folder: Path, path: str = "") -> str:
    """Output of ``python -m module --nproc 4 argv``, run where neither tree nor package lies."""
    command = [sys.executable, "-m", module, "--nproc", "4", *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{path}:{ROOT}" if path else str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}\n{done.stderr[-5000:]}")
    return done.stdout


def compare(clone: Path, tag: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """The rows of a tag, one for each script: its last values, what differs between the ways, at most."""
    from conftest import write_toy_data

    tree = extract(clone, tag, folder)
    patched = folder / f"{tag}-patched"
    shutil.copytree(tree, patched)
    apply = ROOT / "patches" / "apply.sh"
    subprocess.run([apply, patched], check=True, stdout=subprocess.DEVNULL)
    data = folder / f"{tag}-data"
    write_toy_data(data)
    hybrid_script, hybrid_model = hybrid(tree)
    for script, model in (("pretrain_gpt.py", TOY), (hybrid_script, hybrid_model)):

        def log(module: str, tree: Path, *more: str, script: str = script, model: list[str] = model) -> Log:
            with tempfile.TemporaryDirectory() as board:
                argv = (*model, *CUT, *more, "--data-path", data, "--tensorboard-dir", board)
                run(module, tree / script, *argv, folder=folder)
                return read_scalars(Path(board))

        own = log(CPU, tree)
        silent = [log(LAUNCH, tree, *ZERO), log(CPU, patched, *ZERO), log(CPU, patched)]
        launched = log(LAUNCH, tree, *JREG)
        others = [log(CPU, patched, *JREG)]
        if script == "pretrain_gpt.py":
            others.append(loop_of_ones_own(tree, data, folder))
        is_own = all(log[name] == own[name] for log in silent for name in ("lm loss", "grad-norm"))
        difference = max(relative(other[name], launched[name]) for other in others for name in VALUES)
        is_shown = max(launched["jump rate"]) > 0 and launched["lm loss"] != own["lm loss"]
        yield (
            *(tag, script, *(f"{launched[name][-1]:.6f}" for name in VALUES), f"{difference:.0e}"),
            *(
                "yes" if is_own else "NO",
                "PASS" if is_own and is_shown and difference <= TOLERANCE else "FAIL",
            ),
        )
    subprocess.run([apply, "--revert", patched], check=True, stdout=subprocess.DEVNULL)
    compiled = ("--exclude=__pycache__", "--exclude=*.pyc")
    subprocess.run(["diff", "-rq", *compiled, tree, patched], check=True)


def hybrid(tree: Path) -> tuple[str, list[str]]:
    """The tree's script for hybrid models, and the toy model as one: pairs of attention and MLP."""
    kind = "hybrid" if (tree / "pretrain_hybrid.py").exists() else "mamba"
    model, pattern = TOY[2:], ["--hybrid-layer-pattern", "*-*-*-*-"]  # the pattern has the number of layers
    if pattern[0] not in (tree / "megatron" / "training" / "arguments.py").read_text():
        model, pattern[0] = ["--num-layers", "8", *model], "--hybrid-override-pattern"
    spec = (f"megatron.core.models.{kind}.{kind}_layer_specs", f"{kind}_stack_spec")
    return f"pretrain_{kind}.py", [*model, *pattern, "--spec", *spec]


def relative(found: list[float], wanted: list[float]) -> float:
    """The largest difference, over the largest value."""
    return float(np.max(np.abs(np.subtract(found, wanted))) / np.max(np.abs(wanted)))


def loop_of_ones_own(tree: Path, data: Path, folder: Path) -> Log:
    """The losses of the example's loop on the tree's ``megatron.core`` with the script's batches."""
    result = folder / f"{tree.name}-code.npz"
    program = Path(__file__).with_name("code_path.py")
    run(CPU, program, tree, data, result, folder=folder, path=str(tree))
    return {name.replace("_", " "): list(values) for name, values in np.load(result).items()}


def main() -> int:
    clone, *tags = sys.argv[1:]
    table = [("tree", "script", *VALUES, "largest difference", "coeff 0 changes nothing", "")]
    with tempfile.TemporaryDirectory() as folder:
        for tag in tags or TAGS:
            for row in compare(Path(clone).resolve(), tag, Path(folder)):
                table.append(row)
                print(*row, sep=" | ", flush=True)
    if failed := [row for row in table if row[-1] == "FAIL"]:
        return len(failed)
    if not tags:
        commit = ["git", "-C", clone, "rev-parse", "--short=9", TAGS[-1]]
        last = subprocess.run(commit, check=True, capture_output=True, text=True).stdout.strip()
        readme.write(
            "ways in", [row[:-1] for row in table], f"Megatron-LM at these tags, {TAGS[-1]} at {last}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
