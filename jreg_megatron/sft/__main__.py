"""Supervised fine-tuning (SFT) of an exported model by TRL's ``SFTTrainer``; ``recipes/sft.sh`` calls this.

The first process checks model, data, batch and GPUs, prints one table and becomes ``torchrun``. Each rank is
``python -m jreg_megatron.sft train MODEL DATA TRL_FLAGS...``.

``sft.jinja`` in this folder is Tulu's format, from its model cards and ``open-instruct``: a line with the
role, the text, and the end token after each answer. The text between its ``generation`` marks has labels:
the answers with their end tokens. A text has no begin token; the training data of ``jreg_megatron.data`` has
none either.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from jreg_megatron.recipe import announcement, identity
from jreg_megatron.recipe.request import read_words
from jreg_megatron.runtime.errors import UserError, one_line, quiet_interrupt, user_errors_exit
from jreg_megatron.runtime.flags import Parser, count, refuse
from jreg_megatron.runtime.imports import need

TEMPLATE = Path(__file__).with_name("sft.jinja")
ROLES = ("system", "user", "assistant")
SMOKE_STEPS = 2

SMOKE_FLAGS = """
    --use_cpu true --per_device_train_batch_size 4 --max_length 256 --learning_rate 1e-3 --warmup_steps 0
    --logging_steps 1 --dataset_num_proc 1 --fsdp=
"""
"""One process without a GPU, short texts, and a learning rate that lowers the loss in a few steps."""
_RUN = "sft.json"
IDENTITY = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_steps", "max_length"),
    *("packing", "assistant_only_loss", "seed"),
)
"""The settings that identify a run, beside model, data and batch."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``; a run that starts replaces this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    with user_errors_exit(), quiet_interrupt():
        if words[:1] == ["train"]:
            train(words[1], words[2], words[3:])
        else:
            _start(words)


def train(model: str, data: str, flags: Sequence[str]) -> None:
    """Train in this rank, from the checkpoint in the flags if they name one.

    The last checkpoint is the result: a folder with model, tokenizer and template.
    """
    trainer = make_trainer(model, data, flags)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)


def make_trainer(model: str, data: str, flags: Sequence[str]) -> Any:
    """TRL's trainer, with the data as tokens and labels."""
    trl = need("trl", "SFT", "sft")
    (settings,) = _parser().parse_args_into_dataclasses(list(flags))
    return trl.SFTTrainer(model=model, args=settings, train_dataset=read_data(data)[0])


def read_data(data: str) -> tuple[Any, int]:
    """The usable conversations of a JSON-lines file, a folder or a data set on the hub; the number of others.

    Raises:
        UserError: if no conversation is usable.
    """
    datasets = need("datasets", "SFT", "sft")
    path = Path(data)
    if path.suffix in (".json", ".jsonl") and not path.is_file():
        raise UserError(f"DATA is {data}, which does not exist; correct the path")
    source: tuple[str, dict[str, str]] = ("json", {"data_files": data}) if path.is_file() else (data, {})
    try:
        rows = datasets.load_dataset(source[0], split="train", **source[1])
    except Exception as error:  # datasets has no common class for its errors
        said = one_line(error.__cause__ or error)
        raise UserError(
            f"DATA is {data}, which cannot be read ({type(error).__name__}: {said}); name a JSON-lines file, "
            "a folder of such files, or a data set of the Hugging Face hub, if this machine has a network"
        ) from error
    if "messages" not in rows.column_names:
        raise UserError(
            f"DATA is {data}, whose rows have {', '.join(rows.column_names)}; each row needs messages, "
            'a list of {"role": ..., "content": ...}'
        )
    usable = rows.filter(is_usable, input_columns="messages")
    if not len(usable):
        raise UserError(
            f"DATA is {data}, where no row is usable; each needs roles among {', '.join(ROLES)}, text as "
            f"content and an answer by assistant; the first row has {json.dumps(rows[0]['messages'])[:200]}"
        )
    return usable, len(rows) - len(usable)


