"""All settings of the regularizer: one frozen dataclass for Python, YAML and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from jreg_megatron.methods.jreg import formulas
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.stream.anatomy import (
    final_norm_of,
    last_stage_has_a_layer,
    last_stage_is_given_a_layer,
    num_layers,
    residual_layers,
)
from jreg_megatron.stream.settings import Settings, is_finite, is_integer, layer_setting, setting

if TYPE_CHECKING:
    from jreg_megatron.methods.jreg.regularizer import Regularizer
    from jreg_megatron.stream.method import Place

WEIGHT_RULES = ("softmax", "last", "uniform")
FINAL_STATES = ("pre_norm", "post_norm")
KERNELS = ("auto", "triton", "torch")
TOKENS = ("all", "unmasked")

# The last layer's input and the final norm's output must be on one rank to be compared.
_NO_LAYER_FOR_POST_NORM = (
    "JREG does not support final_state 'post_norm' with no layer on the last pipeline stage; use 'pre_norm', "
    "or put a layer there"
)


def _weights_from_text(text: str) -> str | tuple[float, ...]:
    """``softmax`` stays a name, ``0,0.5,0.5`` becomes numbers; anything else is left for the checks."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


@dataclass(frozen=True, kw_only=True)
class JRegConfig(Settings):
    """Settings of the jump-suppressing regularizer: ``loss = CE + coeff * sum_l w_l * Psi_l``.

    Every field is a command-line flag too (``--jreg-coeff`` and so on, see :meth:`add_arguments`) and a key
    for :meth:`from_mapping`.

    Raises:
        UserError: for a value that is not allowed; the message names the setting, the value and the fix.
    """

    name: ClassVar[str] = "JREG"
    prefix: ClassVar[str] = "jreg"
    title: ClassVar[str] = "JREG, the jump-suppressing regularizer"
    about: ClassVar[str] = (
        "loss = cross-entropy + lambda * sum over layers of weight * displacement (arXiv 2601.18302)"
    )
    in_full_graphs: ClassVar[bool] = True
    in_overlap: ClassVar[bool] = True

    coeff: float = setting(
        0.0,
        "lambda, the strength, >= 0. At 0 the displacement is only measured, and training is bit-identical "
        "to training without JREG. The paper uses 1.",
        float,
        "LAMBDA",
    )
    alpha: float = setting(
        1.0,
        "sharpness of the layer weights softmax(alpha * [1..L]), >= 0. At 0 all layers have the same weight. "
        "The paper uses 1.",
        float,
        "ALPHA",
    )
    weights: str | tuple[float, ...] = setting(
        "softmax",
        "layer weights: 'softmax' of alpha (the paper's), 'last' (layer L alone), 'uniform' (1/L each), or "
        "one number per layer, first layer first, as in 0,0,0.3,0.7.",
        _weights_from_text,
        "RULE",
    )
    final_state: str = setting(
        "pre_norm",
        "the last layer's output: 'pre_norm', before the final norm (the paper's), or 'post_norm', after "
        "it. The numbers differ several-fold.",
        metavar="STATE",
    )
    negligible_weight: float = setting(
        1e-6,
        "the lightest layers get no gradient if their weights together are at most this share of all "
        "weights. 0 leaves out only layers of weight 0.",
        float,
        "SHARE",
    )
    loss_weight: float = setting(
        1.0,
        "the factor by which the script multiplies its cross-entropy, as in 0.5 * CE + 0.5 * KD. JREG is "
        "not multiplied. If the loss has another factor, the first step stops the run.",
        float,
        "WEIGHT",
    )
    tokens: str = setting(
        "all",
        "the tokens that count: 'all', or 'unmasked': with a padding mask the tokens that are not padding, "
        "otherwise those that the loss mask keeps. Averaged in the same way as cross-entropy.",
        metavar="TOKENS",
    )
    token_share: float = setting(
        1.0,
        "the share of the tokens that get the gradient, 1/n: every n-th token of a sequence, with n times "
        "the weight. Each step takes other tokens; on average the gradient equals that of all tokens. All "
        "tokens are measured.",
        float,
        "SHARE",
    )
    start_iteration: int = setting(1, "first training iteration with the regularizer.", int, "N")
    stop_iteration: int | None = setting(
        None, "first training iteration without the regularizer again.", int, "N"
    )
    warmup_iterations: int = setting(
        0, "warm-up: the coefficient rises linearly over this many iterations.", int, "N"
    )
    measure_interval: int = setting(
        1, "measure in every N-th training iteration. Validation always measures.", int, "N"
    )
    layer: str = layer_setting()
    kernels: str = setting(
        "auto",
        "the implementation: 'triton' (fused, on a GPU), 'torch' (anywhere), or 'auto': triton where it "
        "runs. All ranks must use the same one.",
        metavar="KERNELS",
    )
    untested_cuda_graphs: bool = setting(
        False,
        "allow --cuda-graph-impl transformer_engine, local or full_iteration, which we have not compared on "
        "a GPU yet. First run the self-test with --cuda-graph on your GPU.",
        bool,
    )
    untested_overlap: bool = setting(
        False,
        "allow --overlap-moe-expert-parallel-comm, which we have not compared on GPUs yet. First run the "
        "self-test with --overlap on your GPUs.",
        bool,
    )
    log_per_layer: bool = setting(
        False, "also log each layer as jreg/displacement_layer_NN to TensorBoard and W&B.", bool
    )

    def __post_init__(self) -> None:
        self.require_layer()
        self.require("coeff", self.coeff, is_finite(self.coeff) and self.coeff >= 0, "a finite number >= 0")
        weight = self.loss_weight
        self.require("loss_weight", weight, is_finite(weight) and weight > 0, "a finite number > 0")
        self.require("alpha", self.alpha, is_finite(self.alpha) and self.alpha >= 0, "a finite number >= 0")
        if isinstance(self.weights, str):
            rules = ", ".join(WEIGHT_RULES)
            known = self.weights in WEIGHT_RULES
            self.require("weights", self.weights, known, f"one of {rules}, or one number per layer")
        else:
            is_list = isinstance(self.weights, list | tuple)
            self.require(
                "weights", self.weights, is_list, "a rule's name or a list of numbers, one per layer"
            )
            numbers = tuple(self.weights)
            allowed = all(is_finite(w) and w >= 0 for w in numbers) and any(numbers)
            self.require("weights", _shown(numbers), allowed, "finite numbers >= 0, one per layer, not all 0")
            # A list from YAML or Python becomes what the frozen dataclass can hash and compare.
            object.__setattr__(self, "weights", tuple(float(w) for w in numbers))
        self.require(
            "final_state", self.final_state, self.final_state in FINAL_STATES, " or ".join(FINAL_STATES)
        )
        share = self.negligible_weight
        self.require(
            "negligible_weight", share, is_finite(share) and 0 <= share < 1, "a number >= 0 and below 1"
        )
        self.require("tokens", self.tokens, self.tokens in TOKENS, " or ".join(TOKENS))
        share = self.token_share
        allowed = is_finite(share) and 0 < share <= 1 and abs(1 / share - round(1 / share)) < 1e-6
        self.require("token_share", share, allowed, "1, or 1 over a whole number, such as 0.5 or 0.25")
        self.require("kernels", self.kernels, self.kernels in KERNELS, ", ".join(KERNELS))
        for name, least in (("start_iteration", 1), ("warmup_iterations", 0), ("measure_interval", 1)):
            value = getattr(self, name)
            self.require(name, value, is_integer(value) and value >= least, f"a whole number >= {least}")
        if self.stop_iteration is not None:
            after = is_integer(self.stop_iteration) and self.stop_iteration > self.start_iteration
            fix = f"a whole number above {self.flag('start_iteration')} ({self.start_iteration}), or left out"
            self.require("stop_iteration", self.stop_iteration, after, fix)
        self.require(
            "log_per_layer", self.log_per_layer, isinstance(self.log_per_layer, bool), "true or false"
        )

    def layer_weights(self, num_layers: int) -> Tensor:
        """The weights ``w_1..w_L`` of the regularizer.

        Returns:
            ``[num_layers]`` float64; sums to 1 except for explicit numbers, which are used as given.

        Raises:
            UserError: if explicit weights are not one per layer.
        """
        if not isinstance(self.weights, str):
            fix = f"{num_layers} numbers, one for each layer of the model, not {len(self.weights)}"
            self.require("weights", _shown(self.weights), len(self.weights) == num_layers, fix)
            return torch.tensor(self.weights, dtype=torch.float64)
        if self.weights == "last":
            weights = torch.zeros(num_layers, dtype=torch.float64)
            weights[-1] = 1.0
            return weights
        return formulas.layer_weights(num_layers, 0.0 if self.weights == "uniform" else self.alpha)

    def gradient_weights(self, num_layers: int) -> Tensor:
        """:meth:`layer_weights`, with 0 for layers whose gradient is left out.

        The lightest layers are left out, as long as their weights together are at most
        ``negligible_weight * sum(w)``. Let ``e = coeff * negligible_weight * sum(w)``. No displacement is
        above 1, so the loss changes by at most ``e``. A displacement's gradient at a state ``h`` is at most
        ``1 / (2 |h|)`` long, so a token's gradient changes by at most ``e / (2 |h|)``.

        Returns:
            ``[num_layers]`` float64.

        Raises:
            UserError: if explicit weights are not one per layer.
        """
        weights = self.layer_weights(num_layers)
        order = weights.argsort(stable=True)
        is_left_out = weights[order].cumsum(0) <= self.negligible_weight * weights.sum()
        weights[order[is_left_out]] = 0.0
        return weights

    @property
    def token_stride(self) -> int:
        """One over :attr:`token_share`."""
        return round(1 / self.token_share)

    @property
    def has_schedule(self) -> bool:
        """Whether the coefficient, its tokens or the measuring depends on the iteration."""
        constant = self.start_iteration == 1 and self.stop_iteration is None and self.warmup_iterations == 0
        constant = constant and self.token_share == 1
        return super().has_schedule or (self.coeff > 0 and not constant)

    def coeff_at(self, iteration: int) -> float:
        """lambda in training iteration ``iteration`` (1-based): 0 before the start and from the stop on.

        With a warm-up of N iterations the first one has ``coeff / N`` and the N-th the full ``coeff``.
        """
        step = iteration - self.start_iteration + 1
        if step < 1 or (self.stop_iteration is not None and iteration >= self.stop_iteration):
            return 0.0
        return self.coeff * min(1.0, step / self.warmup_iterations) if self.warmup_iterations else self.coeff

    def refuse(self, model_config: Any) -> None:
        """Refuse ``post_norm`` if the final norm's pipeline stage has no layer, and a share of the tokens in
        a CUDA graph, which would take the same tokens in each step."""
        if self.token_share != 1 and getattr(model_config, "cuda_graph_impl", "none") == "full_iteration":
            raise UserError(
                f"{self.flag('token_share')} is {self.token_share:g}, and the graph of cuda_graph_impl "
                "full_iteration would take the same tokens in each step; leave one of the two out"
            )
        if self.final_state == "post_norm" and not last_stage_is_given_a_layer(model_config):
            raise UserError(_NO_LAYER_FOR_POST_NORM)

    def refuse_layers(self, num_layers: int) -> None:
        """Refuse explicit weights that are not one for each layer."""
        self.layer_weights(num_layers)

    def refuse_model(self, chunks: Sequence[Any]) -> None:
        """Refuse ``post_norm`` on a model without a final norm, or without a layer on its last stage."""
        if self.final_state != "post_norm":
            return
        if not last_stage_has_a_layer(chunks[0]):
            raise UserError(_NO_LAYER_FOR_POST_NORM)
        for chunk in chunks:
            is_last = any(layer.number == num_layers(chunk) for layer in residual_layers(chunk))
            if is_last and final_norm_of(chunk) is None:
                raise UserError(
                    f"{self.flag('final_state')} is post_norm, and the model has no final norm after its "
                    "last layer; use pre_norm"
                )

    def make(self, place: Place) -> Regularizer:
        """The regularizer on a built model."""
        from jreg_megatron.methods.jreg.regularizer import Regularizer

        return Regularizer(self, place)


def _shown(numbers: tuple[Any, ...]) -> str:
    return ",".join(str(n) for n in numbers)
