"""Checks for a machine with one GPU in eight minutes: ``python tests/on_gpu.py FOLDER``.

Self-test, kernels, host, the step of three models at alpha 1, and a recipe that gets SIGTERM and saves. Each
part has its own time limit and leaves its output in FOLDER. The JSON files have the names of those in
``jreg_megatron/bench/results/``, to be copied there. The recipe trains on ``DATA=folder``, as
``recipes/fineweb_edu.sh`` makes it; without it on random tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 480
GRACE = 20
"""Seconds that a part has to end after SIGTERM. In this time the recipe saves."""
SAVED = 75
"""The recipe's exit status if it got SIGTERM and has saved."""

_BENCH, _SELFTEST = "jreg_megatron.bench", "jreg_megatron.selftest"


@dataclass(frozen=True)
class Part:
    """A command, and its time limit."""

    name: str
    seconds: float
    """Seconds until it gets SIGTERM."""
    words: Sequence[str]
    """A module with its arguments, or a script with its own."""
    result: str = ""
    """The file that it writes; else its output is the result."""
    environment: dict[str, str] = field(default_factory=dict)
    fine: tuple[int, ...] = (0,)
    """Exit statuses that are right."""


Start = Callable[[Part, Path, float], int]
"""Runs a part, whose output goes to a file, for so many seconds; returns its exit status."""


def parts(folder: Path, work: Path, is_toy: bool) -> list[Part]:
    """All parts in order. Results go to ``folder``, and temporary files to ``work``."""
    stem = f"{date.today().isoformat()}_{device()}"

    def words(usual: str, toy: str) -> list[str]:
        return [*usual.split(), *(toy.split() if is_toy else ())]

    def bench(seconds: float, name: str, usual: str, toy: str) -> Part:
        result = f"{stem}_{name}.json"
        return Part(name, seconds, [_BENCH, *words(usual, toy), "--json", str(folder / result)], result)

    def step(model: str, narrowest: int, more: str = "") -> Part:
        usual = f"step --model {model} --seconds 48 --ways unmodified_again,measure,jreg {more}"
        toy = f"--cpu --ways jreg --rounds 1 --layers 1 --width {narrowest} --sequence 8"
        name = f"step_{model.replace('.', '')}"
        return bench(62, name, usual, f"{toy} --micro-batch 1 --micro-batches 1")

    found = [Part("selftest", 40, [_SELFTEST, *words("", "--cpu --precision bf16")])]
    if find_spec("transformer_engine") and not is_toy:
        flags = "--transformer-impl transformer_engine --precision bf16"
        found.append(Part("selftest_transformer_engine", 35, [_SELFTEST, *flags.split()]))
        for graphs in ("transformer_engine", "local"):
            words_of_graphs = f"--cuda-graph {graphs} {flags}".split()
            found.append(Part(f"selftest_cuda_graph_{graphs}", 45, [_SELFTEST, *words_of_graphs]))
    if not is_toy:
        found.append(Part("selftest_full_graph", 35, [_SELFTEST, "--cuda-graph", "full_iteration"]))
    return [
        *found,
        bench(70, "kernel", "kernel --seconds 3", "--cpu --tokens 3 --widths 8 --rounds 1 --no-compile"),
        bench(35, "host", "host --rounds 30", "--layers 1 --rounds 1"),
        step("170m", 24),
        step("1b", 32),
        step("3.4b", 48, "--layers 10"),
        recipe(work, is_toy),
    ]


def recipe(work: Path, is_toy: bool) -> Part:
    """The smallest recipe on one GPU, for two minutes, if so much time is left."""
    knobs = {"RUN": str(work / "run"), "GPUS": "1", "PYTHON": sys.executable, "TOKENS": "1000000000"}
    words = [str(ROOT / "recipes/llama_170m.sh"), "jreg"]
    words += ["--dry-run"] if is_toy else []
    if "DATA" not in os.environ:
        make_up_data(work, 20_000 if is_toy else 4_000_000)
        words += ["--", "--tokenizer-type", "NullTokenizer", "--vocab-size", "31999"]
    knobs |= {"DATA": os.environ.get("DATA", str(work)), "EPOCHS": "1000000"}
    return Part("recipe_170m", 120, words, environment=knobs, fine=(0, SAVED))


def make_up_data(folder: Path, tokens: int) -> None:
    """Documents of a thousand random tokens, for a run whose loss nobody reads."""
    from data_toy import write_documents

    draw = random.Random(0).choices
    for name in ("train", "validation"):
        documents = (draw(range(31_000), k=1000) for _ in range(tokens // 1000))
        write_documents(folder / f"{name}_text_document", documents)


def device() -> str:
    """The GPU's name in one word, such as ``h100``; ``cpu`` without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    found = re.search(r"[A-Z]+\d+\w*", name)
    return found[0].lower() if found else "gpu"


def start(part: Part, output: Path, seconds: float) -> int:
    """Run a part in a process of its own."""
    program = [] if part.words[0].endswith(".sh") else [sys.executable, "-m"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **part.environment}
    with output.open("w") as log:
        process = subprocess.Popen(
            [*program, *part.words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                return process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of it, ranks too
        return process.wait()


def run(folder: Path, is_toy: bool, start: Start = start, seconds: float = SECONDS) -> int:
    """Run all parts one after the other; returns 0 if each was fine, else 1."""
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as work:
        for part in parts(folder.absolute(), Path(work), is_toy):
            began = time.monotonic()
            left = min(part.seconds, deadline - began - GRACE)
            status: int | None = None
            if left > 0:
                status = start(part, folder / f"{part.name}.log", left)
            is_fine = status in part.fine and (folder / part.result).exists()
            row = {"part": part.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
            rows.append({**row, "result": part.result or f"{part.name}.log", "is_fine": is_fine})
            (folder / "summary.json").write_text(json.dumps(rows, indent=2) + "\n")
            verdict = "fine" if is_fine else "no time left" if status is None else f"FAILED, status {status}"
            print(f"{part.name:28} {row['seconds']:6.1f} s  {verdict}", flush=True)
    return 0 if all(row["is_fine"] for row in rows) else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv``."""
    parser = argparse.ArgumentParser(prog="tests/on_gpu.py", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where results go; made if it is not there")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU, to try this script itself")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    return run(args.folder, args.toy)


if __name__ == "__main__":
    sys.exit(main())
