"""Initial weights of Meta Lingua, without a scale by depth. Megatron has no flags for them."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

from torch import Tensor, nn

from jreg_megatron.runtime.errors import UserError

FLAG = "--init-fan-in"
_CUT = 3.0  # standard deviations
_OTHERS = {
    "init_method_std": (0.02, "--init-method-std"),
    "embedding_init_method_std": (None, "--embedding-init-method-std"),
    "use_mup": (False, "--use-mup"),
    "num_experts": (None, "--num-experts"),  # their matrices have other shapes
}


def check(args: Namespace) -> None:
    """Refuse flags that exclude ``--init-fan-in``, a flag of ``jreg_megatron.pretrain``.

    Raises:
        UserError: naming the flag.
    """
    for name, (default, flag) in _OTHERS.items():
        value = getattr(args, name, default)
        if getattr(args, "init_fan_in", False) and value != default:
            raise UserError(f"{flag} is {value}, but {FLAG} sets the initial weights; leave one of them out")


def set_fan_in(config: Any, args: Namespace) -> None:
    """Make a ``TransformerConfig`` draw each matrix from a normal distribution cut at 3 standard deviations.

    The standard deviation is ``inputs ** -0.5`` for every matrix, also embedding and output layer. These are
    the defaults of Meta Lingua, in which arXiv 2601.18302 trained. Megatron's own standard deviation is 0.02,
    divided by ``sqrt(2 * layers)`` for the two matrices that write to the residual stream.
    """
    # These two are split over their inputs. On a GPU a rank draws its share, on a CPU the whole matrix.
    shares = 1 if args.use_cpu_initialization else args.tensor_model_parallel_size
    config.init_method = config.embedding_init_method = partial(_draw, 1)
    config.output_layer_init_method = partial(_draw, shares)


def _draw(shares: int, weight: Tensor) -> None:
    std = float(weight.shape[-1] * shares) ** -0.5
    # Older versions of torch draw the tails too coarsely in bfloat16.
    drawn = nn.init.trunc_normal_(weight.detach().float(), std=std, a=-_CUT * std, b=_CUT * std)
    weight.detach().copy_(drawn)