def is_usable(messages: Any) -> bool:
    """Whether a conversation has only Tulu's roles and texts, and at least one answer."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    roles = [message.get("role") for message in messages]
    return (
        "assistant" in roles
        and set(roles) <= set(ROLES)
        and all(isinstance(message.get("content"), str) for message in messages)
    )


def check_model(model: str, length: int) -> str:
    """The exported model, as text.

    Raises:
        UserError: if ``model`` is no folder of ``jreg-megatron export`` with a tokenizer.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(
            f"MODEL is {model}, which is not a folder; give one that jreg-megatron export has made"
        )
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"MODEL is {model}, which holds no exported model (config.json and safetensors); "
            f"make one: jreg-megatron export CHECKPOINTS OUTPUT"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"MODEL is {model}, which has no tokenizer; export it again without --no-tokenizer")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token is None:
        raise UserError(
            f"MODEL is {model}, whose tokenizer has no end token (eos); an answer must end with one: export "
            "with another tokenizer"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"MODEL is {model}, whose tokenizer has {len(tokenizer):,} tokens and its embedding "
            f"{config.vocab_size:,} rows; export it with the training's tokenizer"
        )
    if length > config.max_position_embeddings:
        raise UserError(
            f"--max_length is {length:,}, and {model} was trained on {config.max_position_embeddings:,} "
            "tokens; lower LENGTH"
        )
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    return f"{model}: {parameters:,} parameters, all trained; vocabulary {len(tokenizer):,}"


def check_data(data: str, examples: int) -> str:
    """The size of the data and the number of passes over it, as text."""
    rows, left_out = read_data(data)
    return f"{len(rows):,} conversations of {data}, read {examples / len(rows):.2f} times" + (
        f"; {left_out:,} left out: no answer, or other roles" if left_out else ""
    )


def last_checkpoint(run: Path) -> tuple[int, Path | None]:
    """Step and folder of the last whole checkpoint; 0 and None where there is none."""
    # The Trainer writes this file last.
    whole = [state.parent for state in run.glob("checkpoint-*/trainer_state.json")]
    return max(((int(path.name.split("-")[1]), path) for path in whole), default=(0, None))


def _start(words: Sequence[str]) -> None:
    options, flags = read_request(words)
    if options.smoke is not None:
        _smoke(options, flags)
        return
    if options.model is None:
        raise UserError(f"the model is missing; name the exported folder: {options.recipe} MODEL")
    asked = parse(flags)
    run, steps = Path(asked.output_dir), asked.max_steps
    if steps < 1:
        raise UserError(f"--max_steps is {steps}; it must be a whole number >= 1: set STEPS")
    micro_batch = asked.per_device_train_batch_size
    at_a_time = options.gpus * micro_batch
    share, rest = divmod(options.batch, at_a_time)
    if rest:
        raise UserError(
            f"BATCH is {options.batch}, which {options.gpus} GPUs cannot share in micro-batches of "
            f"{micro_batch}; it must be a multiple of {at_a_time}: change MICRO_BATCH or GPUS"
        )
    asked_for = {name: getattr(asked, name) for name in IDENTITY}
    asked_for |= {"MODEL": options.model, "DATA": options.data, "BATCH": options.batch}
    identity.refuse_another(run / _RUN, asked_for)
    done, checkpoint = last_checkpoint(run)
    if done >= steps:  # the Trainer would make one more step
        print(f"{run} has all of its {steps:,} steps: nothing to do. The model is {checkpoint}")
        return
    from jreg_megatron.recipe import machine  # it brings torch

    rows = {
        "length": f"{steps:,} steps of {options.batch:,} conversations of at most {asked.max_length:,} tokens"
        + (f"; going on from step {done:,}" if done else f"; the model will be {run}/checkpoint-{steps}"),
        "optimizer": f"AdamW {asked.adam_beta1:g}, {asked.adam_beta2:g}, weight decay "
        f"{asked.weight_decay:g}, clip {asked.max_grad_norm:g}; {asked.lr_scheduler_type} from "
        f"{asked.learning_rate:g}, warm-up {asked.warmup_steps:g}",
        "loss": "on the answers only" if asked.assistant_only_loss else "on all tokens",
        "layout": f"{options.gpus} GPUs; {share} micro-batches of {micro_batch} a step",
    }
    findings: dict[str, Callable[[], str]] = {
        "model": partial(check_model, options.model, asked.max_length),
        "data": partial(check_data, options.data, steps * options.batch),
        "this node": lambda: machine.check_gpus(options.gpus, machine.Gpus.of_this_node()),
    }
    rows |= announcement.found(findings, options.dry_run)
    announcement.show(f"{options.recipe.stem}, seed {asked.seed}, in {run}", rows)
    flags += ["--gradient_accumulation_steps", str(share)]
    flags += ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ranks = [*launcher, "--nproc-per-node", str(options.gpus), *_rank(options.model, options.data, flags)]
    if not options.dry_run:
        identity.write(run / _RUN, asked_for)
    _become(ranks, options.dry_run)


