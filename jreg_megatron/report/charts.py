"""Two kinds of picture in Vega-Lite: lines with a marker per value, and a heat map.

Each field of a chart has a name of ours. Names of models are only values. So Vega never reads text of the
input as an expression, a field or an address.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median
from textwrap import wrap
from typing import Any, Literal

import vl_convert

Row = dict[str, Any]

# The Okabe-Ito palette, for all kinds of colour vision; grey in place of its black, for dark pages.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#767676")
# Paths of Vega's symbols for the legends of the page; one more than colours, so that pairs differ.
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
"""More bands would hide each other."""
DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (6, 3), (2, 2))
VEGA_LITE: str = vl_convert.get_vegalite_versions()[-1]
_SCHEMA = f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE}.json"
_WIDTH, _HEIGHT = 720, 330
_LEGEND_WIDTH = 200  # of one of its columns
_LOOKS = dict.fromkeys(("color", "shape", "strokeDash"), "independent")
"""The looks of models; charts side by side may use the same colour for different models."""
_LEGEND = {
    "orient": "bottom",
    "title": None,
    "labelLimit": _LEGEND_WIDTH + 60,
    "symbolSize": 70,
    "symbolOpacity": 1,
    "symbolLimit": 0,
}
_IS_THIN = "indexof(thin, datum.model) >= 0"
_MAP_AXES = {"step": "training step", "layer": "layer"}
_LETTERS = 100
_FEW_TICKS = 10
_DWARFS = 8.0
"""The ratio of largest value to median from which a linear axis hides most values."""
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
_GREY = "#5b6470"
_CONFIG = {
    "font": _FONT,
    "aria": False,
    "view": {"stroke": None},
    "axis": {
        "gridColor": "#e3e6ea",
        "domainColor": "#8a929c",
        "tickColor": "#8a929c",
        "labelColor": _GREY,
        "titleColor": _GREY,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "legend": {"labelColor": _GREY, "titleColor": _GREY, "labelFontSize": 12, "titleFontWeight": "normal"},
    "title": {"color": "#1b1f24"},
}


@dataclass(frozen=True)
class Style:
    """How a model looks in every figure."""

    colour: str
    symbol: str
    dash: tuple[int, ...]
    thin: bool = False
    """Whether it is a thin line under the others, for comparison."""

    @classmethod
    def of(cls, number: int) -> Style:
        """The look of model ``number``, from 0; the first 168 are different."""
        colours, symbols = len(COLOURS), len(SYMBOLS)
        dash = DASHES[number // (colours * symbols) % len(DASHES)]
        return cls(COLOURS[number % colours], list(SYMBOLS)[number % symbols], dash)


@dataclass(frozen=True)
class Axis:
    """An axis of a chart."""

    title: str
    format: str = ".4~g"
    """Of its values, in d3's syntax."""
    whole: bool = False
    """Whether its values are integers."""
    scale: Literal["linear", "log", "symlog", "auto"] = "linear"
    """"auto" is linear, unless that would hide most values."""
    zero: bool = False
    """Whether a linear axis begins at 0."""
    ticks: tuple[float, ...] = ()
    """Empty: Vega chooses them."""

    def fitted(self, rows: Sequence[Row], field: Literal["x", "y"]) -> Axis:
        """This axis for the values of a field, with ticks and a definite scale."""
        values = sorted({float(row[field]) for row in rows} if self.whole else [row[field] for row in rows])
        above = [value for value in values if value > 0]
        scale = self.scale
        if scale == "auto" and self.whole:  # some models have steps far apart, such as Pythia
            is_far = len(values) >= 5 and values[-1] >= 20 * median(values)
            scale = "linear" if not is_far else "symlog" if values[0] <= 0 else "log"
        elif scale == "auto":
            scale = "log" if above and values[0] >= 0 and above[-1] > _DWARFS * median(above) else "linear"
        if scale == "linear" and self.whole and values[-1] - values[0] < _FEW_TICKS:
            # Vega would also draw halves, with the label of the next integer.
            return replace(self, scale=scale, ticks=tuple(range(round(values[0]), round(values[-1]) + 1)))
        if scale == "linear" or self.ticks or not above:
            return replace(self, scale=scale)
        ends = [row[end] for row in rows if field == "y" for end in ("low", "high") if row.get(end)]
        ends = [end for end in (*ends, *above) if end > 0]
        ticks = log_ticks(min(ends), max(ends))
        return replace(self, scale=scale, ticks=(0, *ticks) if scale == "symlog" else ticks)


