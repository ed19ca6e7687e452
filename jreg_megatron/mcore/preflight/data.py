"""Checks of the training data's files."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import batched

from jreg_megatron.data.token_file import TokenFile
from jreg_megatron.mcore.preflight.asked import flag_of, given, is_number, read_text
from jreg_megatron.runtime.errors import UserError, one_line

_SPLITS = ("train", "valid", "test")
_DEFAULT_SPLIT = "969,30,1"  # Megatron's
_SPLIT_FLAGS = ("train_data_path", "valid_data_path", "test_data_path")


def data_source(args: Namespace) -> None:
    if args.perform_rl_step:
        return
    sources = given(args, "data_path", "data_args_path")
    sources += given(args, *_SPLIT_FLAGS)[:1] + given(args, "per_split_data_args_path")
    sources += ["--mock-data"] if args.mock_data else []
    if not sources:
        raise UserError(
            "--data-path is missing; give the prefix of .bin/.idx files (or --train-data-path and "
            "--valid-data-path), or --mock-data for random tokens"
        )
    if len(sources) > 1:
        raise UserError(f"{sources[0]} and {sources[1]} exclude each other; give one source of data")
    if sources[0] == "--data-args-path" and args.split is None:
        raise UserError("--split is missing; --data-args-path needs it, for example --split 99,1,0")
    split_by_file = sources[0] not in ("--data-path", "--data-args-path", "--mock-data")
    if split_by_file and args.split is not None:
        raise UserError(f"--split is {args.split}, but {sources[0]} gives the splits by file; drop --split")
    if any(given(args, *_SPLIT_FLAGS)) and args.train_data_path is None and not args.skip_train:
        raise UserError(f"--train-data-path is missing beside {sources[0]}; add it")


def data_files(args: Namespace) -> None:
    for flag, prefix in local_prefixes(args):
        token_file_of(flag, prefix)


def local_prefixes(args: Namespace) -> Iterator[tuple[str, str]]:
    """Each local dataset once, with the flag that names it."""
    # Fine-tuning data are JSON lines. Mock data have no files.
    if args.mock_data or args.sft:
        return
    seen = set()
    for flag, entries in _blends(args):
        for _, prefix in _weighted(flag, entries):
            if "://" not in prefix and prefix not in seen:
                seen.add(prefix)
                yield flag, prefix


def _blends(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    for name in ("data_path", *_SPLIT_FLAGS):
        if getattr(args, name) is not None:
            yield flag_of(name), getattr(args, name)
    if args.data_args_path is not None and "://" not in args.data_args_path:
        flag = f"--data-args-path {args.data_args_path}"
        yield flag, read_text(flag, args.data_args_path).split()
    if args.per_split_data_args_path is not None and "://" not in args.per_split_data_args_path:
        flag = f"--per-split-data-args-path {args.per_split_data_args_path}"
        try:
            splits = json.loads(read_text(flag, args.per_split_data_args_path))
        except ValueError as error:
            raise UserError(f"{flag} is not JSON ({one_line(error)}); correct the file") from error
        missing = [split for split in _SPLITS if not isinstance(splits, dict) or split not in splits]
        if missing:
            raise UserError(f"{flag} has no key {missing[0]}; it must have train, valid and test")
        for split in _SPLITS:
            entries = splits[split].split() if isinstance(splits[split], str) else splits[split]
            if entries is not None:
                yield f"{flag} ({split})", [str(entry) for entry in entries]


def training_blends(args: Namespace) -> Iterator[tuple[str, float, list[tuple[float | None, str]]]]:
    """Of the training data: the flag, the share of each dataset for training, and weights with prefixes."""
    if args.mock_data or args.sft:
        return
    parts = [float(part) for part in re.split(r"[,/]", args.split or _DEFAULT_SPLIT)]
    for flag, entries in _blends(args):
        name = flag.partition(" ")[0]
        if name in ("--valid-data-path", "--test-data-path") or flag.endswith(("(valid)", "(test)")):
            continue
        is_split = name in ("--data-path", "--data-args-path")
        yield flag, parts[0] / sum(parts) if is_split else 1.0, _weighted(flag, entries)


def _weighted(flag: str, entries: list[str]) -> list[tuple[float | None, str]]:
    """A blend's weights and prefixes; the weights are None if not given."""
    if not entries:
        raise UserError(f"{flag} is empty; give the prefix of .bin/.idx files")
    if len(entries) % 2 == 0:
        weights = [is_number(entry) for entry in entries[::2]]
        if all(weights):
            return [(float(weight), prefix.strip()) for weight, prefix in batched(entries, 2)]
        if any(weights):
            raise UserError(
                f"{flag} is {' '.join(entries)}; give a weight before every prefix or before none"
            )
    return [(None, entry.strip()) for entry in entries]


def token_file_of(flag: str, prefix: str) -> TokenFile:
    """The files of a dataset; raises as :class:`TokenFile`, naming ``flag`` too."""
    try:
        return TokenFile(prefix)
    except UserError as error:
        hint = "; give a weight before every prefix or before none" if is_number(prefix) else ""
        raise UserError(f"{flag} names {prefix}, but {error}{hint}") from error
