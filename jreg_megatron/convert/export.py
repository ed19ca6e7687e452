"""``jreg-megatron export``: write a Megatron checkpoint as a Hugging Face folder of a Llama or Qwen."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jreg_megatron.convert import command
from jreg_megatron.decoder.checkpoint.folder import find_checkpoint
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.imports import need

if TYPE_CHECKING:
    from jreg_megatron.decoder.checkpoint.tokenizer import TrainingTokenizer
    from jreg_megatron.decoder.checkpoint.weights import Checkpoint
    from jreg_megatron.methods.lns.settings import LayerNormScalingConfig

_OWN = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.*", "merges.txt"),
    "added_tokens.json",
)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    command.run("export", parser().parse_args(argv), _OWN, export, _print)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command.parser(
        "export",
        ("CHECKPOINTS", "a training's --save folder"),
        "new folder",
        "Write a Megatron torch_dist checkpoint of a Llama, Qwen2 or Qwen3, saved at any layout, as a folder "
        "for transformers, vLLM and others: safetensors, config and tokenizer. No GPU is needed.",
        "At the end the exported files are loaded. Their logits must equal the checkpoint's, and their "
        "tokenizer must give the same ids as the training's tokenizer.",
    )
    made.add_argument("--step", type=int, metavar="N", help="iteration (default: the last)")
    which = made.add_mutually_exclusive_group().add_argument
    which("--tokenizer-model", metavar="PATH", help="place of the training's tokenizer, if it has moved")
    which("--no-tokenizer", action="store_true", help="export only weights and config")
    rows = "rows of the embedding to export, if neither tokenizer nor training shows the vocabulary's size"
    made.add_argument("--vocab-size", type=int, metavar="N", help=rows)
    return made


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Export, check the written files, and return the report for ``--json``.

    Raises:
        UserError: for a model that neither Llama nor Qwen can express, or for missing or damaged files.
    """
    find_checkpoint(options.source, options.step)
    need("transformers", "export", "analysis")
    import torch
    from transformers import AutoModelForCausalLM

    from jreg_megatron.convert.llama import from_megatron, older_rope_settings, to_hugging_face
    from jreg_megatron.convert.tokenizer import add_to_json, save_tokenizer
    from jreg_megatron.decoder.checkpoint.arguments import all_arguments
    from jreg_megatron.decoder.checkpoint.model import decoder_of, open_checkpoint

    device = torch.device("cpu")
    checkpoint = open_checkpoint(options.source, options.step, device)
    scaling = _norm_scaling(checkpoint)
    args, rows = all_arguments(checkpoint.arguments), checkpoint.rows
    config = from_megatron(args, rows, str(checkpoint.folder), is_changed=scaling is not None)
    tokenizer = _tokenizer(checkpoint.arguments, options)
    told = _told_vocab_size(checkpoint, rows, tokenizer, options.vocab_size)
    config.vocab_size = told or options.vocab_size or rows
    config.dtype = options.dtype or str(checkpoint.dtype).removeprefix("torch.")
    dtype = getattr(torch, config.dtype)
    how: dict[str, Any] = {"dtype": dtype, "device": device, "vocab_size": config.vocab_size}
    decoder = decoder_of(checkpoint, source=str(options.source), **how)
    notes: list[str] = []
    with command.made_beside(options.output) as folder:
        if tokenizer:
            notes, config.bos_token_id = save_tokenizer(tokenizer, folder)
            config.eos_token_id = tokenizer.eod
        weights = decoder.model.state_dict()
        if scaling:
            weights = scaling.into_norms(weights)
            notes.append(
                f"the norms' weights include the factors of {scaling.as_flags()}; leave this flag out if you "
                "import these files and continue training"
            )
        weights = to_hugging_face(weights, config)
        _save_model(folder, config, weights)
        # Transformers 5 writes these settings under another key. Older programs would assume base 10,000.
        add_to_json(folder / "config.json", older_rope_settings(config))
        if not (told or options.vocab_size):
            notes.append(
                f"the size of the vocabulary is not known, so padding may be among the {rows} exported rows; "
                "give --vocab-size or --tokenizer-model"
            )
        written = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        difference = command.check_logits(decoder, written, "exported")
    return {
        "step": checkpoint.step,
        "dtype": config.dtype,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "vocab_size": config.vocab_size,
        "rows_of_padding_left_out": rows - config.vocab_size,
        "mtp_layers_left_out": args.mtp_num_layers or 0,
        "tokenizer": tokenizer.settings.tokenizer_model if tokenizer else None,
        "largest_logit_difference": difference,
        "notes": notes,
    }


