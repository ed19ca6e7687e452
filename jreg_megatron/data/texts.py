"""Texts for measuring a model: text files, JSON lines, Parquet, Megatron's token files, or the speeches."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from jreg_megatron.data.corpus import Piece, Source, find_sources, records
from jreg_megatron.data.speeches import is_validation, read_speeches
from jreg_megatron.data.token_file import TokenFile
from jreg_megatron.runtime.errors import UserError

MAX_TOKENS = 512
"""Default of ``--max-tokens``, per text."""
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Text:
    """A document."""

    name: str  # for messages: a speech, a file, or a file and the line or number in it
    content: str | Sequence[int] | numpy.ndarray  # the text, or its token ids


@dataclass(frozen=True)
class TextFiles:
    """Text files that were found. Iteration reads one text at a time."""

    key: str  # field of JSON lines or column of Parquet that holds the text
    _parts: tuple[TokenFile | Source, ...]

    @classmethod
    def find(cls, inputs: Sequence[str], key: str = "text") -> TextFiles:
        """Find files, folders and patterns as ``jreg-megatron data prepare`` does, and also prefixes of
        ``.bin/.idx`` files, with or without the ending.

        Raises:
            UserError: for a file that is missing, unreadable, damaged or of unknown format.
        """
        parts: list[TokenFile | Source] = []
        for name in inputs:
            prefix = name[:-4] if name.endswith((".bin", ".idx")) else name
            parts += [TokenFile(prefix)] if os.path.isfile(f"{prefix}.idx") else find_sources([name])
        return cls(key, tuple(parts))

    def __iter__(self) -> Iterator[Text]:
        """Each text in order.

        Raises:
            UserError: for a bad record, naming file and line.
        """
        for part in self._parts:
            if isinstance(part, TokenFile):
                part.verify()
                for number in range(part.documents):
                    yield Text(f"{part.prefix} document {number + 1}", part.document(number))
                continue
            for record in records(Piece((part,), part.size), [self.key], _MAX_BYTES):
                place = part.path if part.format == "text" else f"{part.path} line {record.line}"
                if record.kind:
                    raise UserError(f"{place}: {record.kind} ({record.reason}); correct it or leave it out")
                for text in record.texts:
                    yield Text(place, text if isinstance(text, str) else " ".join(text))


def held_out_speeches() -> list[Text]:
    """The speeches that the demo holds out, by year. Raises as :func:`read_speeches`."""
    return [Text(name, speech) for name, speech in read_speeches().items() if is_validation(name)]


def training_speeches() -> list[Text]:
    """The speeches that the demo trains on, by year. Raises as :func:`read_speeches`."""
    return [Text(name, speech) for name, speech in read_speeches().items() if not is_validation(name)]


def named_speeches(names: Sequence[str]) -> list[Text]:
    """Speeches by name, such as ``1862-Lincoln-1``.

    Raises:
        UserError: for an unknown name.
    """
    speeches = read_speeches()
    for name in names:
        if name not in speeches:
            like = [other for other in speeches if other.split("-")[0] == name[:4]]
            near = like or [*list(speeches)[:2], "..."]
            raise UserError(f"--speeches is {name}, which does not exist; there are {', '.join(near)}")
    return [Text(name, speeches[name]) for name in names]


def add_text_arguments(parser: ArgumentParser) -> tuple[Any, Any]:
    """Define ``--text``, ``--speeches``, ``--key`` and ``--max-tokens``. Returns the group, and the mutually
    exclusive group in it."""
    group = parser.add_argument_group("texts (default: the held-out State of the Union speeches)")
    which = group.add_mutually_exclusive_group()
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    files = "files, folders or patterns: text, JSON lines (.gz, .zst too), Parquet; or .bin/.idx prefixes"
    which.add_argument("--text", **several, metavar="FILE", help=files)
    speeches = "State of the Union speeches, such as 1862-Lincoln-1"
    which.add_argument("--speeches", **several, metavar="NAME", help=speeches)
    key = "field of JSON lines, column of Parquet (default: %(default)s)"
    group.add_argument("--key", default="text", help=key)
    first = f"read the first N tokens of each text; 0 reads all (default: {MAX_TOKENS})"
    group.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=first)
    return group, which


def texts_of(args: Namespace) -> Iterable[Text]:
    """The texts that the flags of :func:`add_text_arguments` name. They can be read several times.

    Raises:
        UserError: if a file or a speech does not exist.
    """
    if args.speeches:
        return named_speeches(args.speeches)
    return TextFiles.find(args.text, args.key) if args.text else held_out_speeches()


def describe(args: Namespace) -> str:
    """A phrase for the texts of :func:`texts_of`."""
    if args.speeches:
        return f"speeches {', '.join(args.speeches)}"
    return ", ".join(args.text) if args.text else "the held-out State of the Union speeches"
