"""The interactive page, in a headless browser without a network."""

import fcntl
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from synthetic import BATCH, make_run, make_suite, one_at_a_time

from benchmark import report
from benchmark.__main__ import main as benchmark
from benchmark.plot import read_curves
from benchmark.statistics import mean_interval
from benchmark.suite import REFERENCE

WAIT = 300_000  # milliseconds after which a test gives up; a busy machine needs more than the usual 30 seconds


@pytest.fixture(scope="module")
def chromium():
    """Path of Debian's chromium, which is installed if need be; without it the tests are skipped."""
    with one_at_a_time("install"):
        if not shutil.which("chromium") and shutil.which("apt-get") and os.geteuid() == 0:
            subprocess.run(["apt-get", "update"], capture_output=True)
            subprocess.run(["apt-get", "install", "--yes", "chromium"], capture_output=True)
    return shutil.which("chromium") or pytest.skip("chromium cannot be installed here")


@pytest.fixture(scope="module")
def open_page(chromium):
    """Opens pages in a browser that is offline; each page notes its errors and what it asks for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=WAIT)
        context = browser.new_context(offline=True, viewport={"width": 1300, "height": 700})
        context.set_default_timeout(WAIT)

        def open_one(path):
            tab = context.new_page()
            tab.problems, tab.requests = [], []
            tab.on("pageerror", lambda error: tab.problems.append(str(error)))
            tab.on("console", lambda message: tab.problems.append(message.text) if message.type == "error" else None)
            tab.on("request", lambda request: tab.requests.append(request.url))
            tab.goto(path.as_uri())
            return tab

        yield open_one
        browser.close()


@pytest.fixture(scope="module")
def page(open_page, tmp_path_factory):
    """The page of a suite of two environments with three seeds."""
    folder = tmp_path_factory.mktemp("report")
    suite, other = make_suite(folder), make_suite(folder, ["A-v0"], [10], name="other")
    for seed in (1, 2, 3):
        make_run(folder / "runs", "A-v0", seed, [seed * update for update in range(20)])
        make_run(folder / "runs", "B-v0", seed, [100 - seed * update for update in range(20)])
    make_run(folder / "runs", "A-v0", 10, range(7))
    words = [str(suite), str(other), f"--runs-dir={folder / 'runs'}", f"--output={folder / 'report.html'}"]
    assert benchmark(["report", *words]) == 0
    return open_page(folder / "report.html")


@pytest.fixture(autouse=True)
def fresh(request):
    """Every test starts with the page as it is when it is opened."""
    if "page" in request.fixturenames:
        request.getfixturevalue("page").reload()


def traces(page) -> list[dict]:
    """What plotly shows."""
    return page.evaluate("document.getElementById('figure').data.map(t => ({x: [...t.x], y: [...t.y], name: t.name, "
                         "panel: t.xaxis, color: t.line.color, hover: t.hovertemplate}))")  # fmt: skip


def panels(page) -> list[str]:
    """Titles of the panels."""
    return page.evaluate("document.getElementById('figure').layout.annotations.map(a => a.text)")


def test_first_view(page, tmp_path):
    """All runs are there, nothing is fetched, nothing is complained about, and something is drawn."""
    shown = traces(page)
    assert len(shown) == 7
    assert panels(page) == ["<b>A-v0</b>", "<b>B-v0</b>"]
    first = next(trace for trace in shown if "A-v0, seed 2 " in trace["hover"])
    assert first["x"] == [BATCH * update for update in range(1, 21)]
    assert first["y"] == [update for update in range(20)]  # means of 0, 2, 4, ...
    assert {trace["name"] for trace in shown} == {"ppo.py (made)", "ppo.py (other)"}
    assert len({trace["color"] for trace in shown}) == 2
    assert page.locator("#figure .scatterlayer .trace").count() == 7
    legend = page.locator("#figure .legend").bounding_box()
    assert 0 <= legend["y"] < 60 and legend["x"] + legend["width"] <= 1300
    assert page.inner_text("#count") == "7 of 7 runs"
    assert page.problems == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)
    page.screenshot(path=os.environ.get("REPORT_SCREENSHOT", tmp_path / "report.png"))


def test_metric_and_hours(page):
    page.select_option("#metric", "losses/entropy")
    page.select_option("#x", "hours")
    shown = traces(page)
    assert all(trace["y"] == [0.5] * len(trace["x"]) for trace in shown)
    assert shown[0]["x"] == pytest.approx([update / 100 for update in range(1, 21)])
    page.select_option("#metric", "losses/explained_variance")  # null in the first update
    assert [trace["y"][0] for trace in traces(page)] == [None] * 7
    assert page.problems == []


def test_toggles(page):
    """By environment, script and seed; colors stay with what they stand for."""
    page.select_option("#color", "seed")
    colors = {trace["name"]: trace["color"] for trace in traces(page)}
    assert list(colors) == ["seed 1", "seed 2", "seed 3", "seed 10"] and len(set(colors.values())) == 4
    page.uncheck("#envs input[value='A-v0']")
    assert panels(page) == ["<b>B-v0</b>"]
    page.uncheck("#seeds input[value='1']")
    shown = traces(page)
    assert {trace["name"]: trace["color"] for trace in shown} == {seed: colors[seed] for seed in ("seed 2", "seed 3")}
    page.click("#envs button")
    assert len(traces(page)) == 5
    page.uncheck("#scripts input[value='ppo.py (made)']")
    assert [trace["name"] for trace in traces(page)] == ["seed 10"]
    assert "unfinished" in traces(page)[0]["hover"]
    page.click("#seeds button")  # all, for one is off
    page.click("#seeds button")
    assert traces(page) == [] and page.inner_text("#count") == "0 of 7 runs"
    assert page.problems == []


def test_means(page):
    """Over seeds, each as far as it has got, with Student's t intervals; a seed alone has none."""
    page.select_option("#curves", "means")
    shown = page.evaluate("get('figure').data.map(t => ({x: t.x, y: t.y, name: t.name, fill: t.fill, panel: t.xaxis, "
                          "more: t.customdata}))")  # fmt: skip
    lines, bands = ([trace for trace in shown if bool(trace.get("fill")) == band] for band in (False, True))
    assert [(trace["name"], trace["panel"]) for trace in lines] == [
        ("ppo.py (made)", "x"), ("ppo.py (made)", "x2"), ("ppo.py (other)", "x")
    ]  # fmt: skip
    assert [trace["panel"] for trace in bands] == ["x", "x2"]
    assert (lines[0]["x"][0], lines[0]["x"][-1]) == (BATCH, 20 * BATCH)
    for i in (0, 60, 119):  # returns are 0, seed, 2 seed, .., and their means half of that
        updates = lines[0]["x"][i] / BATCH - 1
        low, high = mean_interval(np.array([1, 2, 3]) * updates / 2)
        assert lines[0]["y"][i] == pytest.approx(updates)
        assert bands[0]["y"][i] == pytest.approx(high) and bands[0]["y"][-1 - i] == pytest.approx(low)
    assert float(lines[0]["more"][119].removeprefix(" \u00b1 ")) == pytest.approx(high - 19, rel=1e-2)
    assert set(lines[2]["more"]) == {""}
    page.uncheck("#seeds input[value='3']")
    assert traces(page)[1]["y"][119] == pytest.approx(0.75 * 19)
    assert page.problems == []


