"""Curves, statistics, tables and figures of runs with known contents."""

import fcntl
import json
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from scipy import stats
from synthetic import BATCH, make_run, make_suite

from benchmark import plot
from benchmark.__main__ import main as benchmark
from benchmark.plot import Curve
from benchmark.suite import REFERENCE, InputError, read_metrics


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that do not depend on which tests came before."""
    return np.random.default_rng(1)


@pytest.fixture
def draw(tmp_path, capsys):
    """Plots a suite of tmp_path with its runs; returns its table's rows by environment, and what was said on stderr."""

    def run(suite, **settings):
        folders = {"runs_dir": tmp_path / "runs", "results": tmp_path / "results", "output": tmp_path / "img"}
        assert plot.main(plot.Args(str(suite), **(folders | settings))) == 0
        out, err = capsys.readouterr()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.partition("\n\n")[0].splitlines()]
        return {row[0]: row[1:] for row in rows}, err

    return run


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes most of a plot's time; a test that looks at the table or the data alone can do without."""
    monkeypatch.setattr(plot, "draw", lambda *args: None)


def curve(values, steps=None, part=1.0) -> Curve:
    """A curve whose steps are 1, 2, 3 and so on, and hours a tenth of that."""
    steps = np.arange(1.0, len(values) + 1) if steps is None else np.asarray(steps, float)
    return Curve(steps, steps / 10, np.asarray(values, float), part)


def test_curve_is_the_mean_of_the_last_100_episodes(tmp_path, rng):
    returns = rng.normal(size=300)
    columns = read_metrics(make_run(tmp_path, "A-v0", 1, returns))
    values = plot.metric_by_update(columns, plot.RETURN)
    expected = [returns[max(0, update - 100) : update].mean() for update in range(1, 301)]
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
    drawn = plot.run_curve(columns, plot.RETURN, 1.0)
    assert len(drawn.steps) == plot.POINTS
    assert (drawn.steps[0], drawn.steps[-1]) == (BATCH, 300 * BATCH)
    assert drawn.values[-1] == values[-1]
    assert drawn.hours[-1] == pytest.approx(3)


def test_curve_before_the_first_episode():
    """Updates without an episode so far have no value; then all episodes so far count."""
    nan = np.nan
    columns = {"charts/SPS": [9, nan, nan, 9, 9, nan, 9], plot.RETURN: [nan, 2, 4, nan, nan, 9, nan]}
    values = plot.metric_by_update({name: np.array(column, float) for name, column in columns.items()}, plot.RETURN)
    np.testing.assert_array_equal(values, [nan, 3, 3, 5])


def test_curve_of_tests_begins_before_training():
    """A test is no episode: what it says is shown as it is, at its step."""
    nan, name = np.nan, "eval/greedy_accuracy"
    columns = {"charts/SPS": [nan, 9, 9, 9], name: [0.2, nan, 0.5, 0.9], "global_step": [0, 4, 8, 12]}
    columns |= {"wall_time": [1, 2, 3, 4]}
    drawn = plot.run_curve({name: np.array(column, float) for name, column in columns.items()}, name, 1.0)
    assert drawn.steps.tolist() == [0, 8, 12] and drawn.values.tolist() == [0.2, 0.5, 0.9]


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_statistics_equal_scipy(statistic, rng):
    """What is drawn at each point is what scipy says about the seeds there."""
    values = rng.normal(size=(12, plot.POINTS))
    _, center, low, high = plot.aggregate([curve(row) for row in values], statistic, "steps")
    for column in (0, 60, plot.POINTS - 1):
        seeds = values[:, column]
        if statistic == "mean":
            assert center[column] == pytest.approx(seeds.mean())
            bounds = stats.ttest_1samp(seeds, 0).confidence_interval()
            assert (low[column], high[column]) == pytest.approx(tuple(bounds))
            continue
        assert center[column] == pytest.approx(np.sort(seeds)[3:9].mean())  # the middle half
        function = lambda x, axis: stats.trim_mean(x, 0.25, axis=axis)  # noqa: E731
        bounds = stats.bootstrap((seeds,), function, method="percentile", n_resamples=9999, rng=rng).confidence_interval
        width = bounds.high - bounds.low
        assert low[column] == pytest.approx(bounds.low, abs=0.08 * width)
        assert high[column] == pytest.approx(bounds.high, abs=0.08 * width)


