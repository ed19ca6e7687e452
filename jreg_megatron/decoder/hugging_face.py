"""Load models with transformers: names on the hub, folders, and GGUF files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.reference import GGUF_ENDING, Reference, step_of
from jreg_megatron.decoder.structure import find_structure
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.imports import errors_alone, need
from jreg_megatron.runtime.output import note


def encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from text to ids, by a tokenizer of transformers. It drops special tokens after the text."""

    def ids(text: str, **how: bool) -> list[int]:
        # verbose would warn about every text that is longer than the model's context.
        found: list[int] = tokenizer(text, verbose=False, **how)["input_ids"]
        return found

    # Count the special tokens after a text, to leave them out.
    plain, whole = ids("a", add_special_tokens=False), ids("a")
    starts = (at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain)
    closing = len(whole) - len(plain) - next(starts, len(whole) - len(plain))
    return lambda text: (found := ids(text))[: len(found) - closing]


def load_hugging_face(
    reference: Reference, dtype: torch.dtype, device: str = "cpu", trust_remote_code: bool = False
) -> Decoder:
    """Load a causal language model and its tokenizer.

    Args:
        reference: names the model.
        dtype: type of the weights, also of the unpacked weights of a GGUF file.
        device: a device, or ``auto`` for all GPUs, which needs ``accelerate``.
        trust_remote_code: allow the model's own code to run.

    Raises:
        UserError: if it cannot be loaded, or is not a causal decoder.
    """
    transformers = need("transformers", "measuring a model of Hugging Face", "analysis")
    source, is_gguf = reference.source, reference.source.endswith(GGUF_ENDING)
    where: dict[str, Any] = {"revision": reference.revision, "trust_remote_code": trust_remote_code}
    if is_gguf:
        need("gguf", "reading GGUF", "analysis")
        source, where["gguf_file"] = str(Path(source).parent), Path(source).name
    if is_gguf or device == "auto":
        need("accelerate", "reading GGUF" if is_gguf else "--device auto", "analysis")
    spread = "auto" if device == "auto" else None
    model = model_of(reference, source, dtype=dtype, device_map=spread, **where)
    with errors_alone("transformers"):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
            # A folder without a tokenizer may give one that knows only special tokens.
            has_words = len(tokenizer) > len(tokenizer.added_tokens_decoder)
        except Exception:  # refused later if there is text to encode
            has_words = False
    model = model if device == "auto" else model.to(device)
    kind = "gguf" if is_gguf else "hugging_face"
    return decoder_of(model, tokenizer if has_words else None, reference, kind)


