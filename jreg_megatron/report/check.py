"""Values of a JSON file that know where they lie, so that a wrong one is named with its file and field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from jreg_megatron.runtime.errors import UserError

_SHOWN = 40


def printable(text: str) -> str:
    """``text`` on one line, with what is invisible or turns the direction of writing spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, length: int) -> str:
    """``text`` printable, and cut in the middle to ``length`` characters, so that both ends can be read."""
    if len(text) > 2 * length:  # spelled out it only gets longer
        text = text[:length] + text[-length:]
    text = printable(text)
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[head + 1 - length :]}"


class Field:
    """A value of a JSON file, with its file and its place there.

    Every method raises a :class:`UserError` that names both if the value is not what was asked for.
    """

    def __init__(self, file: str, value: Any, place: str = "") -> None:
        self.file, self.value, self.place = file, value, place

    @classmethod
    def read(cls, path: Path) -> Field:
        """The content of a JSON file.

        Raises:
            UserError: if it cannot be read or is no JSON.
        """
        file = printable(str(path))
        try:
            return cls(file, json.loads(path.read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is no JSON: it is not UTF-8 text") from error
        except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
            raise UserError(f"{file} is no JSON that can be read: {printable(str(error))}") from error

    def fail(self, must: str) -> NoReturn:
        """Refuse the value: it must be what ``must`` says."""
        found = self.value
        if isinstance(found, (dict, list)):
            shown = f"a list of {len(found)}" if isinstance(found, list) else f"an object of {len(found)}"
        elif isinstance(found, int) and abs(found) > 10**_SHOWN:
            shown = "a number too large"
        else:
            shown = shortened(json.dumps(found, ensure_ascii=False), _SHOWN)
        raise UserError(f"{self.file}: {self.place or 'the whole'} is {shown}; it must be {must}")

    def get(self, key: str) -> Field | None:
        """The field ``key`` of this object; None where it is missing or null."""
        if not isinstance(self.value, dict):
            self.fail("an object")
        value = self.value.get(key)
        return None if value is None else Field(self.file, value, self._below(key))

    def __getitem__(self, key: str) -> Field:
        found = self.get(key)
        if found is None:
            what = "null" if key in self.value else "missing"
            raise UserError(f"{self.file}: {self._below(key)} is {what}; it is needed")
        return found

    def fields(self) -> dict[str, Field]:
        """This object's fields by name."""
        if not isinstance(self.value, dict):
            self.fail("an object")
        return {key: Field(self.file, value, self._below(key)) for key, value in self.value.items()}

    def entries(self, length: int | None = None) -> list[Field]:
        """This list's entries; ``length`` is how many there must be."""
        if not isinstance(self.value, list):
            self.fail("a list" if length is None else f"a list of {length} numbers")
        if length is not None and len(self.value) != length:
            self.fail(f"a list of {length} numbers")
        return [Field(self.file, value, f"{self.place}[{n}]") for n, value in enumerate(self.value)]

    def text(self) -> str:
        """A string that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            self.fail("a text")
        return self.value

    def one_of(self, *choices: str) -> str:
        """One of a few strings."""
        if self.value not in choices:
            self.fail(" or ".join(choices))
        return str(self.value)

    def flag(self) -> bool:
        """true or false."""
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def whole(self, low: int = 0) -> int:
        """An integer of at least ``low``."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not low <= self.value < 2**53:
            self.fail(f"an integer >= {low}")
        return self.value

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number in ``low`` .. ``high``, which rounding may miss by a millionth."""
        wanted = "a finite number"
        if low > -math.inf:
            wanted += f" >= {low:g}" if high == math.inf else f" in {low:g}..{high:g}"
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.fail(wanted)
        if (isinstance(self.value, int) and abs(self.value) > 2**1000) or not math.isfinite(self.value):
            self.fail(wanted)
        slack = 1e-6 * (high - low) if high < math.inf and low > -math.inf else 0.0
        if not low - slack <= self.value <= high + slack:
            self.fail(wanted)
        return min(max(float(self.value), low), high)

    def numbers(
        self, length: int | None = None, low: float = -math.inf, high: float = math.inf
    ) -> tuple[float, ...]:
        """A list of such numbers."""
        return tuple(entry.number(low, high) for entry in self.entries(length))

    def interval(self) -> tuple[float, float]:
        """Two numbers, the lower end first."""
        low, high = self.numbers(2)
        if low > high:
            self.fail("the lower end before the upper end")
        return low, high

    def _below(self, key: str) -> str:
        name = key if key.isidentifier() and len(key) <= _SHOWN else f'["{shortened(key, _SHOWN)}"]'
        return f"{self.place}.{name}" if self.place and not name.startswith("[") else f"{self.place}{name}"
