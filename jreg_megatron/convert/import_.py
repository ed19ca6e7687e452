"""``jreg-megatron import``: write a Hugging Face folder of a Llama or Qwen as a Megatron checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from jreg_megatron.convert import command
from jreg_megatron.decoder.checkpoint.folder import RELEASE, TRACKER
from jreg_megatron.decoder.reference import Reference
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.imports import need, without_noise


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    command.run("import", parser().parse_args(argv), (RELEASE, TRACKER), import_folder, _print)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return command.parser(
        "import",
        ("FOLDER", "folder with config.json and safetensors"),
        "new folder, for Megatron's --load",
        "Write a Llama, Qwen2 or Qwen3 of Hugging Face as a Megatron torch_dist checkpoint, which training "
        "loads at any layout, and print the Megatron flags of the model. No GPU is needed.",
        "At the end the checkpoint is loaded. Its logits must equal the Hugging Face model's.",
    )


def import_folder(options: argparse.Namespace) -> dict[str, Any]:
    """Import, check the checkpoint, and return the report for ``--json``.

    Raises:
        UserError: for a model that Megatron cannot express, or for missing or damaged files.
    """
    source = options.source
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json; give the Hugging Face folder of a Llama")
    need("transformers", "import", "analysis")
    import torch
    from transformers import AutoConfig

    from jreg_megatron.convert.llama import megatron_flags, refuse_other, to_megatron
    from jreg_megatron.decoder.checkpoint.model import import_megatron, load_megatron
    from jreg_megatron.decoder.hugging_face import loading_errors, model_of

    device, reference = torch.device("cpu"), Reference(str(source), str(source))
    with loading_errors(reference):
        config = AutoConfig.from_pretrained(source)
    refuse_other(config, str(source))
    import_megatron(device)
    model = model_of(reference, str(source), dtype=getattr(torch, options.dtype) if options.dtype else "auto")
    weights = to_megatron(model.state_dict(), config)
    flags = [*megatron_flags(config), *_tokenizer_flags(source, config.vocab_size)]
    with command.made_beside(options.output) as folder:
        (folder / RELEASE).mkdir()
        _save(folder / RELEASE, weights, config.vocab_size, flags, model.dtype)
        # After all weights, as in Megatron, because this file makes the folder a checkpoint.
        (folder / TRACKER).write_text(f"{RELEASE}\n")
        decoder = load_megatron(folder, dtype=model.dtype, device=device)
        difference = command.check_logits(decoder, model, "imported")
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in weights.values()),
        "vocab_size": config.vocab_size,
        "megatron_flags": ["--load", str(options.output.absolute()), "--finetune", *flags],
        "largest_logit_difference": difference,
    }


def _tokenizer_flags(folder: Path, vocab_size: int) -> list[str]:
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder.absolute())]
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)]


def _save(folder: Path, weights: dict[str, Any], vocab_size: int, flags: list[str], dtype: Any) -> None:
    """Write a ``torch_dist`` checkpoint of the weights, with the arguments of their model."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from jreg_megatron.cpu import FLAGS
    from jreg_megatron.decoder.checkpoint import arguments
    from jreg_megatron.decoder.checkpoint import model as building
    from jreg_megatron.mcore.arguments import parse
    from jreg_megatron.mcore.one_process import single_process

    args = parse([*FLAGS, *flags], world_size=1)
    # The number of padding rows depends on the training's layout. Megatron adds them when it loads.
    args.vocab_size = args.padded_vocab_size = vocab_size
    args.make_vocab_size_divisible_by, args.params_dtype = 1, dtype
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    single_process()
    with without_noise():
        model: Any = building.build(arguments.model_arguments(vars(args), dtype, vocab_size)).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, (missing, unexpected)
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    sharded = model.sharded_state_dict(metadata=metadata | {"dp_cp_group": group})
    with without_noise():
        dist_checkpointing.save({"model": sharded} | common, str(folder), content_metadata=metadata)
    # Megatron-Core before 0.19 reads this file; newer versions read either.
    torch.save(common | {"content_metadata": metadata}, folder / "common.pt")


def _print(report: dict[str, Any]) -> None:
    print(f"Checked: logits differ by at most {report['largest_logit_difference']:.1e}")
    print("Continue training with these flags, and your own for data, length, batch, optimizer and layout:\n")
    # One line per flag, for a shell script.
    words = [f"\\\n    {w}" if w.startswith("--") else w for w in map(shlex.quote, report["megatron_flags"])]
    print(" ".join(words).removeprefix("\\\n"))


if __name__ == "__main__":
    main()
