"""The open models of the paper's Tables 1 and 2, on the text that it measured them on: LAMBADA."""

from __future__ import annotations

from collections.abc import Sequence

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.reference import Reference, hub_revisions, step_of
from jreg_megatron.paper import numbers
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.extras import need

LAMBADA = "EleutherAI/lambada_openai"
"""The hub's name of the test set. There are two versions; the paper does not say which it took."""


def paper_models(names: Sequence[str]) -> list[tuple[Reference, float]]:
    """The checkpoints of the paper's models, all of them without ``names``, and zeta_L as it prints it.

    Of a model that the paper follows over training there is one checkpoint for each share of its steps: the
    branch on the hub whose step is nearest. zeta_L is in hundredths of Psi.

    Raises:
        UserError: for a name that the paper does not have, and where the hub has to be asked and is silent.
    """
    known, trained, over_training = (
        numbers()[table] for table in ("hub", "open_models", "open_models_over_training")
    )
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--paper names {unknown[0]}, which is none of the paper's: {', '.join(known)}")
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
    except Exception as error:  # datasets has no class of its own for what can go wrong here
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"--paper measures on LAMBADA, the data set {LAMBADA} of the hub, which could not be loaded "
            f"({type(error).__name__}: {said}); try with a network, or name its file by --text"
        ) from error
    return [Text(f"LAMBADA {number}", text) for number, text in enumerate(rows["text"], start=1)]