def _norm_scaling(checkpoint: Checkpoint) -> LayerNormScalingConfig | None:
    """The factors of norms with which the model was trained. A change of another kind is refused."""
    from jreg_megatron.convert.llama import AS_IT_IS
    from jreg_megatron.decoder.checkpoint.arguments import known_changes
    from jreg_megatron.methods.lns.settings import LayerNormScalingConfig

    scaling = None
    for of_one in known_changes(checkpoint.arguments, str(checkpoint.folder)):
        if not isinstance(of_one, LayerNormScalingConfig):
            raise UserError(
                f"{checkpoint.folder} was trained with {of_one.as_flags()} ({of_one.name}), which no Llama "
                f"or Qwen of Hugging Face has; {AS_IT_IS}"
            )
        scaling = of_one
    return scaling


def _told_vocab_size(
    checkpoint: Checkpoint, rows: int, tokenizer: TrainingTokenizer | None, asked: int | None
) -> int | None:
    """Rows of the embedding without padding, by checkpoint or tokenizer; None if not known.

    Raises:
        UserError: for a tokenizer or a ``--vocab-size`` that does not fit.
    """
    from jreg_megatron.decoder.checkpoint.tokenizer import TrainingTokenizer, pads_to, vocab_size_of

    arguments, what = checkpoint.arguments, checkpoint.folder
    told = vocab_size_of(arguments, rows, tokenizer or TrainingTokenizer.of(arguments))
    if asked is not None and not (0 < asked <= rows and asked == (told or asked)):
        instead = f"a vocabulary of {told}" if told else f"{rows} rows"
        raise UserError(f"--vocab-size is {asked}, but {what} has {instead}; leave it out or correct it")
    if tokenizer is None:
        return told
    size = tokenizer.vocab_size
    fits = pads_to(arguments, size, rows) or told == rows if asked is None else asked >= size
    if not (fits and size <= rows):
        raise UserError(
            f"the tokenizer {tokenizer.settings.tokenizer_model} has {size} tokens, which the training would "
            f"not pad to the {rows} rows of {what}; give its tokenizer with --tokenizer-model, the rows to "
            "export with --vocab-size, or --no-tokenizer"
        )
    return told


def _tokenizer(arguments: dict[str, Any], options: argparse.Namespace) -> TrainingTokenizer | None:
    from jreg_megatron.data.tokenizing import TYPES
    from jreg_megatron.decoder.checkpoint.tokenizer import TrainingTokenizer

    if options.no_tokenizer or arguments.get("tokenizer_type") == "NullTokenizer":
        return None
    kind, place = arguments.get("tokenizer_type"), options.tokenizer_model or arguments.get("tokenizer_model")
    if kind not in TYPES:
        raise UserError(f"the training's --tokenizer-type {kind} cannot be exported; give --no-tokenizer")
    tokenizer = TrainingTokenizer.of(arguments | {"tokenizer_model": place})
    if tokenizer is None:
        raise UserError(
            f"the training's tokenizer {place} does not exist; give its new place with --tokenizer-model, "
            "or give --no-tokenizer"
        )
    return tokenizer


def _save_model(folder: Path, config: Any, weights: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
        missing = [name for name in missing if name != "lm_head.weight"]
    assert not missing and not unexpected, (missing, unexpected)
    model.save_pretrained(folder)


def _print(report: dict[str, Any]) -> None:
    if report["rows_of_padding_left_out"]:
        print(f"Left out: {report['rows_of_padding_left_out']} rows of padding after the vocabulary")
    if report["mtp_layers_left_out"]:
        print(f"Left out: {report['mtp_layers_left_out']} layers of multi-token prediction (MTP)")
    print(f"Checked: logits differ by at most {report['largest_logit_difference']:.1e}", end="")
    print("; the tokenizer gives the same ids" if report["tokenizer"] else "; no tokenizer")
    for note in report["notes"]:
        print(f"Note: {note}")


if __name__ == "__main__":
    main()
