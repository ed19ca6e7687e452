"""The models that are measured: the demo's and the three of ``recipes/``, as Megatron's arguments."""

from __future__ import annotations

from dataclasses import dataclass

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
        sizes: dict[str, int] = {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_hidden_size,
            "--num-attention-heads": self.num_attention_heads,
            "--padded-vocab-size": self.vocab_size,
        }
        flags = [word for flag, size in sizes.items() for word in (flag, str(size))]
        return [*flags, *_LLAMA.split(), *(_RECIPE if self.recipe else _DEMO).split()]


# Micro-batches hold 8,192 tokens, for which the costs are stated. More micro-batches a step would make the
# optimizer's share, to which JREG adds nothing, smaller.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("demo", None, 8, 128, 352, 4, 128, 4096, 4, 2),
        Shape("170m", "llama_170m", 12, 768, 2048, 12, 1024, 32000, 8, 4),
        Shape("1b", "llama_1b", 16, 2048, 5376, 16, 1024, 32000, 8, 4),
        Shape("3.4b", "llama_3b4", 30, 3072, 8192, 24, 1024, 32000, 8, 4),
    )
}


def find_shape(name: str) -> Shape | None:
    """The shape of that name, or of that recipe; None if there is none."""
    for shape in SHAPES.values():
        if name.lower() in (shape.name, shape.recipe):
            return shape
    return None
