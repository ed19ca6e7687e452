"""The teacher: a trained Hugging Face causal language model, which runs without gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.methods.let.settings import LETConfig
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.imports import errors_alone, need

_FLAG = LETConfig.flag("teacher")
_NUMBER = re.compile(r"\d+")
_LENGTH = 8
"""Number of tokens in the test of whether the model looks ahead."""
_MOVED = 1e-5
"""A smaller change of a state, relative to its norm, is rounding in float32."""


def check(folder: str, length: int | None) -> None:
    """Check a teacher's files without memory for its weights.

    Args:
        folder: the teacher's folder.
        length: tokens in the training's sequences; None if not known.

    Raises:
        UserError: for files that are missing or damaged, or a teacher of shorter sequences.
    """
    refuse_longer(folder, length or 0, _longest(_load(folder, torch.float32, "meta")))


def refuse_longer(folder: str, length: int, longest: int | None) -> None:
    """Refuse sequences of more tokens than the teacher's longest.

    Raises:
        UserError: naming both.
    """
    if longest is not None and length > longest:
        raise UserError(
            f"{_FLAG} {folder} takes sequences of up to {longest} tokens, and the training's have {length}; "
            "give another teacher, or a smaller --seq-length"
        )


def _longest(model: Any) -> int | None:
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    return longest


def _load(folder: str, dtype: torch.dtype, device: str | None = None) -> Any:
    """The model; on device "meta" without the values of its weights."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{_FLAG} is {folder}, which has no config.json, so it is not a Hugging Face model; give one: "
            "'hf download NAME --local-dir FOLDER' fetches it from the hub, and 'jreg-megatron "
            "export CHECKPOINTS FOLDER' makes one of a Megatron checkpoint"
        )
    transformers = need("transformers", f"{_FLAG} {folder}", "analysis")
    # Random numbers of the training must not depend on whether a teacher is loaded.
    with errors_alone("transformers"), torch.random.fork_rng(devices=[]):
        transformers.utils.logging.disable_progress_bar()
        try:
            how = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = transformers.AutoModel.from_pretrained(
                folder, dtype=dtype, device_map=device, **how
            )
        except Exception as error:
            raise UserError(
                f"{_FLAG} {folder} cannot be loaded ({one_line(error)[:300]}); give the folder of a whole "
                "model"
            ) from error
    kinds = {_NUMBER.sub("#", name) for name in model.state_dict()}
    for what, names in (
        ("lack {}, which its config.json needs", info["missing_keys"]),
        (
            "hold {0[0]} of size {0[1]}, and its config.json needs {0[2]}",
            [(name, [*held], [*needed]) for name, held, needed in info["mismatched_keys"]],
        ),
        # A head is not needed here, but another layer is.
        (
            "hold {}, which its config.json does not have",
            [name for name in info["unexpected_keys"] if _NUMBER.sub("#", name).endswith(tuple(kinds))],
        ),
    ):
        if names:
            raise UserError(
                f"the files of {_FLAG} {folder} {what.format(min(names, key=str))}; give the folder of a "
                "whole causal language model"
            )
    return model.eval().requires_grad_(False)


class Teacher:
    """Gives the last states of token ids, after the final norm, at the width of the trained model."""

    def __init__(self, folder: str, width: int, device: torch.device, dtype: torch.dtype) -> None:
        """Load it.

        Args:
            folder: the folder of a Hugging Face model.
            width: hidden size of the model that is trained.
            device: where the teacher runs.
            dtype: the type of the teacher's weights.

        Raises:
            UserError: if it cannot be loaded whole, or is not a causal language model.
        """
        # In 16 bits a small change of a state may be lost in rounding.
        self._model = _load(folder, torch.float32)
        self.max_length = _longest(self._model)
        try:
            self.vocab_size: int = self._model.get_input_embeddings().num_embeddings
            tokens = torch.arange(1, 1 + _LENGTH).repeat(2, 1) % self.vocab_size
            tokens[1, -1] = (tokens[1, -1] + 1) % self.vocab_size
            first, other = self._last_states(tokens).unbind()
            if dtype != torch.float32:
                self._model = _load(folder, dtype)
            self._model.to(device)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{_FLAG} {folder} cannot be run as a causal language model: {one_line(error)[:300]}"
            ) from error
        off = (first - other).norm(dim=-1) > _MOVED * first.norm(dim=-1)
        if off[:-1].any() or not off[-1]:
            raise UserError(
                f"{_FLAG} {folder} is not a causal language model, or its states do not depend on the tokens "
                "(weights of zero); give another model"
            )
        unit = torch.eye(first.shape[-1], device=device)
        # Interpolation is linear, so it is a matrix, which is faster on a GPU.
        self._resize = torch.nn.functional.interpolate(unit[None], size=width, mode="linear")[0]

    @torch.inference_mode()
    def _last_states(self, tokens: Tensor) -> Tensor:
        states: Tensor = self._model(input_ids=tokens, use_cache=False).last_hidden_state
        return states

    def states(self, tokens: Tensor) -> Tensor:
        """The last states of whole sequences.

        Args:
            tokens: ids ``[b, s]``.

        Returns:
            ``[s, b, width of the teacher]``, to be given to :meth:`resized`.
        """
        return self._last_states(tokens).transpose(0, 1)

    def resized(self, states: Tensor) -> Tensor:
        """States at the width of the model that is trained, ``[s, b, h]`` float32."""
        return states.float() @ self._resize
