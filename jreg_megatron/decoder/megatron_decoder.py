"""Megatron's ``GPTModel`` as a decoder: its layers, final norm and head, and how they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jreg_megatron.decoder import megatron_model as building
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.megatron_folder import CheckpointFolder
from jreg_megatron.decoder.megatron_tokenizer import TrainingTokenizer, vocab_size_of
from jreg_megatron.decoder.megatron_weights import Checkpoint


def decoder_of(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str,
    vocab_size: int | None = None,
) -> Decoder:
    """The model of an opened checkpoint, with its weights.

    Args:
        checkpoint: what to read.
        dtype: of weights and states.
        device: where it runs.
        source: what the user has named.
        vocab_size: rows of the embedding that are no padding; by default what the checkpoint tells, and
            where it tells nothing the user is told so, and all rows count.

    Raises:
        UserError: as :func:`jreg_megatron.decoder.megatron.load_megatron`.
    """
    arguments = checkpoint.arguments
    building.refuse_other_models(arguments, str(checkpoint.place.path))
    padded = building.padded_vocab_size(checkpoint.shapes)
    with building.without_noise():
        args = building.model_arguments(arguments, dtype, padded)
        building.single_process()
        model = building.build(args)
        checkpoint.load_into(model)
    if arguments.get("layernorm_zero_centered_gamma") or arguments.get("apply_layernorm_1p"):
        building.center_norms_at_one(model)
    model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    tokenizer = TrainingTokenizer.of(arguments)
    vocab_size = vocab_size or vocab_size_of(arguments, padded, tokenizer)
    if vocab_size is None:
        building.tell_once(
            f"nothing tells how many of the {padded} rows of the embedding of {source} are vocabulary (no "
            "tokenizer that fits, no --vocab-size of the training), so padding may be among them and have "
            "its part in the loss"
        )
    return _decoder(
        model,
        name=_name(checkpoint.place),
        source=source,
        step=checkpoint.place.step,
        tokenizer=tokenizer,
        end_of_text=tokenizer.end_of_text if tokenizer else None,
        vocab_size=vocab_size or padded,
        max_length=args.max_position_embeddings,
    )


def _decoder(model: Any, *, vocab_size: int, **known: Any) -> Decoder:
    # Then it ends behind the final norm, so that states are to be had without logits.
    model.post_process = False
    parameter = next(model.parameters())

    def states(tokens: Tensor) -> Tensor:
        tokens = tokens.to(parameter.device)
        positions = torch.arange(tokens.shape[1], device=parameter.device).expand_as(tokens)
        # Without a mask, Megatron's attention is causal.
        out: Tensor = model(tokens, positions, None)
        return out

    @torch.inference_mode()
    def run(tokens: Tensor) -> None:
        states(tokens)

    @torch.inference_mode()
    def head(normed: Tensor) -> Tensor:
        tied = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if tied else None
        out, _ = model.output_layer(normed.transpose(0, 1).contiguous(), weight=weight)
        scaled: Tensor = model._scale_logits(out)
        return scaled.transpose(0, 1)[..., :vocab_size]

    @torch.inference_mode()
    def logits(tokens: Tensor) -> Tensor:
        return head(states(tokens).transpose(0, 1))

    return Decoder(
        kind="megatron",
        revision=None,
        model=model,
        layers=list(model.decoder.layers),
        final_norm=model.decoder.final_layernorm,
        head=head,
        run=run,
        logits=logits,
        vocab_size=vocab_size,
        hidden_size=model.config.hidden_size,
        device=parameter.device,
        dtype=parameter.dtype,
        sequence_first=True,
        **known,
    )


def _name(place: CheckpointFolder) -> str:
    """The run's: of ``runs/NAME/checkpoints`` that is NAME."""
    training = place.path.absolute().parent
    return training.parent.name if training.name in ("checkpoints", "checkpoint", "ckpt") else training.name
