"""Read a ``torch_dist`` checkpoint of any layout in one process.

A checkpoint is untrusted data: unpickling builds only torch's and Megatron's own record types.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from jreg_megatron.decoder.checkpoint.arguments import hybrid_name, pattern_of
from jreg_megatron.decoder.checkpoint.folder import step_of
from jreg_megatron.runtime.errors import UserError, one_line

_EMBEDDING = "embedding.word_embeddings.weight"
_COMMON = "common_state/shard_0_1"
_OLD_COMMON = "common.pt"  # before 0.19

_TRAINING_ONLY = ("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")
_PREDICTS_AHEAD = "mtp."
_EXTRA_STATE = "_extra_state"  # such as scales of FP8

_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""A norm's name, and its name if Transformer Engine fuses it with the next linear layer."""


class Checkpoint:
    """An opened checkpoint: its common state, and the names and shapes of its weights."""

    def __init__(self, folder: Path) -> None:
        """Read everything but the weights. Megatron must be imported already.

        Raises:
            UserError: if a file is missing or damaged, or names types that are not allowed.
        """
        self.folder, self.step = folder, step_of(folder)
        with damage_refused(folder):
            with (folder / ".metadata").open("rb") as file:
                # Torch reads it again later. This checks first that it is harmless.
                listed = _MetadataUnpickler(file).load().state_dict_metadata
            self.common = _read_common(folder, listed)
        if "args" not in self.common:
            raise UserError(
                f"{folder} holds no Megatron arguments; give a checkpoint of Megatron's own training loop"
            )
        self.arguments: dict[str, Any] = dict(vars(self.common["args"]))  # Megatron's by name, as saved
        weights = {
            name: entry
            for name, entry in listed.items()
            if isinstance(entry, TensorStorageMetadata)
            and not name.startswith(_TRAINING_ONLY)
            and _EXTRA_STATE not in name
        }
        # The weights' shapes by their saved names (layers may be stacked), and the type of the first weight.
        self.shapes = {name: entry.size for name, entry in weights.items()}
        self.dtype = next((entry.properties.dtype for entry in weights.values()), None)

    @property
    def rows(self) -> int:
        """Number of rows of the embedding, with padding.

        Raises:
            UserError: if there is no embedding.
        """
        if _EMBEDDING not in self.shapes:
            raise UserError(f"the checkpoint has no {_EMBEDDING}; give a checkpoint of Megatron's GPTModel")
        return int(self.shapes[_EMBEDDING][0])

    def load_into(self, model: nn.Module) -> None:
        """Load all parameters and buffers into a ``GPTModel`` that is not split over processes.

        Raises:
            UserError: if model and checkpoint do not have the same weights, or a file is damaged.
        """
        from megatron.core import dist_checkpointing, parallel_state
        from megatron.core.dist_checkpointing import ShardedObject

        metadata = dict(self.common.get("content_metadata") or {})
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        is_hybrid = pattern_of(self.arguments) is not None
        if is_hybrid:
            metadata["non_homogeneous_layers"] = True  # one name per layer, not stacked
        wanted = {
            name: entry
            for name, entry in cast(Any, model).sharded_state_dict(metadata=metadata).items()
            if not isinstance(entry, ShardedObject)
        }
        for entry in wanted.values() if is_hybrid else ():
            entry.key = hybrid_name(entry.key)
        self._match_names(wanted)
        with damage_refused(self.folder):
            loaded = dist_checkpointing.load(
                {"model": wanted}, str(self.folder), validate_access_integrity=False
            )
        missing, _ = model.load_state_dict(loaded["model"], strict=False)
        if missing := [name for name in missing if _EXTRA_STATE not in name]:
            raise UserError(
                f"{self.folder} has no weights for {_some(missing)}, which the model needs; give another "
                "checkpoint"
            )

    def _match_names(self, wanted: dict[str, Any]) -> None:
        saved = set(self.shapes)
        for entry in wanted.values():
            # Either the checkpoint or the model may have the norm fused with the next linear layer.
            pairs = (pair for both in _FUSED_NORMS.items() for pair in (both, both[::-1]))
            others = (entry.key.replace(ours, theirs) for ours, theirs in pairs)
            entry.key = next((name for name in (entry.key, *others) if name in saved), entry.key)
        used = {entry.key for entry in wanted.values()}
        if missing := sorted(used - saved):
            raise UserError(
                f"{self.folder} holds no {_some(missing)}, which its arguments need; give another checkpoint"
            )
        left = sorted(name for name in saved - used if not name.startswith(_PREDICTS_AHEAD))
        if left:
            raise UserError(
                f"{self.folder} holds {_some(left)}, which Megatron's torch-only layers do not have; "
                "export it with Megatron-Bridge, and give the Hugging Face folder"
            )


def _read_common(folder: Path, listed: dict[str, Any]) -> dict[str, Any]:
    old = folder / _OLD_COMMON
    if old.is_file():
        return dict(torch.load(old, map_location="cpu", weights_only=True))
    if _COMMON not in listed:
        raise UserError(
            f"{folder} has no {_OLD_COMMON}, so its arguments are not known; give another checkpoint"
        )
    state = {_COMMON: io.BytesIO()}
    reader = FileSystemReader(folder)
    load_distributed(state, storage_reader=reader, planner=_SafePlanner(False, False), no_dist=True)
    common: Any = state[_COMMON]
    if isinstance(common, io.BytesIO):  # pickled twice
        common.seek(0)
        common = torch.load(common, map_location="cpu", weights_only=True)
    return dict(common[0])


class _SafePlanner(DefaultLoadPlanner):
    """Torch's planner, limited to types that Megatron has declared safe."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    _MODULES = ("metadata", "planner", "filesystem")

    def find_class(self, module: str, name: str) -> Any:
        package, _, last = module.rpartition(".")
        if package == "torch.distributed.checkpoint" and last in self._MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | type(torch.Size)):
            return getattr(torch, name)
        elif (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is not one of torch's records")


@contextmanager
def damage_refused(folder: Path) -> Iterator[None]:
    """Turn torch's and Megatron's errors about files into a :class:`UserError` that names the checkpoint."""
    try:
        yield
    except UserError:
        raise
    # CheckpointException does not derive from Exception.
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        while isinstance(cause, CheckpointException) and cause.failures:
            cause = next(iter(cause.failures.values()))[0]
        raise UserError(
            f"{folder} cannot be read: {one_line(cause, 200)}; a file may be missing or cut short; copy it "
            "again, or give another --step"
        ) from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
