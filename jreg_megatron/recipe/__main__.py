"""Check, announce and start a run: ``python -m jreg_megatron.recipe``. ``recipes/*.sh`` calls it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
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
from jreg_megatron.recipe import announcement, identity, request
from jreg_megatron.recipe.supervise import SIGNALS, UNFINISHED
from jreg_megatron.runtime.errors import UserError, quiet_interrupt, user_errors_exit
from jreg_megatron.runtime.flags import flag_of


def main(argv: list[str] | None = None) -> None:
    """Run the command line ``argv``. A run that starts replaces this process."""
    for number in SIGNALS:
        signal.signal(number, _nothing_started)
    with user_errors_exit(), quiet_interrupt():
        asked = request.read(sys.argv[1:] if argv is None else argv)
        if asked.smoke is None:
            _train(asked)
        else:
            _smoke(asked)


def _nothing_started(number: int, _: object) -> NoReturn:
    name = signal.Signals(number).name
    print(f"jreg_megatron: {name} before training began; the same command starts it", flush=True)
    os._exit(UNFINISHED)


def _train(asked: Namespace) -> None:
    from jreg_megatron.mcore import preflight
    from jreg_megatron.mcore.arguments import parse
    from jreg_megatron.mcore.installed import NO_FUSION, has_apex
    from jreg_megatron.methods import known
    from jreg_megatron.recipe import machine, plan
    from jreg_megatron.stream.support import refuse_unsupported

    meets = request.rendezvous(asked.nodes)
    gpus = machine.Gpus.of_this_node()  # before CPU mode, in which this process only plans
    _import_megatron()
    flags = _flags(asked)
    args = parse(flags, asked.world_size)
    for check in preflight.SIZE_CHECKS:
        check(args)
    identity.refuse_another(asked.run / identity.FILE, identity.settings(args))
    if not asked.dry_run and last_checkpoint(args.save) >= args.train_iters:
        print(f"{asked.run} has all of its {args.train_iters:,} iterations: nothing to do")
        return
    added = [NO_FUSION] if args.gradient_accumulation_fusion and not has_apex() else []
    flags += added
    planned = plan.make(flags, asked.world_size)

    def check_methods() -> str:
        settings = known.settings_in(args)
        refuse_unsupported(args, *settings)
        for of_one in settings:
            of_one.refuse_layers(args.num_layers)
        return ", ".join(of_one.name for of_one in settings)

    def check_files() -> str:
        for check in preflight.DATA_CHECKS:
            check(args)
        machine.check_tokenizer(args)
        return machine.check_training_data(args, planned.tokens, asked.epochs)

    def check_node() -> str:
        preflight.optimizer.package(args.optimizer)
        return machine.check_gpus(asked.gpus, gpus)

    rows = plan.rows(asked, planned)
    if added:
        rows["added"] = f"{' '.join(added)}, since Apex is not installed here (each node checks this)"
    findings: dict[str, Callable[[], str]] = {
        "data": check_files,
        "methods": check_methods,
        "memory": partial(machine.check_memory, planned, gpus),
        "checkpoints": partial(machine.check_disk, planned),
        "this node": check_node,
    }
    rows |= announcement.found(findings, asked.dry_run)
    ranks = announcement.torchrun(asked.gpus, asked.nodes, meets, flags)
    is_first = meets is None or meets.node_rank == 0
    if is_first:
        announcement.show(f"{asked.recipe.stem}, {asked.variant}, in {asked.run}", rows)
    _become(ranks, args, asked.run if is_first else None, asked.dry_run)


def _smoke(asked: Namespace) -> None:
    from jreg_megatron.mcore.arguments import parse
    from jreg_megatron.recipe import smoke

    _import_megatron()
    flags, run = smoke.without_data(_flags(asked)), asked.run / "smoke"
    args = parse(flags, asked.world_size)
    flags += smoke.flags(args, run, asked.smoke)
    world_size = smoke.ranks(args)
    forked = [sys.executable, "-m", "jreg_megatron.cpu", "--nproc", str(world_size)]
    ranks = [*forked, *announcement.MODULE, "--cpu", *flags]
    print(f"Smoke: a toy of {asked.recipe.stem} on {world_size} CPU ranks; its folder is {run}")
    toy = parse(flags, world_size)
    is_over = last_checkpoint(toy.load) >= toy.train_iters
    is_over |= identity.difference(run / identity.FILE, identity.settings(toy)) is not None
    if is_over and not asked.dry_run:
        shutil.rmtree(run)
        print("Removed the earlier run there: it was finished or had other settings")
    _become(ranks, toy, run, asked.dry_run)


def _import_megatron() -> None:
    """Import Megatron in CPU mode, without its warnings, because this process only plans."""
    from jreg_megatron import cpu

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cpu.enable()
    from megatron.core import utils

    # CPU mode hides Transformer Engine, but the ranks will have it.
    with contextlib.suppress(PackageNotFoundError):
        utils._te_version = utils.PkgVersion(version("transformer-engine"))


def _flags(asked: Namespace) -> list[str]:
    """The recipe's flags, ``--train-iters`` from the number of tokens, and the user's flags."""
    from jreg_megatron.mcore.arguments import parse

    args = parse([*asked.flags, *asked.user_flags], asked.world_size)
    for name in ("global_batch_size", "seq_length"):
        if not getattr(args, name):
            raise UserError(f"{flag_of(name)} is missing in {asked.recipe}; give it a number >= 1")
    iterations = asked.tokens // (args.global_batch_size * args.seq_length)
    if iterations < 1:
        raise UserError(f"TOKENS is {asked.tokens}, which is less than one batch; raise it")
    return [*asked.flags, "--train-iters", str(iterations), *asked.user_flags]


def _become(ranks: Sequence[str], args: Namespace, run: Path | None, is_dry_run: bool) -> None:
    """Replace this process, which has all of Megatron in memory, with the small supervisor. In a dry run only
    print the command ``ranks``.

    On the first node the supervisor keeps other runs out of the folder ``run``.
    """
    if is_dry_run:
        print(announcement.as_text(ranks, os.environ))
        return
    if run is not None:
        identity.write(run / identity.FILE, identity.settings(args))
    sys.stdout.flush()
    supervisor = [sys.executable, "-m", "jreg_megatron.recipe.supervise"]
    watched = ["--iterations", str(args.train_iters), "--checkpoints", str(Path(args.save))]
    watched += ["--lock", str(run)] if run is not None else []
    # Signals wait until the supervisor has its handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(sys.executable, [*supervisor, *watched, "--", *ranks])


if __name__ == "__main__":
    main()
