"""Make Megatron's token files from text, and inspect them: ``python -m jreg_megatron.data COMMAND``."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jreg_megatron.data import tokenizing
from jreg_megatron.data.corpus import FORMATS
from jreg_megatron.data.tokenizing import TokenizerSettings
from jreg_megatron.runtime.errors import UserError, check_least, user_errors_exit
from jreg_megatron.runtime.output import check_outputs


def main(argv: list[str] | None = None) -> None:
    """Run a command.

    Raises:
        SystemExit: with status 2 and one line for a user's mistake, 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    with user_errors_exit("the same command continues from here"):
        args.command(args)


def _prepare(args: Namespace) -> None:
    from jreg_megatron.data.prepare import prepare

    check_least(args, workers=1, max_refused=0, max_record_bytes=1, piece_bytes=1)
    if not 0 <= args.validation_share < 1:
        raise UserError(f"--validation-share is {args.validation_share}; it must be >= 0 and < 1")
    if bool(args.validation_share) != bool(args.validation_output):
        raise UserError("--validation-share and --validation-output need each other; give both or none")
    if len(set(args.keys)) != len(args.keys):
        raise UserError(f"--keys is {' '.join(args.keys)}; name each key once")
    manifest, made = prepare(args)
    if args.quiet:
        return
    if not made:
        print(f"{args.output} is done already")
    for name, output in manifest["outputs"].items():
        place = os.path.normpath(args.output.parent / name)
        print(f"{place}: {output['documents']:,} documents, {output['tokens']:,} tokens ({output['dtype']})")
    if made:
        print(f"Made in {manifest['seconds']:.0f} s")
    if manifest["refused"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in manifest["refused"].items())
        print(f"Refused: {kinds}; {args.output}.refused.jsonl lists them")


def _tokenizer(args: Namespace) -> None:
    from jreg_megatron.data.vocabulary import make

    check_least(args, vocab_size=1, sample_bytes=1, max_record_bytes=1)
    made = make(args)
    print(f"{args.output}: {args.vocab_size:,} pieces" + ("" if made else "; it is done already"))


def _inspect(args: Namespace) -> None:
    from jreg_megatron.data import inspection

    check_least(args, samples=0)
    check_outputs(blend=args.blend)
    prefixes = inspection.find_prefixes(args.prefix)
    tokenizer = None
    if args.tokenizer_model:
        settings = TokenizerSettings.from_args(args)
        tokenizing.identify(settings)
        tokenizer = tokenizing.build(settings)
    summary = inspection.inspect(prefixes, tokenizer.vocab_size if tokenizer else None, not args.quick)
    samples = list(inspection.samples(prefixes[0], args.samples, tokenizer)) if tokenizer else []
    if args.json:
        print(json.dumps(asdict(summary) | {"samples": samples}, indent=2))
    else:
        inspection.show(summary, samples)
    if args.blend:
        inspection.write_blend(args.blend, prefixes)
        if not args.json:
            print(f"Train on all of them with: --data-args-path {args.blend} --split 99,1,0")


def _parser() -> ArgumentParser:
    about = "Text for pretraining with Megatron."
    parser = ArgumentParser(prog="python -m jreg_megatron.data", description=about)
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare = commands.add_parser(
        "prepare",
        help="encode text into Megatron's .bin and .idx",
        description="Encode text into Megatron's .bin and .idx. The files are byte for byte those of "
        "Megatron's tools/preprocess_data.py --append-eod. After a kill, the same command keeps the finished "
        "pieces and makes the others.",
    )
    _add_input(prepare)
    tokenizing.add_arguments(prepare, required=True)
    _add_prepare(prepare)
    tokenizer = commands.add_parser(
        "tokenizer",
        help="train a SentencePiece model",
        description="Train a SentencePiece model: BPE with byte fallback. Decoding returns any text "
        "unchanged. The same input gives the same bytes.",
    )
    _add_input(tokenizer)
    _add_tokenizer(tokenizer)
    inspect = commands.add_parser(
        "inspect",
        help="verify token files and show a summary",
        description="Verify Megatron's token files, made by any program, and show a summary.",
    )
    _add_inspect(inspect)
    tokenizing.add_arguments(inspect, required=False)
    return parser


