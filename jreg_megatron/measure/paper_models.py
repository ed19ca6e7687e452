"""The open models of the paper's Tables 1 and 2, and its text: LAMBADA."""

from __future__ import annotations

from collections.abc import Sequence

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.reference import Reference, hub_revisions, step_of
from jreg_megatron.paper import numbers
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.imports import need

LAMBADA = "EleutherAI/lambada_openai"
"""The hub's name of the test set. There are two versions; the paper does not say which one it used."""


def paper_models(names: Sequence[str]) -> list[tuple[Reference, float]]:
    """Checkpoints of the paper's models (without ``names``: of all), each with the paper's zeta_L.

    A model that the paper follows over training has one checkpoint for each share of its steps: the branch on
    the hub with the nearest step.

    Raises:
        UserError: for an unknown name, or if the hub does not answer.
    """
    known, trained, over_training = (
        numbers()[table] for table in ("hub", "open_models", "open_models_over_training")
    )
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--paper names {unknown[0]}; the paper's models are {', '.join(known)}")
    found = []
    for name in names or known:
        source = known[name]
        if name in trained:
            found.append((Reference(name, source), float(trained[name][0])))
            continue
        branches = {step_of(branch) or 0: branch for branch in hub_revisions(source)}
        for share, zeta in zip(over_training["shares"], over_training[name], strict=True):
            nearest = min(branches, key=lambda step: abs(step - share * max(branches)))
            found.append((Reference(name, source, branches[nearest]), float(zeta)))
    return found


def lambada() -> list[Text]:
    """The passages of LAMBADA's test set, from the hub or its cache.

    Raises:
        UserError: if neither has them.
    """
    datasets = need("datasets", "measuring the paper's models", "data")
    try:
        rows = datasets.load_dataset(LAMBADA, "default", split="test")
    except Exception as error:  # datasets has no exception class for this
        raise UserError(
            f"--paper measures on LAMBADA, the data set {LAMBADA} of the hub, which could not be loaded "
            f"({type(error).__name__}: {one_line(error, 160)}); try with a network, or give its file "
            "with --text"
        ) from error
    return [Text(f"LAMBADA {number}", text) for number, text in enumerate(rows["text"], start=1)]
