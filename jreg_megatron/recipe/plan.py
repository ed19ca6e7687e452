"""The plan of a run. Megatron itself reads the flags, and the model is counted without memory for it."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from dataclasses import dataclass

from jreg_megatron.decoder.checkpoint.folder import last_checkpoint
from jreg_megatron.mcore.arguments import as_rank_zero_of, parse
from jreg_megatron.mcore.one_process import single_process
from jreg_megatron.recipe.announcement import number_as_text, seconds_as_text
from jreg_megatron.runtime.errors import megatrons_refusals


@dataclass(frozen=True)
class Plan:
    """The numbers that follow from a run's flags."""

    args: Namespace
    """Megatron's validated arguments, with the kernels of CPU mode."""
    parameters: int
    """Parameters of the whole model, with the padding rows of the embedding."""
    flops: float
    """Floating-point operations of the whole training, by Megatron's count."""
    state_bytes: float
    """Weights, gradients and optimizer on the fullest GPU, by Megatron's estimate."""
    activation_bytes: float
    """Activations on this GPU, by Megatron's estimate."""

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return int(self.args.train_iters * self.args.global_batch_size * self.args.seq_length)


def make(flags: list[str], world_size: int) -> Plan:
    """Let Megatron validate the flags, and count the model.

    Raises:
        UserError: with Megatron's message, if it refuses the flags.
    """
    from megatron.training import arguments
    from megatron.training.theoretical_memory_usage import (
        compute_activation_memory,
        compute_weight_and_optimizer_memory,
    )
    from megatron.training.training import num_floating_point_operations

    from jreg_megatron import cpu

    args = parse(cpu.with_cpu_flags(flags), world_size)
    with megatrons_refusals():
        with as_rank_zero_of(world_size, flags):
            arguments.validate_args(args)
        parameters = count_parameters(args)
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    return Plan(
        args=args,
        parameters=parameters,
        flops=args.train_iters * float(num_floating_point_operations(args, args.global_batch_size)),
        state_bytes=compute_weight_and_optimizer_memory(args),
        activation_bytes=compute_activation_memory(args, micro_batches) / args.context_parallel_size,
    )


def count_parameters(args: Namespace) -> int:
    """Number of parameters of the model, which Megatron builds on torch's meta device."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    single_process()
    config = gpt_config_from_args(args)
    whole = dict.fromkeys(
        (
            *("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size"),
        ),
        1,
    )
    unset = dict.fromkeys(
        (
            *("pipeline_dtype", "virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"),
            *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
        )
    )
    config.transformer = dataclasses.replace(config.transformer, sequence_parallel=False, **whole, **unset)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("meta"):
        model = GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    return sum(parameter.numel() for parameter in model.parameters())


def rows(request: Namespace, plan: Plan) -> dict[str, str]:
    """The plan's rows of the table: texts by name."""
    args = plan.args
    coeff = getattr(args, "jreg_coeff", 0.0)
    jreg = f"lambda {coeff:g}, alpha {getattr(args, 'jreg_alpha', 1.0):g}"
    steps = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    seconds = plan.flops / request.world_size / (request.tflops * 1e12)
    done = last_checkpoint(args.load)
    return {
        "model": f"{plan.parameters:,} parameters: {args.num_layers} layers x {args.hidden_size}, FFN "
        f"{args.ffn_hidden_size}, {args.num_attention_heads} heads of {args.kv_channels}, vocabulary "
        f"{args.padded_vocab_size:,}",
        "JREG": jreg if coeff else "lambda 0: the jump is measured, the training does not change",
        "length": f"{number_as_text(plan.tokens)} tokens ({plan.tokens / plan.parameters:.0f} a parameter): "
        f"{args.train_iters:,} iterations of {args.global_batch_size:,} sequences of {args.seq_length:,}"
        + (f"; resumes after iteration {done:,}" if done else ""),
        "optimizer": f"{args.optimizer} {args.adam_beta1:g}, {args.adam_beta2:g}, epsilon {args.adam_eps:g}, "
        f"weight decay {args.weight_decay:g}, clip {args.clip_grad:g}; {args.lr_decay_style} from "
        f"{args.lr:g} to {args.min_lr:g}, {args.lr_warmup_iters:,} iterations of warm-up",
        "layout": f"{request.nodes} x {request.gpus} GPUs: TP {args.tensor_model_parallel_size} x "
        f"PP {args.pipeline_model_parallel_size} x CP {args.context_parallel_size} x "
        f"DP {args.data_parallel_size}; {steps} micro-batches of {args.micro_batch_size} a step",
        "time": f"about {seconds_as_text(seconds)} at {request.tflops:g} TFLOP/s a GPU; {plan.flops:.1e} "
        "operations" + (f" ({1 - done / args.train_iters:.0%} of it left)" if done else ""),
    }
