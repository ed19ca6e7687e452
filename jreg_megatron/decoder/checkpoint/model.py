"""Build a checkpoint's ``GPTModel`` in one process, as a decoder."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jreg_megatron.decoder.checkpoint.arguments import (
    known_changes,
    model_arguments,
    refuse_other_layers,
    tell_once,
)
from jreg_megatron.decoder.checkpoint.folder import find_checkpoint
from jreg_megatron.decoder.checkpoint.tokenizer import TrainingTokenizer, vocab_size_of
from jreg_megatron.decoder.decoder import Decoder, stream_in, stream_out, with_stream
from jreg_megatron.mcore.installed import need_training_loop
from jreg_megatron.mcore.one_process import single_process
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.imports import without_noise
from jreg_megatron.stream.anatomy import described_layers
from jreg_megatron.stream.attachment import place_of
from jreg_megatron.stream.preparation import prepare
from jreg_megatron.stream.settings import Settings

if TYPE_CHECKING:
    from jreg_megatron.decoder.checkpoint.weights import Checkpoint


def load_megatron(
    folder: Path, step: int | None = None, *, dtype: torch.dtype, device: torch.device
) -> Decoder:
    """Load a checkpoint of Megatron's training loop as a ``GPTModel``, with the changes of known methods.

    Its logits exclude the rows of padding. Megatron's own loss includes them, so it is a little higher.

    ``folder`` and ``step`` are as in :func:`find_checkpoint`. For a CPU, Megatron's calls of CUDA are
    redirected until the process ends.

    Raises:
        UserError: if there is no such checkpoint; if it is damaged; if its model is neither a ``GPTModel``
            nor a ``HybridModel`` of pairs of attention with MLP or experts; if an unknown method changed the
            model; or if its training counted its layers in another way.
    """
    checkpoint = open_checkpoint(folder, step, device)
    refuse_other_layers(checkpoint.arguments, str(checkpoint.folder))
    if layers := described_layers(Namespace(**checkpoint.arguments)):
        tell_once(f"{folder} is a hybrid model: {layers}")
    return decoder_of(checkpoint, dtype=dtype, device=device, source=str(folder))


def open_checkpoint(folder: Path, step: int | None, device: torch.device) -> Checkpoint:
    """Find a checkpoint and read everything but its weights. Imports Megatron.

    Raises:
        UserError: if the checkpoint does not exist, or is damaged.
    """
    place = find_checkpoint(folder, step)
    import_megatron(device)
    from jreg_megatron.decoder.checkpoint.weights import Checkpoint

    with without_noise():
        return Checkpoint(place)


def decoder_of(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    source: str,
    vocab_size: int | None = None,
) -> Decoder:
    """The model of an opened checkpoint, under the user's name ``source``. Raises as :func:`load_megatron`.

    ``vocab_size`` is the number of rows of the embedding without padding, by default from the checkpoint. If
    it is not known, all rows count and the user gets a note.
    """
    arguments, padded = checkpoint.arguments, checkpoint.rows
    changes = known_changes(arguments, str(checkpoint.folder))  # first: it refuses what cannot run
    with without_noise():
        args = model_arguments(arguments, dtype, padded)
        model = _loaded(checkpoint, args, changes, device)
    tokenizer = TrainingTokenizer.of(arguments)
    vocab_size = vocab_size or vocab_size_of(arguments, padded, tokenizer)
    if vocab_size is None:
        tell_once(
            f"the size of the vocabulary of {source} is not known (no matching tokenizer, no --vocab-size of "
            f"the training), so all {padded} rows of the embedding count, perhaps with padding, and the loss "
            "may be higher"
        )
        vocab_size = padded

    @torch.inference_mode()
    def run(tokens: Tensor) -> Any:
        tokens = tokens.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        return model(tokens, positions, None)  # without a mask, Megatron's attention is causal

    @torch.inference_mode()
    def head(normed: Tensor) -> Tensor:
        tied = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if tied else None
        out, _ = model.output_layer(normed.transpose(0, 1).contiguous(), weight=weight)
        scaled: Tensor = model._scale_logits(out)
        return scaled.transpose(0, 1)[..., :vocab_size]

    @torch.inference_mode()
    def logits(tokens: Tensor) -> Tensor:
        return head(run(tokens).transpose(0, 1))

    def last_validation() -> dict[str, Tensor]:
        from jreg_megatron.decoder.checkpoint.validation import last_validation_samples

        with without_noise():
            return last_validation_samples(checkpoint)

    return Decoder(
        name=_name(checkpoint.folder),
        source=source,
        kind="megatron",
        revision=None,
        step=checkpoint.step,
        model=model,
        layers=list(model.decoder.layers),
        final_norm=model.decoder.final_layernorm,
        head=head,
        run=run,
        logits=logits,
        encode=tokenizer.encode if tokenizer else None,
        end_of_text=tokenizer.eod if tokenizer else None,
        vocab_size=vocab_size,
        hidden_size=model.config.hidden_size,
        max_length=args.max_position_embeddings,
        device=next(model.parameters()).device,
        dtype=dtype,
        sequence_first=True,
        settings={name: str(value) for name, value in sorted(arguments.items())},
        last_validation=last_validation,
    )


def _loaded(
    checkpoint: Checkpoint, args: Namespace, changes: Sequence[Settings], device: torch.device
) -> Any:
    """Megatron's model with the checkpoint's weights and its methods' changes, without the head."""
    arguments = checkpoint.arguments
    single_process()
    model: Any = prepare([build(args)], changes)[0]
    checkpoint.load_into(model)
    if arguments.get("layernorm_zero_centered_gamma") or arguments.get("apply_layernorm_1p"):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
                module.weight.data.add_(1)  # the checkpoint holds weight - 1
    model.to(device=device, dtype=args.params_dtype).eval().requires_grad_(False)
    for of_one in changes:
        _change_layers(model, of_one)
    model.post_process = False  # its forward pass returns the final norm's output instead of logits
    return model


