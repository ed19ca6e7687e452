"""Check, announce and start a run: ``python -m jreg_megatron.recipe``, called by ``recipes/*.sh``."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from jreg_megatron.decoder.checkpoint.folder import last_checkpoint
from jreg_megatron.recipe import command, identity
from jreg_megatron.recipe.request import Rendezvous, Request
from jreg_megatron.recipe.supervise import SIGNALS, UNFINISHED
from jreg_megatron.runtime.errors import UserError, quiet_interrupt, user_errors_exit


def main(argv: list[str] | None = None) -> None:
    """Run the command line ``argv``; a run that starts replaces this process."""
    for number in SIGNALS:
        signal.signal(number, _nothing_started)
    with user_errors_exit(), quiet_interrupt():
        request = Request.from_words(sys.argv[1:] if argv is None else argv)
        if request.smoke is None:
            _train(request)
        else:
            _smoke(request)


def _nothing_started(number: int, _: object) -> NoReturn:
    name = signal.Signals(number).name
    print(f"jreg_megatron: {name} before training began; the same command starts it", flush=True)
    os._exit(UNFINISHED)


def _train(request: Request) -> None:
    from jreg_megatron.mcore import preflight
    from jreg_megatron.mcore.arguments import parse
    from jreg_megatron.recipe import announcement, machine, plan

    rendezvous = Rendezvous.from_environment(request)
    gpus = machine.Gpus.of_this_node()  # before CPU mode, in which this process only plans
    _import_megatron()
    flags = _flags(request)
    asked = parse(flags, request.world_size)
    for check in preflight.SIZE_CHECKS:
        check(asked)
    identity.refuse_another(request.run, asked)
    if not request.dry_run and last_checkpoint(asked.save) >= asked.train_iters:
        print(f"{request.run} has all of its {asked.train_iters:,} iterations: nothing to do")
        return
    added = machine.flags_without_apex(asked)
    flags += added
    planned = plan.make(flags, request.world_size)

    def check_files() -> str:
        for check in preflight.DATA_CHECKS:
            check(asked)
        machine.check_tokenizer(asked)
        return machine.check_training_data(asked, planned.tokens, request.epochs)

    def check_node() -> str:
        preflight.optimizer.package(asked.optimizer)
        return machine.check_gpus(request.gpus, gpus)

    rows = announcement.rows(request, planned)
    if added:
        rows["added"] = f"{' '.join(added)}, since Apex is not installed here (each node checks this)"
    findings: dict[str, Callable[[], str]] = {
        "data": check_files,
        "memory": partial(machine.check_memory, planned, gpus),
        "checkpoints": partial(machine.check_disk, planned),
        "this node": check_node,
    }
    rows |= announcement.found(findings, request.dry_run)
    ranks = command.on_gpus(request.gpus, request.nodes, rendezvous, flags)
    is_first = rendezvous is None or rendezvous.node_rank == 0
    if is_first:
        announcement.show(f"{request.recipe.stem}, {request.variant}, in {request.run}", rows)
    if request.dry_run:
        print(command.as_text(ranks, os.environ))
    else:
        _become(ranks, asked, request.run if is_first else None)


def _smoke(request: Request) -> None:
    from jreg_megatron.mcore.arguments import parse
    from jreg_megatron.recipe import smoke

    assert request.smoke is not None
    _import_megatron()
    flags, run = smoke.without_data(_flags(request)), request.run / "smoke"
    asked = parse(flags, request.world_size)
    flags += smoke.flags(asked, run, request.smoke)
    world_size = smoke.ranks(asked)
    forked = [sys.executable, "-m", "jreg_megatron.cpu", "--nproc", str(world_size)]
    ranks = [*forked, *command.MODULE, "--cpu", *flags]
    print(f"Smoke: a toy of {request.recipe.stem} on {world_size} CPU ranks; its folder is {run}")
    if request.dry_run:
        print(command.as_text(ranks, os.environ))
        return
    toy = parse(flags, world_size)
    if smoke.start_clean(toy, run):
        print("Removed the earlier run there: it was finished or had other settings")
    _become(ranks, toy, run)


def _import_megatron() -> None:
    """Import Megatron in CPU mode, without its warnings: this process only plans."""
    from jreg_megatron import cpu

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cpu.enable()
    from megatron.core import utils

    # CPU mode hides Transformer Engine, but the ranks will have it.
    with contextlib.suppress(PackageNotFoundError):
        utils._te_version = utils.PkgVersion(version("transformer-engine"))


def _flags(request: Request) -> list[str]:
    """The recipe's flags, ``--train-iters`` from the number of tokens, and the user's flags."""
    from jreg_megatron.mcore.arguments import parse

    args = parse([*request.flags, *request.user_flags], request.world_size)
    for name in ("global_batch_size", "seq_length"):
        if not getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} is missing in {request.recipe}; give it a number >= 1"
            )
    iterations = request.tokens // (args.global_batch_size * args.seq_length)
    if iterations < 1:
        raise UserError(f"TOKENS is {request.tokens}, which is less than one batch; raise it")
    return [*request.flags, "--train-iters", str(iterations), *request.user_flags]


def _become(ranks: Sequence[str], args: Namespace, run: Path | None) -> None:
    """Become the small supervisor; this process has all of Megatron in memory.

    On the first node the supervisor keeps other runs out of the folder ``run``.
    """
    if run is not None:
        identity.keep(run, args)
    sys.stdout.flush()
    supervisor = [sys.executable, "-m", "jreg_megatron.recipe.supervise"]
    watched = ["--iterations", str(args.train_iters), "--checkpoints", str(Path(args.save))]
    watched += ["--lock", str(run)] if run is not None else []
    # Signals wait until the supervisor has its handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(sys.executable, [*supervisor, *watched, "--", *ranks])


if __name__ == "__main__":
    main()
