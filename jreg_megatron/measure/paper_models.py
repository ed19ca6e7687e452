"""The open models of the paper's Tables 1 and 2, on the text that it measured them on: LAMBADA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jreg_megatron.data.texts import Text
from jreg_megatron.decoder.reference import Reference, hub_revisions, step_of
from jreg_megatron.paper import numbers
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.extras import need

LAMBADA = "EleutherAI/lambada_openai"
"""The hub's name of the test set. There are two versions; the paper does not say which it took."""


def paper_models(names: Sequence[str]) -> list[Reference]:
    """The checkpoints of the paper's models, all of them without ``names``.

    Of a model that the paper follows over training there is one checkpoint for each share of its steps: the
    branch on the hub whose step is nearest.

    Raises:
        UserError: for a name that the paper does not have, and where the hub has to be asked and is silent.
    """
    known = numbers()["hub"]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--paper names {unknown[0]}, which is none of the paper's: {', '.join(known)}")
    found = []
    for name in names or known:
        source = known[name]
        if name in numbers()["open_models"]:
            found.append(Reference(name, source))
            continue
        branches = {step_of(branch) or 0: branch for branch in hub_revisions(source)}
        for share in numbers()["open_models_over_training"]["shares"]:
            nearest = min(branches, key=lambda step: abs(step - share * max(branches)))
            found.append(Reference(name, source, branches[nearest]))
    return found


def printed_zeta(references: Sequence[Reference]) -> list[float]:
    """What the paper prints for :func:`paper_models`, in the same order: zeta_L, in hundredths of Psi."""
    of_shares: dict[str, list[float]] = {}
    for name, values in numbers()["open_models_over_training"].items():
        of_shares[name] = [float(value) for value in values]
    return [
        float(numbers()["open_models"][reference.name][0])
        if reference.name in numbers()["open_models"]
        else of_shares[reference.name].pop(0)
        for reference in references
    ]


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
            f"--paper measures on LAMBADA, the data set {LAMBADA} of the hub, which cannot be had "
            f"({type(error).__name__}: {said}); try with a network, or name its file by --text"
        ) from error
    return [Text(f"LAMBADA {number}", text) for number, text in enumerate(rows["text"], start=1)]


def print_beside(console: Any, rows: Sequence[tuple[dict[str, Any], float]]) -> None:
    """Print each measured model's zeta_L beside the paper's.

    Args:
        console: rich's.
        rows: a model's entry of the document, and what the paper prints for it.
    """
    from rich.table import Table

    table = Table(title="zeta_L: the paper's and ours", title_justify="left")
    table.add_column("model", overflow="fold")
    for column in ("revision", "paper", "before the final norm", "after it"):
        table.add_column(column, justify="right")
    for model, printed in rows:
        rates = [model["jump_rate"].get(state) for state in ("pre_norm", "post_norm")]
        ours = ["" if rate is None else f"{rate:.2f}" for rate in rates]
        table.add_row(model["name"], model["revision"] or "", f"{printed:g}", *ours)
    console.print(table)
