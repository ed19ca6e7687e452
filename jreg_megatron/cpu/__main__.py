"""Run a Megatron script on a CPU.

``torchrun --nproc-per-node N -m jreg_megatron.cpu SCRIPT.py ARGS...`` or, with one import of Megatron
for all ranks and so a much faster start, ``python -m jreg_megatron.cpu --nproc N SCRIPT.py ARGS...``.
As with torchrun, ``-m MODULE`` can replace ``SCRIPT.py``.
"""

from __future__ import annotations

import argparse

from jreg_megatron.cpu import script
from jreg_megatron.runtime.errors import user_errors_exit


def main() -> None:
    """Run the script named on the command line, with the rest of it and the CPU's flags as arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m jreg_megatron.cpu", description="Run a Megatron script on a CPU."
    )
    with user_errors_exit():
        script.run(script.add_arguments(parser).parse_args(), on_cpu=True)


if __name__ == "__main__":
    main()
