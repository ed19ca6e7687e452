"""What can be asked of ``bench step``, checked before any time is spent."""

from __future__ import annotations

import math
import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jreg_megatron.bench.names import EVERY_STEP, NAIVE, UNMODIFIED, WAYS
from jreg_megatron.bench.shapes import SHAPES, Shape, find_shape
from jreg_megatron.runtime.errors import UserError

if TYPE_CHECKING:  # it brings torch, for which --help should not wait
    from jreg_megatron.methods.jreg.settings import JRegConfig

COEFF, ALPHA = 1.0, 1.0
DTYPES = {"fp32": [], "bf16": ["--bf16"], "fp16": ["--fp16"]}

# Above these Megatron's own work before the first step, of which the number of steps is part, takes long.
_MOST_ROUNDS, _LONGEST_INTERVAL = 10_000, 100

# What this tool sets by its own options.
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
    "--jreg-measure-interval": "--measure-interval",
}
# What belongs to the model by whose name the result goes.
_OF_THE_MODEL = (
    "--ffn-hidden-size",
    "--num-attention-heads",
    "--group-query-attention",
    "--num-query-groups",
    "--kv-channels",
    "--vocab-size",
    "--padded-vocab-size",
)
# What ends the training, or skips steps of it, before all has been measured.
_ENDING = ("--exit-", "--phase-transition-iterations", "--iterations-to-skip", "--skip-train", "--help")


@dataclass(frozen=True)
class Setup:
    """A step to be measured."""

    shape: Shape
    dtype: str
    layout: dict[str, int]
    """``ranks``, and the sizes of ``tensor``, ``pipeline`` and ``context`` parallelism."""
    config: JRegConfig
    ways: list[str]
    notes: list[str]
    """Why others are left out."""
    rounds: int
    counts: bool
    megatron_arguments: list[str]
    """More of the user's."""

    @property
    def data_parallel(self) -> int:
        """Replicas of the model."""
        ranks, *parts = self.layout.values()
        return ranks // math.prod(parts)


def add_step_arguments(parser: ArgumentParser) -> None:
    """Define the options of ``bench step``."""
    model = parser.add_argument_group("model and layout")
    model.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help=f"{', '.join(SHAPES)}, or the name of its recipe (default: %(default)s)",
    )
    for flag, of_what in (
        ("--layers", "layers; by default the model's"),
        ("--width", "hidden size; a multiple of the model's heads. The feed-forward size grows with it"),
        ("--sequence", "tokens of a sequence; by default the model's"),
        ("--micro-batch", "sequences of a micro-batch (demo: 4 of 128 tokens, else 8 of 1,024)"),
        ("--micro-batches", "micro-batches of a step (demo: 2, else 4)"),
    ):
        model.add_argument(flag, type=int, metavar="N", help=of_what)
    model.add_argument(
        "--dtype", choices=DTYPES, help="number type; by default bf16 on a GPU and fp32 on a CPU"
    )
    for flag, what in (("--tp", "tensor"), ("--pp", "pipeline"), ("--cp", "context")):
        model.add_argument(flag, type=int, default=1, metavar="N", help=f"{what}-parallel size (default: 1)")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--measure-interval",
        type=int,
        default=10,
        metavar="N",
        help=f"'measure' and 'jreg' measure one step in N, N in 1..{_LONGEST_INTERVAL}; "
        "'jreg_every_step' in each (default: 10)",
    )
    run.add_argument(
        "--ways",
        metavar="NAME,...",
        help=f"only some of {', '.join(name for name in WAYS if name != UNMODIFIED)}; by default all",
    )
    run.add_argument(
        "--seconds",
        type=float,
        default=150,
        metavar="S",
        help="the run ends about so long after its start, earlier if all intervals are narrow (default: "
        "%(default)g). Two rounds run however long they take",
    )
    run.add_argument(
        "--rounds",
        type=int,
        default=300,
        metavar="N",
        help="at most N rounds. In a round each way runs once, with the unmodified step before and after it "
        "(default: %(default)s)",
    )
    run.add_argument(
        "--count",
        action="store_true",
        help="count kernels, collectives and waits of a step, and its memory, too; 13 steps more",
    )
    run.add_argument("--cpu", action="store_true", help="the default where there is no CUDA device")
    run.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="start N ranks on this machine's CPU; for a run without torchrun",
    )
    run.add_argument("--verbose", action="store_true", help="show what Megatron prints")


