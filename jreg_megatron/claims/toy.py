"""The models that ``make claims`` trains: small, so that many seeds fit on two cores.

The toy was chosen by the baseline alone, on seeds above 100. No claim uses these seeds. See README.md in
this folder.
"""

from __future__ import annotations

from pathlib import Path

from jreg_megatron.demo.training import Run, llama, optimizer

VOCABULARY = 512
STEPS = 2000
"""Steps with the smallest batch."""
SEEDS = 10
BATCHES = (8, 16, 32)
"""In sequences; all runs with JREG have the first."""
OTHER_ALPHAS = (0.0, 0.1, 0.3, 0.5, 3.0)
FEW_SEEDS = 3
"""For other batches and alphas."""

TASKS = ("--tasks", "speeches_last_word,speeches_bits_per_byte")
"""Words for ``evaluate``. The third task's passages are longer than the model's sequences."""

SEQUENCE = 64
_VALIDATION = 256  # sequences
TOKENS = BATCHES[0] * SEQUENCE
"""Of a step with the smallest batch."""
STEPS_BY = BATCHES[-1] // BATCHES[0]
"""With multiples of it all batches see the same number of tokens."""
FEWEST_STEPS = 8 * STEPS_BY
"""With fewer, a run has fewer than eight validations."""


MODEL = llama(8, 64, 192, SEQUENCE)
"""Megatron's flags of the toy."""
_OPTIMIZER = optimizer("6e-3", "6e-4")
_LOGGING = "--log-interval 25 --tensorboard-log-interval 25 --jreg-log-per-layer"


def runs(folder: Path, steps: int, seeds: int) -> list[Run]:
    """The runs of the claims, all on equally many tokens, each in its own folder under ``folder``.

    ``steps`` are those with the smallest batch.
    """

    def run(seed: int, alpha: float | None = None, batch: int = BATCHES[0]) -> Run:
        """Without an alpha it is a baseline."""
        name = f"{'baseline' if alpha is None else f'alpha{alpha:g}'}_batch{batch}_seed{seed}"
        jreg = {} if alpha is None else {"coeff": 1.0, "alpha": alpha}
        length = steps * BATCHES[0] // batch
        return Run(name, length, folder / name, **jreg, seed=seed, flags=flags(MODEL, batch), ranks=1)

    found = [run(seed, alpha) for seed in range(1, seeds + 1) for alpha in (None, 1.0)]
    for seed in range(1, min(FEW_SEEDS, seeds) + 1):
        found += [run(seed, batch=batch) for batch in BATCHES[1:]]
        found += [run(seed, alpha) for alpha in OTHER_ALPHAS]
    return found


def flags(model: str, batch: int = BATCHES[0], more: str = "") -> tuple[str, ...]:
    """Megatron's flags of a run of a toy; those of the method are in ``more``."""
    size = f"--micro-batch-size {batch} --global-batch-size {batch} --eval-iters {_VALIDATION // batch}"
    return tuple(f"{model} {_OPTIMIZER} {_LOGGING} {size} {more}".split())


def described(steps: int) -> dict[str, str]:
    """A page's description of the toy, which has ``steps`` with the first of :data:`BATCHES`."""
    return {
        "model": " ".join(MODEL.split()),
        "optimizer": " ".join(_OPTIMIZER.split()),
        "text": f"State of the Union speeches; a SentencePiece vocabulary of {VOCABULARY} pieces",
        "length": f"{steps:,} steps of {TOKENS} tokens, {steps * TOKENS:,} in all",
    }
