"""JREG in your own training loop on ``megatron.core``, without ``megatron.training``.

    torchrun --nproc-per-node 4 -m jreg_megatron.examples.custom_loop --tensor 2 --pipeline 2

trains a small Llama on generated text, on GPUs or, if there are none, on the CPU. The lines for JREG have the
mark ``# JREG``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from jreg_megatron import JRegConfig, Metrics, attach  # JREG
from jreg_megatron.runtime.errors import UserError, user_errors_exit

NUM_MICROBATCHES, MICRO_BATCH_SIZE = 4, 2
LAYERS, HIDDEN, FFN, HEADS, LENGTH, VOCABULARY = 4, 64, 96, 4, 32, 256
LR, DECAY = 1e-3, 0.01
SEED = 3

Batch = dict[str, Tensor]
"""``tokens``, ``labels`` and ``loss_mask`` of a micro-batch, ``[b, s]`` each."""


def initialize(tensor: int, pipeline: int) -> None:
    """Set up process group, Megatron's parallel state and random seeds in a rank of torchrun."""
    if "RANK" not in os.environ:
        raise UserError("RANK is not set; start the program with torchrun --nproc-per-node N -m ...")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        from jreg_megatron import cpu

        cpu.enable()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor, pipeline)
    seed = SEED + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def build_model() -> list[Any]:
    """This rank's part of the model, wrapped for data parallelism."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    if torch.cuda.is_available():
        model.cuda()
    return [DistributedDataParallel(config, DistributedDataParallelConfig(), model)]


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run one micro-batch through this pipeline stage; returns the output and the loss function."""
    batch = next(batches)
    positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device)
    losses = model(batch["tokens"], positions.expand_as(batch["tokens"]), None, labels=batch["labels"])

    def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, count = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum()
        return total, count.int(), torch.stack((total.detach(), count))

    return losses, loss


def train(
    batches: Iterator[Batch], steps: int, jreg: JRegConfig
) -> Iterator[tuple[float | None, Metrics | None]]:
    """Train; yields the cross-entropy of each step (only on the last pipeline stage) and JREG's values."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = build_model()
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=LR, weight_decay=DECAY), model)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=steps,
        lr_decay_style="constant",
        start_wd=DECAY,
        end_wd=DECAY,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    config = model[0].config
    config.grad_scale_func = optimizer.scale_loss  # fp16's loss scale; JREG reads it here too
    config.finalize_model_grads_func = finalize_model_grads

    step = 0
    handle = attach(model, jreg, num_microbatches=NUM_MICROBATCHES, iteration=lambda: step)  # JREG
    while step < steps:
        step += 1
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports: Sequence[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=model[0],
            num_microbatches=NUM_MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH_SIZE,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(increment=1)
        metrics = handle.end_iteration(step)  # JREG; collective
        lm_loss = None
        if reports:  # on the last pipeline stage
            sums = torch.stack(list(reports)).sum(0)
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
            lm_loss = float(sums[0] / sums[1])
        yield lm_loss, metrics


def made_up_text() -> Iterator[Batch]:
    """Endless micro-batches, different on each data-parallel rank: a text counts upwards from a random id."""
    from megatron.core import parallel_state

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    while True:
        start = torch.randint(VOCABULARY, (MICRO_BATCH_SIZE, 1), generator=generator)
        text = ((start + torch.arange(LENGTH + 1)) % VOCABULARY).to(device)
        mask = torch.ones(MICRO_BATCH_SIZE, LENGTH, device=device)
        yield {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask}


def main(argv: list[str] | None = None) -> None:
    """Train for some steps and print a line for each step."""
    parser = argparse.ArgumentParser(
        prog="python -m jreg_megatron.examples.custom_loop",
        description="Train a small Llama with JREG in your own training loop.",
    )
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (default: 1)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size (default: 1)")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: 20)")
    JRegConfig.add_arguments(parser)  # JREG
    options = parser.parse_args(argv)
    with user_errors_exit():
        jreg = JRegConfig.from_args(options)  # JREG
        initialize(options.tensor, options.pipeline)
        is_last = dist.get_rank() == dist.get_world_size() - 1
        for step, (lm_loss, metrics) in enumerate(train(made_up_text(), options.steps, jreg), start=1):
            if is_last and metrics is not None:
                print(f"step {step:3} | lm loss {lm_loss:.4f} | jreg loss {metrics.jreg_loss:.6f}", end=" | ")
                print(f"jump rate {metrics.jump_rate:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
