"""Run a Megatron script on a CPU.

``torchrun --nproc-per-node N -m jreg_megatron.cpu SCRIPT.py ARGS...`` or ``python -m jreg_megatron.cpu
--nproc N SCRIPT.py ARGS...``. The second starts much faster, because all ranks share one import of Megatron.
As with torchrun, ``-m MODULE`` can replace ``SCRIPT.py``.
"""

from __future__ import annotations

import argparse

from jreg_megatron.cpu import script
from jreg_megatron.runtime.errors import user_errors_exit


def main() -> None:
    """Run the script of the command line with its arguments and the CPU's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m jreg_megatron.cpu", description="Run a Megatron script on a CPU."
    )
    with user_errors_exit():
        script.run(script.add_arguments(parser).parse_args(), on_cpu=True)


if __name__ == "__main__":
    main()
