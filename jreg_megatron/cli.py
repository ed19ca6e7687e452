"""The command ``jreg-megatron``: one name for what ``python -m jreg_megatron.X`` starts."""

from __future__ import annotations

import argparse
import runpy
import sys

from jreg_megatron import __version__

_COMMANDS = {
    "bench": "what JREG costs here: kernels, Megatron's step, and how it grows",
    "claims": "the paper's six claims, judged on toys trained here or on your own runs",
    "data": "text into Megatron's token files, and a look into them",
    "demo": "train two small Llamas on this machine's CPU, without JREG and with it",
    "evaluate": "tasks, middle layers and early exit of a model, or of two compared",
    "export": "a Megatron checkpoint into a Hugging Face folder",
    "import": "a Hugging Face folder into a Megatron checkpoint",
    "launch": "run a Megatron script that stays as it is with JREG in it",
    "measure": "how far each layer of any model turns its state, and how far the last one jumps",
    "pretrain": "pretrain with Megatron's own loop (one rank; torchrun starts several)",
    "report": "one HTML page of measurements, evaluations and training runs",
    "selftest": "compare JREG with an independent model at every layout of these ranks",
    "sweep": "train a recipe over a grid of lambda, alpha and seeds",
}

_MODULES = {"export": "convert.export", "import": "convert.import_"}
"""Commands whose module has another name."""


def main() -> None:
    """Hand the rest of the command line to the module of the command."""
    width = max(map(len, _COMMANDS))
    parser = argparse.ArgumentParser(
        prog="jreg-megatron",
        description="JREG for Megatron-Core: measure and suppress the last-layer jump in pretraining.",
        epilog="\n".join(f"  {name:{width}}  {what}" for name, what in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see COMMAND --help")
    options = parser.parse_args()
    sys.argv = [f"jreg-megatron {options.command}", *options.arguments]
    module = _MODULES.get(options.command, options.command)
    runpy.run_module(f"jreg_megatron.{module}", run_name="__main__")


if __name__ == "__main__":
    main()
