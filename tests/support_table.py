"""Writes what is supported and what is refused into ``jreg_megatron/selftest/README.md``.

Both tables come from the code: ``python tests/support_table.py``. A row of the first needs a layout that the
tests compare, or a test of that name; the second has what ``stream/support`` refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import readme
from layout_rows import rows

from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.stream.support import REFUSED

LAYOUTS: dict[str, Callable[[Layout], bool]] = {
    "tensor parallelism": lambda x: x.tensor > 1,
    "sequence parallelism": lambda x: x.sequence_parallel,
    "context parallelism": lambda x: x.context > 1,
    "pipeline parallelism": lambda x: x.pipeline > 1,
    "virtual pipeline stages": lambda x: x.virtual > 1,
    "uneven pipeline stages, custom layouts, embedding and loss counted as layers": lambda x: (
        x.split != "even"
    ),
    "expert parallelism": lambda x: x.expert > 1,
    "data parallelism": lambda x: x.data > 1,
    "distributed optimizer": lambda x: x.distributed_optimizer,
    "torch FSDP2": lambda x: x.fsdp,
    "Megatron-FSDP, Megatron-Core 0.19": lambda x: x.megatron_fsdp != "none",
    "recompute: selective": lambda x: x.recompute == "selective",
    "recompute: full, uniform": lambda x: x.recompute == "uniform",
    "recompute: full, block": lambda x: x.recompute == "block",
    "gradient accumulation": lambda x: x.num_microbatches > 1,
    "per-token loss": lambda x: x.per_token_loss,
    "loss masks": lambda x: x.masked,
    "JREG on unmasked tokens, by the loss mask": lambda x: x.tokens == "unmasked" and not x.padded,
    "JREG on unmasked tokens, by the padding mask": lambda x: x.tokens == "unmasked" and x.padded,
    "packed sequences": lambda x: x.packed,
    "last state after the final norm": lambda x: x.final_state == "post_norm",
    "bf16": lambda x: x.precision == "bf16",
    "fp16 with a loss scale": lambda x: x.precision == "fp16",
    "`GPTModel` of dense layers": lambda x: x.model == "gpt",
    "`GPTModel` with experts": lambda x: x.model == "moe",
    "multi-token prediction": lambda x: x.model == "mtp",
    "[`HybridModel`](#hybridmodel)": lambda x: x.model == "hybrid",
    "tied embeddings": lambda x: x.tied,
    "several methods at once": lambda x: x.methods == "all",
}
"""Rows that layouts show: the text, and the layouts."""

KINDS = {
    "latent attention (MLA)": "latent",
    "sliding windows": "window",
    "grouped queries, attention sinks (`--softmax-type learnable`, `off-by-one`)": "learnable sinks",
    "MuP (`--use-mup`)": "MuP",
    "Liger's patch of Megatron, with stand-ins for its kernels": "Liger",
    "residual stream in fp32": "fp32 residual",
    "experts' tokens exchanged by all-to-all": "tokens exchanged",
    "torch FSDP2 by wrappers of other frameworks, such as Primus; copies of shards": "another's FSDP2",
}
"""Variants that ``test_variants`` compares with a reference, each with its name there."""

TESTS = {
    "Muon, `dist_muon` (package `emerging_optimizers`)": "test_pretrain::test_muon_that_ranks_share_gives",
    "gated delta net, sparse attention": "test_hybrid::test_sub_layers_of_every_kind_give",
    "Transformer Engine's layers, with a stand-in for it": (
        "test_transformer_engine::test_step_in_transformer"
    ),
    "CUDA graphs of single layers, Transformer Engine's or Megatron's, with stand-ins for them": (
        "test_cuda_graphs::test_a_step_of_replayed_graphs_equals_the_reference_at"
    ),
    "CUDA graph of a whole iteration, with a stand-in for it": (
        "test_cuda_graphs::test_a_replayed_iteration_equals_the_reference_at"
    ),
    "experts with a limited number of tokens (`--moe-expert-rank-capacity-factor`)": (
        "test_cuda_graphs::test_an_iteration_that_megatron_runs_again"
    ),
    "overlapped experts (`--overlap-moe-expert-parallel-comm`), with a stand-in for streams": (
        "test_overlap::test_an_overlapped_step_equals_the_reference_at"
    ),
    "overlapped experts of a limited number of tokens, in a CUDA graph of the iteration, with stand-ins": (
        "test_overlap::test_an_overlapped_iteration_in_a_graph_equals_the_reference_at"
    ),
    "fine-grained activation offloading, with CPU tensors": (
        "test_offload::test_a_step_of_offloaded_activations_equals_the_reference_at"
    ),
    "resume at another layout": "test_accidents::test_a_run_resumes_at_another_layout",
    "launcher": "test_launch::test_a_launched_script_gives_the_same_values",
    "Megatron-Bridge, with a stand-in for it": "test_bridge::test_step_equals_the_reference_at",
    "low-rank adapters (LoRA) on a frozen model, also with recompute and in a pipeline": (
        "test_lora::test_adapters_on_a_frozen_model_get"
    ),
    "Megatron-Bridge 0.6.2 itself": "real_bridge::test_two_lines_of_a_recipe_train",
    "LoRA of Megatron-Bridge 0.6.2": "real_bridge::test_bridges_low_rank_adapters_get",
    "Megatron-FSDP in Megatron-Bridge 0.6.2": "real_bridge::test_megatron_fsdp_trains_as_copies",
}
"""Features that other tests show, each with its file and the beginning of its name."""

HERE = Path(__file__).parent


def supported() -> str:
    """The first table, with empty lines around it.

    Raises:
        AssertionError: if no layout or test shows a row.
    """
    table = [("what", "shown by")]
    for what, has in LAYOUTS.items():
        count = sum(map(has, rows()))
        assert count, what
        table.append((what, f"{count} of the [layouts](#layouts)"))
    for what, kind in KINDS.items():
        assert f'\n    "{kind}": (' in (HERE / "variant_step.py").read_text(), kind
        table.append((what, _link("test_variants")))
    for what, place in TESTS.items():
        file, _, name = place.partition("::")
        assert re.search(rf"^def {name}", (HERE / f"{file}.py").read_text(), re.MULTILINE), place
        table.append((what, _link(file)))
    return _as_text(table)


def refused() -> str:
    """The second table, with empty lines around it."""
    names = {name: " with ".join(f"`{part}`" for part in name.split(" with ")) for name in REFUSED}
    return _as_text([("setting", "reason"), *((names[name], reason) for name, reason in REFUSED.items())])


def _link(file: str) -> str:
    return f"[tests/{file}.py](../../tests/{file}.py)"


def _as_text(table: list[tuple[str, str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |\n" for row in table)
    return "".join(("\n", head, "| --- | --- |\n", *body, "\n"))


if __name__ == "__main__":
    readme.replace("support", supported())
    readme.replace("refusals", refused())
