"""Make Megatron's token files from text, and inspect them: ``python -m jreg_megatron.data COMMAND``."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from jreg_megatron.data import tokenizing
from jreg_megatron.data.corpus import FORMATS
from jreg_megatron.data.tokenizing import TokenizerSettings
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.flags import check_least
from jreg_megatron.runtime.output import check_outputs

_NUMBER: Any = {"type": int, "metavar": "N"}


def main(argv: list[str] | None = None) -> None:
    """Run a command.

    Raises:
        SystemExit: with status 2 and one line for a user's mistake, 130 for Ctrl-C.
    """
    args = parser().parse_args(argv)
    with user_errors_exit("the same command continues from here"):
        args.command(args)


def _prepare(args: Namespace) -> None:
    """Encode text into Megatron's .bin and .idx. The files are byte for byte those of Megatron's
    tools/preprocess_data.py --append-eod. If a run is killed, the same command continues it: it keeps the
    finished pieces."""
    from jreg_megatron.data.prepare import prepare

    check_least(args, workers=1, max_refused=0, max_record_bytes=1, piece_bytes=1)
    if not 0 <= args.validation_share < 1:
        raise UserError(f"--validation-share is {args.validation_share}; it must be >= 0 and < 1")
    if bool(args.validation_share) != bool(args.validation_output):
        raise UserError("--validation-share and --validation-output need each other; give both or none")
    args.keys = list(dict.fromkeys(args.keys))
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
    """Train a SentencePiece model: BPE with byte fallback. Decoding returns any text unchanged. The same
    input gives the same bytes."""
    from jreg_megatron.data.vocabulary import make

    check_least(args, vocab_size=1, sample_bytes=1, max_record_bytes=1)
    made = make(args)
    print(f"{args.output}: {args.vocab_size:,} pieces" + ("" if made else "; it is done already"))


def _inspect(args: Namespace) -> None:
    """Verify Megatron's token files, written by any program, and show a summary."""
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


def parser() -> ArgumentParser:
    """The parser of all commands."""
    about = "Turn text into Megatron's token files, and check them."
    made = ArgumentParser(prog="jreg-megatron data", description=about)
    commands: Any = made.add_subparsers(required=True, metavar="COMMAND")
    for run, add_flags in ((_prepare, _add_prepare), (_tokenizer, _add_tokenizer), (_inspect, _add_inspect)):
        about = run.__doc__ or ""  # shown by --help
        brief = about.partition(". ")[0].rstrip(".")
        command = commands.add_parser(run.__name__[1:], help=brief, description=about)
        command.set_defaults(command=run)
        add_flags(command)
    return made


def _add_prepare(parser: ArgumentParser) -> None:
    _add_input(parser)
    tokenizing.add_arguments(parser, required=True)
    add = parser.add_argument_group("output").add_argument
    add(
        *("--output", "--output-prefix"),
        required=True,
        type=Path,
        metavar="PREFIX",
        help="write PREFIX_text_document.bin and .idx. PREFIX.manifest.json lists sources, tokenizer and "
        "settings",
    )
    no_eod = "do not end documents with the end-of-document id"
    add("--no-append-eod", dest="append_eod", action="store_false", help=no_eod)
    share = (
        "hold out this share of the documents, >= 0 and < 1. A hash of the text decides, so copies of a text "
        "stay together"
    )
    add("--validation-share", type=float, default=0.0, metavar="SHARE", help=share)
    held_out = "prefix of the files of held-out documents"
    add("--validation-output", type=Path, metavar="PREFIX", help=held_out)
    add = parser.add_argument_group("run").add_argument
    refused = (
        "stop after more than N bad records (default: %(default)s). A stopped run continues with a higher "
        "limit. PREFIX.refused.jsonl lists the bad records"
    )
    add("--max-refused", **_NUMBER, default=0, help=refused)
    cores = len(os.sched_getaffinity(0))
    add("--workers", **_NUMBER, default=cores, help="processes (default: the cores, %(default)s)")
    piece = (
        "bytes of input per piece. A killed run loses at most one piece per worker. A .gz or .zst file is "
        "one piece (default: 1/256 of the input, at least 1 MiB and at most 64 MiB)"
    )
    add("--piece-bytes", **_NUMBER, help=piece)
    no_check = "do not check the free disk space"
    add("--no-disk-check", dest="check_disk", action="store_false", help=no_check)
    add("--quiet", action="store_true", help="no progress, no summary")


def _add_tokenizer(parser: ArgumentParser) -> None:
    _add_input(parser, "All go into one sample")
    add = parser.add_argument_group("output").add_argument
    add("--output", required=True, type=Path, metavar="FILE", help="the model, as in tokenizer.model")
    add("--vocab-size", **_NUMBER, default=32000, help="number of pieces (default: %(default)s)")
    sample = "approximate bytes of text in the sample, taken evenly from the input (default: %(default)s)"
    add("--sample-bytes", **_NUMBER, default=1 << 28, help=sample)


def _add_inspect(parser: ArgumentParser) -> None:
    add, files = parser.add_argument, "token files without .bin/.idx, or folders of them"
    add("prefix", nargs="+", metavar="PREFIX|FOLDER", help=files)
    add("--quick", action="store_true", help="verify the index only; do not read the tokens")
    samples = "documents to show, with --tokenizer-model (default: %(default)s)"
    add("--samples", **_NUMBER, default=3, help=samples)
    add("--json", action="store_true", help="print JSON")
    add("--blend", metavar="FILE", help="write a list of the files for Megatron's --data-args-path")
    tokenizing.add_arguments(parser, required=False)


def _add_input(parser: ArgumentParser, of_keys: str = "Each gets its own token file") -> None:
    add = parser.add_argument_group("input").add_argument
    files = (
        "files, patterns and folders, read in this order. The files of a folder are sorted by path. Known "
        f"endings: {' '.join(chain(*FORMATS.values()))}, optionally followed by .gz or .zst. A document is a "
        "line of JSON, a row of Parquet, or a text file"
    )
    add("input", nargs="*", metavar="INPUT", help=files)
    add("--format", choices=FORMATS, help="format of all files, whatever their endings")
    keys = f"fields or columns with the text (default: text). {of_keys}"
    add("--keys", "--json-keys", nargs="+", default=["text"], metavar="KEY", help=keys)
    hub = "read a dataset of the Hugging Face hub instead, over the network. Its code is not run"
    add("--hub", metavar="NAME", help=hub)
    add("--subset", metavar="NAME", help="configuration of the dataset")
    add("--hub-split", default="train", metavar="NAME", help="split of the dataset (default: %(default)s)")
    add("--max-record-bytes", **_NUMBER, default=1 << 28, help="refuse larger records (default: %(default)s)")


if __name__ == "__main__":
    main()
