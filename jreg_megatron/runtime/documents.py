"""JSON files, read against a schema; an error names the file, the place in it and the wrong value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from jreg_megatron.runtime.errors import UserError

_SHOWN, _PLACE = 40, 120
# Replaces messages of pydantic that use Python's terms or are too long.
_MUST = {
    **dict.fromkeys(("model_type", "dict_type"), "an object"),
    "too_short": "a list with at least one entry",
    "too_long": "a pair",
}


def printable(text: str) -> str:
    """``text`` on one line, with escapes for invisible characters and those that change the direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, length: int) -> str:
    """:func:`printable` text, cut in the middle to ``length`` characters, so that both ends remain."""
    if len(text) > 2 * length:  # escapes only make it longer
        text = text[:length] + text[-length:]
    text = printable(text)
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[head + 1 - length :]}"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it cannot be read or is not JSON.
    """
    file = printable(str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    # RecursionError: nested too deep. ValueError also: not UTF-8, or a number with thousands of digits.
    except (RecursionError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON: {printable(str(error))}") from error


def checked(path: Path, schema: Any, value: Any) -> Any:
    """Validate ``value``, the content of the JSON file ``path``, against ``schema``.

    ``schema`` is a pydantic model, a dataclass or another type. Its validators raise a ``ValueError`` whose
    message completes "it must be".

    Raises:
        UserError: naming the file, the first wrong field, its value and the allowed values.
    """
    file = printable(str(path))
    try:
        return TypeAdapter(schema).validate_python(value, context={"layers": 0})
    except ValidationError as error:
        raise UserError(f"{file}: {_wrong(error.errors()[0])}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _as_text(value: Any) -> str:
    if isinstance(value, (dict, list)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("a text")
    return value if isinstance(value, str) else json.dumps(value)


NULL_IS_EMPTY = BeforeValidator(lambda value: {} if value is None else value)
"""Reads null as an empty object."""
# Pydantic's own type for text refuses a lone surrogate, which JSON allows.
Name = Annotated[str, PlainValidator(str)]
"""The name of a field."""
Text = Annotated[str, PlainValidator(_text)]
"""A text that is not empty."""
Texts = Annotated[dict[Name, Annotated[str, PlainValidator(_as_text)]], NULL_IS_EMPTY]
"""An object whose values become text; null, true and numbers as in JSON."""


def _wrong(error: ErrorDetails) -> str:
    value = error["input"]
    keys = (f".{part}" if str(part).isidentifier() else f"[{json.dumps(part)}]" for part in error["loc"])
    place = shortened("".join(keys).removeprefix("."), _PLACE)
    if error["type"] == "missing" or value is None:
        return f"{place} is {'null' if value is None else 'missing'}; it is needed"
    words = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{place or 'the whole'} is {_shown(value)}; it must be {_MUST.get(error['type'], words)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**_SHOWN:
        return "a number too large"
    return shortened(json.dumps(value, ensure_ascii=False), _SHOWN)