def _number(group: Any, flag: str, default: int | None, help: str) -> None:
    group.add_argument(flag, type=int, default=default, metavar="N", help=help)


def _add_prepare(parser: ArgumentParser) -> None:
    parser.set_defaults(command=_prepare)
    group = parser.add_argument_group("output")
    group.add_argument(
        *("--output", "--output-prefix"),
        required=True,
        type=Path,
        metavar="PREFIX",
        help="write PREFIX_text_document.bin and .idx. PREFIX.manifest.json lists sources, tokenizer and "
        "settings",
    )
    group.add_argument(
        "--no-append-eod",
        dest="append_eod",
        action="store_false",
        help="do not end documents with the end-of-document id",
    )
    group.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="hold out this share of the documents, >= 0 and < 1. A hash of the text decides, so all copies "
        "of a text are held out or none",
    )
    group.add_argument(
        "--validation-output", type=Path, metavar="PREFIX", help="prefix of the files of held-out documents"
    )
    group = parser.add_argument_group("run")
    refused = (
        "stop after more than N bad records (default: %(default)s). A stopped run continues with a higher "
        "limit. PREFIX.refused.jsonl lists the bad records"
    )
    _number(group, "--max-refused", 0, refused)
    cores = len(os.sched_getaffinity(0))
    _number(group, "--workers", cores, "processes (default: the cores, %(default)s)")
    piece = (
        "bytes of input in a piece. A kill loses at most one piece of each worker. A .gz or .zst file is one "
        "piece (default: 1/256 of the input, at least 1 MiB and at most 64 MiB)"
    )
    _number(group, "--piece-bytes", None, piece)
    no_check = "do not check whether the disk has room"
    group.add_argument("--no-disk-check", dest="check_disk", action="store_false", help=no_check)
    group.add_argument("--quiet", action="store_true", help="no progress, no summary")


def _add_tokenizer(parser: ArgumentParser) -> None:
    parser.set_defaults(command=_tokenizer)
    group = parser.add_argument_group("output")
    model = "the model, as in tokenizer.model"
    group.add_argument("--output", required=True, type=Path, metavar="FILE", help=model)
    _number(group, "--vocab-size", 32000, "number of pieces (default: %(default)s)")
    sample = "bytes of text to train on, about, taken evenly from the input (default: %(default)s)"
    _number(group, "--sample-bytes", 1 << 28, sample)


def _add_inspect(parser: ArgumentParser) -> None:
    parser.set_defaults(command=_inspect)
    parser.add_argument(
        "prefix", nargs="+", metavar="PREFIX|FOLDER", help="token files without .bin/.idx, or folders of them"
    )
    parser.add_argument("--quick", action="store_true", help="verify the index only; do not read the tokens")
    _number(parser, "--samples", 3, "documents to show, with --tokenizer-model (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    blend = "write a list of the files for Megatron's --data-args-path"
    parser.add_argument("--blend", metavar="FILE", help=blend)


def _add_input(parser: ArgumentParser) -> None:
    known = " ".join(ending for endings in FORMATS.values() for ending in endings)
    group = parser.add_argument_group("input")
    group.add_argument(
        "input",
        nargs="*",
        metavar="INPUT",
        help="files, patterns and folders, read in this order. The files below a folder are sorted by path. "
        f"Known endings: {known}, and .gz or .zst after them. A document is a line of JSON, a row of "
        "Parquet, or a text file",
    )
    of_all = "format of all files, whatever their endings"
    group.add_argument("--format", choices=FORMATS, help=of_all)
    group.add_argument(
        *("--keys", "--json-keys"),
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields or columns that hold text (default: text). Each makes its own token file",
    )
    hub = "read a dataset of the Hugging Face hub instead, over the network. Its code is not run"
    group.add_argument("--hub", metavar="NAME", help=hub)
    group.add_argument("--subset", metavar="NAME", help="configuration of the dataset")
    split = "split of the dataset (default: %(default)s)"
    group.add_argument("--hub-split", default="train", metavar="NAME", help=split)
    _number(group, "--max-record-bytes", 1 << 28, "refuse larger records (default: %(default)s)")


if __name__ == "__main__":
    main()
