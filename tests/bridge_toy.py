"""A recipe of Megatron-Bridge 0.6.2 that trains on the CPU, with gloo and without Bridge's dependencies.

Bridge's own code runs unchanged. Packages that this machine lacks are replaced by modules in which every name
is an empty class. The recipe uses none of them.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness_preload  # noqa: F401  (Megatron on the CPU, before anything imports it)
import torch

ABSENT = (
    *("datasets", "fla", "mistral_common", "modelopt", "nvidia_resiliency_ext"),
    *("transformer_engine", "megatron.energon"),
)


class _AbsentClass(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent_class(name)


def _absent_class(name: str) -> _AbsentClass:
    return _AbsentClass(name, (), {"__new__": lambda *_, **__: None, "__class_getitem__": lambda _: object})


class _AbsentModule(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent_class(name)


class _AbsentModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if not any(name == absent or name.startswith(f"{absent}.") for absent in ABSENT):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


del sys.modules["transformer_engine"]  # which CPU mode hides, and Bridge cannot do without
sys.meta_path.append(_AbsentModules())

from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec  # noqa: E402
from megatron.bridge.models.transformer_config import TransformerConfig  # noqa: E402
from megatron.bridge.training import config as bridge  # noqa: E402
from megatron.bridge.training import setup  # noqa: E402
from megatron.bridge.training.callbacks import Callback  # noqa: E402
from megatron.bridge.training.gpt_step import forward_step  # noqa: E402
from megatron.bridge.training.pretrain import pretrain  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402

setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
setup.set_jit_fusion_options = lambda *_: None  # it warms up kernels that are not compiled here

LENGTH = 32


def recipe(
    folder: Path,
    *,
    with_builder: bool = False,
    cut: Sequence[int | None] = (1, 1, None),
    precision: str | None = None,
) -> Any:
    """Bridge's ``ConfigContainer`` of a Llama of four layers: 4 iterations of 4 micro-batches on mock data.

    Args:
        folder: for TensorBoard.
        with_builder: describe the model by a ``ModelConfig``, not by a model provider.
        cut: tensor, pipeline and virtual pipeline size.
        precision: Bridge's name of a mixed precision; by default float32.
    """
    tensor, pipeline, virtual = cut
    transformer: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "attention_backend": AttnBackend.unfused,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "pipeline_dtype": torch.float32,
        "sequence_parallel": tensor > 1,
        "cross_entropy_loss_fusion": False,
    }
    model: dict[str, Any] = {
        "vocab_size": 256,
        "seq_length": LENGTH,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    if with_builder:
        cpu = TransformerConfig(**transformer, transformer_impl="local")
        described: Any = GPTModelConfig(transformer=cpu, **model)
    else:
        described = GPTModelProvider(**transformer, **model, transformer_layer_spec=local_layer_spec)
    return bridge.ConfigContainer(
        model=described,
        train=bridge.TrainingConfig(train_iters=4, global_batch_size=8, micro_batch_size=2),
        validation=bridge.ValidationConfig(eval_interval=2, eval_iters=2),
        optimizer=bridge.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-3),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant",
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
        dataset=bridge.MockGPTDatasetConfig(
            random_seed=1,
            seq_length=LENGTH,
            split="90,5,5",
            dataloader_type="single",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            num_workers=0,
            persistent_workers=False,
        ),
        logger=bridge.LoggerConfig(log_interval=2, tensorboard_dir=str(folder)),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        checkpoint=bridge.CheckpointConfig(),
        rng=bridge.RNGConfig(seed=3),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
        mixed_precision=precision,
    )


def train(config: Any, callbacks: list[Callback]) -> None:
    pretrain(config, forward_step, callbacks=callbacks)