def test_interquartile_mean_of_few_seeds_is_refused(tmp_path, capsys, no_figure):
    """Of the suite's seeds with an error, of others with a word."""
    suite = make_suite(tmp_path, ["CartPole-v1"], list(range(1, 11)), reference="classic.csv")
    folders = [f"--results={tmp_path}", f"--output={tmp_path}", f"--runs-dir={tmp_path / 'runs'}"]
    for seed in range(1, 10):
        make_run(tmp_path / "runs", "CartPole-v1", seed, [seed] * 20)
    assert benchmark(["plot", str(suite), *folders, "--statistic", "iqm"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark plot: error: the interquartile mean needs 10 seeds, and CartPole-v1 has 9: ")
    make_run(tmp_path / "runs", "CartPole-v1", 10, [100] * 20)
    assert benchmark(["plot", str(suite), *folders, "--statistic", "iqm"]) == 0
    out, err = capsys.readouterr()
    assert "official code is left out: it has fewer than 10 seeds" in err
    assert "| CartPole-v1 | 5.5 +- 30.2 (10 seeds) |" in out  # 3 to 8; the mean is 14.5


def test_unequal_lengths():
    """At each point those seeds count that have got there; over hours a finished run keeps its last value."""
    curves = [curve([0] * 10), curve([1] * 20), curve([2] * 4, part=0.2)]
    x, center, low, high = plot.aggregate(curves, "mean", "steps")
    assert (x[0], x[-1]) == (1, 20)
    np.testing.assert_allclose(center, np.select([x <= 4, x <= 10], [1, 0.5], 1))
    assert np.isnan(low[x > 10]).all() and np.isfinite(low[x <= 10]).all()
    _, center, _, _ = plot.aggregate(curves, "mean", "hours")
    np.testing.assert_allclose(center, np.where(x <= 4, 1, 0.5))


def test_one_seed_has_no_interval():
    _, center, low, high = plot.aggregate([curve([1, 2, 3])], "mean", "steps")
    assert (center[0], center[-1]) == (1, 3)
    assert np.isnan(low).all() and np.isnan(high).all()
    assert plot.final_cells({1: curve([1, 2, 3])}, "mean") == ("3.0 (1 seed)", "-", "18.0 min")


def test_table_figure_and_data(draw, tmp_path):
    suite = make_suite(tmp_path, published={"A-v0": [7, 2]}, reference="classic.csv", env_ids=["A-v0", "CartPole-v1"])
    for seed, final in ((1, 10), (2, 20), (3, 60)):
        make_run(tmp_path / "runs", "A-v0", seed, [final] * 20)
        make_run(tmp_path / "runs", "CartPole-v1", seed, [5] * 20)
    rows, err = draw(suite)
    assert err == ""
    assert rows["environment"] == ["ppo.py: mean +- std", "95% interval", "official code: mean +- std", "95% interval",
                                   "article", "runtime"]  # fmt: skip
    bounds = stats.ttest_1samp([10, 20, 60], 0).confidence_interval()
    expected = f"{bounds.low:.1f} to {bounds.high:.1f}"
    assert rows["A-v0"] == ["30.0 +- 26.5 (3 seeds)", expected, "-", "-", "7 +- 2", "12.0 min"]
    assert rows["CartPole-v1"][:2] == ["5.0 +- 0.0 (3 seeds)", "5.0 to 5.0"]
    assert rows["CartPole-v1"][2] == "482.0 +- 14.2 (5 seeds, 0.5M steps)"
    assert rows["CartPole-v1"][4] == "-"
    table = (tmp_path / "results/made.md").read_text()
    assert table.startswith("| environment | ppo.py: mean +- std | 95% interval |") and "|---|---|" in table
    lines = (tmp_path / "results/made.csv").read_text().splitlines()
    assert lines[0] == "env_id,seed,global_step,return_mean_100,hours"
    assert lines[1] == "A-v0,1,512,10,0.01"
    assert len(lines) == 1 + 2 * 3 * 20
    facts = json.loads((tmp_path / "results/made.json").read_text())
    assert facts["commit"] and facts["machine"] and facts["versions"]["numpy"] == np.__version__
    assert len(facts["runs"]) == 6 and facts["unfinished"] == {} and facts["resumed"] == []
    # Without the runs, and whenever it is drawn, the figure is the same to the last bit.
    files = {path: path.read_bytes() for path in (tmp_path / "img").iterdir()}
    assert {path.name for path in files} == {"made.png", "made.svg"}
    again, err = draw(suite, runs_dir=tmp_path / "nothing", output=tmp_path / "again")
    assert again == rows
    assert "drawing from" in err
    for path, contents in files.items():
        assert (tmp_path / "again" / path.name).read_bytes() == contents


def test_equivalence_with_the_official_code(draw, tmp_path, no_figure):
    """For the environments with a margin; a seed alone says nothing, nor does an unfinished run."""
    suite = make_suite(tmp_path, ["CartPole-v1", "Acrobot-v1"], reference="classic.csv",
                       margins={"CartPole-v1": 25, "Acrobot-v1": 9})  # fmt: skip
    finals = [480, 490, 499]
    for seed, final in enumerate(finals, start=1):
        make_run(tmp_path / "runs", "CartPole-v1", seed, [final] * 20)
    make_run(tmp_path / "runs", "CartPole-v1", 4, [20] * 10)
    make_run(tmp_path / "runs", "Acrobot-v1", 1, [-80] * 20)
    draw(suite)
    official = [curve.values[-1] for curve in plot.read_curves(REFERENCE / "classic.csv")["CartPole-v1"].values()]
    found = stats.ttest_ind(finals, official, equal_var=False).confidence_interval(0.9)
    table = (tmp_path / "results/made.md").read_text().partition("by two one-sided")[2]
    assert f"| {np.mean(finals) - np.mean(official):+.1f} | {found.low:+.1f} to {found.high:+.1f} | 25 | 0.0" in table
    assert "| Acrobot-v1 | - | - | 9 | - | one seed cannot say |" in table


def test_more_runs_are_added_to_the_curves(draw, tmp_path, no_figure):
    """--add keeps what the CSV has, replaces seeds that were run again, and says where both come from."""
    suite = make_suite(tmp_path, env_ids=["A-v0", "B-v0"])
    for seed, final in ((1, 4), (3, 8)):
        make_run(tmp_path / "first", "A-v0", seed, [final] * 20)
    for env_id, seed, final in (("A-v0", 2, 6), ("A-v0", 3, 11), ("B-v0", 1, 5)):
        make_run(tmp_path / "second", env_id, seed, [final] * 20)
    draw(suite, runs_dir=tmp_path / "first")
    first = json.loads((tmp_path / "results/made.json").read_text())
    rows, _ = draw(suite, runs_dir=tmp_path / "second", add=True)
    assert rows["A-v0"][0] == "7.0 +- 3.6 (3 seeds)"  # 4, 6, 11
    assert rows["B-v0"][0] == "5.0 (1 seed)"
    curves = plot.read_curves(tmp_path / "results/made.csv")
    facts = json.loads((tmp_path / "results/made.json").read_text())
    assert list(curves) == ["A-v0", "B-v0"] and list(curves["A-v0"]) == [1, 2, 3]
    assert facts["added_to"] == first and len(facts["runs"]) == 3 and facts["unfinished"] == {}
    again, _ = draw(suite, runs_dir=tmp_path / "second", add=True)
    assert again == rows
    assert json.loads((tmp_path / "results/made.json").read_text())["added_to"] == first
    alone, _ = draw(suite, runs_dir=tmp_path / "second")
    assert alone["A-v0"][0] == "8.5 +- 3.5 (2 seeds)"
    assert "added_to" not in json.loads((tmp_path / "results/made.json").read_text())


def test_other_suites_are_drawn_beside(draw, tmp_path):
    """Their curves come from their CSV, for the environments that both have; one that was not plotted is named."""
    make_suite(tmp_path, env_ids=["m:A-v0", "B-v0"], name="other")
    make_suite(tmp_path, env_ids=["m:A-v0"], name="unplotted")
    suite = make_suite(tmp_path, env_ids=["m:A-v0", "C-v0"], compare=["other", "unplotted"])
    for name, env_id, final in (
        ("runs", "m:A-v0", 9),
        ("runs", "C-v0", 8),
        ("others", "m:A-v0", 4),
        ("others", "B-v0", 3),
    ):
        for seed in (1, 2, 3):
            make_run(tmp_path / name, env_id, seed, [final] * 20)
    draw(tmp_path / "other.toml", runs_dir=tmp_path / "others")
    for x in ("steps", "hours"):
        rows, err = draw(suite, x=x)
        assert "suite unplotted is left out: there is no" in err
        assert rows["environment"][2:4] == ["Made up: mean +- std", "95% interval"]  # the same script: its title
        assert rows["A-v0"][:4] == ["9.0 +- 0.0 (3 seeds)", "9.0 to 9.0", "4.0 +- 0.0 (3 seeds)", "4.0 to 4.0"]
        assert rows["C-v0"][2] == "-" and "B-v0" not in rows
    for figure in ("made.svg", "made_hours.svg"):
        svg = (tmp_path / "img" / figure).read_text()
        assert "Made up, 3 seeds" in svg and "<!-- A-v0 -->" in svg
    _, err = draw(suite, metric="losses/entropy")
    assert "suite other is left out" in err


def test_a_value_beside_ours_says_after_how_many_steps_it_was_reached():
    """If these are not ours."""
    curves = {1: curve([1, 2], steps=[1, 4_000_000]), 2: curve([1, 4], steps=[1, 4_000_000])}
    assert plot.final_cells(curves, "mean", steps=3_960_000)[0] == "3.0 +- 1.4 (2 seeds)"
    assert plot.final_cells(curves, "mean", steps=2_000_000)[0] == "3.0 +- 1.4 (2 seeds, 4M steps)"


def test_an_unfinished_run_is_not_added_in_place_of_a_finished_one():
    old, new = {"A": {1: curve([1]), 2: curve([2], part=0.5)}}, {"A": {1: curve([3], part=0.5), 2: curve([4])}, "B": {}}
    both = plot.add_curves(old, new)
    assert list(both) == ["A", "B"] and [both["A"][seed].values[-1] for seed in (1, 2)] == [1, 4]
    assert plot.add_curves(new, old)["A"][2].values[-1] == 4


def test_what_is_missing_or_unfinished_is_said(draw, tmp_path):
    suite = make_suite(tmp_path, seeds=[1, 2, 3, 4], env_ids=["A-v0", "B-v0", "C-v0"])
    make_run(tmp_path / "runs", "A-v0", 1, [3] * 20)
    make_run(tmp_path / "runs", "A-v0", 2, [50] * 8)
    make_run(tmp_path / "runs", "A-v0", 4, [0] * 20, episodes=False)
    make_run(tmp_path / "runs", "B-v0", 1, [4] * 5)
    (make_run(tmp_path / "runs", "B-v0", 2, [4]) / "metrics.jsonl").unlink()
    rows, err = draw(suite, x="hours")
    assert rows["A-v0"] == ["3.0 (1 seed, 1 more unfinished)", "-", "12.0 min"]
    assert rows["B-v0"] == ["4.0 (1 seed, unfinished: 25% done)", "-", "3.0 min"]
    assert rows["C-v0"] == ["-", "-", "-"]
    assert rows["environment"][0] == "ppo.py: mean +- std"
    assert err.splitlines() == [
        "B-v0__ppo__2__1700000002 is left out: no episode has ended in it",
        "A-v0__ppo__4__1700000004 is left out: no episode has ended in it",
        "A-v0: no run of seed 3",
        "B-v0: no run of seed 3, 4",
        "C-v0: no runs",
        "A-v0 seed 2 is unfinished: 40% of its steps are done",
        "B-v0 seed 1 is unfinished: 25% of its steps are done",
    ]
    assert {path.name for path in (tmp_path / "img").iterdir()} == {"made_hours.png", "made_hours.svg"}
    # The CSV alone knows it too.
    again, err = draw(suite, x="hours", runs_dir=tmp_path / "nothing")
    assert again == rows
    assert "A-v0 seed 2 is unfinished: 40%" in err


def test_other_metrics(draw, tmp_path):
    """Metrics of updates are drawn as they are, without reference and article; null has no value."""
    suite = make_suite(tmp_path, env_ids=["A-v0"], seeds=[1, 2], reference="classic.csv", published={"A-v0": [7, 2]})
    for seed in (1, 2):
        make_run(tmp_path / "runs", "A-v0", seed, [3] * 20, entropy=seed / 10)
    rows, _ = draw(suite, metric="losses/entropy")
    assert rows["environment"] == ["ppo.py: mean +- std", "95% interval", "runtime"]
    assert rows["A-v0"][0] == "0.15 +- 0.07071 (2 seeds)"
    assert (tmp_path / "img/made_losses-entropy.png").exists()
    assert "made.csv" not in [path.name for path in (tmp_path / "results").iterdir()]
    draw(suite, metric="losses/explained_variance")


def test_other_metrics_beside_those_of_the_official_code(draw, tmp_path):
    """If it has them in a file of their own."""
    suite = make_suite(tmp_path, env_ids=["Hopper-v4"], seeds=[1], reference="mujoco.csv", margins={"Hopper-v4": 298})
    make_run(tmp_path / "runs", "Hopper-v4", 1, [3] * 20, entropy=0.1)
    rows, _ = draw(suite, metric="losses/entropy")
    assert rows["environment"] == ["ppo.py: mean +- std", "95% interval", "official code: mean +- std",
                                   "95% interval", "runtime"]  # fmt: skip
    official = plot.read_curves(REFERENCE / "mujoco_losses-entropy.csv")["Hopper-v4"].values()
    assert rows["Hopper-v4"][2].startswith(f"{np.mean([curve.values[-1] for curve in official]):.4g} +- ")
    assert "Equivalence" not in (tmp_path / "results/made_losses-entropy.md").read_text()  # margins are of returns
    rows, _ = draw(suite, metric="losses/explained_variance")
    assert "official code: mean +- std" not in rows["environment"]


STRANGE = [
    "A|B-v0",
    "<b>x</b>-v0",
    "$\\frac$-v0",
    "*a* _b_ `c` [d](e)-v0",
    "a\nb\x1b[31m-v0",
    "\\|-v0",
    "---",
    "&amp;-v0",
]


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table, as a reader sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert tokens[0].type == "table_open" and tokens[-1].type == "table_close"
    found = []
    for token in tokens:
        if token.type == "tr_open":
            found.append([])
        elif token.type == "inline":
            assert all(child.type in ("text", "text_special") for child in token.children)  # no tag, no emphasis
            found[-1].append("".join(child.content for child in token.children))
    return found


def test_names_that_mean_something_elsewhere(draw, tmp_path, capsys, monkeypatch):
    """In a Markdown table, in a formula of matplotlib's, in XML, on a terminal: they are shown as they are."""
    suite = make_suite(
        tmp_path, STRANGE, [1], title="$\\frac$ <b>", published_label="a|b", published={STRANGE[0]: [1, 2]}
    )
    for env_id in STRANGE:
        make_run(tmp_path / "runs", env_id, 1, [3] * 20)
    folders = [f"--{name}={tmp_path / name}" for name in ("runs-dir", "results", "output")]
    (tmp_path / "runs").rename(tmp_path / "runs-dir")
    assert benchmark(["plot", str(suite), *folders]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    table = cells(output)
    shown = [env_id.replace("\n", "\\n").replace("\x1b", "\\x1b") for env_id in STRANGE]
    assert [row[0] for row in table] == ["environment", *shown]
    assert table[0][3] == "a|b" and {len(row) for row in table} == {5}
    svg = (tmp_path / "output/made.svg").read_text()
    ElementTree.fromstring(svg)
    assert "<!-- $\\frac$ &lt;b&gt; -->" in svg and "<!-- $\\frac$-v0 -->" in svg
    monkeypatch.setattr(plot, "draw", lambda *args: None)
    draw(suite, runs_dir=tmp_path / "nothing")  # from the CSV
    assert cells((tmp_path / "results/made.md").read_text()) == table


def test_environments_of_one_name_in_two_modules(draw, tmp_path, no_figure):
    """Where the name alone says too little, the module stands before it."""
    suite = make_suite(tmp_path, ["a:X-v0", "b:X-v0"], [1])
    for env_id, value in (("a:X-v0", 3), ("b:X-v0", 4)):
        make_run(tmp_path / "runs", env_id, 1, [value] * 20)
    rows, _ = draw(suite)
    assert [rows[env_id][0] for env_id in ("a:X-v0", "b:X-v0")] == ["3.0 (1 seed)", "4.0 (1 seed)"]


def test_suites_of_one_title(draw, tmp_path):
    """Both are drawn beside a third one."""
    for name, final in (("one", 1), ("two", 2), ("three", 3)):
        suite = make_suite(tmp_path, ["A-v0"], [1], name=name, compare=["one", "two"] if name == "three" else ["one"])
        make_run(tmp_path / name, "A-v0", 1, [final] * 20)
        rows, _ = draw(suite, runs_dir=tmp_path / name)
    assert rows["A-v0"][::2] == ["3.0 (1 seed)", "1.0 (1 seed)", "2.0 (1 seed)"] + rows["A-v0"][6:]
    assert [head.partition(":")[0] for head in rows["environment"][:6:2]] == ["ppo.py", "Made up", "Made up (two)"]
    svg = (tmp_path / "img/three.svg").read_text()
    assert "<!-- Made up, 1 seed -->" in svg and "<!-- Made up (two), 1 seed -->" in svg


@pytest.mark.parametrize(("words", "rows"), [(1, 1), (20, 3)])
def test_the_legend_fits_into_the_figure(words, rows, draw, tmp_path, monkeypatch):
    """Its names stand beside each other where they can, else below each other, and the panel stays as high."""
    shown = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: shown.append(figure))
    for name in ("one", "two", "three"):
        others = {"compare": ["one", "two"]} if name == "three" else {}
        suite = make_suite(tmp_path, ["A-v0"], [1], name=name, title=f"{name} {'x ' * words}", **others)
        make_run(tmp_path / name, "A-v0", 1, [1] * 20)
        draw(suite, runs_dir=tmp_path / name)
    figure = shown[-1]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, tops = legend.get_window_extent(), {round(text.get_window_extent().y0) for text in legend.get_texts()}
    assert len(legend.get_texts()) == 3 and len(tops) == rows
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    heights = [each.axes[0].get_window_extent().height for each in shown if not each.draw_without_rendering()]
    assert max(heights) - min(heights) < 5


def test_broken_and_running_runs(draw, tmp_path, capsys, no_figure):
    """A broken one is named in one line and left out, and the exit code says so; what still runs is unfinished."""
    suite = make_suite(tmp_path, ["A-v0"], [1, 2, 3])
    paths = [make_run(tmp_path / "runs", "A-v0", seed, [seed] * 20) for seed in (1, 2, 3)]
    (paths[0] / "config.json").write_text('{"env_id": "A-v0", "se')
    folders = [f"--runs-dir={tmp_path / 'runs'}", f"--results={tmp_path}", f"--output={tmp_path}"]
    with open(paths[1] / "metrics.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert benchmark(["plot", str(suite), *folders]) == 1
    out, err = capsys.readouterr()
    assert "3.0 (1 seed, 1 more unfinished)" in out
    first, second, third = err.splitlines()
    assert first.startswith(f"{paths[0]} is broken: config.json cannot be read: ")
    assert second == "A-v0: no run of seed 1" and third.startswith("A-v0 seed 2 is unfinished: ")


@pytest.mark.parametrize(
    "torn", ['{"global_step": 999, "wall_ti', '{"global_step": "x", "charts/SPS": {}}\n', "\0" * 9]
)
def test_torn_metrics(draw, tmp_path, torn, no_figure):
    suite = make_suite(tmp_path, ["A-v0"], [1])
    with open(make_run(tmp_path / "runs", "A-v0", 1, [3] * 20) / "metrics.jsonl", "a") as file:
        file.write(torn)
    rows, err = draw(suite)
    assert rows["A-v0"][0] == "3.0 (1 seed)" and err == ""


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"runs": [1]}', '{"runs": [], "unfinished": {"A-v0": {"1": "x"}}}'])
def test_broken_sidecar(text, tmp_path, capsys, no_figure):
    """The JSON file beside a CSV, which says what the CSV does not."""
    suite = make_suite(tmp_path, ["A-v0"], [1])
    make_run(tmp_path / "runs", "A-v0", 1, [3] * 20)
    folders = [f"--runs-dir={tmp_path / 'runs'}", f"--results={tmp_path}", f"--output={tmp_path}"]
    assert benchmark(["plot", str(suite), *folders]) == 0
    (tmp_path / "made.json").write_text(text)
    csv = (tmp_path / "made.csv").read_bytes()
    capsys.readouterr()
    for words in (["--add", folders[0]], ["--runs-dir=nowhere"]):
        assert benchmark(["plot", str(suite), *words, *folders[1:]]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"benchmark plot: error: cannot read {tmp_path / 'made.json'}: ")
    assert (tmp_path / "made.csv").read_bytes() == csv


def test_links_are_replaced_and_not_followed(draw, tmp_path):
    """What is written has no way out of the folders that are given for it."""
    suite = make_suite(tmp_path, ["A-v0"], [1])
    make_run(tmp_path / "runs", "A-v0", 1, [3] * 20)
    names = ["results/made.csv", "results/made.json", "results/made.md", "img/made.png", "img/made.svg"]
    (tmp_path / "precious").write_text("{")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "precious")
    draw(suite)
    assert (tmp_path / "precious").read_text() == "{"
    assert not any((tmp_path / name).is_symlink() for name in names)
    written = [path for folder in ("results", "img") for path in (tmp_path / folder).iterdir()]
    assert sorted(str(path.relative_to(tmp_path)) for path in written) == sorted(names)


@pytest.mark.parametrize(
    "path", sorted((plot.ROOT / "benchmark" / "results").glob("*.csv")), ids=lambda path: path.stem
)
def test_committed_data_say_where_they_come_from(path):
    """Beside each CSV stands the command, and the commit."""
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["command"].startswith("python -m benchmark") and facts["commit"]


def test_bad_input(tmp_path, capsys):
    """One line on stderr, exit code 2, and nothing is written."""
    suite = make_suite(tmp_path, env_ids=["A-v0"], seeds=[1, 2])
    folders = [f"--results={tmp_path / 'results'}", f"--output={tmp_path / 'img'}", f"--runs-dir={tmp_path / 'runs'}"]

    def refused(*words):
        assert benchmark(["plot", *words, *folders]) == 2
        out, err = capsys.readouterr()
        assert out == "" and not (tmp_path / "img").exists() and not (tmp_path / "results").exists()
        assert err.count("\n") == err.count("benchmark plot: error: ") == 1
        return err

    assert "there is no suite clasic; did you mean classic" in refused("clasic")
    assert "no runs of suite made in" in refused(str(suite))
    make_run(tmp_path / "runs", "A-v0", 1, [3] * 20)
    assert "did you mean losses/entropy?" in refused(str(suite), "--metric", "losses/entrpy")
    make_run(tmp_path / "runs", "A-v0", 2, [3] * 20, gamma=0.9)
    assert "mixed configurations" in refused(str(suite))


@pytest.mark.parametrize("option", ["results", "output"])
def test_folder_that_cannot_be_written(option, tmp_path, capsys):
    suite = make_suite(tmp_path, env_ids=["A-v0"], seeds=[1])
    make_run(tmp_path / "runs", "A-v0", 1, [3] * 20)
    folders = {"runs-dir": tmp_path / "runs", "results": tmp_path / "results", "output": tmp_path / "img"}
    folders[option] = tmp_path / "file"
    (tmp_path / "file").touch()
    assert benchmark(["plot", str(suite), *(f"--{name}={path}" for name, path in folders.items())]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"benchmark plot: error: cannot write to {tmp_path / 'file'}: ")


def test_no_run_has_an_episode(tmp_path):
    suite = make_suite(tmp_path, env_ids=["A-v0"], seeds=[1])
    make_run(tmp_path / "runs", "A-v0", 1, [3] * 20, episodes=False)
    with pytest.raises(InputError, match="no run in .* has an episode that ended"):
        plot.main(plot.Args(str(suite), runs_dir=tmp_path / "runs", results=tmp_path, output=tmp_path))


def test_broken_csv(tmp_path):
    (tmp_path / "made.csv").write_text("env_id,seed,global_step,return_mean_100\nA-v0,1,zero,3\n")
    with pytest.raises(InputError, match="cannot read .*made.csv"):
        plot.read_curves(tmp_path / "made.csv")


@pytest.mark.parametrize("suite", ["classic", "mujoco"])
def test_committed_data_can_be_drawn(suite, draw, tmp_path):
    """The figures in the docs come out of the committed CSVs, also those without hours."""
    (tmp_path / "results").mkdir()
    shutil.copy(plot.ROOT / "benchmark" / "results" / f"{suite}.csv", tmp_path / "results")
    rows, _ = draw(suite)
    assert len(rows) == 2 + 3 and all("5 seeds" in row[0] for row in list(rows.values())[2:])
