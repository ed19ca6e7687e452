"""The report in a real browser: it is drawn, asks for nothing, runs nothing that came with the input."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from report_toy import LAYERS, MODELS, STEPS, evaluation, measurement, summary, write

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
pytest.importorskip("vl_convert", reason="the report needs the extra 'report'")

from jreg_megatron.report.__main__ import main  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=\"window.hacked=2\">' onmouseover='window.hacked=3",
    "{{7*7}} {% raw %} ${7*7} #{7*7}",
    "datum.x[0].y\\.z; picked; window.hacked=4",
    "javascript:window.hacked=5",
    "http://example.invalid/pixel.png",
    "\u202egnp.txt\u2066 \u200b\ud800 \x00\x1b[31m",
    "n" * 10_000,
    "<!--",
    "__proto__",
    "image",
)


@dataclass
class Opened:
    """A page, with its network requests and its console's messages."""

    page: Any
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def marks(self, figure: str, kind: str = "symbol") -> int:
        """How many marks of a kind a live figure has drawn."""
        return int(self.page.locator(f"#{figure} .live .mark-{kind}[class*=marks] > path").count())

    def background(self) -> str:
        """The body's colour."""
        return str(self.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, as installed."""
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Open a file without a network; returns it once it is drawn."""
    contexts = []

    def go(path: Path, **options: Any) -> Opened:
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("console", lambda message: opened.messages.append(message.text))
        opened.page.on("pageerror", lambda error: opened.messages.append(str(error)))
        opened.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            opened.page.evaluate("window.reportDrawn")
        return opened

    yield go
    for context in contexts:
        context.close()


def made(folder: Path, *inputs: Path) -> Path:
    """The page of inputs."""
    path = folder / "report.html"
    with patch.object(sys, "argv", ["report", *map(str, inputs), "--quiet", "--output", str(path)]):
        main()
    return path


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every figure."""
    folder = tmp_path_factory.mktemp("rich")
    return made(
        folder,
        write(folder / "m.json", measurement(steps=STEPS)),
        write(folder / "e.json", evaluation()),
        write(folder / "summary.json", summary(("short", "short with jreg"))),
    )


def test_the_page_asks_for_nothing_and_draws_every_value(rich: Path, open_page: Any) -> None:
    opened = open_page(rich)
    assert opened.requests == [rich.as_uri()]
    assert opened.messages == []
    figures = opened.page.locator("figure").evaluate_all("all => all.map(one => one.id)")
    assert len(figures) == 14
    expected = {
        "displacement": len(MODELS) * LAYERS,
        "displacement_in_training": 2 * 8,
        "jump_rate": len(MODELS) * len(STEPS),
        "jump_rate_in_training": 2 * len(STEPS),
        "validation_loss": 2 * len(STEPS),
        "read_out_loss": len(MODELS) * (LAYERS + 1),
        "lens_loss": len(MODELS) * (LAYERS + 1),
        "early_exit_accuracy": len(MODELS) * (LAYERS + 1),
        "early_exit_agreement": len(MODELS) * (LAYERS + 1),
        "read_out_difference": LAYERS + 1,
        "layer_drop": len(MODELS) * LAYERS,
        "depth_kl": len(MODELS) * (LAYERS + 1),
    }
    assert {name: opened.marks(name) for name in expected} == expected
    maps = {name: opened.marks(name, "rect") for name in figures if name.startswith("heat_map")}
    assert maps == {"heat_map_1": LAYERS * len(STEPS), "heat_map_2": LAYERS * len(STEPS)}


def test_dark_and_light_follow_the_system_and_the_switch(rich: Path, open_page: Any) -> None:
    light, dark = (open_page(rich, color_scheme=scheme) for scheme in ("light", "dark"))
    bright, night = light.background(), dark.background()
    assert sum(map(int, re.findall(r"\d+", night))) < 150 < 600 < sum(map(int, re.findall(r"\d+", bright)))
    for opened, other in ((light, night), (dark, bright)):
        opened.page.locator("#theme").click()
        assert opened.background() == other
    label = dark.page.locator("#displacement .live .role-axis-label text").first
    on_bright = label.evaluate("one => getComputedStyle(one).fill")
    dark.page.locator("#theme").click()
    assert label.evaluate("one => getComputedStyle(one).fill") != on_bright


def test_a_click_in_the_legend_picks_a_model_in_every_figure(rich: Path, open_page: Any) -> None:
    opened = open_page(rich)
    button = opened.page.locator("#displacement button.model").first
    button.focus()
    opened.page.keyboard.press("Enter")
    assert opened.page.locator("button.model[aria-pressed=true]").all_inner_texts() == ["baseline"] * 8
    faint = "[class*=marks] > path[opacity='0.12']"
    for name, values in (("displacement", LAYERS), ("read_out_loss", LAYERS + 1)):
        playwright.expect(opened.page.locator(f"#{name} .live .mark-symbol{faint}")).to_have_count(values)
    assert opened.page.locator(f"#validation_loss .live .mark-symbol{faint}").count() == 0
    button.click()
    playwright.expect(opened.page.locator(f".live {faint}")).to_have_count(0)


def test_a_model_picked_elsewhere_fades_nothing_when_an_axis_changes(rich: Path, open_page: Any) -> None:
    opened = open_page(rich)
    opened.page.locator("#validation_loss button.model").first.click()
    figure = opened.page.locator("#displacement")
    ticks = figure.locator(".live .role-axis-label").nth(1)
    before = ticks.text_content()
    figure.get_by_label("linear").check()
    playwright.expect(ticks).not_to_have_text(before)
    assert (
        figure.locator(".live .mark-symbol[class*=marks] > path[opacity='1']").count() == len(MODELS) * LAYERS
    )


def test_every_name_of_many_models_can_be_seen(tmp_path: Path, open_page: Any) -> None:
    for count in (30, 60):
        names = [f"a model with a rather long name, number {number}" for number in range(count)]
        path = made(tmp_path, write(tmp_path / "m.json", measurement(names, layers=3)))
        opened = open_page(path, viewport={"width": 600, "height": 800})
        legend = opened.page.locator("#displacement .legend")
        hidden = "one => one.scrollHeight - one.clientHeight"
        assert legend.evaluate(hidden) <= 0
        opened.page.emulate_media(media="print")
        assert legend.evaluate(hidden) <= 0
        assert all(button.is_visible() for button in legend.locator("button").all())


def test_controls_change_what_is_drawn_and_hovering_shows_values(rich: Path, open_page: Any) -> None:
    opened = open_page(rich)
    figure = opened.page.locator("#displacement")
    last = figure.locator(".live .mark-symbol[class*=marks] > path").nth(LAYERS - 1)
    place = last.get_attribute("transform")
    figure.get_by_label("after the final norm").check()
    playwright.expect(last).not_to_have_attribute("transform", place)
    last.hover()
    tooltip = opened.page.locator("#vg-tooltip-element")
    value = measurement(steps=STEPS)["models"][len(STEPS) - 1]["displacement"]["post_norm"][-1]
    playwright.expect(tooltip).to_contain_text(f"{value:.4g}")
    playwright.expect(tooltip).to_contain_text("baseline")
    ticks = figure.locator(".live .role-axis-label").nth(1)
    before = ticks.text_content()
    figure.get_by_label("linear").check()
    playwright.expect(ticks).not_to_have_text(before)
    assert opened.marks("displacement") == len(MODELS) * LAYERS
    assert figure.get_by_label("after the final norm").is_checked() and opened.messages == []


def test_a_table_sorts_by_the_column_that_is_clicked(rich: Path, open_page: Any) -> None:
    page = open_page(rich).page
    head = page.locator("#summary th", has_text="last Ψ before")
    cells = f"#summary td:nth-child({head.evaluate('one => one.cellIndex') + 1})"
    for order in (1, -1):
        head.get_by_role("button").click()
        values = [float(text) for text in page.locator(cells).all_inner_texts()]
        assert values == sorted(values, key=lambda value: order * value) and len(set(values)) > 2


def test_the_page_fits_400_pixels_and_1600(rich: Path, open_page: Any) -> None:
    for width in (400, 1600):
        opened = open_page(rich, viewport={"width": width, "height": 800})
        assert opened.overflow() == 0
        box = opened.page.locator("#displacement .live svg").bounding_box()
        assert 0.75 * min(width, 600) < box["width"] < width


def test_print_is_light_and_has_no_controls(rich: Path, open_page: Any) -> None:
    opened = open_page(rich, color_scheme="dark")
    controls = opened.page.locator(".controls, summary")
    assert controls.count() > 10 and opened.page.locator("#theme").is_visible()
    opened.page.emulate_media(media="print")
    assert not any(control.is_visible() for control in controls.all())
    assert opened.background() == "rgb(255, 255, 255)"
    assert opened.page.locator("figure .live svg").count() == 14


def test_without_scripts_every_figure_is_there(rich: Path, open_page: Any) -> None:
    opened = open_page(rich, java_script_enabled=False, viewport={"width": 400, "height": 800})
    pictures = opened.page.locator("figure .picture > svg")
    assert pictures.count() == 14
    assert all(picture.bounding_box()["width"] > 300 for picture in pictures.all())
    dots = opened.page.locator("#displacement .picture > svg .mark-symbol[class*=marks] > path")
    assert dots.count() == len(MODELS) * LAYERS
    ids = re.findall(r'<[^<>]*\sid="([^"]*)"', rich.read_text().partition("<script")[0])
    assert len(ids) == len(set(ids)) > 20 and "heat_map_2-0" in ids
    assert opened.requests == [rich.as_uri()]


def test_hostile_names_are_shown_as_text_and_run_nothing(tmp_path: Path, open_page: Any) -> None:
    document = measurement(HOSTILE, steps=(1, 2))
    for model in document["models"]:
        model["settings"] = {name: f"{name}{model['name']}"[-200:] for name in HOSTILE}
    document["text"]["source"] = document["versions"]["torch"] = HOSTILE[0]
    scores = evaluation(HOSTILE)
    for model in scores["models"]:
        model["tasks"] = {name: model["tasks"]["boolq"] | {"metric": name} for name in HOSTILE}
    inputs = write(tmp_path / "m.json", document), write(tmp_path / "e<b>&'.json", scores)
    path = made(tmp_path, *inputs)
    opened = open_page(path, viewport={"width": 400, "height": 800})
    page = opened.page
    assert opened.requests == [path.as_uri()] and opened.messages == []
    buttons = page.locator("#displacement button.model")
    assert buttons.count() == len(HOSTILE) == len(set(buttons.all_inner_texts()))
    assert opened.marks("displacement") == len(HOSTILE) * LAYERS
    buttons.nth(2).dblclick()
    buttons.nth(1).click()
    page.locator("#displacement .live .mark-symbol[class*=marks] > path").nth(LAYERS).hover()
    playwright.expect(page.locator("#vg-tooltip-element")).to_contain_text("<img src=x")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, object, embed, a[href^='javascript']").count() == 0
    text = page.locator("#summary").inner_text()
    assert HOSTILE[0] in text and HOSTILE[2] in text and "\\u202egnp.txt" in text and "\u202e" not in text
    assert "49" not in page.locator("#displacement .legend").inner_text()
    assert opened.overflow() == 0 and opened.requests == [path.as_uri()]


def test_the_page_forbids_every_connection_and_foreign_script(rich: Path, open_page: Any) -> None:
    opened = open_page(rich)
    page = opened.page
    tried = page.evaluate(
        """async () => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            const fetched = await fetch("data:,x").then(() => "fetched", () => "refused");
            // In a task of its own: what a debugger evaluates may compile text.
            const compiled = await new Promise((resolve) => setTimeout(() => {
                try { resolve(new Function("return 'compiled'")()); } catch { resolve("refused"); }
            }));
            return [window.hacked ?? "refused", fetched, compiled];
        }"""
    )
    assert tried == ["refused"] * 3
    assert any("Content Security Policy" in message for message in opened.messages)


def test_sixty_models_are_all_drawn_and_can_be_distinguished(tmp_path: Path, open_page: Any) -> None:
    path = made(
        tmp_path, write(tmp_path / "m.json", measurement([f"model {number}" for number in range(60)]))
    )
    opened = open_page(path, viewport={"width": 400, "height": 800})
    assert opened.marks("displacement") == 60 * LAYERS and opened.overflow() == 0
    looks = opened.page.locator("#displacement button.model svg").evaluate_all(
        "all => all.map(one => one.innerHTML)"
    )
    assert len(set(looks)) == 60


def test_every_figure_has_its_numbers_and_names_for_a_screen_reader(rich: Path, open_page: Any) -> None:
    page = open_page(rich).page
    for figure in page.locator("figure").all():
        figure.locator("summary").click()
        assert figure.locator("table tbody tr").first.is_visible()
        assert figure.get_attribute("aria-labelledby")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, [role=img], [role=region], section, table")]
            .filter(one => !(one.textContent.trim() || one.ariaLabel || one.labels?.length)).length"""
    )
    assert unnamed == 0
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(one => one.id)).size") == (
        page.locator("[id]").count()
    )
