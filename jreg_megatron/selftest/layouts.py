"""Layouts: each is one way in which Megatron splits and runs a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jreg_megatron.runtime.errors import UserError

NUM_LAYERS = 4
LENGTH = 32
"""Tokens of a sequence."""
BATCH = 16
"""Sequences of a step, over all data-parallel replicas and micro-batches."""
NUM_EXPERTS = 4
NUM_HEADS = 4

PIPELINE_LAYOUTS = {2: "Etttt|L", 4: "Et|tt|t|L"}
"""By number of (virtual) stages: a pipeline layout with uneven stages. The last one has no layer."""

UNEVEN = (1, 3)
"""Layers of the two stages of an uneven split."""

HYBRIDS: dict[str, tuple[str, ...]] = {
    "pairs": ("*-", "*-", "*-", "*-"),
    "latent attention": ("+-", "+-", "+-", "+-"),
    "experts": ("*E", "*E", "*E", "*E"),
    "Mamba": ("M-", "*-", "M", "*-"),
    "lone sub-layers": ("--", "*E-", "M", "*"),
    "sub-layers as layers": ("M", "-", "E", "*"),
}
"""Layers of a HybridModel, by name. The reference uses these layers; it reads no pattern."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the toy model is split and run. Sizes have the names of Megatron's arguments, shortened."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Model chunks per pipeline stage."""
    context: int = 1
    expert: int = 1
    """Number of ranks of data and context parallelism that share the experts."""
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    fsdp: bool = False
    """torch's FSDP2 instead of Megatron's DistributedDataParallel."""
    megatron_fsdp: str = "none"
    """none, or what Megatron-FSDP shards: no_shard, optim, optim_grads or optim_grads_params."""
    num_microbatches: int = 2
    split: str = "even"
    """The split of layers over pipeline stages: even, uneven (fewer on the first), embedding and loss (each
    counts as a layer), layout (a custom pipeline layout, with only the loss on the last stage)."""
    recompute: str = "none"
    """none, selective, uniform (full) or block (full)."""
    graphs: str = "none"
    """What is in CUDA graphs: none; layers (whole layers); some of Megatron's ``--cuda-graph-modules``, with
    spaces between; or iteration (all of it in one). They are captured after a first step."""
    local_graphs: bool = False
    """Whether graphs of layers are Megatron's own, and not Transformer Engine's."""
    overlap: bool = False
    """Megatron's ``--overlap-moe-expert-parallel-comm``: one micro-batch's forward pass runs between parts of
    another's backward pass."""
    per_token_loss: bool = False
    masked: bool = False
    """Whether the loss mask leaves tokens out, unevenly."""
    tokens: str = "all"
    """Which tokens JREG counts: all or unmasked."""
    padded: bool = False
    """Whether sequences end in padding. Then every stage has the padding mask; the last has both masks."""
    packed: bool = False
    """Whether a micro-batch's sequences are packed into one."""
    token_stride: int = 1
    """1 of this many tokens of a sequence has the regularizer's gradient."""
    final_state: str = "pre_norm"
    precision: str = "fp32"
    """fp32, bf16, or fp16 with a loss scale."""
    model: str = "gpt"
    """gpt (dense Llama), moe, mtp (with a layer of multi-token prediction) or hybrid (HybridModel)."""
    layers: str = "pairs"
    """Of a HybridModel: one of ``HYBRIDS``."""
    capacity: float = 0.0
    """Each expert's capacity, as a share of a micro-batch's tokens. It keeps the tokens with the largest
    weight and pads the rest. 1: no token is left out. 0: no capacity."""
    balanced: bool = False
    """Whether the router has an auxiliary loss."""
    tied: bool = False
    methods: str = "jreg"
    """What is attached: jreg; all of JREG, norms and attenuation; or blocks, JREG on layers with LayerNorm
    scaling and Peri-LN."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def stages(self) -> int:
        """Pipeline stages, virtual ones counted."""
        return self.pipeline * self.virtual

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The sub-layers of each layer, by the symbols of hybrid patterns."""
        if self.model == "hybrid":
            return HYBRIDS[self.layers]
        return ("*E" if self.model == "moe" else "*-",) * NUM_LAYERS

    @property
    def has_experts(self) -> bool:
        """Whether some layer has experts."""
        return any("E" in kinds for kinds in self.sublayers)

    @property
    def stage_sizes(self) -> list[int]:
        """Layers of each stage of a HybridModel, virtual ones counted."""
        return [*UNEVEN] if self.split == "uneven" else [NUM_LAYERS // self.stages] * self.stages

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a micro-batch."""
        return BATCH // (self.data * self.num_microbatches)

    def refusal(self) -> str | None:
        """Why the layout cannot run, by Megatron, JREG or the toy model's size; None if it can."""
        return next((rule.reason for rule in RULES if not rule.holds(self)), None)

    @property
    def name(self) -> str:
        """A short name: the differences to the default, which is one rank."""
        sizes = {"TP": self.tensor, "PP": self.pipeline, "VPP": self.virtual, "CP": self.context}
        sizes |= {"EP": self.expert, "DP": self.data}
        words = [f"{letters}{size}" for letters, size in sizes.items() if size > 1] or ["one rank"]
        words += ["SP"] * self.sequence_parallel
        words += ["distributed optimizer"] * self.distributed_optimizer
        words += ["FSDP2"] * self.fsdp
        words += [f"Megatron-FSDP {self.megatron_fsdp}"] * (self.megatron_fsdp != "none")
        words += ["1 micro-batch"] * (self.num_microbatches == 1)
        words += [f"{self.num_microbatches} micro-batches"] * (self.num_microbatches > 2)
        words += [f"{self.split} split"] * (self.split != "even")
        words += [f"{self.recompute} recompute"] * (self.recompute != "none")
        words += {"none": [], "iteration": ["CUDA graph of the iteration"]}.get(
            self.graphs, [f"{'local ' * self.local_graphs}CUDA graphs of {self.graphs}"]
        )
        words += ["overlapped experts"] * self.overlap
        words += ["per-token loss"] * self.per_token_loss
        words += ["masked tokens"] * self.masked
        words += ["padding"] * self.padded
        words += ["packed sequences"] * self.packed
        words += ["JREG on unmasked tokens"] * (self.tokens != "all")
        words += [self.final_state] * (self.final_state != "pre_norm")
        words += {"moe": ["MoE"], "mtp": ["MTP"], "hybrid": ["HybridModel"]}.get(self.model, [])
        words += [self.layers] * (self.layers != "pairs")
        words += [f"experts take {self.capacity:.0%}"] * (self.capacity > 0)
        words += ["auxiliary loss"] * self.balanced
        words += ["tied"] * self.tied
        words += [f"gradient in 1 of {self.token_stride} tokens"] * (self.token_stride > 1)
        words += ["all methods"] * (self.methods == "all")
        words += ["LayerNorm scaling and Peri-LN"] * (self.methods == "blocks")
        words += [self.precision] * (self.precision != "fp32")
        return " ".join(words[:1]) + "".join(f", {word}" for word in words[1:])


@dataclass(frozen=True)
class Rule:
    """A condition that a layout must meet to run."""

    names: tuple[str, ...]
    """The layout's fields in the condition."""
    holds: Callable[[Layout], bool]
    reason: str


def _rule(names: str, reason: str, holds: Callable[[Layout], bool]) -> Rule:
    return Rule(tuple(names.split()), holds, reason)


RULES = (
    _rule("virtual pipeline", "virtual stages need a pipeline", lambda x: x.virtual == 1 or x.pipeline > 1),
    _rule(
        "virtual pipeline num_microbatches",
        "the interleaved schedule needs a multiple of the pipeline's size of micro-batches",
        lambda x: x.virtual == 1 or x.num_microbatches % x.pipeline == 0,
    ),
    _rule(
        "split pipeline virtual",
        "the toy model's layers don't divide so",
        lambda x: {
            "even": NUM_LAYERS % x.stages == 0,
            "layout": x.stages in PIPELINE_LAYOUTS,
        }.get(x.split, x.pipeline == 2 and x.virtual == 1),
    ),
    _rule(
        "sequence_parallel tensor",
        "sequence parallelism needs tensor parallelism",
        lambda x: x.tensor > 1 or not x.sequence_parallel,
    ),
    _rule("tensor", "the attention heads don't divide", lambda x: NUM_HEADS % x.tensor == 0),
    _rule(
        "context tensor", "the sequence doesn't divide", lambda x: LENGTH % (2 * x.context * x.tensor) == 0
    ),
    _rule(
        "data num_microbatches",
        "the batch doesn't divide",
        lambda x: BATCH % (x.data * x.num_microbatches) == 0,
    ),
    _rule(
        "expert data context",
        "experts are shared among ranks of data and context parallelism",
        lambda x: (x.data * x.context) % x.expert == 0 and NUM_EXPERTS % x.expert == 0,
    ),
    _rule(
        "layers model",
        "only a HybridModel has sub-layers",
        lambda x: x.layers == "pairs" or x.model == "hybrid",
    ),
    _rule("expert model layers", "only a MoE model has experts", lambda x: x.expert == 1 or x.has_experts),
    _rule(
        "model layers tensor sequence_parallel",
        "Megatron trains MoE with tensor parallelism only with sequence parallelism",
        lambda x: not x.has_experts or x.tensor == 1 or x.sequence_parallel,
    ),
    _rule(
        "model layers precision graphs",
        "rounding changes the choice of experts, so each gets all tokens, and only graphs are compared",
        lambda x: not x.has_experts or x.precision == "fp32" or x.graphs != "none",
    ),
    _rule(
        "layers context",
        "the stand-in for a Mamba's mixer does not support context parallelism",
        lambda x: x.context == 1 or not any("M" in kinds for kinds in x.sublayers),
    ),
    _rule(
        "packed context model",
        "packed sequences are compared in GPTModels without context parallelism",
        lambda x: not x.packed or (x.context == 1 and x.model in ("gpt", "moe")),
    ),
    _rule(
        "model tied pipeline",
        "Megatron cannot name the tied weights of multi-token prediction in a pipeline",
        lambda x: x.model != "mtp" or not x.tied or x.pipeline == 1,
    ),
    _rule(
        "fsdp pipeline expert distributed_optimizer tied",
        "Megatron refuses FSDP2 with it",
        lambda x: not x.fsdp or (x.pipeline == x.expert == 1 and not x.distributed_optimizer and not x.tied),
    ),
    _rule(
        "megatron_fsdp fsdp pipeline distributed_optimizer graphs",
        "Megatron-FSDP has its own optimizer and no pipeline, and is not compared in CUDA graphs",
        lambda x: (
            x.megatron_fsdp == "none"
            or (x.pipeline == 1 and x.graphs == "none" and not (x.fsdp or x.distributed_optimizer))
        ),
    ),
    _rule(
        "megatron_fsdp expert tensor data context per_token_loss",
        "Megatron-FSDP divides gradients of experts without replicas once too often in each micro-batch",
        lambda x: (
            x.megatron_fsdp in ("none", "no_shard", "optim")
            or x.per_token_loss
            or not 1 < x.expert == x.tensor * x.data * x.context
        ),
    ),
    _rule(
        "megatron_fsdp expert",
        "Megatron-FSDP no_shard clips gradients by the norm of each rank's own experts",
        lambda x: x.megatron_fsdp != "no_shard" or x.expert == 1,
    ),
    _rule(
        "graphs recompute fsdp packed padded",
        "graphs are compared in models as most jobs run them",
        lambda x: (
            x.graphs == "none"
            or (
                (x.recompute in ("none", "selective") or x.graphs == "iteration")
                and not (x.fsdp or x.packed or x.padded)
            )
        ),
    ),
    _rule(
        "local_graphs graphs",
        "only graphs of layers can be Megatron's own or Transformer Engine's",
        lambda x: not x.local_graphs or x.graphs not in ("none", "iteration"),
    ),
    _rule(
        "local_graphs pipeline graphs",
        "Megatron-Core 0.19.2 itself fails with its own graphs in a pipeline, and of the MLP alone",
        lambda x: not x.local_graphs or (x.pipeline == 1 and "mlp" not in x.graphs.split()),
    ),
    _rule(
        "graphs precision token_stride",
        "JREG refuses a loss scale and a share of the tokens in a graph of the iteration",
        lambda x: x.graphs != "iteration" or (x.precision != "fp16" and x.token_stride == 1),
    ),
    _rule(
        "graphs model layers capacity",
        "the host waits for the number of an expert's tokens, unless that is its capacity",
        lambda x: (
            not {"iteration", "layers", "moe"} & {*x.graphs.split()} or not x.has_experts or x.capacity > 0
        ),
    ),
    _rule(
        "token_stride context tensor sequence_parallel",
        "JREG refuses a share of the tokens where a part of a sequence is no multiple of the stride",
        lambda x: (
            LENGTH // x.context // (x.tensor if x.sequence_parallel else 1) % x.token_stride == 0
            and (x.context == 1 or LENGTH // (2 * x.context) % x.token_stride == 0)
        ),
    ),
    _rule(
        "model layers capacity balanced",
        "only experts have a capacity and an auxiliary loss",
        lambda x: x.has_experts or not (x.capacity or x.balanced),
    ),
    _rule(
        "overlap expert pipeline virtual recompute graphs local_graphs",
        "Megatron's overlapped schedule needs expert parallelism, virtual stages in a pipeline, no full "
        "recompute, and the experts in no graph of a layer, nor anything in one of Megatron's own",
        lambda x: (
            not x.overlap
            or (
                x.expert > 1
                and (x.pipeline == 1 or x.virtual > 1)
                and x.recompute in ("none", "selective")
                and not {*x.graphs.split()} & {"layers", "mlp", "moe"}
                and not x.local_graphs
            )
        ),
    ),
    _rule(
        "overlap model",
        "only experts have the overlapped schedule",
        lambda x: not x.overlap or x.model == "moe",
    ),
    _rule("fsdp precision", "Megatron refuses FSDP2 in fp16", lambda x: not x.fsdp or x.precision != "fp16"),
    _rule(
        "fsdp data context",
        "FSDP2 needs ranks to share out the parameters to",
        lambda x: not x.fsdp or x.data * x.context > 1,
    ),
    _rule(
        "fsdp per_token_loss",
        "Megatron does not divide FSDP2's gradients by the number of tokens",
        lambda x: not x.fsdp or not x.per_token_loss,
    ),
    _rule(
        "methods model",
        "LayerNorm scaling and Peri-LN support only a GPTModel without MTP",
        lambda x: x.methods != "blocks" or x.model in ("gpt", "moe"),
    ),
    _rule(
        "model split",
        "a HybridModel's pipeline is cut by its pattern",
        lambda x: x.model != "hybrid" or x.split in ("even", "uneven"),
    ),
    _rule(
        "model layers recompute",
        "full recompute by block splits attention from MLP in a HybridModel",
        lambda x: x.model != "hybrid" or x.recompute != "block" or max(map(len, x.sublayers)) == 1,
    ),
    _rule(
        "final_state split model",
        "JREG refuses post_norm where no layer is on the final norm's pipeline stage",
        lambda x: x.final_state == "pre_norm" or x.split != "layout" or x.model == "mtp",
    ),
)


MODES: tuple[dict[str, Any], ...] = (
    {},
    {"methods": "all"},
    {"methods": "blocks"},
    {"token_stride": 4, "recompute": "selective"},
    {"model": "moe", "expert": 2},
    {"fsdp": True},
    {"megatron_fsdp": "optim_grads_params"},
    {"recompute": "uniform", "masked": True, "tokens": "unmasked"},
    {"per_token_loss": True, "masked": True},
    {"virtual": 2, "num_microbatches": 4},
    {"model": "hybrid"},
    {"model": "hybrid", "layers": "lone sub-layers"},
    {"model": "mtp"},
    {"final_state": "post_norm", "recompute": "block"},
    {"split": "layout", "tied": True},
    {"split": "uneven", "recompute": "selective"},
    {"precision": "bf16"},
    {"precision": "fp16", "num_microbatches": 1},
    {"per_token_loss": True, "masked": True, "tokens": "unmasked", "final_state": "post_norm"},
)
"""Variations in addition to sizes. Each runs at some sizes, the first one also at all other sizes."""

GRAPH_MODES: tuple[dict[str, Any], ...] = (
    {"graphs": "layers"},
    {"graphs": "attn"},
    {"graphs": "mlp", "num_microbatches": 4},
    {"graphs": "layers", "methods": "all"},
    {"graphs": "layers", "methods": "blocks"},
    {"graphs": "layers", "virtual": 2, "num_microbatches": 4},
    {"graphs": "attn", "recompute": "selective", "final_state": "post_norm"},
    {"graphs": "attn moe_router", "model": "moe", "balanced": True},
    {"graphs": "layers", "model": "hybrid", "layers": "Mamba"},
    {"graphs": "mamba mlp", "model": "hybrid", "layers": "Mamba", "methods": "all"},
    {"graphs": "attn moe_router", "model": "hybrid", "layers": "experts"},
)
"""The same for ``--cuda-graph transformer_engine``."""

LOCAL_GRAPH_MODES: tuple[dict[str, Any], ...] = tuple(
    {"local_graphs": True, "graphs": "layers", **more}
    for more in (
        {},
        {"methods": "all"},
        {"methods": "blocks", "num_microbatches": 4},
        {"recompute": "selective", "final_state": "post_norm"},
        {"masked": True, "tokens": "unmasked", "token_stride": 4},
        {"model": "hybrid", "layers": "Mamba"},
        {"model": "hybrid", "layers": "Mamba", "graphs": "mamba attn", "methods": "all"},
        {"model": "hybrid", "layers": "experts", "graphs": "attn moe_router", "expert": 2},
        {"model": "hybrid", "layers": "experts", "graphs": "moe_router", "recompute": "selective"},
    )
)
"""The same for ``--cuda-graph local``."""

FULL_GRAPH_MODES: tuple[dict[str, Any], ...] = (
    {"graphs": "iteration"},
    {"graphs": "iteration", "num_microbatches": 4, "masked": True, "tokens": "unmasked"},
    {"graphs": "iteration", "methods": "all"},
    {"graphs": "iteration", "methods": "blocks", "recompute": "uniform"},
    {"graphs": "iteration", "virtual": 2, "num_microbatches": 4},
    {"graphs": "iteration", "final_state": "post_norm", "recompute": "selective"},
    {"graphs": "iteration", "model": "hybrid"},
    {"graphs": "iteration", "model": "moe", "capacity": 1.0, "balanced": True},
    {"graphs": "iteration", "model": "hybrid", "layers": "experts", "capacity": 1.0, "expert": 2},
)
"""The same for ``--cuda-graph full_iteration``."""


OVERLAP_MODES: tuple[dict[str, Any], ...] = tuple(
    {"model": "moe", "expert": 2, "overlap": True, "num_microbatches": 4, **more}
    for more in (
        {},
        {"methods": "all"},
        {"virtual": 2},
        {"virtual": 2, "methods": "all", "final_state": "post_norm"},
        {"per_token_loss": True, "masked": True, "tokens": "unmasked"},
        {"recompute": "selective", "token_stride": 4},
    )
)
"""The same for ``--overlap``."""

OVERLAP_IN_FULL_GRAPH_MODES: tuple[dict[str, Any], ...] = tuple(
    {**mode, "graphs": "iteration", "capacity": 1.0, "token_stride": 1} for mode in OVERLAP_MODES
)
"""The same where a CUDA graph of the iteration is asked for too."""


def layouts_for(
    world_size: int,
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
    context: int | None = None,
    expert: int | None = None,
    precision: str | None = None,
    graphs: str | None = None,
    overlap: bool = False,
) -> list[Layout]:
    """Layouts that use all ranks: every way to split the model into the given sizes, and every mode once.

    Args:
        world_size: the number of ranks.
        tensor, pipeline, context, expert: fixed sizes; others are varied.
        precision: the type of all layouts; by default each mode's own.
        graphs: Megatron's ``cuda_graph_impl`` of all, if they have CUDA graphs.
        overlap: whether all have Megatron's overlapped schedule for experts; with ``full_iteration`` too.

    Raises:
        UserError: if the toy model cannot be split in this way.
    """
    modes = {
        None: MODES,
        "transformer_engine": GRAPH_MODES,
        "local": LOCAL_GRAPH_MODES,
        "full_iteration": FULL_GRAPH_MODES,
    }[graphs]
    if overlap:
        modes = OVERLAP_IN_FULL_GRAPH_MODES if graphs else OVERLAP_MODES
    powers = [2**n for n in range(world_size.bit_length())]
    sizes = [
        {"tensor": t, "pipeline": p, "context": c, "data": world_size // (t * p * c)}
        for t, p, c in itertools.product(*([n] if n else powers for n in (tensor, pipeline, context)))
        if world_size % (t * p * c) == 0
    ]

    def allowed(cut: dict[str, int], mode: dict[str, Any]) -> Layout | None:
        values = {"num_microbatches": 2 if cut["data"] < BATCH else 1, **cut, **mode}
        values["sequence_parallel"] = cut["tensor"] > 1
        is_shared = cut["data"] * cut["context"] > 1
        values["distributed_optimizer"] = is_shared and not {"fsdp", "megatron_fsdp"} & mode.keys()
        if expert and expert > 1:
            values = {
                "model": "moe",
                "capacity": float(graphs == "full_iteration"),
                **values,
                "expert": expert,
            }
        if precision:
            values["precision"] = precision
        layout = Layout(**values)
        return layout if layout.refusal() is None else None

    if not any(allowed(cut, mode) for cut in sizes for mode in modes):
        asked = {"--tp": tensor, "--pp": pipeline, "--cp": context, "--ep": expert}
        given = " ".join(f"{flag} {n}" for flag, n in asked.items() if n) or "all sizes"
        given += " and --overlap" * overlap
        raise UserError(
            f"{given}{f' in {precision}' if precision else ''}: the toy model ({NUM_LAYERS} layers, "
            f"{NUM_HEADS} heads, {NUM_EXPERTS} experts, {LENGTH} tokens, {BATCH} sequences) cannot be split "
            f"so over {world_size} rank{'s' * (world_size > 1)}; give powers of two up to 4, another number "
            "of ranks, or fp32 for experts"
        )
    waiting = list(modes)

    def next_layout(cut: dict[str, int]) -> Layout | None:
        for mode in waiting:
            if layout := allowed(cut, mode):
                waiting.remove(mode)
                return layout
        return None

    # Every cut has a layout. If modes are left over, cuts have more.
    chosen = [next_layout(cut) or allowed(cut, modes[0]) for cut in sizes]
    while more := [layout for cut in sizes if (layout := next_layout(cut))]:
        chosen += more
    return list(dict.fromkeys(layout for layout in chosen if layout))
