"""Writes the README's table of settings, from the settings themselves: ``python tests/settings_table.py``."""

from __future__ import annotations

from dataclasses import fields

import readme

from jreg_megatron.methods.jreg.settings import JRegConfig
from jreg_megatron.stream.settings import default_text


def table() -> str:
    """The part of the README, with empty lines around it."""
    rows = [("flag", "default", "what it sets"), ("---", "---", "---")]
    for f in fields(JRegConfig):
        default = "off" if f.default is False else default_text(f)
        rows.append((f"`{JRegConfig.flag(f.name)}`", f"`{default}`", f.metadata["help"].rstrip(".")))
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n"


if __name__ == "__main__":
    readme.replace("settings", table())
