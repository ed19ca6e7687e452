"""Two kinds of picture as Vega-Lite dictionaries: lines with a marker per value, and a heat map.

The fields of a chart have fixed names, and names of models are only values. So Vega never reads text of the
input as an expression, a field or an address.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median
from textwrap import wrap
from typing import Any, Literal

import vl_convert

Row = dict[str, Any]
Chart = dict[str, Any]
"""A Vega-Lite specification with its rows, as wide as its container and without a legend."""

# The Okabe-Ito palette, for all kinds of colour vision, with grey instead of black for dark pages.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#767676")
# Paths of Vega's symbols, for the page's legends. There is one more than colours, so that pairs differ.
SYMBOLS = {
    "circle": "M5,0A5,5,0,1,1,-5,0A5,5,0,1,1,5,0Z",
    "square": "M-4.5,-4.5h9v9h-9Z",
    "triangle-up": "M0,-5L5.5,4.5H-5.5Z",
    "diamond": "M0,-6L5.5,0L0,6L-5.5,0Z",
    "cross": "M-5.5,-2h3.5v-3.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5Z",
    "triangle-down": "M0,5L5.5,-4.5H-5.5Z",
    "triangle-right": "M5,0L-4.5,5.5V-5.5Z",
    "triangle-left": "M-5,0L4.5,5.5V-5.5Z",
}
BANDS = 8
"""The maximum number of bands. More would hide each other."""
DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (6, 3), (2, 2))
VEGA_LITE: str = vl_convert.get_vegalite_versions()[-1]
_SCHEMA = f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE}.json"
_WIDTH, _HEIGHT = 720, 330
_LEGEND_WIDTH = 200  # per column
_LEGEND = {"orient": "bottom", "title": None, "labelLimit": _LEGEND_WIDTH + 60}
_LEGEND |= {"symbolSize": 70, "symbolOpacity": 1, "symbolLimit": 0}
_LOOKS = dict.fromkeys(("color", "shape", "strokeDash"), "independent")
"""The channels of models' looks. Charts side by side may use the same colour for different models."""
_IS_THIN = "indexof(thin, datum.model) >= 0"
_PICKED = "length(picked) == 0 || indexof(picked, datum.model) >= 0"
_LETTERS = 100
_FEW_TICKS = 10
_DWARFS, _FAR = 8.0, 20.0
"""Ratios of the largest value to the median above which a linear axis hides most values, or most steps."""
_SPACED = {"labelOverlap": True, "labelSeparation": 6}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
_WORDS = dict.fromkeys(("labelColor", "titleColor"), "#5b6470") | {"labelFontSize": 12}
_CONFIG = {
    "font": _FONT,
    "aria": False,
    "view": {"stroke": None},
    "axis": {"gridColor": "#e3e6ea", "domainColor": "#8a929c", "tickColor": "#8a929c"}
    | {"titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8, **_WORDS},
    "legend": {"titleFontWeight": "normal", **_WORDS},
    "title": {"color": "#1b1f24"},
}


@dataclass(frozen=True)
class Style:
    """A model's look in every figure."""

    colour: str
    symbol: str
    dash: tuple[int, ...]
    thin: bool = False
    """Whether the model is a thin line under the others, for comparison."""

    @classmethod
    def of(cls, number: int) -> Style:
        """The look of model ``number``, from 0. The first 168 looks are different."""
        colours, symbols = len(COLOURS), len(SYMBOLS)
        dash = DASHES[number // (colours * symbols) % len(DASHES)]
        return cls(COLOURS[number % colours], list(SYMBOLS)[number % symbols], dash)


@dataclass(frozen=True)
class Axis:
    """An axis of a chart."""

    title: str
    format: str = ".4~g"
    """The format of its values, in d3's syntax."""
    whole: bool = False
    """Whether its values are integers."""
    scale: Literal["linear", "log", "symlog", "auto"] = "linear"
    """"auto" is linear, unless that would hide most values."""
    zero: bool = False
    """Whether a linear axis begins at 0."""
    ticks: tuple[float, ...] = ()
    """The values of its ticks. If empty, Vega chooses them."""

    def fitted(self, rows: Sequence[Row], field: Literal["x", "y"]) -> Axis:
        """This axis with the scale and ticks for the values of a field."""
        values = sorted({float(row[field]) for row in rows} if self.whole else [row[field] for row in rows])
        scale = self.scale
        if scale == "auto" and self.whole:  # the steps of some models are far apart, such as Pythia's
            is_far = len(values) >= 5 and values[-1] >= _FAR * median(values)
            scale = "linear" if not is_far else "symlog" if values[0] <= 0 else "log"
        elif scale == "auto":
            above = [value for value in values if value > 0]
            is_far = bool(above) and values[0] >= 0 and above[-1] > _DWARFS * median(above)
            scale = "log" if is_far else "linear"
        ticks = self.ticks
        if scale == "linear" and self.whole and values[-1] - values[0] < _FEW_TICKS:
            # Vega would also draw ticks at halves, with the label of the next integer.
            ticks = tuple(range(round(values[0]), round(values[-1]) + 1))
        elif scale != "linear" and not ticks:
            # Vega would label 0.03 and 0.07.
            even = (float(f"{digit}e{exponent}") for exponent in range(-9, 10) for digit in (1, 2, 5))
            inside = [tick for tick in even if 0.9 * values[0] <= tick <= 1.1 * values[-1]]
            ticks = (*([0] if scale == "symlog" else []), *inside) if len(inside) > 1 else ()
        return replace(self, scale=scale, ticks=ticks)

    def channel(self, field: str) -> dict[str, Any]:
        """The Vega-Lite channel of a field on this axis."""
        assert self.scale != "auto", "the axis is fitted to no rows yet"
        ticks: dict[str, Any] = {"format": ",d" if self.whole else ".6~g"}
        if self.scale != "linear":
            # The page removes scale and ticks when it changes the axis to a linear one.
            scale: dict[str, Any] = {"type": self.scale, "nice": False, "padding": 10}
            ticks |= _SPACED
        elif self.whole:
            scale = {"nice": False, "zero": False, "padding": 8}
            ticks |= {"tickMinStep": 1} | _SPACED
        else:
            scale = {"zero": self.zero}
            ticks |= {"tickCount": 6}
        ticks |= {"values": self.ticks} if self.ticks else {}
        return _field(field) | {"title": self.title, "scale": scale, "axis": ticks}


def lines(
    rows: list[Row],
    looks: Mapping[str, Style],
    x: Axis,
    y: Axis,
    *,
    choices: Mapping[str, str] | None = None,
    band: bool = False,
    rule: float | None = None,
) -> Chart:
    """A line for each model through its values, with a marker on each.

    Args:
        rows: with ``model``, ``x``, ``y``, a field for each choice, and for ``band`` also ``low`` and
            ``high``. Rows with ``seed`` instead of ``y`` are faint points. If there are any, only thin models
            have bands, and the intervals of the others are bars.
        looks: by label, in order.
        x, y: the axes, fitted to the rows.
        choices: the default value of each field that selects rows.
        band: fill between ``low`` and ``high``; with more than :data:`BANDS` models only for picked ones.
        rule: height of a horizontal line.
    """
    choices = choices or {}

    def look(values: list[Any]) -> dict[str, Any]:
        return _field("model", "nominal") | {"legend": None, "scale": {"domain": [*looks], "range": values}}

    def thin(value: int, usual: int) -> dict[str, Any]:
        return {"condition": {"test": _IS_THIN, "value": value}, "value": usual}

    tips = {"x": (x.title, "," if x.whole else x.format), "y": (y.title, y.format)}
    tips |= {"low": ("band from", y.format), "high": ("band to", y.format)} if band else {}
    tooltip = [_field("model", "nominal") | {"title": "model"}]
    tooltip += [_field(name) | {"title": title, "format": form} for name, (title, form) in tips.items()]
    base = {"x": x.channel("x"), "color": look([style.colour for style in looks.values()])}
    fade = {"opacity": {"condition": {"test": _PICKED, "value": 1}, "value": 0.12}}
    value = base | {"y": y.channel("y")} | fade
    between = {"y": y.channel("low"), "y2": {"field": "high"}}
    faint = min(0.22, 0.6 / len(looks)) if len(looks) <= BANDS else 0
    opacity = [{"test": "length(picked) == 0", "value": faint}, {"test": _PICKED, "value": 0.25}]
    dash = {"strokeDash": look([list(style.dash) for style in looks.values()]), "strokeWidth": thin(1, 2)}
    shape = {"shape": look([style.symbol for style in looks.values()]), "size": thin(14, 46)}
    has_seeds = any("seed" in row for row in rows)
    means = "isValid(datum.y)"

    def layer(mark: str, encoding: Mapping[str, Any], only: str = means, **more: Any) -> dict[str, Any]:
        found = {"mark": {"type": mark} | more, "encoding": encoding}
        return found | {"transform": [{"filter": only}]} if has_seeds else found

    layers: list[dict[str, Any]] = []
    if band:
        area = base | between | {"opacity": {"condition": opacity, "value": 0}}
        layers.append(layer("area", area, f"{means} && {_IS_THIN}"))
    if rule is not None:
        layers.append(layer("rule", {"y": {"datum": rule}}, strokeDash=[4, 4], color="#767676"))
    layers.append(layer("line", value | dash))
    layers.append(layer("point", value | shape | {"tooltip": tooltip}, filled=True))
    if has_seeds:
        layers.append(layer("rule", base | between, f"{means} && !({_IS_THIN})", strokeWidth=1.5))
        seeds = base | {"y": y.channel("seed")}
        layers.append(layer("point", seeds, "isValid(datum.seed)", filled=True, size=36, opacity=0.35))
    is_log = y.scale == "log"
    filters = [f"datum.{name} === {name}" for name in choices]
    filters += ["scale !== 'log' || !(datum.y <= 0)"] if is_log else []
    params = {"picked": [], "thin": [label for label, style in looks.items() if style.thin], **choices}
    return _chart({"layer": layers}, filters, params | ({"scale": "log"} if is_log else {}), rows)


def heat_map(rows: list[Row], *, low: float, high: float, height: int) -> Chart:
    """Layers over training steps, with displacement as colour on a logarithmic scale.

    ``rows`` have ``step``, ``layer``, ``state`` and ``value``. The colour scale is from ``low`` to ``high``.
    """
    step, layer = _field("step", "ordinal"), _field("layer", "ordinal") | {"title": "layer"}
    step |= {"title": "training step"}
    legend = {"title": "displacement", "format": ".2~g", "gradientLength": min(height, 200), "tickCount": 4}
    scale = {"type": "log", "domain": [low, high], "scheme": "viridis", "clamp": True}
    value = _field("value") | {"title": "displacement"}
    encoding = {
        "x": step | {"axis": {"labelAngle": 0, "format": ","} | _SPACED},
        "y": layer | {"sort": "descending", "axis": _SPACED},
        "color": value | {"legend": legend, "scale": scale},
        "tooltip": [step | {"format": ","}, layer, value | {"format": ".4~g"}],
    }
    spec = {"mark": {"type": "rect"}, "encoding": encoding}
    return _chart(spec, ["datum.state === state"], {"state": "pre_norm"}, rows, height)


def still(chart: Chart, name: str) -> str:
    """A chart as a static picture for the page, in SVG. Its ids begin with ``name``."""
    return _convert(chart | {"width": _WIDTH}, name)


def pictures(
    title: str,
    rows: Sequence[Sequence[tuple[str, Chart]]],
    subtitle: str = "",
    *,
    width: int = _WIDTH,
    chosen: Mapping[str, str] | None = None,
) -> tuple[str, bytes]:
    """SVG and PNG as files: rows of charts on white, with titles and legends.

    Charts in a row share the vertical axis if it has the same title. Charts with the same legend share it. A
    chart is ``width`` pixels wide in the SVG and twice as wide in the PNG. ``chosen`` are values of its
    parameters.
    """
    datasets: dict[str, list[Row]] = {}
    params: dict[str, Any] = {}
    legends: list[Any] = []
    placed = []
    for row in rows:
        panels = []
        for name, chart in row:
            data = f"rows{len(datasets)}"
            datasets[data] = chart["datasets"]["rows"]
            params |= {param["name"]: param for param in chart["params"]}
            panel = {key: deepcopy(chart[key]) for key in _OF_A_PANEL if key in chart}
            panel |= {"width": width, "data": {"name": data}}
            panel["title"] = {"text": name, "fontSize": 13, "fontWeight": "normal"}
            channels = [
                layer["encoding"][look]
                for layer in panel.get("layer", ())
                for look in _LOOKS
                if look in layer["encoding"]
            ]
            if (legend := [channel["scale"]["domain"] for channel in channels]) not in legends:
                legends.append(legend)
                for channel in channels:
                    channel["legend"] = _LEGEND | {"columns": len(row) * width // _LEGEND_WIDTH}
            panels.append(panel)
        titles = {panel["layer"][-1]["encoding"]["y"]["title"] for panel in panels if "layer" in panel}
        scales = _LOOKS | {"y": "shared" if len(titles) == 1 else "independent"}
        placed.append({"hconcat": panels, "spacing": 30, "resolve": {"scale": scales}})
    heading: dict[str, Any] = {"text": title, "anchor": "start", "fontSize": 15, "offset": 12}
    letters = _LETTERS * max(map(len, rows), default=1) * width // _WIDTH
    heading |= {"subtitle": wrap(subtitle, letters), "subtitleFontSize": 12} if subtitle else {}
    whole = {
        **{"$schema": _SCHEMA, "title": heading, "background": "white", "padding": 14, "config": _CONFIG},
        "params": [p | {"value": (chosen or {}).get(p["name"], p["value"])} for p in params.values()],
        **{"datasets": datasets, "vconcat": placed, "resolve": {"scale": _LOOKS}},
    }
    svg = _convert(whole, "figure")
    return svg, vl_convert.svg_to_png(svg, scale=2)


_OF_A_PANEL = ("layer", "mark", "encoding", "height", "transform")


def _convert(spec: dict[str, Any], name: str) -> str:
    """An SVG whose ids begin with ``name``. Vega's own ids depend on the pictures made before."""
    svg: str = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, allowed_base_urls=[])
    for number, identity in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg))):
        svg = svg.replace(f'id="{identity}"', f'id="{name}-{number}"')
        svg = svg.replace(f"url(#{identity})", f"url(#{name}-{number})")
    return svg


def _field(name: str, kind: str = "quantitative") -> dict[str, Any]:
    return {"field": name, "type": kind}


def _chart(
    spec: dict[str, Any],
    filters: Sequence[str],
    params: Mapping[str, Any],
    rows: list[Row],
    height: int = _HEIGHT,
) -> Chart:
    return spec | {
        **{"$schema": _SCHEMA, "config": _CONFIG, "background": None, "width": "container"},
        **{"height": height, "autosize": {"type": "fit-x", "contains": "padding"}},
        "transform": [{"filter": text} for text in filters],
        "params": [{"name": name, "value": value} for name, value in params.items()],
        **{"data": {"name": "rows"}, "datasets": {"rows": rows}},
    }