def add_host_arguments(parser: ArgumentParser) -> None:
    """Define the options of ``bench host``."""
    for flag, default, what in (
        ("--layers", 20, "layers"),
        ("--width", 16, "hidden size, an even number"),
        ("--rounds", 300, "rounds; in each, every way runs once"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{what} (default: {default})")


def setup_of(args: Namespace, more: list[str], world_size: int, on_cpu: bool) -> Setup:
    """What the options and the arguments behind ``--`` ask for.

    Raises:
        UserError: for a mistake, naming option, value and fix.
    """
    shape = _shape(args)
    for name in ("tp", "pp", "cp", "measure_interval", "rounds"):
        require_at_least_one(name, getattr(args, name))
    for name, most in (("rounds", _MOST_ROUNDS), ("measure_interval", _LONGEST_INTERVAL)):
        if (value := getattr(args, name)) > most:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be in 1..{most}")
    check_seconds(args.seconds)
    parts = args.tp * args.pp * args.cp
    if world_size % parts:
        raise UserError(
            f"--tp {args.tp} x --pp {args.pp} x --cp {args.cp} is {parts}, which does not divide the "
            f"{world_size} rank{'s' * (world_size > 1)}; add --nproc {parts} on a CPU, or start as many with "
            "torchrun"
        )
    if shape.num_layers % args.pp:
        raise UserError(
            f"--pp is {args.pp}, which does not divide the {shape.num_layers} layers; set --layers"
        )
    config, rest = _jreg(args, more)
    for flag in (word.partition("=")[0] for word in more):
        if flag in _OWN:
            raise UserError(f"{flag} cannot be given behind --; use {_OWN[flag]}")
        if flag in _OF_THE_MODEL:
            raise UserError(
                f"{flag} belongs to the model, {shape.name}; leave it out, or use --model or --width"
            )
        if flag.startswith(_ENDING):
            raise UserError(f"{flag} would end or skip steps that are to be measured; leave it out")
    ways, notes = _ways(args), []
    if NAIVE in ways and (why_not := _why_no_naive(world_size, config, rest)):
        ways.remove(NAIVE)
        notes.append(f"{NAIVE} is left out: {why_not}.")
    if not ways:
        why = " and ".join(note.rstrip(".") for note in notes) or "with --measure-interval 1 that is jreg"
        raise UserError(f"--ways is {args.ways}, but {why}; name another way too")
    return Setup(
        shape=shape,
        dtype=args.dtype or ("fp32" if on_cpu else "bf16"),
        layout={"ranks": world_size, "tensor": args.tp, "pipeline": args.pp, "context": args.cp},
        config=config,
        ways=ways,
        notes=notes,
        rounds=args.rounds,
        counts=args.count,
        megatron_arguments=rest,
    )


def _why_no_naive(world_size: int, config: JRegConfig, megatron_arguments: list[str]) -> str | None:
    if world_size > 1:
        return "it needs the whole model and all tokens on one rank"
    if any(word.startswith("--recompute") for word in megatron_arguments):
        return "its hooks fire twice where layers are recomputed"
    if config.final_state != "pre_norm" or config.tokens != "all":
        return "it knows the state before the final norm and all tokens only"
    return None


def _ways(args: Namespace) -> list[str]:
    known = [name for name in WAYS if name != UNMODIFIED]
    ways = known if args.ways is None else list(dict.fromkeys(args.ways.split(",")))
    for way in ways:
        if way not in known:
            raise UserError(f"--ways is {args.ways}; it must be some of {','.join(known)}")
    if args.measure_interval == 1:
        ways = [way for way in ways if way != EVERY_STEP]  # JREG is this
    return ways


def has_cuda() -> bool:
    """Whether there is a CUDA device to measure on."""
    import torch

    return torch.cuda.is_available()


def world_size_of(args: Namespace) -> int:
    """How many ranks there are or will be.

    Raises:
        UserError: if the environment tells half of it, or ``--nproc`` does not fit.
    """
    if args.nproc is not None:
        from jreg_megatron.runtime.fork import check_nproc

        check_nproc(args.nproc)
        return int(args.nproc)
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and size is None:
        return 1
    if not (rank and rank.isdecimal() and size and size.isdecimal()):
        raise UserError(
            f"the environment has RANK={rank} and WORLD_SIZE={size}; start the ranks with torchrun, or "
            "unset both"
        )
    return int(size)


def _shape(args: Namespace) -> Shape:
    shape = find_shape(args.model)
    if shape is None:
        recipes = [known.recipe for known in SHAPES.values() if known.recipe]
        raise UserError(f"--model is {args.model}; it must be one of {', '.join([*SHAPES, *recipes])}")
    changes = {
        "num_layers": ("layers", args.layers),
        "hidden_size": ("width", args.width),
        "sequence": ("sequence", args.sequence),
        "micro_batch": ("micro_batch", args.micro_batch),
        "micro_batches": ("micro_batches", args.micro_batches),
    }
    for option, value in changes.values():
        require_at_least_one(option, value)
    if args.width is not None:
        if args.width % (2 * shape.num_attention_heads):
            raise UserError(
                f"--width is {args.width}; it must be a multiple of {2 * shape.num_attention_heads}, since "
                f"the model has {shape.num_attention_heads} attention heads of even size"
            )
        shape = replace(shape, ffn_hidden_size=round(shape.ffn_hidden_size * args.width / shape.hidden_size))
    return replace(shape, **{name: value for name, (_, value) in changes.items() if value is not None})


def _jreg(args: Namespace, more: list[str]) -> tuple[JRegConfig, list[str]]:
    """JREG's settings, and Megatron's arguments among those behind ``--``."""
    from jreg_megatron.methods.jreg.settings import JRegConfig, flag_of

    JRegConfig.check_flags(more)
    parser = JRegConfig.add_arguments(ArgumentParser(add_help=False, allow_abbrev=False))
    given, rest = parser.parse_known_args(more)
    config = JRegConfig.from_args(given)
    config = replace(
        config,
        coeff=getattr(given, "jreg_coeff", COEFF),
        alpha=getattr(given, "jreg_alpha", ALPHA),
        measure_interval=args.measure_interval,
    )
    for name in ("start_iteration", "stop_iteration", "warmup_iterations"):
        if hasattr(given, f"jreg_{name}"):
            raise UserError(f"{flag_of(name)} is a schedule, and the benchmark has none; leave it out")
    if config.coeff == 0:
        raise UserError(f"{flag_of('coeff')} is 0, so there is no JREG to be measured; give a positive one")
    config.layer_weights(_shape(args).num_layers)
    return config, rest


def require_at_least_one(option: str, value: int | None) -> None:
    """Refuse a number below 1; None passes."""
    if value is not None and value < 1:
        raise UserError(f"--{option.replace('_', '-')} is {value}; it must be >= 1")


def check_seconds(seconds: float) -> None:
    """Refuse what is no time to measure for."""
    if not 0 < seconds < 86400:
        raise UserError(f"--seconds is {seconds:g}; it must be above 0 and below a day")
