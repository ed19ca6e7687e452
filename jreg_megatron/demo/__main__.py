"""``make demo``: train two small Llamas on real text, without and with JREG, and look at the jump."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from jreg_megatron.demo import report
from jreg_megatron.demo.data import prepare
from jreg_megatron.demo.training import Run
from jreg_megatron.errors import UserError, user_errors_exit
from jreg_megatron.settings import JRegConfig

COEFF, ALPHA, ITERATIONS = 0.1, 3.0, 300


def main() -> None:
    """Run the demo and leave its report in the output folder."""
    with user_errors_exit():
        _demo(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jreg_megatron.demo", description=__doc__)
    parser.add_argument(
        "--coeff", type=float, default=COEFF, help="lambda of the JREG run (default: %(default)s)"
    )
    parser.add_argument(
        "--alpha", type=float, default=ALPHA, help="sharpness of its layer weights (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, help="training iterations (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="where the results go (default: %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/data"), help="where the data is kept (default: %(default)s)"
    )
    return parser.parse_args()


def _demo(args: argparse.Namespace) -> None:
    if args.iterations < 10:
        raise UserError(
            f"--iterations is {args.iterations}; it must be at least 10, where the first line is logged"
        )
    configs = {
        "baseline": JRegConfig(coeff=0.0),
        "jreg": JRegConfig(coeff=args.coeff, alpha=args.alpha),
    }
    runs = [Run(name, config, args.iterations, args.output / name) for name, config in configs.items()]
    data = prepare(args.data)
    print(
        f"Data: {'reusing' if data.reused else 'made'} {data.train_tokens:,} training and "
        f"{data.validation_tokens:,} validation tokens in {args.data}"
    )
    _clear(args.output)
    started = time.monotonic()
    with tqdm(total=len(runs) * args.iterations, unit="it", dynamic_ncols=True) as bar:
        for index, run in enumerate(runs):
            bar.set_description(f"{run.name}: starting 4 ranks")

            def advance(iteration: int, index: int = index, name: str = run.name) -> None:
                bar.set_description(name)
                bar.update(index * args.iterations + iteration - bar.n)

            run.train(data, advance)
    outcomes = {run.name: report.Outcome.read(run) for run in runs}
    report.write_summary(outcomes, args.output / "summary.json")
    report.draw(outcomes, args.output / "report.png")
    report.print_table(outcomes)
    print(
        f"Trained in {time.monotonic() - started:.0f} s. "
        f"Picture: {args.output / 'report.png'}. Numbers: {args.output / 'summary.json'}."
    )


def _clear(output: Path) -> None:
    """Start clean, but remove nothing that an earlier demo did not make."""
    if not output.exists():
        output.mkdir(parents=True)
        return
    mine = [output / name for name in ("baseline", "jreg", "summary.json", "report.png")]
    for path in mine:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    print(f"Starting clean: removed the earlier runs in {output}")


if __name__ == "__main__":
    main()
