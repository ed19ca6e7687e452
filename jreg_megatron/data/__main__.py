"""Make Megatron's token files from text, and inspect them: ``python -m jreg_megatron.data COMMAND``."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jreg_megatron.data import sources, tokenizing
from jreg_megatron.data.sources import Corpus
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
    from jreg_megatron.data.piece_folder import Options, read_manifest
    from jreg_megatron.data.prepare import prepare

    check_least(args, workers=1, max_refused=0, max_record_bytes=1, piece_bytes=1)
    if not 0 <= args.validation_share < 1:
        raise UserError(f"--validation-share is {args.validation_share}; it must be >= 0 and < 1")
    if bool(args.validation_share) != bool(args.validation_output):
        raise UserError("--validation-share and --validation-output need each other; give both or none")
    if len(set(args.keys)) != len(args.keys):
        raise UserError(f"--keys is {' '.join(args.keys)}; name each key once")
    options = _of_args(Options, args, tokenizer=TokenizerSettings.from_args(args))
    made = prepare(options)
    if args.quiet:
        return
    if not made:
        print(f"{args.output} is done already")
    manifest = read_manifest(options.manifest)
    for name, output in manifest["outputs"].items():
        place = os.path.normpath(args.output.parent / name)
        print(f"{place}: {output['documents']:,} documents, {output['tokens']:,} tokens ({output['dtype']})")
    if made:
        print(f"Made in {manifest['seconds']:.0f} s")
    if manifest["refused"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in manifest["refused"].items())
        print(f"Refused: {kinds}; {args.output}.refused.jsonl lists them")


def _tokenizer(args: Namespace) -> None:
    from jreg_megatron.data.vocabulary import Options, make

    check_least(args, vocab_size=1, sample_bytes=1, max_record_bytes=1)
    made = make(_of_args(Options, args))
    print(f"{args.output}: {args.vocab_size:,} pieces" + ("" if made else "; it is done already"))


def _inspect(args: Namespace) -> None:
    from tqdm import tqdm

    from jreg_megatron.data import inspection

    check_least(args, samples=0)
    check_outputs(blend=args.blend)
    prefixes = inspection.find_prefixes(args.prefix)
    tokenizer = None
    if args.tokenizer_model:
        settings = TokenizerSettings.from_args(args)
        tokenizing.identify(settings)
        tokenizer = tokenizing.build(settings)
    sizes = (os.path.getsize(f"{prefix}.bin") for prefix in prefixes if os.path.isfile(f"{prefix}.bin"))
    hidden = True if args.quick else None
    with tqdm(
        total=sum(sizes), unit="B", unit_scale=True, desc="verifying", disable=hidden, leave=False
    ) as bar:
        vocab_size = tokenizer.vocab_size if tokenizer else None
        summary = inspection.inspect(prefixes, vocab_size, not args.quick, bar)
    samples = list(inspection.samples(prefixes[0], args.samples, tokenizer)) if tokenizer else []
    if args.json:
        shown = [{"document": number, "tokens": tokens, "text": text} for number, tokens, text in samples]
        print(json.dumps(asdict(summary) | {"samples": shown}, indent=2))
    else:
        inspection.show(summary, samples)
    if args.blend:
        inspection.write_blend(args.blend, prefixes)
        if not args.json:
            print(f"Train on all of them with: --data-args-path {args.blend} --split 99,1,0")


def _of_args[T](kind: type[T], args: Namespace, **more: object) -> T:
    """Options from the arguments of the same names. The corpus and ``more`` are added."""
    corpus = Corpus(tuple(args.input), args.format, args.hub, args.subset, args.hub_split)
    values = vars(args) | {"corpus": corpus, **more}
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jreg_megatron.data", description="Text for pretraining with Megatron."
    )
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(
        commands.add_parser(
            "prepare",
            help="encode text into Megatron's .bin and .idx",
            description="Encode text into Megatron's .bin and .idx. The files are byte for byte those of "
            "Megatron's tools/preprocess_data.py --append-eod. After a kill, the same command keeps the "
            "finished pieces and makes the others.",
        )
    )
    _add_tokenizer(
        commands.add_parser(
            "tokenizer",
            help="train a SentencePiece model",
            description="Train a SentencePiece model: BPE with byte fallback. Decoding returns any text "
            "unchanged. The same input gives the same bytes.",
        )
    )
    _add_inspect(
        commands.add_parser(
            "inspect",
            help="verify token files and show a summary",
            description="Verify Megatron's token files, made by any program, and show a summary.",
        )
    )
    return parser


def _add_prepare(parser: ArgumentParser) -> None:
    parser.set_defaults(command=_prepare)
    _add_corpus(parser)
    tokenizing.add_arguments(parser, required=True)
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
    group = parser.add_argument_group("bad records")
    group.add_argument(
        "--max-refused",
        type=int,
        default=0,
        metavar="N",
        help="stop after more than N bad records (default: %(default)s). A stopped run continues with a "
        "higher limit. PREFIX.refused.jsonl lists the bad records",
    )
    _add_max_record_bytes(group)
    group = parser.add_argument_group("run")
    cores = len(os.sched_getaffinity(0))
    group.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="processes (default: the cores, %(default)s)"
    )
    group.add_argument(
        "--piece-bytes",
        type=int,
        metavar="N",
        help="bytes of input in a piece. A kill loses at most one piece of each worker. A .gz or .zst file "
        "is one piece (default: 1/256 of the input, at least 1 MiB and at most 64 MiB)",
    )
    group.add_argument(
        "--no-disk-check",
        dest="check_disk",
        action="store_false",
        help="do not check whether the disk has room",
    )
    group.add_argument("--quiet", action="store_true", help="no progress, no summary")


def _add_tokenizer(parser: ArgumentParser) -> None:
    parser.set_defaults(command=_tokenizer)
    _add_corpus(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="the model, as in tokenizer.model"
    )
    group.add_argument(
        "--vocab-size", type=int, default=32000, metavar="N", help="number of pieces (default: %(default)s)"
    )
    group.add_argument(
        "--sample-bytes",
        type=int,
        default=1 << 28,
        metavar="N",
        help="bytes of text to train on, about, taken evenly from the input (default: %(default)s)",
    )
    _add_max_record_bytes(group)


def _add_inspect(parser: ArgumentParser) -> None:
    parser.set_defaults(command=_inspect)
    parser.add_argument(
        "prefix", nargs="+", metavar="PREFIX|FOLDER", help="token files without .bin/.idx, or folders of them"
    )
    parser.add_argument("--quick", action="store_true", help="verify the index only; do not read the tokens")
    parser.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="documents to show, with --tokenizer-model (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--blend", metavar="FILE", help="write a list of the files for Megatron's --data-args-path"
    )
    tokenizing.add_arguments(parser, required=False)


def _add_corpus(parser: ArgumentParser) -> None:
    known = " ".join(ending for endings in sources.FORMATS.values() for ending in endings)
    group = parser.add_argument_group("input")
    group.add_argument(
        "input",
        nargs="*",
        metavar="INPUT",
        help="files, patterns and folders, read in this order. The files below a folder are sorted by path. "
        f"Known endings: {known}, and .gz or .zst after them. A document is a line of JSON, a row of "
        "Parquet, or a text file",
    )
    group.add_argument(
        "--format", choices=sources.FORMATS, help="format of all files, whatever their endings"
    )
    group.add_argument(
        *("--keys", "--json-keys"),
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields or columns that hold text (default: text). Each makes its own token file",
    )
    group.add_argument(
        "--hub",
        metavar="NAME",
        help="read a dataset of the Hugging Face hub instead, over the network. Its code is not run",
    )
    group.add_argument("--subset", metavar="NAME", help="configuration of the dataset")
    group.add_argument(
        "--hub-split", default="train", metavar="NAME", help="split of the dataset (default: %(default)s)"
    )


def _add_max_record_bytes(group: Any) -> None:
    group.add_argument(
        "--max-record-bytes",
        type=int,
        default=1 << 28,
        metavar="N",
        help="refuse larger records (default: %(default)s)",
    )


if __name__ == "__main__":
    main()
