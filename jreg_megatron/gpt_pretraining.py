"""The functions that Megatron's loop needs from a script: data, batches and loss of a GPT-style model.

In Megatron-LM they are in ``pretrain_gpt.py``, which no wheel contains. This is plain language-model
pretraining on ``.bin/.idx`` data or mock data, with every parallelism of the wheel. Other tasks of that
script are refused by name in :func:`refuse_other_tasks`; use ``pretrain_gpt.py`` itself for them.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import arguments, get_args, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor, nn

from jreg_megatron.mcore import initialization, installed, preflight
from jreg_megatron.mcore.arguments import add_arguments
from jreg_megatron.mcore.samples import dataset_config
from jreg_megatron.methods import known
from jreg_megatron.runtime.errors import UserError, megatrons_refusals
from jreg_megatron.runtime.flags import flag_of
from jreg_megatron.stream.settings import Settings
from jreg_megatron.stream.support import refuse_unsupported

_OTHER_TASKS = (
    *("sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking", "logits_load_dir"),
    *("logits_save_dir", "per_dataset_sequences_path", "perform_rl_step", "modelopt_enabled"),
    *("hybrid_layer_pattern", "cache_mla_latents", "config_logger_dir"),
    *("mrope_section", "init_method_xavier_uniform"),
)

_SPIKE = 10.0


def refuse_other_tasks(args: argparse.Namespace) -> None:
    """Refuse the tasks that only Megatron-LM's own scripts do.

    Raises:
        UserError: naming the flag.
    """
    given = [flag_of(name) for name in _OTHER_TASKS if getattr(args, name, None)]
    given += ["--dataloader-type external"] if args.dataloader_type == "external" else []
    for flag in given:
        raise UserError(
            f"{flag} is not part of jreg_megatron.pretrain, which does plain pretraining; leave it out"
        )


def read_arguments(*settings: Settings) -> Any:
    """Megatron's configuration from the command line of this process, checked and validated.

    ``settings`` are those of methods without flags there.

    Raises:
        UserError: for the first mistake, or with Megatron's words.
    """
    with megatrons_refusals():
        asked = arguments.parse_args(add_arguments)
    installed.refuse_without_nvidias_packages(asked)
    settings = (*settings, *known.settings_in(asked))
    refuse_other_tasks(asked)
    refuse_unsupported(asked, *settings)
    preflight.check_arguments(asked)
    if not (asked.use_checkpoint_args or asked.yaml_cfg):
        for of_one in settings:
            of_one.refuse_layers(asked.num_layers)
    with megatrons_refusals():
        with mock.patch.object(arguments, "parse_args", return_value=asked):
            args = arguments.parse_and_validate_args(extra_args_provider=add_arguments)
        config = gpt_config_from_args(args)
        if args.init_fan_in:
            initialization.set_fan_in(config.transformer, args)
        return pretrain_cfg_container_from_args(args, config)


def train(config: Any) -> None:
    """Run Megatron's training loop with a configuration of :func:`read_arguments`."""
    kind = ModelType.encoder_or_decoder
    pretrain(config, datasets, kind, forward_step, get_embedding_ranks=embedding_ranks)


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test set with ``num_samples``, built only on ranks that need them."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = dataset_config(
        args,
        get_tokenizer(),
        blend,
        blend_per_split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    is_built_here = partial(_needs_data, vp_stage)
    train, validation, test = BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, config).build()
    return train, validation, test