@dataclass(frozen=True)
class Chart:
    """A picture as a Vega-Lite specification, its parameters and its rows."""

    spec: dict[str, Any]
    params: list[dict[str, Any]]
    rows: list[Row]

    def interactive(self) -> dict[str, Any]:
        """The specification for the page: as wide as its container, without legend and background."""
        return self._whole("container")

    def svg(self, name: str) -> str:
        """The same as a static picture for the page; its ids begin with ``name``."""
        return _convert(self._whole(_WIDTH), name)

    def _whole(self, width: int | str) -> dict[str, Any]:
        return self.spec | {
            "$schema": _SCHEMA,
            "config": _CONFIG,
            "background": None,
            "width": width,
            "autosize": {"type": "fit-x", "contains": "padding"},
            "params": self.params,
            "data": {"name": "rows"},
            "datasets": {"rows": self.rows},
        }


def pictures(
    title: str,
    rows: Sequence[Sequence[tuple[str, Chart]]],
    subtitle: str = "",
    *,
    width: int = _WIDTH,
    chosen: Mapping[str, str] | None = None,
) -> tuple[str, bytes]:
    """SVG and PNG as files: rows of charts on white, with titles and legends.

    Charts in a row share a vertical axis with one title. Charts with the same legend share it.

    Args:
        title, subtitle: above all of them.
        rows: each chart with its title.
        width: of a chart, in pixels of the SVG; the PNG has twice as many.
        chosen: values of the charts' parameters.
    """
    datasets: dict[str, list[Row]] = {}
    params: dict[str, Any] = {}
    domains: list[Any] = []
    placed = []
    for row in rows:
        panels = []
        for name, chart in row:
            data = f"rows{len(datasets)}"
            datasets[data] = chart.rows
            params |= {param["name"]: param for param in chart.params}
            panel = deepcopy(chart.spec) | {"width": width, "data": {"name": data}}
            panel["title"] = {"text": name, "fontSize": 13, "fontWeight": "normal"}
            channels = [
                layer["encoding"].get(name, {}) for layer in panel.get("layer", []) for name in _LOOKS
            ]
            if (domain := [found["scale"]["domain"] for found in channels if found]) not in domains:
                domains.append(domain)
                for found in filter(None, channels):
                    found["legend"] = _LEGEND | {"columns": len(row) * width // _LEGEND_WIDTH}
            panels.append(panel)
        titles = {panel["layer"][-1]["encoding"]["y"]["title"] for panel in panels if "layer" in panel}
        scales = _LOOKS | {"y": "shared" if len(titles) == 1 else "independent"}
        placed.append({"hconcat": panels, "spacing": 30, "resolve": {"scale": scales}})
    heading: dict[str, Any] = {"text": title, "anchor": "start", "fontSize": 15, "offset": 12}
    letters = _LETTERS * max(map(len, rows), default=1) * width // _WIDTH
    heading |= {"subtitle": wrap(subtitle, letters), "subtitleFontSize": 12} if subtitle else {}
    svg = _convert(
        {
            "$schema": _SCHEMA,
            "title": heading,
            "background": "white",
            "padding": 14,
            "config": _CONFIG,
            "params": [p | {"value": (chosen or {}).get(p["name"], p["value"])} for p in params.values()],
            "datasets": datasets,
            "vconcat": placed,
            "resolve": {"scale": _LOOKS},
        },
        "figure",
    )
    return svg, vl_convert.svg_to_png(svg, scale=2)


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """A few round numbers from ``low`` to ``high``, both above 0, at even factors."""
    decades = math.log10(high / low)
    mantissas = (1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{mantissa}e{exponent}") for exponent in exponents for mantissa in mantissas]
    return tuple(tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high)


def _convert(spec: dict[str, Any], name: str) -> str:
    """An SVG whose ids begin with ``name``; Vega counts them on from picture to picture."""
    svg: str = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE, allowed_base_urls=[])
    for number, identity in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg))):
        svg = svg.replace(f'id="{identity}"', f'id="{name}-{number}"')
        svg = svg.replace(f"url(#{identity})", f"url(#{name}-{number})")
    return svg