def _change_layers(model: Any, settings: Settings) -> None:
    """Register hooks through which a method changes the output of layers in every forward pass."""
    method = settings.make(place_of([model], lambda: 1))

    def change(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return with_stream(output, method.change(number, stream_in(args, kwargs), stream_out(output)))

    for layer in model.decoder.layers:
        if method.changes(layer.layer_number):
            layer.register_forward_hook(partial(change, layer.layer_number), with_kwargs=True)


def _name(place: Path) -> str:
    """The run's name, such as NAME in ``runs/NAME/checkpoints``."""
    training = place.absolute().parent
    return training.parent.name if training.name in ("checkpoints", "checkpoint", "ckpt") else training.name


def import_megatron(device: torch.device) -> None:
    """Import Megatron's training package. For a CPU, redirect Megatron's calls of CUDA to it.

    Raises:
        UserError: if it is not installed, or too old.
    """
    from jreg_megatron import cpu

    with without_noise():
        cpu.enable_for(device)
        if device.type != "cpu" and device.index is not None:
            torch.cuda.set_device(device)
    need_training_loop("reading Megatron's checkpoints")


def build(args: Namespace) -> nn.Module:
    """Build the whole model on the CPU, without the checkpoint's weights.

    Raises:
        UserError: with Megatron's message, for a model that its torch-only layers cannot run.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        config = gpt_config_from_args(args)
        if args.gelu_by_tanh:
            config.transformer.activation_func = partial(nn.functional.gelu, approximate="tanh")
        model: nn.Module = GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    except (AssertionError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(
            f"Megatron cannot build the checkpoint's model from torch-only layers: {one_line(error)}; export "
            "it with Megatron-Bridge, and give the Hugging Face folder"
        ) from error
    return model
