"""Text into Megatron's token files, and a look into them: ``python -m jreg_megatron.data COMMAND``."""

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
from jreg_megatron.runtime.errors import UserError, user_errors_exit


def main(argv: list[str] | None = None) -> None:
    """Run a command.

    Raises:
        SystemExit: with status 2 and one line for a user's mistake, 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    with user_errors_exit("the same command goes on from here"):
        args.command(args)


def _prepare(args: Namespace) -> None:
    from jreg_megatron.data.options import Options
    from jreg_megatron.data.piece_folder import read_manifest
    from jreg_megatron.data.prepare import prepare

    _check_least(args, workers=1, max_refused=0, max_record_bytes=1, piece_bytes=1)
    if not 0 <= args.validation_share < 1:
        raise UserError(f"--validation-share is {args.validation_share}; it must be from 0 to below 1")
    if bool(args.validation_share) != bool(args.validation_output):
        raise UserError("--validation-share and --validation-output belong together; give both or none")
    if len(set(args.keys)) != len(args.keys):
        raise UserError(f"--keys is {' '.join(args.keys)}; name each key once")
    options = _of_args(Options, args, tokenizer=TokenizerSettings.from_args(args))
    made = prepare(options)
    if args.quiet:
        return
    if not made:
        print(f"{args.output} is done already; nothing to do")
    manifest = read_manifest(options.manifest)
    for name, output in manifest["outputs"].items():
        place = os.path.normpath(args.output.parent / name)
        print(f"{place}: {output['documents']:,} documents, {output['tokens']:,} tokens ({output['dtype']})")
    if made:
        print(f"Made in {manifest['seconds']:.0f} s")
    if manifest["refused"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in manifest["refused"].items())
        print(f"Refused: {kinds}; they are listed in {args.output}.refused.jsonl")


def _tokenizer(args: Namespace) -> None:
    from jreg_megatron.data.vocabulary import Options, make

    _check_least(args, vocab_size=1, sample_bytes=1, max_record_bytes=1)
    made = make(_of_args(Options, args))
    print(f"{args.output}: {args.vocab_size:,} pieces" + ("" if made else "; it is done already"))


def _inspect(args: Namespace) -> None:
    from tqdm import tqdm

    from jreg_megatron.data import inspection

    _check_least(args, samples=0)
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
    """Options whose fields have the names of the arguments, but for the corpus and what is given."""
    corpus = Corpus(tuple(args.input), args.format, args.hub, args.subset, args.hub_split)
    values = vars(args) | {"corpus": corpus, **more}
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _check_least(args: Namespace, **least: int) -> None:
    for name, limit in least.items():
        value = getattr(args, name)
        if value is not None and value < limit:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be >= {limit}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jreg_megatron.data", description="Text for pretraining with Megatron."
    )
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(
        commands.add_parser(
            "prepare",
            help="encode text into Megatron's .bin and .idx",
            description="Encode text into Megatron's .bin and .idx, byte for byte as Megatron's "
            "tools/preprocess_data.py --append-eod does. You can kill it at any time: the same command keeps "
            "the finished pieces and makes the others.",
        )
    )
    _add_tokenizer(
        commands.add_parser(
            "tokenizer",
            help="train a SentencePiece model",
            description="Train a SentencePiece model: BPE with byte fallback, so that decoding returns any "
            "text unchanged. The same input gives the same bytes.",
        )
    )
    _add_inspect(
        commands.add_parser(
            "inspect",
            help="verify token files and show what they hold",
            description="Verify Megatron's token files, written by any program, and show what they hold.",
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
        help="writes PREFIX_text_document.bin and .idx, and PREFIX.manifest.json, which lists the "
        "sources, the tokenizer and the settings",
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
        help="hold out this share of the documents, from 0 to below 1; a hash of the text decides, so "
        "all copies of a text go to the same side",
    )
    group.add_argument(
        "--validation-output", type=Path, metavar="PREFIX", help="prefix of the files for held-out documents"
    )
    group = parser.add_argument_group("bad records")
    group.add_argument(
        "--max-refused",
        type=int,
        default=0,
        metavar="N",
        help="stop after more than N bad records (default: %(default)s, so that no text is lost unseen). A "
        "stopped run continues with a higher limit. PREFIX.refused.jsonl lists the bad records",
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
        help="bytes of input in a piece; a kill loses at most one piece for each worker (default: 1/256 of "
        "the input, at least 1 MiB and at most 64 MiB). A .gz or .zst file is one piece",
    )
    group.add_argument(
        "--no-disk-check",
        dest="check_disk",
        action="store_false",
        help="start even if the disk seems too small",
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
        help="about how much text to train on, taken evenly from the input (default: %(default)s)",
    )
    _add_max_record_bytes(group)


def _add_inspect(parser: ArgumentParser) -> None:
    parser.set_defaults(command=_inspect)
    parser.add_argument(
        "prefix", nargs="+", metavar="PREFIX|FOLDER", help="token files without .bin/.idx, or folders of them"
    )
    parser.add_argument("--quick", action="store_true", help="verify the index only, do not read the tokens")
    parser.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="documents to show, with --tokenizer-model (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--blend", type=Path, metavar="FILE", help="write the list of them for Megatron's --data-args-path"
    )
    tokenizing.add_arguments(parser, required=False)


def _add_corpus(parser: ArgumentParser) -> None:
    known = " ".join(ending for endings in sources.FORMATS.values() for ending in endings)
    group = parser.add_argument_group("input")
    group.add_argument(
        "input",
        nargs="*",
        metavar="INPUT",
        help="files, patterns and folders, read in this order; the files of a folder and of its subfolders "
        f"are read by path. Known endings: {known}, and .gz or .zst after them. A document is a line of "
        "JSON, a row of Parquet, or a text file",
    )
    group.add_argument("--format", choices=sources.FORMATS, help="what the files are, whatever their endings")
    group.add_argument(
        *("--keys", "--json-keys"),
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields or columns that hold text (default: text); each makes a token file of its own",
    )
    group.add_argument(
        "--hub",
        metavar="NAME",
        help="a dataset on the Hugging Face hub instead; read over the network, none of its code is run",
    )
    group.add_argument("--subset", metavar="NAME", help="its configuration")
    group.add_argument(
        "--hub-split", default="train", metavar="NAME", help="its split (default: %(default)s)"
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