def lines(
    rows: list[Row],
    models: Sequence[tuple[str, Style]],
    x: Axis,
    y: Axis,
    *,
    choices: dict[str, str] | None = None,
    band: bool = False,
    rule: float | None = None,
) -> Chart:
    """A line for each model through its values, with a marker on each.

    Args:
        rows: ``model``, ``x``, ``y``, with ``band`` also ``low`` and ``high``, and a field for each choice.
        models: label and look, in order.
        x, y: the axes.
        choices: fields that select rows, each with its default value.
        band: fill from ``low`` to ``high``; with more than :data:`BANDS` models only for picked ones.
        rule: height of a horizontal line.
    """
    choices = choices or {}
    labels, styles = [label for label, _ in models], [style for _, style in models]
    picked = "length(picked) == 0 || indexof(picked, datum.model) >= 0"

    def look(values: list[Any]) -> dict[str, Any]:
        return _field("model", "nominal") | {"legend": None, "scale": {"domain": labels, "range": values}}

    def thin(value: int, usual: int) -> dict[str, Any]:
        return {"condition": {"test": _IS_THIN, "value": value}, "value": usual}

    tips = {"x": (x.title, "," if x.whole else x.format), "y": (y.title, y.format)}
    tips |= {"low": ("band from", y.format), "high": ("band to", y.format)} if band else {}
    tooltip = [_field("model", "nominal") | {"title": "model"}]
    tooltip += [_field(name) | {"title": title, "format": form} for name, (title, form) in tips.items()]
    base = {"x": _position("x", x), "color": look([style.colour for style in styles])}
    value = base | {
        "y": _position("y", y),
        "opacity": {"condition": {"test": picked, "value": 1}, "value": 0.12},
    }
    faint = min(0.22, 0.6 / len(models)) if len(models) <= BANDS else 0
    opacity = [{"test": "length(picked) == 0", "value": faint}, {"test": picked, "value": 0.25}]
    area = {"y": _position("low", y), "y2": {"field": "high"}, "opacity": {"condition": opacity, "value": 0}}
    layers: list[dict[str, Any]] = [{"mark": {"type": "area"}, "encoding": base | area}] if band else []
    if rule is not None:
        mark = {"type": "rule", "strokeDash": [4, 4], "color": "#767676"}
        layers.append({"mark": mark, "encoding": {"y": {"datum": rule}}})
    dash = {"strokeDash": look([list(style.dash) for style in styles]), "strokeWidth": thin(1, 2)}
    shape = {"shape": look([style.symbol for style in styles]), "size": thin(14, 46), "tooltip": tooltip}
    layers.append({"mark": {"type": "line"}, "encoding": value | dash})
    layers.append({"mark": {"type": "point", "filled": True}, "encoding": value | shape})
    is_log = y.scale == "log"
    filters = [f"datum.{name} === {name}" for name in choices]
    filters += ["scale !== 'log' || datum.y > 0"] if is_log else []
    thin_ones = [label for label, style in models if style.thin]
    params = {"picked": [], "thin": thin_ones} | choices | ({"scale": "log"} if is_log else {})
    return _chart({"layer": layers}, filters, params, rows)


