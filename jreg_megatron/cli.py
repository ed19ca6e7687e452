"""The command ``jreg-megatron X``, which is ``python -m jreg_megatron.X``."""

from __future__ import annotations

import argparse
import runpy
import sys

from jreg_megatron import __version__

_COMMANDS = {
    "bench": "measure JREG's cost here: kernels, Megatron's step, Python and kernel launches",
    "claims": "judge the paper's six claims, on toys that it trains or on your own runs",
    "compare": "compare JREG and other methods on toys that it trains, with paired seeds",
    "data": "make Megatron's token files from text, and inspect them",
    "demo": "train two small Llamas on this machine's CPU, without JREG and with it",
    "evaluate": "evaluate a model, or compare two: tasks, middle layers, early exit",
    "export": "convert a Megatron checkpoint to a Hugging Face folder",
    "import": "convert a Hugging Face folder to a Megatron checkpoint",
    "launch": "run a Megatron script with JREG; the script does not change",
    "measure": "measure how far each layer of a model turns the state, and the last layer's jump",
    "pretrain": "pretrain with Megatron's own loop (one rank; use torchrun for several)",
    "report": "make one HTML page of measurements, evaluations and training runs",
    "selftest": "compare JREG with an independent model, at every layout of these ranks",
    "sweep": "train a recipe over a grid of lambda, alpha and seeds",
}

_MODULES = {"export": "convert.export", "import": "convert.import_"}
"""Commands whose module has another name."""


def main() -> None:
    """Run the module of the command with the rest of the command line."""
    width = max(map(len, _COMMANDS))
    parser = argparse.ArgumentParser(
        prog="jreg-megatron",
        description="JREG for Megatron-Core: measure and suppress the last-layer jump in pretraining.",
        epilog="\n".join(f"  {name:{width}}  {what}" for name, what in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="a command from the list below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see COMMAND --help")
    options = parser.parse_args()
    sys.argv = [f"jreg-megatron {options.command}", *options.arguments]
    module = _MODULES.get(options.command, options.command)
    runpy.run_module(f"jreg_megatron.{module}", run_name="__main__")


if __name__ == "__main__":
    main()
