"""`elropt report`: what the page holds, and in a browser what a click changes."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from rich.console import Console

from elropt._look import layer_colors, short
from elropt._rich_tables import weight_table
from elropt.diagnosis import Finding, diagnose
from elropt.inspection import inspect_model
from elropt.plots import run_figure
from elropt.report_page import report_page
from elropt.run_history import RunHistory, read_run, rule_spans

from .nets import bn_mlp
from .test_cli import run as command
from .test_run_history import record, record_run

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;%{x}<b>"
STEPS = 10 * np.arange(30)
NAMES = ["first", HOSTILE, "third", "head"]


def made_up_run(names: list[str] = NAMES, steps: np.ndarray = STEPS) -> RunHistory:
    """Every layer turns by its own power of ten, the last one is not tracked. A rule acts in the first third."""
    shape = len(steps), len(names)
    decays = np.linspace(1, 0.5, len(steps))[:, None]
    angle = decays * 10.0 ** -np.linspace(1, 3, len(names))
    angle[1:2, 0], angle[2:3, 1:2] = np.nan, 0.0
    factor = np.where(np.arange(len(steps)) < len(steps) // 3, 0.25, 1.0)[:, None] * np.ones(shape)
    return RunHistory(
        steps=steps,
        names=names,
        elr=angle / 2,
        applied_lr=0.1 * factor,
        elr_spread=np.full(len(steps), np.nan),
        notes=["a note with <tags>"],
        angle=angle,
        tracked=np.arange(len(names)) < max(1, len(names) - 1),
        weight_norm=np.full(shape, 3.0),
        grad_factor=factor,
        weight_factor=np.ones(shape),
    )


FOUND = [
    Finding("large_angle", (100, 120), ("first",), "first turns by 0.4 rad.", "Lower lr to 0.03.", "warning"),
    Finding("transient", (0, 290), (*NAMES,), "Angles still change.", "", "note"),
    Finding("small_angle", (200, 290), (HOSTILE, "third"), "Two hardly turn.", "Raise lr.", "warning"),
]


def data_of(page: str) -> dict[str, Any]:
    """What the script of a page draws."""
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text, parse_constant=pytest.fail)


def panels_of(page: str) -> dict[str, dict[str, Any]]:
    return {panel["title"]: panel for panel in data_of(page)["panels"]}


def numbers(values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# The page


def test_the_page_has_the_numbers_of_the_run() -> None:
    run = made_up_run()
    page = report_page(run, FOUND, title="elr.jsonl")
    panels = panels_of(page)
    assert data_of(page)["steps"] == STEPS.tolist()
    np.testing.assert_allclose(numbers(panels["angle of the step (rad)"]["values"]), run.angle.T, rtol=1e-3)  # type: ignore[union-attr]
    np.testing.assert_allclose(
        numbers(panels["effective learning rate (rad)"]["values"]), run.elr.T, rtol=1e-3
    )
    elr_spread, angle_spread = panels["spread (max / min) over the tracked layers"]["lines"]
    assert (elr_spread["name"], angle_spread["name"]) == ("ELR", "angle")
    expected = np.full(len(STEPS), 10 ** (4 / 3))  # of the three that are tracked
    expected[1] = 10 ** (2 / 3)  # where the first has none
    np.testing.assert_allclose(numbers(angle_spread["values"]), expected, rtol=1e-3)
    (lr,) = panels["applied learning rate"]["lines"]
    np.testing.assert_allclose(numbers(lr["values"]), run.applied_lr[:, 0])


def test_the_page_tells_an_elr_from_an_angle() -> None:
    panels = panels_of(report_page(made_up_run(), [], title="elr.jsonl"))
    assert "tangent of the angle" in panels["effective learning rate (rad)"]["about"]
    assert "measured between the weights" in panels["angle of the step (rad)"]["about"]
    assert panels["weight norm ‖w‖"]["about"] is None


def test_names_of_layers_cannot_end_the_script() -> None:
    page = report_page(made_up_run(), FOUND, title=HOSTILE)
    assert data_of(page)["layers"] == NAMES
    assert "<img" not in page.replace(plotly_of(page), "")
    assert "a note with &lt;tags&gt;" in page


def plotly_of(page: str) -> str:
    """The code of plotly.js, which is not ours."""
    (code,) = re.findall(r"<script>\n(/\*\*.*?)\n</script>\n<script id", page, re.DOTALL)
    return code


def test_nothing_is_fetched() -> None:
    page = report_page(made_up_run(), FOUND, title="elr.jsonl")
    assert "default-src 'none'" in page  # the browser refuses every address, also in plotly.js
    assert not re.findall(
        r"https?:|@import|<link (?!rel=\"icon\" href=\"data:,\")|\bsrc=\"|url\(",
        page.replace(plotly_of(page), ""),
    )


def test_plot_and_report_look_alike() -> None:
    """The same panels in the same order, and a layer has the same colour."""
    run = made_up_run()
    tracked = [i for i, each in enumerate(run.tracked) if each]
    alone = RunHistory(
        run.steps, [NAMES[i] for i in tracked], run.elr[:, tracked], run.applied_lr[:, tracked], run.elr_spread, [],
        angle=run.angle[:, tracked], weight_norm=run.weight_norm[:, tracked],  # type: ignore[index]
    )  # fmt: skip
    axes = [ax for ax in run_figure(alone).axes if ax.get_ylabel() not in ("", "layer, first to last")]
    data = data_of(report_page(run, [], title="elr.jsonl"))
    titles = [panel["title"].removesuffix(" over the tracked layers") for panel in data["panels"]]
    assert [ax.get_ylabel() for ax in axes] == titles
    colors = [to_hex(line.get_color()) for line in axes[0].get_lines()]
    assert [data["colors"]["light"][i] for i in tracked] == colors
    assert len(set(data["colors"]["light"])) == len(NAMES)


def test_colors_go_by_depth_and_are_grey_for_what_is_not_tracked() -> None:
    assert layer_colors([True]) == ["#440154"]
    grey = layer_colors([True, False, True])[1]
    assert layer_colors([True, False, True]) == [
        layer_colors([True] * 2)[0],
        grey,
        layer_colors([True] * 2)[1],
    ]
    assert grey not in layer_colors([False] * 5)
    assert layer_colors([False] * 5, "dark") == layer_colors([True] * 5, "dark")


def test_when_a_rule_acted() -> None:
    run = made_up_run()
    assert [tuple(span) for span in rule_spans(run)] == [(0, 90, 100)]
    run.weight_factor[20:25, 2] = 0.9
    assert [tuple(span) for span in rule_spans(run)] == [(0, 90, 100), (200, 240, 250)]
    run.grad_factor[:] = 2.0
    assert [tuple(span) for span in rule_spans(run)] == [(0, 290, None)]
    run.grad_factor[:], run.weight_factor[:] = np.nan, 1.0
    assert rule_spans(run) == []


def test_the_hand_over_is_marked_in_plots() -> None:
    marked = [
        [line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == "--"]  # type: ignore[index]
        for ax in run_figure(made_up_run()).axes
        if ax.get_lines()
    ]
    assert marked == [[100]] * 5


def test_the_hand_over_of_a_real_warmup_is_found(tmp_path: Path) -> None:
    run = read_run(record_run(tmp_path / "run.jsonl"), all_layers=True)
    acts = ((run.grad_factor != 1) | (run.weight_factor != 1))[:, run.tracked].any(axis=1)
    assert acts[0]
    (span, *_) = rule_spans(run)
    assert span.first == 0
    assert (span.handed_over is None) == bool(acts.all())


def test_of_long_runs_every_kth_record_is_shown_and_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elropt.report_page.VALUES_PER_PLOT", 1000)
    steps = np.arange(501)
    found = [Finding("update_spike", (347, 349), ("first",), "A spike.", "", "warning")]
    page = report_page(made_up_run(steps=steps), found, title="elr.jsonl")
    shown = data_of(page)["steps"]
    assert {0, 347, 349, 500} <= set(shown)
    assert len(shown) * len(NAMES) <= 1000 + 4 * len(NAMES)
    assert f"{len(shown)} of 501 records" in page


def test_findings_are_written_out() -> None:
    page = report_page(made_up_run(), FOUND, title="elr.jsonl")
    for text in (
        "first turns by 0.4 rad.",
        "Lower lr to 0.03.",
        "steps 100 to 120 · first",
        "steps 0 to 290 · all layers",
    ):
        assert text in page
    assert data_of(page)["findings"][2] == {"steps": [200, 290], "layers": [1, 2]}


def test_the_heading_names_the_optimizer(tmp_path: Path) -> None:
    page = report_page(read_run(record_run(tmp_path / "run.jsonl"), all_layers=True), [], title="elr.jsonl")
    heading = page[page.index("<h1>") : page.index("</header>")]
    assert "ELRSGD, rule &#x27;warmup&#x27;, momentum 0.9, weight decay 0" in heading
    assert "· 3 layers ·" in heading
    assert "3 records, steps 0 to 4" in heading


def test_inspect_has_the_colors_of_the_page() -> None:
    model = bn_mlp(depth=3)
    found = inspect_model(model, torch.randn(16, 8), lr=0.1)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, color_system="truecolor", width=160)
    console.print(weight_table(found, wide=True, colored=True))
    rows = [line for line in text.getvalue().splitlines() if ".weight" in line]
    tracked = [weight.tracked for weight in found.weights]
    assert tracked == [True, True, True, False]
    for row, color in zip(rows, layer_colors(tracked, "dark"), strict=True):
        assert "38;2;{};{};{}m■".format(*(int(color[i : i + 2], 16) for i in (1, 3, 5))) in row


def test_numbers_have_three_digits() -> None:
    assert [short(x) for x in (0.1, 1234.5, 1.0, 1.5e-7, float("nan"))] == [
        "0.1",
        "1.23e+03",
        "1",
        "1.5e-07",
        "–",
    ]


# The command


def test_report_writes_beside_the_run_or_where_it_is_told(tmp_path: Path) -> None:
    recorded = record_run(tmp_path / "run.jsonl")
    assert f"wrote {tmp_path / 'run.html'}" in command("report", recorded)
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert data_of(page)["layers"][:3] == ["0.weight", "3.weight", "6.weight"]
    command("report", recorded, "--out", tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == page


def test_report_prints_what_it_sees(tmp_path: Path) -> None:
    still = {"tracked": True, "weight_norm": 1.0, "angle": 0.01}
    lines = [record(step, a=still, b=still | {"angle": 0.9 if step == 3 else 0.01}) for step in range(12)]
    (tmp_path / "run.jsonl").write_text("".join(lines))
    seen = diagnose(read_run(tmp_path / "run.jsonl", all_layers=True))
    assert seen[0].kind == "large_angle"
    printed = " ".join(command("report", tmp_path / "run.jsonl").split())
    assert "warning: A layer turns too far." in printed
    assert all(finding.what in printed and finding.advice in printed for finding in seen)


@pytest.mark.parametrize(
    ("lines", "panels"),
    [
        (
            record(0, a={}),
            ["effective learning rate (rad)", "applied learning rate"],
        ),  # one layer, one step, old
        (record(0, a={"elr": None, "angle": 0.1}), ["angle of the step (rad)", "applied learning rate"]),
        (record(0, a={"elr": None, "lr": None}), []),
        (record(0, a={"tracked": False}), ["effective learning rate (rad)", "applied learning rate"]),
        (record(3, a={}) + record(0, a={}, b={}) + record(7, b={}) + '{"st', None),
    ],
)
def test_report_takes_old_sparse_and_cut_off_files(
    tmp_path: Path, lines: str, panels: list[str] | None
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(lines)
    output = command("report", path)
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    if panels is None:
        assert "line 4: cut off, skipped" in output
        assert "holds 2 runs" in output
        assert "line 4: cut off, skipped" in page
        assert data_of(page)["steps"] == [0, 7]
    else:
        assert list(panels_of(page)) == panels


def test_report_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("epoch,loss\n1,2.0\n")
    assert "line 1: not JSON" in command("report", path, code=2)
    path.write_text(record(0))
    assert "no layer" in command("report", path, code=2)
    path.write_text(record(0, a={}))
    assert "'page.png' has the suffix '.png'" in command("report", path, "--out", "page.png", code=2)
    assert "cannot write" in command("report", path, "--out", path / "page.html", code=2)
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.delitem(sys.modules, "elropt.report_page")
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert 'elropt report needs plotly: pip install "elropt[cli]"' in command("report", path, code=2)


# The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium with a new profile; nothing is downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian's packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *(f"user-data-dir={tmp_path_factory.mktemp('profile')}", "window-size=1400,1000"),
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()


class Page:
    """A page in the browser, and what it shows."""

    def __init__(self, browser: Any, path: Path, run: RunHistory, found: list[Finding]) -> None:
        path.write_text(report_page(run, found, title="elr.jsonl"), encoding="utf-8")
        self.browser, self.address = browser, path.as_uri()
        browser.get(self.address)
        wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(browser, 60)
        wait.until(lambda _: self.ask('document.querySelector(".js-plotly-plot .main-svg") !== null'))

    def ask(self, script: str, *args: object) -> Any:
        return self.browser.execute_script(f"return {script}", *args)

    def settle(self) -> None:
        """Wait for two frames, by when the page has heard of what happened to it."""
        self.browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def click(self, selector: str) -> None:
        self.browser.find_element("css selector", selector).click()

    def click_point(self, plot: int, step: float, value: float) -> None:
        """Click with the mouse where a step and a value (or row) are in a plot."""
        from selenium.webdriver import ActionChains

        x, y = self.ask(
            """(([plot, step, value]) => {
                const div = document.querySelectorAll(".js-plotly-plot")[plot];
                div.scrollIntoView({block: "center"});
                const {left, top} = div.getBoundingClientRect(), {xaxis, yaxis} = div._fullLayout;
                return [left + xaxis._offset + xaxis.d2p(step), top + yaxis._offset + yaxis.d2p(value)];
            })(arguments)""",
            plot,
            step,
            value,
        )
        actions = ActionChains(self.browser, duration=20)
        actions.w3c_actions.pointer_action.move_to_location(round(x) - 3, round(y))
        actions.w3c_actions.pointer_action.move_to_location(round(x), round(y)).pause(0.15).click()
        actions.perform()
        self.settle()

    def names(self) -> list[list[str]]:
        """Of each plot, the names of its lines or the labels of its rows."""
        return self.ask(
            """[...document.querySelectorAll(".js-plotly-plot")].map((div) =>
            div.data[0].type === "heatmap" ? div.layout.yaxis.ticktext : div.data.map((trace) => trace.name))"""
        )

    def ranges(self) -> list[list[float]]:
        return self.ask(
            '[...document.querySelectorAll(".js-plotly-plot")].map((div) => div.layout.xaxis.range)'
        )

    def findings(self) -> list[str]:
        return [
            element.get_attribute("data-finding")
            for element in self.browser.find_elements("css selector", "[data-finding]")
            if element.is_displayed()
        ]

    def errors(self) -> list[Any]:
        """What the console says, and addresses that were asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        asked = {each["request"]["url"] for each in sent if each["documentURL"] == self.address}
        outside = [url for url in asked - {self.address} if not url.startswith(("data:", "blob:"))]
        return self.browser.get_log("browser") + outside


