"""The models that ``make claims`` trains: small, so that many seeds fit on two cores.

The toy was chosen by the baseline alone, on seeds above 100. No claim uses these seeds. See README.md here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jreg_megatron.demo.training import Run
from jreg_megatron.methods.jreg.settings import JRegConfig

VOCABULARY = 512
STEPS = 2000
"""With the smallest batch."""
SEEDS = 10
BATCHES = (8, 16, 32)
"""In sequences; all runs with JREG have the first."""
OTHER_ALPHAS = (0.0, 0.1, 0.3, 0.5, 3.0)
FEW_SEEDS = 3
"""For other batches and alphas."""

TASKS = ("--tasks", "speeches_last_word,speeches_bits_per_byte")
"""Words for ``evaluate``. The third task's passages are longer than the model's sequences."""

_SEQUENCE = 64
_VALIDATION = 256  # sequences
TOKENS = BATCHES[0] * _SEQUENCE
"""Of a step with the smallest batch."""
STEPS_BY = BATCHES[-1] // BATCHES[0]
"""With multiples of it all batches see the same number of tokens."""
FEWEST_STEPS = 8 * STEPS_BY
"""So that each run is evaluated eight times."""


def model(layers: int = 8, hidden: int = 64, ffn: int = 192, mlp: str = "--swiglu") -> str:
    """Megatron's flags of a toy; the defaults are the toy of the claims."""
    return f"""
    --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} --num-attention-heads 4
    --seq-length {_SEQUENCE} --max-position-embeddings {_SEQUENCE}
    --normalization RMSNorm {mlp} --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    """


_OPTIMIZER = """
    --lr 6e-3 --min-lr 6e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
"""
_LOGGING = "--log-interval 25 --tensorboard-log-interval 25 --jreg-log-per-layer"


@dataclass(frozen=True)
class Plan:
    """The toys to train."""

    steps: int = STEPS
    seeds: int = SEEDS

    def runs(self, folder: Path) -> list[Run]:
        """All runs, each with a folder of its own under ``folder``."""
        baseline, jreg = JRegConfig(coeff=0.0), JRegConfig(coeff=1.0, alpha=1.0)
        settings = [
            (config, BATCHES[0], seed) for seed in range(1, self.seeds + 1) for config in (baseline, jreg)
        ]
        for seed in range(1, min(FEW_SEEDS, self.seeds) + 1):
            settings += [(baseline, batch, seed) for batch in BATCHES[1:]]
            settings += [(JRegConfig(coeff=1.0, alpha=alpha), BATCHES[0], seed) for alpha in OTHER_ALPHAS]
        return [self._run(folder, *setting) for setting in settings]

    def _run(self, folder: Path, config: JRegConfig, batch: int, seed: int) -> Run:
        """A run; all runs have the same number of tokens."""
        what = "baseline" if config.coeff == 0 else f"alpha{config.alpha:g}"
        name = f"{what}_batch{batch}_seed{seed}"
        steps = self.steps * BATCHES[0] // batch
        return Run(name, config, steps, folder / name, seed, flags(model(), batch), ranks=1)


def flags(model: str, batch: int = BATCHES[0], more: str = "") -> tuple[str, ...]:
    """Megatron's flags of a run of a toy; those of the method are in ``more``."""
    size = f"--micro-batch-size {batch} --global-batch-size {batch} --eval-iters {_VALIDATION // batch}"
    return tuple(f"{model} {_OPTIMIZER} {_LOGGING} {size} {more}".split())


def described(steps: int) -> dict[str, str]:
    """What a page says of the toy, which takes ``steps`` with the first of :data:`BATCHES`."""
    return {
        "model": " ".join(model().split()),
        "optimizer": " ".join(_OPTIMIZER.split()),
        "text": f"State of the Union speeches; a SentencePiece vocabulary of {VOCABULARY} pieces",
        "length": f"{steps:,} steps of {TOKENS} tokens, {steps * TOKENS:,} in all",
    }
