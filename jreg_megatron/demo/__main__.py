"""``make demo``: train two small Llamas on real text, without and with JREG, and compare their jumps."""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from jreg_megatron.demo.data import prepare
from jreg_megatron.demo.training import (
    ALPHA,
    COEFF,
    FLAGS,
    ITERATIONS,
    METHOD_FLAGS,
    TEACHER_FLAGS,
    TEACHER_SEED,
    Run,
    method_flags,
    teach,
    train_all,
)
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.flags import Parser, count
from jreg_megatron.runtime.imports import need


def main() -> None:
    """Run the demo and write its report into the output folder."""
    about = "Train two small Llamas on real text, without and with JREG, and compare their jumps."
    parser = Parser(prog="jreg-megatron demo", description=about)
    for flag, kind, default, word, meaning in (
        ("--iterations", count("--iterations", 10), ITERATIONS, "N", "training iterations of each run"),
        ("--output", Path, Path("runs/demo"), "FOLDER", "folder of the results"),
        ("--data", Path, Path("runs/data"), "FOLDER", "folder of the text"),
    ):
        parser.add_argument(
            flag, type=kind, default=default, metavar=word, help=f"{meaning} (default: %(default)s)"
        )
    several: dict[str, Any] = {"nargs": "*", "default": []}
    also = "also train JREG with these settings, such as 1:3 1:0.5"
    parser.add_argument("--also", type=lambda_and_alpha, metavar="LAMBDA:ALPHA", help=also, **several)
    method = f"also train with these methods, without JREG: {', '.join(METHOD_FLAGS)}"
    parser.add_argument("--method", choices=METHOD_FLAGS, metavar="NAME", help=method, **several)
    with user_errors_exit("the next start trains all runs again"):
        _demo(parser.parse_args())


def lambda_and_alpha(text: str) -> tuple[float, float]:
    """Parse two numbers with a colon between them. argparse shows this function's name in its error."""
    coeff, _, alpha = text.partition(":")
    return float(coeff), float(alpha)


def _demo(args: Namespace) -> None:
    need("vl_convert", "the demo's picture", "demo")
    if "let" in args.method:
        need("transformers", "--method let", "analysis")
    from jreg_megatron.demo.report import report  # these import torch, which --help must not
    from jreg_megatron.methods.jreg.settings import JRegConfig

    summary, picture = args.output / "summary.json", args.output / "report.png"
    settings = {"baseline": (0.0, ALPHA), "jreg": (COEFF, ALPHA)}
    settings |= {f"jreg_{coeff:g}_{alpha:g}": (coeff, alpha) for coeff, alpha in args.also}
    for coeff, alpha in settings.values():
        JRegConfig(coeff=coeff, alpha=alpha)  # refuses wrong values
    runs = [Run(name, args.iterations, args.output / name, *of_jreg) for name, of_jreg in settings.items()]
    how: dict[str, Any] = {"seed": TEACHER_SEED, "flags": TEACHER_FLAGS, "ranks": 1}
    teacher = Run("teacher", args.iterations, args.output / "teacher", **how)
    for name in dict.fromkeys(args.method):
        flags = method_flags(METHOD_FLAGS[name], args.iterations, teacher.exported)
        runs.append(Run(name, args.iterations, args.output / name, flags=(*FLAGS, *flags)))
    marks = {run.folder: run.log for run in runs}
    if "let" in args.method:
        marks |= {teacher.folder: teacher.log, teacher.exported: teacher.exported.with_suffix(".log")}
    for folder, mark in marks.items():
        if folder.exists() and not mark.exists():
            raise UserError(
                f"--output is {args.output}, but {folder.name} in it is not a run of the demo: {mark.name} "
                "is missing; name another"
            )
    data = prepare(args.data)
    print(
        f"Data: {'reused' if data.reused else 'made'} {data.train_tokens:,} training and "
        f"{data.validation_tokens:,} validation tokens in {args.data}"
    )
    for file in (summary, picture):
        file.unlink(missing_ok=True)
    for earlier in filter(Path.exists, marks):
        print(f"Removed the earlier run {earlier}")
        shutil.rmtree(earlier)
    started = time.monotonic()
    if "let" in args.method:
        teach(teacher, data)
    train_all(runs, data)
    report(runs, summary, picture)
    print(
        f"JREG: lambda {COEFF:g}, alpha {ALPHA:g}, as in the paper. At alpha 3 the jump moves to earlier\n"
        "layers, which the jump rate does not show: make demo ARGS='--also 1:3'"
    )
    print(f"Trained in {time.monotonic() - started:.0f} s. Picture: {picture}")
    print(f"Numbers: {summary}. Logs: {', '.join(str(run.log) for run in runs)}")
    models = " ".join(f"{run.name}={run.checkpoints}" for run in runs[:2])
    print(f"Compare the two models layer by layer: jreg-megatron evaluate {models}")


if __name__ == "__main__":
    main()