def test_settings_of_a_run(page):
    """A click on its curve shows them."""
    page.evaluate("get('figure').emit('plotly_click', {points: [{fullData: get('figure')._fullData"
                  ".find(t => t.meta[0].env === 'A-v0' && t.meta[0].seed === '2')}]})")  # fmt: skip
    shown = json.loads(page.inner_text("#settings pre"))
    assert page.inner_text("#settings b") == "A-v0__ppo__2__1700000002"
    assert shown["seed"] == 2 and shown["num_envs"] == 4
    assert page.problems == []


def test_on_a_phone(page):
    """390 pixels: the controls are folded away, panels are below each other, and nothing is wider than the screen."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.is_visible("#metric")
    page.click("summary")
    assert page.is_visible("#metric")
    boxes = [
        page.locator(f"#figure .{panel} .gridlayer, #figure .{panel}").first.bounding_box() for panel in ("xy", "x2y2")
    ]
    title, legend = (page.locator(f"#figure .{part}").bounding_box() for part in ("gtitle", "legend"))
    assert title["y"] + title["height"] <= legend["y"] and legend["y"] + legend["height"] < boxes[0]["y"]
    assert boxes[1]["y"] > boxes[0]["y"] + 150 and all(box["width"] > 250 for box in boxes)
    page.set_viewport_size({"width": 1300, "height": 700})
    assert page.problems == []


def test_official_curves_and_committed_ones(open_page, tmp_path):
    """Of a suite without runs the page shows what is in the repository, beside the official code."""
    output = tmp_path / "report.html"
    assert benchmark(["report", "classic", f"--runs-dir={tmp_path}", f"--output={output}"]) == 0
    page = open_page(output)
    folders = {"ppo.py": report.Args([]).results, "official code": REFERENCE}
    curves = {name: read_curves(folder / "classic.csv") for name, folder in folders.items()}
    expected = {name: {(env, str(seed)) for env in envs for seed in envs[env]} for name, envs in curves.items()}
    found = page.evaluate("DATA.runs.map(run => [run.script, run.env, run.seed])")
    assert {name: {(env, seed) for script, env, seed in found if script == name} for name in expected} == expected
    dashes = page.evaluate("get('figure').data.map(t => [t.name, t.line.dash])")
    assert {tuple(pair) for pair in dashes} == {("ppo.py", "solid"), ("official code", "dash")}
    page.evaluate("get('figure').emit('plotly_click', {points: [{fullData: get('figure')._fullData[0]}]})")
    settings = json.loads(page.inner_text("#settings pre"))
    assert settings["env_id"] == found[0][1] and "commit" in settings
    assert page.problems == []


def test_smoothing(page):
    """An exponential moving average whose weights add up to 1."""
    raw = traces(page)[0]["y"]
    page.fill("#smoothing", "0.9")
    smooth = traces(page)[0]["y"]
    for last in (0, 5, 19):
        weights = [0.9 ** (last - index) for index in range(last + 1)]
        expected = sum(weight * value for weight, value in zip(weights, raw)) / sum(weights)
        assert smooth[last] == pytest.approx(expected)
    assert page.inner_text("#smoothing-value") == "0.9"


STRANGE = [
    "</script><script>document.title='caught'</script>",
    "<img src=x onerror=document.title='caught'>",
    "<!--<script>",
    "<b>bold</b><br>&amp;&#65;%{x}${1}",
    "<a href='https://example.com'>$x$</a>",
    "'\"`\\",
    "\u2028 \u202e",
]


# Points at the second point of a curve; whether its environment is then to be read there.
HOVER = """index => {
    const trace = get('figure').data[index], axes = [trace.xaxis, trace.yaxis];
    const panel = axes.map(axis => axis.replace(/^(.)1$/, '$1')).join('');
    Plotly.Fx.hover('figure', [{curveNumber: index, pointNumber: 1}], panel);
}"""
HOVERED = """index => {
    const label = document.querySelector('#figure .hoverlayer .hovertext');
    return label && label.textContent.includes(DATA.runs[index].env);
}"""


def test_names_cannot_break_the_page(open_page, tmp_path):
    """Whatever is in them is shown as it is, in the list, over the panels, in the legend and under the pointer."""
    suite = make_suite(tmp_path, STRANGE, [1])
    for env_id in STRANGE:
        path = make_run(tmp_path / "runs", env_id, 1, [1, 2, 3], metric=env_id)
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        rows = [json.dumps(row | ({f"x/{env_id}": 1} if "charts/SPS" in row else {})) for row in lines]
        (path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    output = tmp_path / "report.html"
    assert benchmark(["report", str(suite), f"--runs-dir={tmp_path / 'runs'}", f"--output={output}"]) == 0
    page = open_page(output)
    expected = sorted(STRANGE)
    boxes = page.evaluate("[...document.querySelectorAll('#envs input')].map(box => box.value)")
    assert sorted(boxes) == expected
    page.select_option("#color", "env")
    for places in (".annotation-text", ".legendtext"):
        shown = page.evaluate(f"[...document.querySelectorAll('#figure {places}')].map(e => e.textContent)")
        assert sorted(shown) == expected
    for index in range(len(STRANGE)):
        page.evaluate(HOVER, index)
        page.wait_for_function(HOVERED, arg=index, timeout=20_000)  # plotly takes a moment
    for env_id in STRANGE:
        page.select_option("#metric", f"x/{env_id}")
        assert page.evaluate("document.querySelector('#figure .gtitle').textContent") == f"x/{env_id}"
    assert page.title() == "ppo37: runs" and page.locator("img").count() == page.locator("#figure a[href]").count() == 0
    assert page.problems == [] and all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)


def test_broken_and_running_runs(tmp_path, capsys):
    """A broken one is named in one line, and the exit code says so; the others are there."""
    suite = make_suite(tmp_path, ["A-v0"], [1, 2, 3])
    paths = [make_run(tmp_path / "runs", "A-v0", seed, [seed] * 20) for seed in (1, 2, 3)]
    (paths[0] / "config.json").write_text("{}")
    with open(paths[1] / "metrics.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write('{"global_step": 99999, "wall_')  # it is about to write more
        file.flush()
        runs, _ = report.load_runs(report.Args([str(suite)], tmp_path / "runs"))
        assert [(run["seed"], run["status"]) for run in runs] == [("2", "running"), ("3", "")]
        capsys.readouterr()
        words = [f"--runs-dir={tmp_path / 'runs'}", f"--output={tmp_path / 'report.html'}"]
        assert benchmark(["report", str(suite), *words]) == 1
    out, err = capsys.readouterr()
    assert "2 runs" in out and err.startswith(f"{paths[0]} is broken: in config.json ") and err.count("\n") == 1


def test_page_replaces_a_link(tmp_path):
    suite = make_suite(tmp_path, ["A-v0"], [1])
    make_run(tmp_path / "runs", "A-v0", 1, [1])
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / "report.html").symlink_to(tmp_path / "precious")
    assert (
        benchmark(["report", str(suite), f"--runs-dir={tmp_path / 'runs'}", f"--output={tmp_path / 'report.html'}"])
        == 0
    )
    assert (tmp_path / "precious").read_text() == "as it was" and not (tmp_path / "report.html").is_symlink()


def test_hundreds_of_runs_are_thinned_out(tmp_path, monkeypatch):
    suite = make_suite(tmp_path, ["A-v0"], range(1, 301), updates=60)
    monkeypatch.setattr(report, "ALL_POINTS", 12_000)
    for seed in range(1, 301):
        make_run(tmp_path / "runs", "A-v0", seed, range(60), total=60)
    runs, _ = report.load_runs(report.Args([str(suite)], tmp_path / "runs"))
    assert len(runs) == 300
    assert {len(run["steps"]) for run in runs} == {40}
    assert all(run["steps"][-1] == 60 * BATCH for run in runs)


def test_bad_input(tmp_path, capsys):
    """One clear line, exit code 2, and no page."""
    suite = make_suite(tmp_path, ["A-v0"], [1])
    page = tmp_path / "report.html"

    def refused(*words):
        assert benchmark(["report", *words, f"--runs-dir={tmp_path / 'runs'}", f"--output={page}"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.splitlines()[-1].startswith("benchmark report: error: ") and not page.exists()
        return err

    assert "no runs of made in" in refused(str(suite))
    assert "there is no suite clasic" in refused("clasic")
    (make_run(tmp_path / "runs", "A-v0", 1, [1]) / "metrics.jsonl").write_text("")
    assert "A-v0__ppo__1__1700000001 is left out: it has not done an update" in refused(str(suite))


def test_page_that_cannot_be_written(tmp_path, capsys):
    suite = make_suite(tmp_path, ["A-v0"], [1])
    make_run(tmp_path / "runs", "A-v0", 1, [1])
    assert benchmark(["report", str(suite), f"--runs-dir={tmp_path / 'runs'}", f"--output={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"cannot write to {tmp_path}: " in err


def test_suite_without_runs_is_said(tmp_path, capsys):
    """Beside one that has some."""
    suites = make_suite(tmp_path, ["A-v0"], [1]), make_suite(tmp_path, ["A-v0"], [2], name="empty")
    make_run(tmp_path / "runs", "A-v0", 1, [1])
    words = [f"--runs-dir={tmp_path / 'runs'}", f"--output={tmp_path / 'report.html'}"]
    assert benchmark(["report", *map(str, suites), *words]) == 0
    assert capsys.readouterr().err == f"no runs of empty in {tmp_path / 'runs'}\n"
