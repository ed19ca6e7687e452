"""``jreg-megatron import``: write a Hugging Face folder of a Llama or Qwen as a Megatron checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from jreg_megatron.convert.export import check_logits
from jreg_megatron.convert.place import made_beside, run
from jreg_megatron.decoder.checkpoint.folder import RELEASE, TRACKER
from jreg_megatron.decoder.load import DTYPES
from jreg_megatron.runtime.errors import UserError, one_line
from jreg_megatron.runtime.extras import need
from jreg_megatron.runtime.output import add_output_arguments, versions


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    run(_parser().parse_args(argv), (RELEASE, TRACKER), import_folder, _print)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jreg-megatron import",
        description="Write a Llama, Qwen2 or Qwen3 of Hugging Face as a Megatron torch_dist checkpoint, "
        "which training loads at any layout, and print the Megatron flags of the model. No GPU is needed.",
        epilog="At the end the checkpoint is loaded. Its logits must be the Hugging Face model's.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json and safetensors of a Llama")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="new folder, for Megatron's --load")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as saved)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in OUTPUT")
    add_output_arguments(parser, csv=False)
    return parser


def import_folder(options: argparse.Namespace) -> dict[str, Any]:
    """Import, check the checkpoint, and return the report for ``--json``.

    Raises:
        UserError: for a model that Megatron cannot express, or files that are missing or damaged.
    """
    if not (options.folder / "config.json").is_file():
        raise UserError(f"{options.folder} has no config.json; give the Hugging Face folder of a Llama")
    need("transformers", "import", "analysis")
    import torch

    from jreg_megatron.convert.llama import megatron_flags, refuse_other
    from jreg_megatron.convert.weights import to_megatron
    from jreg_megatron.decoder.checkpoint.model import import_megatron, load_megatron

    device = torch.device("cpu")
    config = _config(options.folder)
    refuse_other(config, str(options.folder))
    import_megatron(device)
    model = _load(options.folder, options.dtype)
    weights = to_megatron(model.state_dict(), config)
    flags = [*megatron_flags(config), *_tokenizer_flags(options.folder, config.vocab_size)]
    with made_beside(options.output) as folder:
        (folder / RELEASE).mkdir()
        _save(folder / RELEASE, weights, config.vocab_size, flags, model.dtype)
        # After all weights, as Megatron does it: this file makes the folder a checkpoint.
        (folder / TRACKER).write_text(f"{RELEASE}\n")
        decoder = load_megatron(folder, dtype=model.dtype, device=device)
        difference = check_logits(decoder, model, "imported")
    return {
        "format": "jreg_megatron import",
        "version": 1,
        "source": str(options.folder),
        "output": str(options.output),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in weights.values()),
        "vocab_size": config.vocab_size,
        "megatron_flags": ["--load", str(options.output.absolute()), "--finetune", *flags],
        "largest_logit_difference": difference,
        "versions": versions("megatron-core", "torch", "transformers"),
    }


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {one_line(error, 200)}") from error


def _load(folder: Path, dtype: str | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype) if dtype else "auto", output_loading_info=True
        )
    except Exception as error:  # of safetensors, torch or transformers
        raise UserError(f"the weights in {folder} cannot be loaded: {one_line(error, 200)}") from error
    for kind, has in (("missing_keys", "holds no"), ("mismatched_keys", "holds another size of")):
        if info.get(kind):
            raise UserError(f"{folder} {has} {min(map(str, info[kind]))}, which its config.json asks for")
    if info.get("unexpected_keys"):
        raise UserError(f"{folder} holds {min(info['unexpected_keys'])}, which such a model does not have")
    return model.eval()


def _tokenizer_flags(folder: Path, vocab_size: int) -> list[str]:
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder.absolute())]
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)]


def _save(folder: Path, weights: dict[str, Any], vocab_size: int, flags: list[str], dtype: Any) -> None:
    """Write a ``torch_dist`` checkpoint of the weights, with the arguments that describe them."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from jreg_megatron.cpu import FLAGS
    from jreg_megatron.decoder.checkpoint import arguments
    from jreg_megatron.decoder.checkpoint import model as building
    from jreg_megatron.mcore.arguments import parse
    from jreg_megatron.mcore.one_process import single_process

    args = parse([*FLAGS, *flags], world_size=1)
    # The rows of padding depend on the training's layout. Megatron adds them at loading.
    args.vocab_size = args.padded_vocab_size = vocab_size
    args.make_vocab_size_divisible_by, args.params_dtype = 1, dtype
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    single_process()
    with building.without_noise():
        model: Any = building.build(arguments.model_arguments(vars(args), dtype, vocab_size)).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, (missing, unexpected)
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    sharded = model.sharded_state_dict(metadata=metadata | {"dp_cp_group": group})
    with building.without_noise():
        dist_checkpointing.save({"model": sharded} | common, str(folder), content_metadata=metadata)
    # Megatron-Core before 0.19 reads this file; newer versions read either.
    torch.save(common | {"content_metadata": metadata}, folder / "common.pt")


def _print(report: dict[str, Any]) -> None:
    print(f"{report['source']} -> {report['output']}")
    print(f"{report['parameters']:,} parameters in {report['dtype']}, vocabulary {report['vocab_size']:,}")
    print(f"Checked: logits differ by at most {report['largest_logit_difference']:.1e}")
    print("Continue training with these flags, and your own for data, length, batch, optimizer and layout:\n")
    # One flag with its values on a line, for a shell script.
    words = [f"\\\n    {w}" if w.startswith("--") else w for w in map(shlex.quote, report["megatron_flags"])]
    print(" ".join(words).removeprefix("\\\n"))


if __name__ == "__main__":
    main()