# Megatron calls it on every rank, not on tensor-parallel rank 0 only.
datasets.is_distributed = True  # type: ignore[attr-defined]


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """Run a micro-batch through this stage, or plan its run; returns the output or the plan, and the loss
    function."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _next_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"), _micro_batch_size(model))
    timers("batch-generator").stop()
    loss_mask: Any = batch.get("loss_mask")
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch.get("tokens"),
        batch.get("position_ids"),
        batch.get("attention_mask"),
        labels=batch.get("labels"),
        loss_mask=loss_mask,
    )
    return output, partial(_loss, loss_mask)


def embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """The pipeline ranks with the word embedding: the first, the last if tied, and those of MTP layers."""
    ranks = {pipeline_ranks[0]}
    if len(pipeline_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pipeline_ranks[-1])
        ranks.update(get_mtp_ranks(pipeline_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def _predicts_several_tokens(vp_stage: int | None) -> bool:
    config = core_transformer_config_from_args(get_args())
    return bool(
        mtp_on_this_rank(
            layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )


def _sees_tokens(vp_stage: int | None) -> bool:
    return is_first_or_last_pipeline_stage(vp_stage) or _predicts_several_tokens(vp_stage)


def needs_loss_mask() -> bool:
    """Whether a method needs the loss mask; Megatron itself gives it to the last pipeline stage only."""
    return any(getattr(get_args(), f"{of_one.prefix}_tokens", "") == "unmasked" for of_one in known.METHODS)


def _needs_data(vp_stage: int | None) -> bool:
    return mpu.get_tensor_model_parallel_rank() == 0 and (_sees_tokens(vp_stage) or needs_loss_mask())


def _micro_batch_size(model: nn.Module) -> int:
    """Sequences in a micro-batch; an evaluation may have another number."""
    args = get_args()
    size = None if model.training else getattr(args, "eval_micro_batch_size", None)
    return int(size or args.micro_batch_size)


def _next_batch(data_iterator: Any, vp_stage: int | None, micro_batch_size: int) -> dict[str, Tensor | None]:
    """This rank's part of the next micro-batch; on middle pipeline stages only the loss mask, if needed."""
    sample: dict[str, Any] = {}
    if _needs_data(vp_stage):
        sample = next(data_iterator)
    batch = _batch_on_this_tensor_rank(sample, vp_stage, micro_batch_size) if _sees_tokens(vp_stage) else {}
    if needs_loss_mask() and batch.get("loss_mask") is None:
        batch["loss_mask"] = _loss_mask_on_this_tensor_rank(sample, micro_batch_size)
    if not batch:
        return {}
    shared: dict[str, Tensor | None] = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return shared


def _loss_mask_on_this_tensor_rank(sample: dict[str, Any], micro_batch_size: int) -> Tensor:
    """The loss mask ``[b, s]``, from the tensor-parallel rank that read the sample."""
    if mpu.get_tensor_model_parallel_rank() == 0:
        mask: Tensor = sample["loss_mask"].float().cuda(non_blocking=True)
    else:
        mask = torch.empty(micro_batch_size, get_args().seq_length, device=torch.cuda.current_device())
    torch.distributed.broadcast(
        mask, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group()
    )
    return mask


def _batch_on_this_tensor_rank(
    sample: dict[str, Any], vp_stage: int | None, micro_batch_size: int
) -> dict[str, Any]:
    """This stage's part of the sample that the first tensor-parallel rank has read."""
    args = get_args()
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        keys = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
        # The broadcast below also reads these keys of packed sequences.
        batch = dict.fromkeys(
            ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
        )
        batch |= {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in keys}
    shared: dict[str, Any] = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_several_tokens(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return shared


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the unmasked token losses, their number, and both for the log."""
    loss = torch.sum(losses.view(-1).float() * loss_mask.view(-1).float())
    num_tokens = loss_mask.sum().detach().to(torch.int)
    _check_loss(loss)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def _check_loss(loss: Tensor) -> None:
    """Let Megatron check the loss for NaN, Inf and, if its flag is given, spikes."""
    args = get_args()
    guard = get_rerun_state_machine()
    tests: list[tuple[str, Any, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        tests += [("NaN in the loss", torch.isnan, True), ("Inf in the loss", torch.isinf, True)]
    if args.check_for_spiky_loss:
        is_spike = partial(guard.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        tests += [("a spike in the loss", is_spike, False)]
    for what, is_bad, fatal in tests:
        # Tolerance 0: the forward pass is deterministic, so a rerun must give the same loss.
        guard.validate_result(
            result=loss, rejection_func=is_bad, message=f"found {what}", tolerance=0.0, fatal=fatal
        )
