"""``torchrun --nproc-per-node N -m jreg_megatron.selftest``: is JREG exact at every layout, here?"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from jreg_megatron.mcore.installed import has_transformer_engine
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.flags import Parser, count
from jreg_megatron.runtime.fork import be_alone_unless_started, fork_ranks, take_one_thread, world_size_of
from jreg_megatron.runtime.imports import silence_megatron
from jreg_megatron.runtime.ranks import of_every_rank
from jreg_megatron.selftest.layouts import Layout, layouts_for


def main(argv: list[str] | None = None) -> int:
    """Run the self-test; the exit status is 0 if every layout passed, 1 if one failed, 2 for a mistake."""
    with user_errors_exit():
        options = _parse(sys.argv[1:] if argv is None else argv)
        layouts = layouts_for(
            world_size_of(options.nproc),
            tensor=options.tp,
            pipeline=options.pp,
            context=options.cp,
            expert=options.ep,
            precision=options.precision,
            graphs=options.cuda_graph,
            overlap=options.overlap,
        )
    if options.list:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(layout.name for layout in layouts))
        return 0
    silence_megatron()  # it warns of settings that the toy model has on purpose
    if options.nproc:
        from jreg_megatron import cpu

        cpu.enable()
        return fork_ranks(options.nproc, lambda: sys.exit(_test(layouts, options)))
    return _test(layouts, options)


def _test(layouts: list[Layout], options: argparse.Namespace) -> int:
    timeout = timedelta(seconds=options.timeout)
    start(options.cpu or bool(options.nproc), options.transformer_impl, timeout)
    _print(*_about_this_machine(options))
    return _run(layouts, options.transformer_impl, timeout)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="jreg-megatron selftest",
        description="Run one training step of a toy model with JREG at many layouts, on the Megatron-Core "
        "installed here. Compare every parameter's gradient, the losses and each layer's displacement with a "
        "model in plain torch, which each rank computes alone in float64.",
        epilog="Without sizes it tries every way to split the model over the ranks.",
    )
    for flag, what in (
        ("--tp", "tensor-parallel"),
        ("--pp", "pipeline-parallel"),
        ("--cp", "context-parallel"),
        ("--ep", "expert-parallel"),
    ):
        parser.add_argument(flag, type=count(flag), metavar="N", help=f"only layouts with this {what} size")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="all layouts in this type; by default fp32, and one each in bf16 and fp16. In 16 bits the "
        "allowed error is twice the error of the plain model in the same type",
    )
    parser.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        default="local",
        help="Megatron's local layers (the default), or Transformer Engine's; these need --precision bf16, "
        "because they compute float32 in TF32",
    )
    parser.add_argument(
        "--cuda-graph",
        choices=("transformer_engine", "local", "full_iteration"),
        help="layouts with CUDA graphs: transformer_engine or local, graphs of layers and of parts of them, "
        "which need --transformer-impl transformer_engine and --precision bf16; or full_iteration, one graph "
        "of the whole iteration",
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="layouts with experts in Megatron's overlapped schedule, as with "
        "--overlap-moe-expert-parallel-comm; needs 2 ranks or more",
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU (the default without CUDA)")
    parser.add_argument(
        "--nproc",
        type=count("--nproc"),
        metavar="N",
        help="start N ranks on this machine's CPU; leave it out under torchrun",
    )
    parser.add_argument(
        "--timeout",
        type=count("--timeout", most=86_400),
        default=60,
        metavar="SECONDS",
        help="stop a layout if a rank waits longer than this for another one (default: 60)",
    )
    parser.add_argument("--list", action="store_true", help="list the layouts and exit")
    options = parser.parse_args(argv)
    _refuse_mistakes(options)
    return options


def _refuse_mistakes(options: argparse.Namespace) -> None:
    layers = options.transformer_impl, options.precision
    is_of_layers = options.cuda_graph in ("transformer_engine", "local")
    if is_of_layers and layers != ("transformer_engine", "bf16"):
        raise UserError(
            f"--cuda-graph {options.cuda_graph} captures bf16 layers of Transformer Engine; add "
            "--transformer-impl transformer_engine --precision bf16"
        )
    if options.cuda_graph == "full_iteration" and options.precision == "fp16":
        raise UserError("--precision fp16 is not supported with --cuda-graph full_iteration; leave it out")
    if options.overlap and is_of_layers:
        raise UserError(
            f"--overlap is not supported with --cuda-graph {options.cuda_graph}; leave one of the two out"
        )
    on_gpu = torch.cuda.is_available() and not (options.cpu or options.nproc)
    if options.cuda_graph and not (options.list or on_gpu):
        raise UserError(f"--cuda-graph is {options.cuda_graph}, which runs on GPUs only; leave it out")
    if options.transformer_impl == "transformer_engine":
        if options.precision in (None, "fp32"):
            raise UserError(
                "--transformer-impl transformer_engine computes float32 in TF32, too coarse for this "
                "comparison; add --precision bf16"
            )
        if not has_transformer_engine():
            raise UserError("--transformer-impl is transformer_engine, which is not installed; use local")
        if not (options.list or on_gpu):
            raise UserError("--transformer-impl is transformer_engine, which runs on GPUs only; use local")


def start(wants_cpu: bool, transformer_impl: str, timeout: timedelta) -> None:
    """Set up the device, Megatron and the process group."""
    be_alone_unless_started()
    if wants_cpu or not torch.cuda.is_available():
        from jreg_megatron import cpu

        cpu.enable()
        take_one_thread()
        dist.init_process_group("gloo", timeout=timeout)
        return
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.backends.cuda.matmul.allow_tf32 = False
    if transformer_impl == "local":
        from jreg_megatron.mcore import local_layers

        local_layers.install()  # they compute float32 in float32
    dist.init_process_group("nccl", timeout=timeout)


def _about_this_machine(options: argparse.Namespace) -> list[str]:
    import megatron.core

    from jreg_megatron import __version__

    # After the plus is the commit of the repository in the current folder.
    core, _, _ = megatron.core.__version__.partition("+")
    versions = [f"jreg_megatron {__version__}", f"Megatron-Core {core}"]
    versions.append(f"torch {torch.__version__}")
    absent = []
    for module, what in (("transformer_engine", "Transformer Engine"), ("apex", "Apex")):
        try:
            versions.append(f"{what} {getattr(__import__(module), '__version__', '')}".strip())
        except Exception:
            absent.append(what)
    device = torch.cuda.get_device_name() if dist.get_backend() == "nccl" else "CPU"
    ranks = dist.get_world_size()
    lines = [
        ", ".join(versions),
        f"{ranks} rank{'s' * (ranks > 1)} on {device} with {dist.get_backend()}, "
        f"{options.transformer_impl} layers",
    ]
    if absent:
        lines.append(f"Not in use here, so not tested: {', '.join(absent)}")
    if not _has_hybrid_model():
        lines.append("Not in this Megatron-Core: HybridModel")
    if not _runs_megatron_fsdp():
        lines.append("Not tested without Megatron-Core 0.19 and the package einops: Megatron-FSDP")
    lines.append("Largest relative differences to the model in plain torch:")
    return lines


def _has_hybrid_model() -> bool:
    try:
        import megatron.core.models.hybrid.hybrid_model  # noqa: F401
    except ImportError:
        return False
    return True


def _runs_megatron_fsdp() -> bool:
    from jreg_megatron.stream.support import is_since_0_19

    return is_since_0_19() and find_spec("einops") is not None


def _run(layouts: list[Layout], transformer_impl: str, timeout: timedelta) -> int:
    from jreg_megatron.selftest.compare import compare_step

    layouts = [layout for layout in layouts if layout.model != "hybrid" or _has_hybrid_model()]
    layouts = [layout for layout in layouts if layout.megatron_fsdp == "none" or _runs_megatron_fsdp()]
    width = max(len(layout.name) for layout in layouts)
    _print(f"{'layout':{width}}  {'loss':>8}  {'gradient':>8}  {'allowed':>8}  seconds")
    passed, failed, captured, reasons = 0, 0, set(), []
    # A rank that has failed waits here for the others. They wait for it too, in the layout's groups.
    verdicts: Any = dist.new_group(backend="gloo", timeout=3 * timeout)
    for layout in layouts:
        started = time.monotonic()
        error, row = "", ""
        try:
            comparison = compare_step(layout, transformer_impl, timeout)
            captured.add(comparison.captured)
            found, limit = comparison.found, comparison.limit
            row = f"{found.losses:8.1e}  {found.gradient:8.1e}  {limit.gradient:8.1e}"
            if names := found.exceeds(limit):
                error = f"{', '.join(names)} differ; worst: {found.worst_parameter}"
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}".splitlines()[0]
            if os.environ.get("JREG_SELFTEST_TRACEBACK"):
                traceback.print_exc()
        of_ranks = of_every_rank(error, verdicts)
        errors = _each_once(of_ranks)
        seconds = time.monotonic() - started
        verdict = "FAIL" if errors else "PASS"
        _print(f"{layout.name:{width}}  {row or '-':>28}  {seconds:7.1f}  {verdict}")
        if errors:
            failed += 1
            reasons += [f"{layout.name}: {each}" for each in errors]
        else:
            passed += 1
        if len(set(of_ranks)) > 1:
            reasons.append("Stopped: not all ranks failed in the same way, so their groups may be broken")
            break
    if captured:
        _print(f"States are read at: {'; '.join(sorted(captured))}")
    _print(*reasons)
    not_run = len(layouts) - passed - failed
    _print(
        f"{len(layouts)} layouts: {passed} passed, {failed} failed{f', {not_run} not run' if not_run else ''}"
    )
    dist.destroy_process_group()
    return 1 if failed else 0


def _each_once(errors: list[str]) -> list[str]:
    """Each of the ranks' errors once, with the first rank that had it."""
    first_rank = {each: rank for rank, each in reversed(list(enumerate(errors))) if each}
    return [f"{each} (rank {rank})" for each, rank in first_rank.items()]


def _print(*lines: str) -> None:
    if dist.get_rank() == 0:
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