@pytest.fixture(scope="module")
def loaded(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(browser, tmp_path_factory.mktemp("pages") / "page.html", made_up_run(), FOUND)


@pytest.fixture
def page(loaded: Page) -> Iterator[Page]:
    """The page as it is when it was loaded; it must bring no errors."""
    loaded.ask('show({...everything, view: "lines", untracked: false})')
    yield loaded
    assert loaded.errors() == []


SPREAD_AND_LR = [["ELR", "angle"], ["all layers"]]
ESCAPED = HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")  # as plotly wants its text


def by_layer(*names: str) -> list[list[str]]:
    """`Page.names` if these layers are shown: ELR, angle, spread, norm, learning rate."""
    layers = list(names)
    return [layers, layers, SPREAD_AND_LR[0], layers, SPREAD_AND_LR[1]]


@pytest.mark.xdist_group("browser")
def test_a_click_on_a_layer_shows_it_alone(page: Page) -> None:
    assert page.names() == by_layer("first", ESCAPED, "third")
    page.click('[data-layer="2"]')
    assert page.names() == by_layer("third")
    assert page.findings() == ["1", "2"]
    assert page.ask('document.getElementById("shown").textContent') == "third"
    page.click("#reset")
    assert page.names() == by_layer("first", ESCAPED, "third")
    assert page.findings() == ["0", "1", "2"]
    page.click('[data-layer="3"]')  # not tracked
    assert page.names() == by_layer("head")
    page.click("#reset")
    page.click("#untracked input")
    assert page.names() == by_layer("first", ESCAPED, "third", "head")
    search = page.browser.find_element("id", "filter")
    search.send_keys("IR")
    shown = [b.text for b in page.browser.find_elements("css selector", ".layer") if b.is_displayed()]
    assert [text.splitlines()[0] for text in shown] == ["first", "third"]
    search.send_keys("\b\b")


@pytest.mark.xdist_group("browser")
def test_a_click_in_a_plot_shows_that_layer_alone(page: Page) -> None:
    page.click_point(1, 150, made_up_run().angle[15, 1])  # type: ignore[index]
    assert page.names() == by_layer(ESCAPED)
    page.click("#reset")
    page.click('[data-view="heat"]')
    assert page.ask('document.querySelector(".js-plotly-plot").data[0].type') == "heatmap"
    first, middle, third = page.names()[0]
    assert (first, third) == ("first", "third")
    assert middle.startswith("…"), "a long name is cut"
    assert ESCAPED.endswith(middle[1:])
    page.click_point(1, 150, 2)
    assert page.names() == by_layer("third")


@pytest.mark.xdist_group("browser")
def test_a_click_on_a_finding_shows_its_steps_and_layers(page: Page) -> None:
    whole = page.ranges()
    assert all(low < 0 and high > 290 for low, high in whole)
    page.click('[data-finding="0"]')
    assert page.names() == by_layer("first")
    for low, high in page.ranges():
        assert 50 <= low < 100
        assert 120 < high <= 170
    assert page.findings() == ["0", "1", "2"]
    page.click('[data-finding="2"]')
    assert page.names() == by_layer(ESCAPED, "third")
    page.click("#reset")
    assert page.ranges() == whole


@pytest.mark.xdist_group("browser")
def test_the_plots_say_what_they_show(page: Page) -> None:
    captions = page.ask('[...document.querySelectorAll("figcaption")].map((caption) => caption.textContent)')
    assert captions[0].startswith("Effective learning rate (rad): lr·‖g‖/‖w‖, the tangent of")
    assert captions[3] == "Weight norm ‖w‖"


@pytest.mark.xdist_group("browser")
def test_the_hand_over_is_marked_and_dark_is_dark(page: Page) -> None:
    paper = '[...document.querySelectorAll(".js-plotly-plot")].map((div) => div.layout.paper_bgcolor)'
    lines = page.ask(
        """[...document.querySelectorAll(".js-plotly-plot")].map((div) =>
        div.layout.shapes.filter((shape) => shape.type === "line").map((shape) => shape.x0))"""
    )
    assert lines == [[100]] * 5
    assert page.ask('document.querySelector(".annotation-text").textContent') == "handed over"
    assert set(page.ask(paper)) == {"#ffffff"}
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    page.settle()
    try:
        assert set(page.ask(paper)) == {"#0d1117"}
        assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        page.settle()


@pytest.mark.xdist_group("browser")
def test_the_page_writes_numbers_as_the_tables_do(page: Page) -> None:
    values = [0, 1, -3, 123, 999.4, 999.6, 1234.5, 0.1, 1 / 3, 1e-4, 9.999e-5, 1.5e-7, 2.5e20, 1e-300]
    assert page.ask("arguments[0].map(short)", values) == [short(value) for value in values]
    assert page.ask("short(null)") == short(float("nan"))


@pytest.mark.xdist_group("browser")
def test_it_prints_narrow_and_is_wide_again(page: Page) -> None:
    widths = '[...document.querySelectorAll(".js-plotly-plot")].map((div) => div._fullLayout.width)'
    before = page.ask(widths)
    page.ask('dispatchEvent(new Event("beforeprint"))')
    assert max(page.ask(widths)) < 700 < min(before)
    page.ask('dispatchEvent(new Event("afterprint"))')
    assert page.ask(widths) == before


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("layers", [1, 300])
def test_one_record_and_many_layers_are_drawn(browser: Any, tmp_path: Path, layers: int) -> None:
    names = [f"layer{i}" for i in range(layers)]
    run = made_up_run(names, STEPS[:1] if layers == 1 else STEPS)
    page = Page(browser, tmp_path / "page.html", run, [])
    types = page.ask('[...document.querySelectorAll(".js-plotly-plot")].map((div) => div.data[0].type)')
    drawn = page.ask('document.querySelectorAll(".js-plotly-plot .points path, .js-plotly-plot .hm").length')
    if layers == 1:
        assert types == ["scatter"] * 4  # there is no spread
        assert drawn == 4
    else:
        assert types == ["heatmap", "heatmap", "scatter", "heatmap", "scatter"]
        assert drawn >= 3
    assert page.errors() == []
