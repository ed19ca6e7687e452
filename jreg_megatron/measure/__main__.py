"""``jreg-megatron measure``: displacement of each layer and jump rate of a model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable
from typing import Any

from jreg_megatron.data.texts import MAX_TOKENS, Text, add_text_arguments, describe, texts_of
from jreg_megatron.decoder.load import add_model_arguments, check_model_arguments, load
from jreg_megatron.decoder.reference import Reference, find_models
from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import UserError, user_errors_exit

_EXAMPLES = """examples:
  jreg-megatron measure Qwen/Qwen3-0.6B
  jreg-megatron measure runs/170m/checkpoints@all --json training.json
  jreg-megatron measure baseline=runs/a jreg=runs/b --text held_out.jsonl --max-tokens 2048
  jreg-megatron measure Qwen/Qwen3-0.6B --depth --csv depth.csv
  jreg-megatron measure --paper Llama-3.2-1B Pythia-1B --device cuda --json paper.json
  jreg-megatron measure EleutherAI/pythia-160m@step1000,step16000,step143000 --json pythia.json

Psi_l = (1 - cos(h_{l-1}, h_l)) / 2 is the displacement of layer l, zeta_L = 100 max(0, Psi_L - Psi_{L-1}) the
jump rate. Both use the mean over texts of each text's mean over tokens. jreg-megatron report draws --json
files.
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2 and one line for a user's mistake, 130 for Ctrl-C.
    """
    args = _parser().parse_args(argv)
    with user_errors_exit("finished models are in --json and --csv, if they were given"):
        _measure(args)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="jreg-megatron measure",
        description="Measure how far each layer turns the residual stream, in any decoder-only model.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    paper = (
        "measure models of the paper's Tables 1 and 2 instead, by the paper's names, such as Llama-3.2-1B "
        "(default: all ten). Without --text the text is LAMBADA. The table also has the paper's figures"
    )
    parser.add_argument("--paper", nargs="*", metavar="NAME", help=paper)
    text, which = add_text_arguments(parser)
    samples = "read the whole samples of a Megatron training's last validation"
    which.add_argument("--last-validation", action="store_true", help=samples)
    parser.set_defaults(max_tokens=None)  # it may not be given with --last-validation
    without = "leave each sequence's first token out of the printed figures; JSON and CSV hold both"
    text.add_argument("--drop-first-token", action="store_true", help=without)
    add_model_arguments(parser, "*")
    output.add_output_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="also print a line for each layer")
    depth = (
        "also measure how each layer is used, and print a line for each: the share of tokens for which the "
        "layer is void, the contributions of attention and MLP relative to their input, and the entropy and "
        "curvature of a sequence's states. It takes several times as long"
    )
    parser.add_argument("--depth", action="store_true", help=depth)
    return parser


def _measure(args: Namespace) -> None:
    references, printed = _checked(args)
    texts, source = _texts(args)
    check_model_arguments(args)
    from jreg_megatron.measure.table import csv_rows, print_comparison, print_layers, print_summary

    models: list[dict[str, Any]] = []
    text = {"source": source, "max_tokens": args.max_tokens or None}
    packages = ("torch", "transformers", "megatron-core")
    document = output.document("measurement", *packages, text=text, models=models)

    def show(console: Any) -> None:
        print_summary(console, models)
        for model in models if args.layers else []:
            print_layers(console, model)
        for model in models if args.depth else []:
            print_layers(console, model, depth=True)
        if printed:
            theirs = [(model, printed[model["name"], model["revision"]]) for model in models]
            print_comparison(console, theirs)

    try:
        for number, reference in enumerate(references, start=1):
            try:
                models.append(_entry(args, reference, texts, f"{number}/{len(references)}"))
            except UserError as error:
                if args.paper is None:
                    raise
                output.note(f"{reference.at} is left out: {error}")
            # After each model, so that finished ones stay if a later one fails.
            output.put_out(args, document, csv_rows(models))
    finally:
        if models:
            output.put_out(args, document, csv_rows(models), show)
    if not models:
        raise UserError("--paper: none of the models could be loaded; see the notes above")


def _checked(args: Namespace) -> tuple[list[Reference], dict[tuple[str, str | None], float]]:
    """The checkpoints to measure, and the paper's figures by name and revision."""
    output.check_outputs(json=args.json, csv=args.csv)
    if args.last_validation and args.max_tokens is not None:
        raise UserError("--max-tokens and --last-validation exclude each other; give only one")
    if args.max_tokens is None:
        args.max_tokens = 0 if args.last_validation else MAX_TOKENS
    if args.max_tokens < 0:
        raise UserError(f"--max-tokens is {args.max_tokens}; it must be at least 1, or 0 for whole texts")
    if args.paper is None and not args.models:
        raise UserError("MODEL is missing; give one, or --paper")
    if args.paper is not None and args.models:
        raise UserError(f"MODEL is {args.models[0]}, but --paper names the models; leave one out")
    if args.paper is None:
        references, printed = find_models(args.models), {}
    else:
        from jreg_megatron.measure.paper_models import paper_models

        of_paper = paper_models(args.paper)
        references = [reference for reference, _ in of_paper]
        printed = {(reference.name, reference.revision): zeta for reference, zeta in of_paper}
    for reference in references:
        if args.last_validation and not reference.is_megatron:
            raise UserError(f"--last-validation needs Megatron checkpoints; {reference.source} is none")
    return references, printed


def _texts(args: Namespace) -> tuple[Iterable[Text], str]:
    """The texts and their name. The samples of a last validation come with each model."""
    if args.last_validation:
        return [], "the samples of each training's last validation"
    if args.paper is not None and not (args.text or args.speeches):
        from jreg_megatron.measure.paper_models import LAMBADA, lambada

        return lambada(), f"LAMBADA ({LAMBADA}, test)"
    return texts_of(args), describe(args)


def _entry(args: Namespace, reference: Reference, texts: Iterable[Text], which: str) -> dict[str, Any]:
    from tqdm import tqdm

    from jreg_megatron.measure.measurement import entry, measure

    what, quiet = f"{reference.at}: loading ({which})", args.quiet or None
    with tqdm(desc=what, unit=" tokens", unit_scale=True, disable=quiet, dynamic_ncols=True) as bar:
        decoder = load(reference, args)
        bar.set_description(f"{reference.at} ({which})")
        bar.reset()
        if args.last_validation and decoder.last_validation:
            samples = decoder.last_validation()["tokens"].numpy()
            texts = [Text(f"validation sample {number}", ids) for number, ids in enumerate(samples, start=1)]
        how: dict[str, Any] = {"max_tokens": args.max_tokens or None, "batch_size": args.batch_size}
        how["depth"] = args.depth
        measured = measure(decoder, texts, **how, on_tokens=bar.update)
    return entry(decoder, measured, args.drop_first_token)


if __name__ == "__main__":
    main()
