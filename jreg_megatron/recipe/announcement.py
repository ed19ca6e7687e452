"""One table that announces a run: model, data, length, layout, time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jreg_megatron.decoder.checkpoint.folder import last_checkpoint
from jreg_megatron.recipe.plan import Plan, number_as_text, seconds_as_text
from jreg_megatron.recipe.request import Request
from jreg_megatron.runtime.errors import UserError

_WIDTH = 118


def rows(request: Request, plan: Plan) -> dict[str, str]:
    """The rows that follow from the plan: a name and a text each."""
    args = plan.args
    coeff = getattr(args, "jreg_coeff", 0.0)
    jreg = f"lambda {coeff:g}, alpha {getattr(args, 'jreg_alpha', 1.0):g}"
    division = " x ".join(
        f"{short} {size}"
        for short, size in (
            ("TP", args.tensor_model_parallel_size),
            ("PP", args.pipeline_model_parallel_size),
            ("CP", args.context_parallel_size),
            ("DP", args.data_parallel_size),
        )
    )
    steps = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    seconds = plan.flops / request.world_size / (request.tflops * 1e12)
    done = last_checkpoint(args.load)
    return {
        "model": f"{plan.parameters:,} parameters: {args.num_layers} layers x {args.hidden_size}, FFN "
        f"{args.ffn_hidden_size}, {args.num_attention_heads} heads of {args.kv_channels}, vocabulary "
        f"{args.padded_vocab_size:,}",
        "JREG": jreg if coeff else "lambda 0: the jump is measured, the training does not change",
        "length": f"{number_as_text(plan.tokens)} tokens ({plan.tokens / plan.parameters:.0f} a parameter): "
        f"{plan.iterations:,} iterations of {args.global_batch_size:,} sequences of {args.seq_length:,}"
        + (f"; going on from iteration {done:,}" if done else ""),
        "optimizer": f"{args.optimizer} {args.adam_beta1:g}, {args.adam_beta2:g}, epsilon {args.adam_eps:g}, "
        f"weight decay {args.weight_decay:g}, clip {args.clip_grad:g}; {args.lr_decay_style} from "
        f"{args.lr:g} to {args.min_lr:g}, {args.lr_warmup_iters:,} iterations of warm-up",
        "layout": f"{request.nodes} x {request.gpus} GPUs: {division}; {steps} micro-batches of "
        f"{args.micro_batch_size} a step",
        "time": f"about {seconds_as_text(seconds)} at {request.tflops:g} TFLOP/s a GPU; {plan.flops:.1e} "
        "operations" + (f" ({1 - done / plan.iterations:.0%} of it left)" if done else ""),
    }


def found(findings: Mapping[str, Callable[[], str]], is_dry_run: bool) -> dict[str, str]:
    """The results of checks, by row. In a dry run a refusal is a result.

    Raises:
        UserError: from the first check that refuses, unless this is a dry run.
    """
    rows = {}
    for name, find in findings.items():
        try:
            rows[name] = find()
        except UserError as error:
            if not is_dry_run:
                raise
            rows[name] = f"would be refused: {error}"
    return rows


def show(title: str, found: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in found.items():
        table.add_row(name, Text(text))
    Console(width=_WIDTH, markup=False).print(table)