def with_seeds(chart: Chart, seeds: list[Row]) -> Chart:
    """Add a faint point for each seed to a chart of :func:`lines`, and draw intervals as bars.

    Thin models keep their bands.

    Args:
        chart: with bands.
        seeds: ``model``, ``x`` and ``seed``, the seed's value.
    """
    spec, is_mean = deepcopy(chart.spec), "isValid(datum.y)"
    for layer in spec["layer"]:
        layer["transform"] = [{"filter": is_mean}]
    spec["layer"][0]["transform"].append({"filter": _IS_THIN})
    line = spec["layer"][-1]["encoding"]
    of_model = {"x": line["x"], "color": line["color"]}
    y = {key: line["y"][key] for key in ("axis", "scale", "title", "type")}
    spec["layer"] += [
        {
            "mark": {"type": "rule", "strokeWidth": 1.5},
            "transform": [{"filter": f"{is_mean} && !({_IS_THIN})"}],
            "encoding": of_model | {"y": y | {"field": "low"}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 36, "opacity": 0.35},
            "transform": [{"filter": "isValid(datum.seed)"}],
            "encoding": of_model | {"y": y | {"field": "seed"}},
        },
    ]
    return replace(chart, spec=spec, rows=chart.rows + seeds)


def heat_map(rows: list[Row], *, low: float, high: float, height: int) -> Chart:
    """Layers over training steps, with displacement as colour on a logarithmic scale.

    Args:
        rows: ``step``, ``layer``, ``state`` and ``value``, which is above 0.
        low, high: ends of the colour scale; equal for all maps of a page.
        height: in pixels.
    """
    spaced = {"labelOverlap": True, "labelSeparation": 6}
    step, layer = (_field(name, "ordinal") | {"title": title} for name, title in _MAP_AXES.items())
    turn = {
        "legend": {
            "title": "displacement",
            "format": ".2~g",
            "gradientLength": min(height, 200),
            "tickCount": 4,
        },
        "scale": {"type": "log", "domain": [low, high], "scheme": "viridis", "clamp": True},
    }
    encoding = {
        "x": step | {"axis": {"labelAngle": 0, "format": ","} | spaced},
        "y": layer | {"sort": "descending", "axis": spaced},
        "color": _field("value") | turn,
        "tooltip": [
            step | {"format": ","},
            layer,
            _field("exact") | {"title": "displacement", "format": ".4~g"},
        ],
    }
    spec = {"mark": {"type": "rect"}, "encoding": encoding}
    return _chart(spec, ["datum.state === state"], {"state": "pre_norm"}, rows, height)


def _field(name: str, kind: str = "quantitative") -> dict[str, Any]:
    return {"field": name, "type": kind}


def _position(name: str, axis: Axis) -> dict[str, Any]:
    """A field along an axis, for a channel of position."""
    ticks: dict[str, Any] = {"format": ",d" if axis.whole else ".6~g"}
    spaced = {"labelOverlap": True, "labelSeparation": 6}
    assert axis.scale != "auto", "the axis is fitted to no rows yet"
    if axis.scale != "linear":
        # The page removes scale and ticks when it changes the axis to a linear one.
        scale: dict[str, Any] = {"type": axis.scale, "nice": False, "padding": 10}
        ticks |= spaced
    elif axis.whole:
        scale = {"nice": False, "zero": False, "padding": 8}
        ticks |= {"tickMinStep": 1} | spaced
    else:
        scale = {"zero": axis.zero}
        ticks |= {"tickCount": 6}
    ticks |= {"values": axis.ticks} if axis.ticks else {}
    return _field(name) | {"title": axis.title, "scale": scale, "axis": ticks}


def _chart(
    spec: dict[str, Any],
    filters: Sequence[str],
    params: Mapping[str, Any],
    rows: list[Row],
    height: int = _HEIGHT,
) -> Chart:
    spec |= {"height": height, "transform": [{"filter": text} for text in filters]}
    return Chart(spec, [{"name": name, "value": value} for name, value in params.items()], rows)
