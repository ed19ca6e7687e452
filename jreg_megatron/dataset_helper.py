"""Let Megatron start where its C++ dataset helper is built already, as in its wheel."""

from __future__ import annotations

import importlib.util


def use_built_helper() -> None:
    """Keep Megatron's start-up from running ``make``, if there is nothing to make.

    A source tree compiles the helper on first use. The wheel brings it compiled and leaves the Makefile
    out, yet start-up (0.19) runs ``make`` there all the same and ends the process when that fails.
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None
