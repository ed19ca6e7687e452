"""The Megatron flags that a CPU run needs, those that it ignores, and those that it refuses."""

from __future__ import annotations

from itertools import pairwise

from jreg_megatron.runtime.errors import UserError

FLAGS: tuple[str, ...] = tuple(
    """
    --distributed-backend gloo --transformer-impl local --attention-backend unfused --use-cpu-initialization
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion
    --no-gradient-reduce-div-fusion --cuda-graph-impl none --num-workers 0
    """.split()
)
"""Appended to the command line, because argparse takes the last value."""

_SWITCHES = """
    --use-flash-attn --tp-comm-overlap --fp8-param-gather --fp4-param-gather --te-rng-tracker
    --use-transformer-engine-op-fuser --use-te-activation-func --enable-cuda-graph --external-cuda-graph
    --optimizer-cuda-graph --use-precision-aware-optimizer --optimizer-cpu-offload
    --fine-grained-activation-offloading --init-model-with-meta-device --moe-grouped-gemm
    --moe-permute-fusion --moe-router-fusion --use-nccl-ub --use-sharp --record-memory-history
    --use-ring-exchange-p2p
"""
_WITH_VALUE = """
    --tp-comm-overlap-cfg --fp8-format --fp4-format --cpu-offloading-num-layers
    --pipeline-model-parallel-comm-backend --nccl-communicator-config-path --sharp-enabled-group
    --high-priority-stream-groups --gpu-sniff-test-interval --save-activations-interval
    --save-dgrads-interval
"""
_IGNORED = dict.fromkeys(_SWITCHES.split(), 0) | dict.fromkeys(_WITH_VALUE.split(), 1)
"""Flags for a GPU's kernels, number formats, memory, network and inspection, with their number of values.

No flag turns them off again, so they are removed from the command line.
"""

_SPECS = (
    ("megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"),
    ("megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
)
"""The specs of hybrid models that need Transformer Engine. ``hybrid.py`` replaces them."""
_LOCAL_SPEC = ("jreg_megatron.cpu.hybrid", "stack_spec")
HYBRID_SPECS = (*_SPECS, _LOCAL_SPEC)
"""All specs of hybrid models whose attention and MLP are those of Megatron's ``GPTModel``."""

_REFUSED: dict[str, str] = {
    "--apply-layernorm-1p": "leave it out",
    "--experimental-attention-variant": "leave it out",
}


def value_of(argv: list[str], flag: str) -> str | None:
    """The value that argparse would give ``flag``, or None if the flag is absent."""
    found = None
    for i, word in enumerate(argv):
        if word == flag:
            found = argv[i + 1] if i + 1 < len(argv) else ""
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """``argv`` without the ignored flags, and the ignored flags."""
    kept: list[str] = []
    ignored: list[str] = []
    i = 0
    while i < len(argv):
        flag, equals, _ = argv[i].partition("=")
        length = 1
        if flag in _IGNORED and not equals:
            length += _IGNORED[flag]
        (ignored if flag in _IGNORED else kept).extend(argv[i : i + length])
        i += length
    return kept, ignored


def with_cpu_flags(argv: list[str]) -> list[str]:
    """Turn a GPU's command line into one that a CPU can run.

    Args:
        argv: arguments of a Megatron script, without the script's name.

    Returns:
        ``argv`` without the flags that only concern a GPU, followed by :data:`FLAGS`.

    Raises:
        UserError: for a flag without a counterpart on a CPU.
    """
    for flag, instead in _REFUSED.items():
        if value_of(argv, flag) is not None:
            raise UserError(f"{flag} does not run on a CPU, and this is CPU mode; {instead}")
    if tuple(argv[-len(FLAGS) :]) == FLAGS:
        return argv
    return [*_split(argv)[0], *(("--spec", *_LOCAL_SPEC) if _names_a_spec(argv) else ()), *FLAGS]


def _names_a_spec(argv: list[str]) -> bool:
    return any(("--spec", *spec) == tuple(argv[i : i + 3]) for spec in _SPECS for i in range(len(argv)))


def announcement(argv: list[str]) -> str:
    """One line that lists what CPU mode replaces or ignores in the command line ``argv``."""
    ignored = _split(argv)[1]
    for flag, value in pairwise(FLAGS):
        asked = None if value.startswith("--") else value_of(argv, flag)
        if asked not in (None, value) and flag != "--num-workers":
            ignored.append(f"{flag} {asked}")
    if _names_a_spec(argv):
        ignored.append("--spec")
    line = "CPU mode: gloo and torch-only layers replace NCCL, Transformer Engine and fused kernels"
    return f"{line} ({' '.join(ignored)} ignored)" if ignored else line
