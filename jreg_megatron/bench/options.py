"""The options of the benchmark: variants, models and flags, checked before any time is spent."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, replace

from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.flags import Parser, count, flag_of, positive

UNMODIFIED, AGAIN = "unmodified", "unmodified_again"
MEASURE, JREG, EVERY_STEP, NAIVE = "measure", "jreg", "jreg_every_step", "naive"
WAYS = {
    UNMODIFIED: "nothing attached",
    AGAIN: "the same once more, to show the noise",
    MEASURE: "lambda 0, measuring one step in ten",
    JREG: "lambda {coeff:g}, measuring one step in ten",
    EVERY_STEP: "lambda {coeff:g}, measuring in every step",
    NAIVE: "all states kept, cosines by autograd at the end",
}
"""The ways to run a training step, with their settings."""
ATTACHED = (MEASURE, JREG, EVERY_STEP)
"""The ways that measure and log."""
INTERVAL = 10
"""They log one step in this many, as the demo and the recipes do."""
KINDS = ("ordinary", "logging")
"""The kinds of steps: those that do not log, and those that do."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# What the four models share; a test compares all of it with the demo and the recipes.
_LLAMA = """
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --position-embedding-type rope --rotary-base 10000
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
"""
_DEMO = "--init-method-std 0.02"
_RECIPE = """
    --init-fan-in
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --cross-entropy-loss-fusion --no-create-attention-mask-in-dataloader
"""


@dataclass(frozen=True)
class Shape:
    """A model and the work of a step of one data-parallel replica."""

    name: str
    recipe: str | None
    """Its file in ``recipes/``, without ``.sh``."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    sequence: int
    vocab_size: int
    micro_batch: int
    """Sequences at a time."""
    micro_batches: int
    """Micro-batches a step."""

    def megatron_arguments(self) -> list[str]:
        """The Megatron flags of the model and its optimizer, without batch, sequence and data."""
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        flags = [word for name in sizes for word in (flag_of(name), str(getattr(self, name)))]
        flags += ["--padded-vocab-size", str(self.vocab_size)]
        return [*flags, *_LLAMA.split(), *(_RECIPE if self.recipe else _DEMO).split()]


# Micro-batches of the recipes hold 8,192 tokens, as in the pages about cost. With more micro-batches a step
# the optimizer would have a smaller share, and JREG adds nothing to the optimizer.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("demo", None, 8, 128, 352, 4, 128, 4096, 4, 2),
        Shape("170m", "llama_170m", 12, 768, 2048, 12, 1024, 32000, 8, 4),
        Shape("1b", "llama_1b", 16, 2048, 5376, 16, 1024, 32000, 8, 4),
        Shape("3.4b", "llama_3b4", 30, 3072, 8192, 24, 1024, 32000, 8, 4),
    )
}


def _ways(text: str) -> list[str]:
    known = [name for name in WAYS if name != UNMODIFIED]
    ways = list(dict.fromkeys(text.split(",")))
    if not set(ways) <= set(known):
        raise ArgumentTypeError(f"--ways is {text}; it must be some of {','.join(known)}")
    return ways


def _numbers(flag: str, most: int | None = None) -> Callable[[str], list[int]]:
    """An argparse type: whole numbers >= 1 with commas."""
    return lambda text: list(dict.fromkeys(map(count(flag, 1, most), text.split(","))))


def _add_number(
    part: ArgumentParser, flag: str, what: str, default: int | None = None, most: int | None = None
) -> None:
    part.add_argument(flag, type=count(flag, most=most), default=default, metavar="N", help=what)


def _add_seconds(part: ArgumentParser, default: float, what: str) -> None:
    part.add_argument("--seconds", type=positive("--seconds"), default=default, metavar="S", help=what)


def _add_device(part: ArgumentParser) -> None:
    part.add_argument(
        "--dtype", choices=DTYPES, help="number type; by default bf16 on a GPU and fp32 on a CPU"
    )
    part.add_argument("--cpu", action="store_true", help="run on the CPU (the default without CUDA)")


def _add_step(part: ArgumentParser) -> None:
    which = "the demo's, or a recipe's (default: %(default)s)"
    part.add_argument("--model", choices=SHAPES, default="demo", help=which)
    _add_number(part, "--layers", "layers; by default the model's")
    width = "hidden size; a multiple of the model's heads. The feed-forward size grows with it"
    _add_number(part, "--width", width)
    _add_number(part, "--sequence", "tokens of a sequence; by default the model's")
    sequences = "sequences of a micro-batch (demo: 4 of 128 tokens, else 8 of 1,024)"
    _add_number(part, "--micro-batch", sequences)
    _add_number(part, "--micro-batches", "micro-batches of a step (demo: 2, else 4)")
    for flag, what in (("--tp", "tensor"), ("--pp", "pipeline"), ("--cp", "context")):
        _add_number(part, flag, f"{what}-parallel size (default: 1)", default=1)
    names = f"some of {', '.join(name for name in WAYS if name != UNMODIFIED)}; by default all"
    part.add_argument("--ways", type=_ways, metavar="NAME,...", help=names)
    seconds = (
        "the run ends about S seconds after its start, earlier if all 95%% intervals are narrower than "
        "+-0.25%% (default: %(default)g). At least two rounds run"
    )
    _add_seconds(part, 150, seconds)
    rounds = (
        "at most N rounds. In a round each way runs once, with the unmodified step before and after it "
        "(default: %(default)s)"
    )
    # Megatron's work before the first step grows with the number of steps.
    _add_number(part, "--rounds", rounds, default=300, most=10_000)
    counted = "also count kernels, collectives, waits and memory of a step (adds 13 steps)"
    part.add_argument("--count", action="store_true", help=counted)
    _add_device(part)
    _add_number(part, "--nproc", "start N ranks on this machine's CPU; leave it out under torchrun")


def _add_host(part: ArgumentParser) -> None:
    _add_number(part, "--layers", "layers (default: 20)", default=20)
    _add_number(part, "--rounds", "rounds; in each, every way runs once (default: 300)", default=300)


def _add_kernel(part: ArgumentParser) -> None:
    widths = "768,2048,3072,3200"  # the recipes', and 3200 as some 3B models have it
    part.add_argument(
        "--widths",
        type=_numbers("--widths", most=65536),
        default=widths,
        metavar="H,...",
        help="hidden sizes of the states (default: %(default)s)",
    )
    _add_number(part, "--tokens", "rows of a state (default: %(default)s)", default=8192)
    rounds = "at most N rounds a width; each round runs everything once (default: 200; 20 on a CPU)"
    _add_number(part, "--rounds", rounds)
    _add_seconds(part, 30, "start no round of a width after S seconds (default: %(default)g)")
    uncompiled = "do not compare with torch.compile, which is slow to start"
    part.add_argument("--no-compile", action="store_true", help=uncompiled)
    _add_device(part)


_PARTS = {
    "kernel": ("the kernels for displacement and gradients alone", _add_kernel),
    "host": ("the time of Python and kernel launches for a layer", _add_host),
    "step": ("Megatron's training step, unmodified and with JREG", _add_step),
}
_EXAMPLES = """examples:
  jreg-megatron bench step                                      the demo's model, 2.5 minutes
  torchrun --nproc-per-node 8 -m jreg_megatron.bench step --model 1b --tp 2
  jreg-megatron bench step --model 3.4b --layers 12 -- --recompute-granularity selective
  jreg-megatron bench host                                      Python and launches, 3 minutes on a CPU