def _smoke(options: Namespace, flags: list[str]) -> None:
    folder = Path(parse(flags).output_dir) / "smoke"
    flags += [*SMOKE_FLAGS.split(), "--gradient_accumulation_steps", "2", "--output_dir", str(folder / "run")]
    flags += ["--max_steps", str(options.smoke)]
    model, data = options.model or str(folder / "model"), folder / "questions.jsonl"
    ranks = [sys.executable, *_rank(model, str(data), flags)]
    print(f"Smoke: {options.model or 'a toy'} on this machine's CPU; its folder is {folder}")
    if options.model:
        check_model(model, parse(flags).max_length)
    if not options.dry_run:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if not options.model:
            make_toy(Path(model))
        data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in questions()))
    _become(ranks, options.dry_run)


def questions(largest: int = 8) -> Iterator[list[dict[str, str]]]:
    """Conversations about sums."""
    for a, b in product(range(largest), repeat=2):
        sum_of = {"user": f"What is {a} plus {b}?", "assistant": f"{a} plus {b} is {a + b}."}
        yield [{"role": role, "content": content} for role, content in sum_of.items()]


def make_toy(folder: Path, pieces: int = 512) -> None:
    """A small Llama with random weights and a tokenizer, in the format of ``jreg-megatron export``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jreg_megatron.convert.tokenizer import write_sentencepiece
    from jreg_megatron.data import vocabulary
    from jreg_megatron.data.speeches import read_speeches

    folder.mkdir(parents=True)
    speeches = list(read_speeches().values())[:12]
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(
        vocabulary.train((line for text in speeches for line in text.split("\n") if line), pieces)
    )
    write_sentencepiece(tokenizer, folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=pieces, **sizes)).save_pretrained(folder)


def _rank(model: str, data: str, flags: Sequence[str]) -> list[str]:
    return ["-m", "jreg_megatron.sft", "train", model, data, *flags]


def _become(ranks: Sequence[str], is_dry_run: bool) -> None:
    if is_dry_run:
        print(announcement.as_text(ranks, os.environ))
        return
    sys.stdout.flush()
    os.execv(ranks[0], list(ranks))


def _parser() -> Any:
    trl = need("trl", "SFT", "sft")
    from transformers import HfArgumentParser

    parser = HfArgumentParser(trl.SFTConfig, allow_abbrev=False)
    parser.error = refuse
    return parser


def parse(flags: Sequence[str]) -> Namespace:
    """TRL's values of the flags; this machine is not checked."""
    asked: Namespace = _parser().parse_args(list(flags))
    return asked


def read_request(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The options of recipe and user, and TRL's flags."""
    parser = Parser(prog="python -m jreg_megatron.sft")
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the recipe, for messages")
    parser.add_argument("--gpus", type=count("GPUS"), required=True, metavar="N", help="number of GPUs")
    batch = "conversations in a step, over all GPUs"
    parser.add_argument("--batch", type=count("BATCH"), required=True, metavar="N", help=batch)
    data = "conversations: a JSON-lines file, a folder of such files, or a data set of the Hugging Face hub"
    parser.add_argument("--data", required=True, help=data)
    user = Parser(
        usage="%(prog)s MODEL [--dry-run] [--smoke [N]] [-- MORE TRL FLAGS]",
        description="Fine-tune an exported model on instructions. All knobs are in the recipe. The "
        "environment can set those that are written ${NAME:-value}. After a crash, start the same command "
        "again: it resumes.",
    )
    user.add_argument("model", nargs="?", metavar="MODEL", help="folder that jreg-megatron export has made")
    smoke = (
        f"train a toy for N steps (default {SMOKE_STEPS}) on this machine's CPU instead, on generated sums; "
    )
    asked = read_words(
        list(words), parser, user, SMOKE_STEPS, smoke + "with MODEL before it, train that model"
    )
    return asked, ["--chat_template_path", str(TEMPLATE), *asked.flags, *asked.user_flags]


if __name__ == "__main__":
    main()
