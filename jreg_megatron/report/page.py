"""The page: one self-contained HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from jreg_megatron.report.charts import SYMBOLS, VEGA_LITE, still
from jreg_megatron.report.figures import Figure
from jreg_megatron.report.tables import Table


@dataclass(frozen=True)
class Section:
    """A part of the page with at least one figure, table or folded table."""

    name: str
    title: str
    intro: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    notes: Sequence[str] = ()


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as text.

    The page's Content-Security-Policy allows only scripts with its hashes, and no connection. Vega's
    interpreter evaluates expressions, so no text is compiled to a script.
    """
    figures = [figure for section in sections for figure in section.figures]
    scripts = [_asset("page.js")]
    scripts += [_library(), _asset("figures.js")] if figures else []
    environment = jinja2.Environment(
        loader=jinja2.BaseLoader(),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(_asset("page.html.jinja")).render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        style=Markup(_asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        data=Markup(_embedded({figure.name: {"spec": figure.chart} for figure in figures})),
        pictures={figure.name: Markup(still(figure.chart, figure.name)) for figure in figures},
        symbols=SYMBOLS,
    )


def _policy(scripts: Sequence[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _embedded(data: Any) -> str:
    """JSON in which an HTML parser finds no tag."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


@cache
def _library() -> str:
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    # In a string both spellings are equal. Outside of strings neither occurs.
    return re.sub(r"<(?=/script|script|!--)", r"\\x3c", bundle, flags=re.IGNORECASE)


def _asset(name: str) -> str:
    return (files("jreg_megatron.report") / name).read_text(encoding="utf-8")