"""


def parser() -> Parser:
    """The parser of all parts."""
    made = Parser(
        prog="jreg-megatron bench",
        description="Measure what JREG costs: each run also measures the same work without it.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parts = made.add_subparsers(dest="part", required=True, metavar="PART")
    for name, (what, add_flags) in _PARTS.items():
        part = parts.add_parser(name, help=what, description=f"Measure {what}.")
        add_flags(part)
        output.add_output_arguments(part, csv=False)
        if name == "step":
            part.epilog = "Further arguments of Megatron, and --jreg-... settings, can follow after --."
    return made


# What `bench step` sets by its own options.
_OWN = {
    "--num-layers": "--layers",
    "--hidden-size": "--width",
    "--seq-length": "--sequence",
    "--micro-batch-size": "--micro-batch",
    "--global-batch-size": "--micro-batches",
    "--bf16": "--dtype bf16",
    "--fp16": "--dtype fp16",
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--context-parallel-size": "--cp",
    "--train-iters": "--rounds",
    "--train-samples": "--rounds",
}
# Flags that --model sets.
_OF_THE_MODEL = (
    *("--ffn-hidden-size", "--num-attention-heads", "--group-query-attention", "--num-query-groups"),
    *("--kv-channels", "--vocab-size", "--padded-vocab-size"),
)
# Flags that end the training early, or skip steps.
_ENDING = ("--exit-", "--phase-transition-iterations", "--iterations-to-skip", "--skip-train", "--help")


def complete(args: Namespace, more: list[str], world_size: int, on_cpu: bool) -> Namespace:
    """Check the options of ``bench step`` and the arguments after ``--`` together.

    Returns:
        ``args`` with what follows from them: ``model``, the shape with the user's sizes; ``config`` of JREG;
        ``ways``; ``notes``, why ways are left out; ``dtype``; ``layout`` and ``data_parallel``; ``more``,
        Megatron's arguments among those after ``--``; ``on_cpu``.

    Raises:
        UserError: for a mistake, naming option, value and fix.
    """
    _size_model(args)
    parts = args.tp * args.pp * args.cp
    if world_size % parts:
        raise UserError(
            f"--tp {args.tp} x --pp {args.pp} x --cp {args.cp} is {parts}, which does not divide the "
            f"{world_size} rank{'s' * (world_size > 1)}; add --nproc {parts} on a CPU, or start as many with "
            "torchrun"
        )
    if args.model.num_layers % args.pp:
        raise UserError(
            f"--pp is {args.pp}, which does not divide the {args.model.num_layers} layers; set --layers"
        )
    args.layout = {"ranks": world_size, "tensor": args.tp, "pipeline": args.pp, "context": args.cp}
    args.data_parallel, args.on_cpu = world_size // parts, on_cpu
    args.dtype = args.dtype or ("fp32" if on_cpu else "bf16")
    _read_more(args, more)
    _choose_ways(args)
    return args


def _size_model(args: Namespace) -> None:
    shape, names = SHAPES[args.model], ("sequence", "micro_batch", "micro_batches")
    asked = {name: getattr(args, name) for name in names}
    asked |= {"num_layers": args.layers, "hidden_size": args.width}
    sizes = {name: size for name, size in asked.items() if size is not None}
    if (width := args.width) is not None:
        if width % (2 * shape.num_attention_heads):
            raise UserError(
                f"--width is {width}; it must be a multiple of {2 * shape.num_attention_heads}, since "
                f"the model has {shape.num_attention_heads} attention heads of even size"
            )
        sizes["ffn_hidden_size"] = round(shape.ffn_hidden_size * width / shape.hidden_size)
    args.model = replace(shape, **sizes)


def _read_more(args: Namespace, more: list[str]) -> None:
    """JREG's settings, and Megatron's arguments among those after ``--``."""
    from jreg_megatron.methods.jreg.settings import JRegConfig

    given, args.more = JRegConfig.check_flags(more)
    args.config = replace(
        JRegConfig.from_args(given),
        coeff=getattr(given, "jreg_coeff", 1.0),
        measure_interval=INTERVAL,
    )
    for name in ("start_iteration", "stop_iteration", "warmup_iterations", "measure_interval"):
        if hasattr(given, f"jreg_{name}"):
            raise UserError(f"{JRegConfig.flag(name)} is set by the benchmark itself; leave it out")
    if args.config.coeff == 0:
        raise UserError(f"{JRegConfig.flag('coeff')} is 0, so there is no JREG to measure; give a number > 0")
    args.config.layer_weights(args.model.num_layers)
    for flag in (word.partition("=")[0] for word in more):
        if flag in _OWN:
            raise UserError(f"{flag} cannot be given after --; use {_OWN[flag]}")
        if flag in _OF_THE_MODEL:
            raise UserError(
                f"{flag} belongs to the model, {args.model.name}; leave it out, or use --model or --width"
            )
        if flag == "--cuda-graph-impl":
            raise UserError(f"{flag} cannot be measured: all ways would run the graph of one; leave it out")
        if flag.startswith(_ENDING):
            raise UserError(f"{flag} would end the run or skip steps; leave it out")


def _choose_ways(args: Namespace) -> None:
    why_not = {}
    if args.layout["ranks"] > 1:
        why_not[NAIVE] = "it needs the whole model and all tokens on one rank"
    elif any(word.startswith("--recompute") for word in args.more):
        why_not[NAIVE] = "its hooks fire twice where layers are recomputed"
    elif args.config.final_state != "pre_norm" or args.config.tokens != "all" or args.config.token_stride > 1:
        why_not[NAIVE] = "it supports only all tokens and the state before the final norm"
    asked = args.ways or [name for name in WAYS if name != UNMODIFIED]
    args.ways = [way for way in asked if way not in why_not]
    left_out = {way: f"{way} is left out: {why}" for way, why in why_not.items() if way in asked}
    args.notes = [f"{note}." for note in left_out.values()]
    if not args.ways:
        raise UserError(
            f"--ways is {','.join(asked)}, but {' and '.join(left_out.values())}; name another way too"
        )