def model_of(reference: Reference, source: str, *, trust_remote_code: bool = False, **how: Any) -> Any:
    """Load the model in ``source`` in evaluation mode, without gradients. ``how`` is for ``from_pretrained``.

    Raises:
        UserError: if it cannot be loaded, or its files lack a weight or have one of another size.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    at = reference.source
    logging.disable_progress_bar()  # downloads have bars of their own
    # No setting switches off the progress bar of unpacking GGUF.
    hidden = redirect_stderr(io.StringIO()) if "gguf_file" in how else nullcontext()
    with loading_errors(reference, trust_remote_code), errors_alone("transformers", "accelerate"), hidden:
        how |= {"output_loading_info": True, "trust_remote_code": trust_remote_code}
        how["ignore_mismatched_sizes"] = True  # refused below, by name
        model, info = AutoModelForCausalLM.from_pretrained(source, **how)
    # For weights that the files lack, transformers draws random numbers and only warns.
    missing, unused = (sorted(map(str, info[keys])) for keys in ("missing_keys", "unexpected_keys"))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        instead = f"; they hold {unused[0]}, which the model does not have" if unused else ""
        raise UserError(f"the files of {at} hold no {missing[0]}{more}, which its config.json needs{instead}")
    for name, held, needed in sorted(info["mismatched_keys"], key=str):
        raise UserError(
            f"the files of {at} hold {name} of size {list(held)}, but its config.json needs {list(needed)}; "
            "one of them is of another model"
        )
    if unused:
        note(f"{at} holds weights that its config.json does not use, such as {unused[0]}; they are ignored")
    return model.eval().requires_grad_(False)


def decoder_of(
    model: Any, tokenizer: Any | None, reference: Reference, kind: str = "hugging_face"
) -> Decoder:
    """The decoder of a ``transformers`` model in evaluation mode, with its ``transformers`` tokenizer.

    Raises:
        UserError: if its layers cannot be found, or it is not a causal decoder.
    """
    config, name = model.config.get_text_config(decoder=True), reference.name
    device = model.device

    # In an encoder-decoder, num_hidden_layers is the encoder's.
    counts = _settings(
        config, "decoder_layers num_decoder_layers num_hidden_layers n_layer n_layers num_layers"
    )
    num_layers = next((count for count in counts if isinstance(count, int)), None)
    lengths = _settings(
        config, "max_target_positions max_position_embeddings n_positions max_seq_len seq_length"
    )
    max_length = next((int(length) for length in lengths if length > 0), None)
    ids = getattr(config, "vocab_size", None) or len(model.get_output_embeddings().weight)
    logits = partial(_logits, model, name)
    structure = find_structure(model, logits, int(ids), name, num_layers, max_length)
    if num_layers not in (None, len(structure.layers)):
        note(
            f"the configuration of {name} counts {num_layers} layers, but {len(structure.layers)} of "
            f"{type(structure.layers[0]).__name__} run from embedding to head; these are measured"
        )
    if structure.scales:
        note(f"{name} scales its state between layers; its norms are of the layers' outputs")
    if not structure.feeds_head_alone:
        note(f"the head of {name} reads more than its last layer's output; figures are of this output only")
    output_embedding = model.get_output_embeddings()
    # A tied nn.Embedding also runs before the layers, so a forward pass cannot stop at it.
    ends_there = output_embedding is not None and not isinstance(output_embedding, nn.Embedding)

    @torch.inference_mode()
    def run(tokens: Tensor) -> None:
        stop = output_embedding.register_forward_pre_hook(_stop) if ends_there else nullcontext()
        with suppress(_HeadReached), stop:
            _called(model, tokens.to(device))

    return Decoder(
        name=name,
        source=reference.source,
        kind=kind,
        revision=reference.revision,
        step=step_of(reference.revision or reference.source) if reference.step is None else reference.step,
        model=model,
        layers=structure.layers,
        final_norm=structure.final_norm,
        head=None if output_embedding is None else _head(output_embedding, config),
        run=run,
        logits=logits,
        encode=None if tokenizer is None else encoder_of(tokenizer),
        end_of_text=None if tokenizer is None else tokenizer.eos_token_id,
        vocab_size=int(ids),
        hidden_size=structure.hidden_size,
        max_length=max_length,
        device=device,
        dtype=model.dtype,
        in_place=structure.in_place,
    )


def _settings(config: Any, names: str) -> list[Any]:
    """The values of these settings that exist in the configuration and are not zero, in the given order."""
    return [value for name in names.split() if (value := getattr(config, name, None))]


def _called(module: nn.Module, tokens: Tensor) -> Any:
    """The output of a model for token ids, without a cache."""
    known = signature(module.forward).parameters.values()
    has_cache = any(each.name == "use_cache" or each.kind is each.VAR_KEYWORD for each in known)
    return module(input_ids=tokens, **{"use_cache": False} if has_cache else {})


@torch.inference_mode()
def _logits(model: Any, name: str, tokens: Tensor) -> Tensor:
    """Logits ``[b, s, V]`` of token ids ``[b, s]``."""
    output = _called(model, tokens.to(model.device))
    if hasattr(output, "logits"):
        found: Tensor = output.logits
    else:
        found = output["logits" if isinstance(output, dict) else 0]
    if found.ndim != 3 or found.shape[:2] != tokens.shape:
        raise UserError(
            f"{name} ({type(model).__name__}) gives logits {list(found.shape)} for token ids "
            f"{list(tokens.shape)}; give a causal language model that predicts at every position"
        )
    return found


class _HeadReached(Exception):
    """Ends a forward pass after all layers have run."""


def _stop(*_: Any) -> None:
    raise _HeadReached


def _head(embedding: nn.Module, config: Any) -> Callable[[Tensor], Tensor]:
    """The output embedding, with the known settings that change its logits.

    Before a read-out, the result is compared with the model's own logits.
    """
    kind = next((weight.dtype for weight in embedding.parameters() if weight.is_floating_point()), None)
    scales = [*_settings(config, "logit_scale"), 1.0]
    scale = 1.0 if isinstance(scales[0], str) else scales[0]  # of MPT, which transformers does not apply
    scale /= [*_settings(config, "logits_scaling"), 1.0][0]
    cap = next(iter(_settings(config, "final_logit_softcapping logits_soft_cap output_logit_soft_cap")), None)

    def head(states: Tensor) -> Tensor:
        # Some models have an fp32 residual stream with weights of another type. `forward` bypasses the hooks:
        # the read-out runs inside a forward pass that ends at the model's own call of this module.
        logits: Tensor = embedding.forward(states if kind is None else states.to(kind))
        if scale != 1.0:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


@contextmanager
def loading_errors(reference: Reference, trusted: bool = False) -> Iterator[None]:
    """Turn errors of transformers and the hub into one line."""
    at = f"{reference.source}@{reference.revision}" if reference.revision else reference.source
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{at} does not fit into the device's memory; give --dtype bfloat16 or --device auto"
        ) from error
    except Exception as error:
        said = one_line(error)
        if "trust_remote_code" in said and not trusted:
            raise UserError(
                f"{at} has its own Python code; if you trust it, give --trust-remote-code to run it"
            ) from error
        if isinstance(error, OSError) and not Path(reference.source).exists():
            raise UserError(
                f"{at} is not a file or folder, and the hub did not return it ({said[:160]}); correct the "
                "name, the revision or the network access"
            ) from error
        raise UserError(f"{at} cannot be loaded as a causal language model: {said[:300]}") from error
