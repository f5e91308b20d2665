"""python -m benchmark compare: what it says of runs with known contents, where it writes, and what it refuses."""

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from synthetic import make_run, make_suite

from benchmark import compare, plot, statistics
from benchmark.__main__ import main
from benchmark.suite import load_suite

VARIANTS = {"default": [], "--no-norm-adv": ["--no-norm-adv"], "small": ["--num-minibatches", "2"]}
SETTINGS = {"default": {}, "--no-norm-adv": {"norm_adv": False}, "small": {"num_minibatches": 2}}
SHIFTS = {"default": 0, "--no-norm-adv": -20, "small": 1}
NOISE = np.random.default_rng(1).normal(size=(3, 2, 12))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and has no way into the repository's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")


@pytest.fixture
def no_figure(monkeypatch):
    """Drawing takes most of the time."""
    monkeypatch.setattr(compare, "draw_curves", lambda *args: None)
    monkeypatch.setattr(compare, "draw_forest", lambda *args: None)
    monkeypatch.setattr(plot, "draw", lambda *args: None)


def make(seeds=4, variants=VARIANTS, **entries) -> Path:
    """A suite with three variants in two environments, and its runs: from 0 to 100 + shift + noise."""
    folder = Path.cwd()
    suite = make_suite(folder, ["A-v0", "m:B-v0"], list(range(1, seeds + 1)), variants=variants, **entries)
    for (i, name), (j, env_id), seed in (
        (v, e, s) for v in enumerate(variants) for e in enumerate(["A-v0", "m:B-v0"]) for s in range(1, seeds + 1)
    ):
        final = 100 + SHIFTS[name] * (j + 1) + NOISE[i, j, seed - 1]
        # The last 100 of 120 episodes are all alike.
        make_run(folder / "runs/made", env_id, seed, [0.0] * 20 + [final] * 100, 120, exp_name=name,
                 **SETTINGS[name])  # fmt: skip
    return suite


def rows_of(text: str) -> dict[tuple[str, str], list[str]]:
    """The first table's cells by environment and variant, and the second's by variant alone."""
    cells = [[cell.strip().replace("\\", "") for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("|") and "---" not in line]  # fmt: skip
    return {tuple(row[:2]) if len(row) == 7 else (row[0],): row for row in cells}


@pytest.mark.parametrize("measure", ["final", "curve"])
def test_variants_of_a_suite(measure, capsys, no_figure):
    """All numbers are those of SciPy; without the runs, the CSV gives the same."""
    suite = make(updates=120)
    assert main(["compare", str(suite), "--measure", measure]) == 0
    out, err = capsys.readouterr()
    assert err == "" and {path.name for path in Path("compare").iterdir()} == {
        "made.csv", "made.json", "made.md", "made_effects.csv", "made_effects.json"}  # fmt: skip
    rows = rows_of(out)
    groups = plot.read_groups(Path("compare/made.csv"))
    assert list(groups) == list(VARIANTS)
    for j, env_id in enumerate(("A-v0", "m:B-v0")):
        score = {n: np.array([compare.score(c, measure) for c in groups[n][env_id].values()]) for n in VARIANTS}
        if measure == "final":
            np.testing.assert_allclose(score["small"], 100 + 1 + j + NOISE[2, j, :4], rtol=1e-5)
        test = stats.ttest_rel(score["small"], score["default"])
        low, high = test.confidence_interval()
        _, _, mean, effect, interval, method, better = rows[env_id.removeprefix("m:"), "small"]
        assert mean == f"{score['small'].mean():.1f} +- {score['small'].std(ddof=1):.1f} (4 seeds)"
        assert effect == f"{(score['small'] - score['default']).mean():+.1f}" + " *" * ("*" in effect)
        assert (interval, method) == (f"{low:+.1f} to {high:+.1f}", "paired t, 4 seeds")
        assert better == f"{np.mean(score['small'][:, None] > score['default']):.2f}"
        assert rows[env_id.removeprefix("m:"), "--no-norm-adv"][3].endswith(" *")
    assert "If no variant had any effect, 0.2 of 4 intervals would miss 0 by chance." in out
    assert re.search(r" by chance\. [2-4] differences survive Holm's correction for 4 tests, marked \*", out)
    # Normalized: the untrained have 0, the first variant 1; the interval is that of two independent samples' mean.
    assert rows["--no-norm-adv",][1].startswith("-0.") and rows["default",] == ["default", *["-"] * 5]
    assert "An interquartile mean needs 10 seeds, and there are 4" in out
    effects = list(csv.DictReader(Path("compare/made_effects.csv").read_text().splitlines()))
    assert len(effects) == 2 * 2 * 3 and {row["measure"] for row in effects} == {"final", "curve"}
    (row,) = [row for row in effects if row["variant"] == "--no-norm-adv" and row["env_id"] == "A-v0"
              and row["measure"] == measure]  # fmt: skip
    assert (row["tags"], row["flags"], row["seeds"], row["holm"]) == ("core-7", "--no-norm-adv", "4", "1")
    assert f"{float(row['difference']):+.1f} *" == rows["A-v0", "--no-norm-adv"][3]
    for name in ("made", "made_effects"):
        facts = json.loads(Path(f"compare/{name}.json").read_text())
        assert facts["commit"] and facts["command"].startswith("python -m benchmark")
    shutil.rmtree("runs")
    Path("compare").rename("results")
    assert main(["compare", str(suite), "--measure", measure]) == 0
    again, err = capsys.readouterr()
    assert again == out and "comparing what is in" in err
    assert Path("compare/made.md").read_text() == Path("results/made.md").read_text()


@pytest.mark.parametrize(("room", "points"), [(18_000, 30), (6 * 50, 30), (6 * 12 + 5, 12), (1, 2)])
def test_points_of_many_curves(room, points, monkeypatch):
    """Each of six runs keeps so many of its 120, with the first and the last one."""
    monkeypatch.setattr(plot, "SUITE_POINTS", room)
    suite = load_suite(str(make(1, updates=120)))
    groups, *_ = plot.collect(suite, Path("runs/made"))
    curves = [curve for *_, curve in plot.all_curves(groups)]
    assert [len(curve.values) for curve in curves] == [points] * 6
    assert {(curve.steps[0], curve.steps[-1]) for curve in curves} == {(512, 120 * 512)}


def test_overall_difference(capsys, no_figure):
    """With one environment it is the environment's own; with two, Welch and Satterthwaite's of both."""
    suite = make(updates=120)
    main(["compare", str(suite), "--env-ids", "A-v0"])
    rows = rows_of(capsys.readouterr().out)
    value, (low, high) = float(rows["--no-norm-adv",][1].rstrip(" *")), rows["--no-norm-adv",][2].split(" to ")
    base = 100 + NOISE[0, 0, :4].mean()
    pairs = (-20 + NOISE[1, 0, :4] - NOISE[0, 0, :4]) / base
    expected = stats.ttest_1samp(pairs, 0).confidence_interval()
    assert value == pytest.approx(pairs.mean(), abs=0.006)
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=0.006)
    assert ("B-v0", "small") not in rows


def test_ten_seeds_have_interquartile_means(capsys, no_figure):
    suite = make(seeds=12, updates=120)
    main(["compare", str(suite)])
    out = capsys.readouterr().out
    rows = rows_of(out)
    scores = [(100 + 1 + j + NOISE[2, j]) / (100 + NOISE[0, j].mean()) for j in range(2)]
    assert rows["small",][3] == f"{statistics.iqm(np.concatenate(scores)):.2f}"
    low, high = map(float, rows["small",][4].split(" to "))
    assert low <= float(rows["small",][3]) <= high < low + 0.05
    assert re.fullmatch(r"0\.\d\d \(0\.\d\d to [01]\.\d\d\)", rows["A-v0", "small"][6])
    assert "interquartile mean needs" not in out


def test_more_seeds_are_added(capsys, no_figure):
    """--add keeps what the CSV has, also of variants that have no run here; without it there is what runs say."""
    suite = make(seeds=6, updates=120)
    everything = sorted(Path("runs/made").iterdir())
    Path("later").mkdir()
    moved = [path.rename(Path("later", path.name)) for path in everything if path.name[-1] in "56"]
    assert main(["compare", str(suite)]) == 0
    capsys.readouterr()
    small = [path for path in moved if "__small__" in path.name]
    for path in small:
        shutil.rmtree(path)
    for words, seeds, counts in (["--add"], "6 seeds", [6, 6, 4]), ([], "2 seeds", [2, 2]):
        assert main(["compare", str(suite), "--runs-dir", "later", *words]) == 0
        rows = rows_of(capsys.readouterr().out)
        assert rows["A-v0", "--no-norm-adv"][2].endswith(f"({seeds})")
        assert [len(curves["A-v0"]) for curves in plot.read_groups(Path("compare/made.csv")).values()] == counts
        assert ("added_to" in json.loads(Path("compare/made.json").read_text())) == bool(words)


def test_two_suites_and_files(capsys, no_figure):
    """Runs of one, the committed curves of the other, without common seeds: Welch's t; and both as files."""
    folder = Path.cwd()
    mine = make_suite(folder, ["A-v0", "C-v0"], [4, 5, 6], name="mine")
    make_suite(folder, ["A-v0"], [1, 2, 3], name="base")
    finals = {"mine": {4: 30, 5: 50, 6: 40}, "base": {1: 10, 2: 12, 3: 17}}
    for name, values in finals.items():
        for seed, value in values.items():
            make_run(folder / "runs" / name, "A-v0", seed, [value] * 20)
    make_run(folder / "runs/mine", "A-v0", 9, [1e6] * 20)  # no seed of the suite's
    assert main(["plot", "base.toml", "--results=results", "--output=img"]) == 0
    shutil.rmtree("runs/base")
    capsys.readouterr()
    assert main(["compare", "base.toml", str(mine)]) == 0
    out, err = capsys.readouterr()
    test = stats.ttest_ind(list(finals["mine"].values()), list(finals["base"].values()), equal_var=False)
    low, high = test.confidence_interval()
    assert rows_of(out)["A-v0", "mine"][2:] == [
        "40.0 +- 10.0 (3 seeds)", "+27.0 *", f"{low:+.1f} to {high:+.1f}", "Welch's t, 3 seeds", "1.00"]  # fmt: skip
    assert {path.name for path in Path("compare").iterdir()} == {
        "base-vs-mine.md", "base-vs-mine_effects.csv", "base-vs-mine_effects.json"}  # fmt: skip
    assert main(["plot", "mine.toml", "--results=results", "--output=img"]) == 0
    capsys.readouterr()
    assert main(["compare", "results/base.csv", "results/mine.csv"]) == 0
    assert rows_of(capsys.readouterr().out) == rows_of(out)


def test_what_is_unfinished_or_not_comparable_is_said(capsys, no_figure):
    """It does not count; a task that nobody has learned is not normalized; other numbers of steps are named."""
    folder, variants = Path.cwd(), {"a": [], "b": []}
    suite = make_suite(folder, ["A-v0", "B-v0"], [1, 2, 3], variants=variants)
    for name in variants:
        for seed in (1, 2, 3):
            make_run(folder / "runs/made", "A-v0", seed, [-200] * 20, exp_name=name)
            make_run(folder / "runs/made", "B-v0", seed, np.arange(20.0) + seed, exp_name=name)
    (folder / "runs/made/B-v0__b__3__1700000003/metrics.jsonl").write_text("")
    make_run(folder / "runs/made2", "B-v0", 3, [5] * 9, exp_name="b")
    shutil.rmtree("runs/made/B-v0__b__3__1700000003")
    Path("runs/made2/B-v0__b__3__1700000003").rename("runs/made/B-v0__b__3__1700000003")
    assert main(["compare", str(suite)]) == 0
    out, err = capsys.readouterr()
    assert "b, B-v0: seed 3 is unfinished and left out" in err
    assert "A-v0 is left out of what is normalized: a has not learned anything there" in err
    assert rows_of(out)["A-v0", "b"][3:5] == ["+0.0", "+0.0 to +0.0"]
    assert rows_of(out)["B-v0", "b"][5] == "Welch's t, 2 seeds"
    assert "Normalized scores over B-v0:" in out


def test_figures(capsys):
    """With all variants, the profile, the details' tags, and a title that would mean something elsewhere."""
    suite = make(updates=120, title="$\\frac$ <b>")
    assert main(["compare", str(suite), "--forest"]) == 0
    names = ("made.png", "made.svg", "made_forest.png", "made_forest.svg")
    first = {name: Path("compare", name).read_bytes() for name in names}
    curves, forest = (first[name].decode() for name in names[1::2])
    ElementTree.fromstring(curves), ElementTree.fromstring(forest)
    for name in VARIANTS:
        assert f"<!-- {name.replace('--', '- -')}, 4 seeds -->" in curves.replace("--no", "- -no") or name in curves
    assert "performance profile" in curves and "over environments" in forest
    assert "<!-- small  [core-6] -->" in forest and "[core-7]" in forest


def test_rows_of_a_forest_are_sorted(monkeypatch):
    """By the last panel's differences, the worst below; and nothing is drawn of what was not measured."""
    kept = {}
    monkeypatch.setattr(compare, "save_figure", lambda figure, path: kept.setdefault(path.name, figure))
    monkeypatch.setattr(compare, "draw_curves", lambda *args: None)
    assert main(["compare", str(make(updates=120)), "--forest"]) == 0
    left, *_, right = kept["made_forest"].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["--no-norm-adv  [core-7]", "small  [core-6]"]
    assert [axis.get_title() for axis in kept["made_forest"].axes] == [
        "A-v0, 4 seeds", "B-v0, 4 seeds", "over environments"]  # fmt: skip
    (x,), (y,) = right.containers[0].lines[0].get_data()
    assert x == pytest.approx(-0.3, abs=0.02) and y == 0


@pytest.mark.parametrize(("seeds", "thin", "bands"), [(1, 0, 0), (2, 6, 0), (3, 0, 3)])
def test_two_runs_are_drawn_as_they_are(seeds, thin, bands, monkeypatch):
    """Student's interval of two runs would cover everything; from three on there is a band."""
    kept = {}
    monkeypatch.setattr(compare, "save_figure", lambda figure, path: kept.setdefault(path.name, figure))
    assert main(["compare", str(make(seeds, updates=120))]) == 0
    axis, *_ = kept["made"].axes
    assert sum(line.get_linewidth() < 1 for line in axis.lines) == thin and len(axis.collections) == bands
    title = kept["made"].get_suptitle()
    assert ("95% interval" in title) == (seeds > 2) and title.endswith("thin: the two runs") == (seeds == 2)


@pytest.mark.parametrize("number", [12, 13])
def test_of_many_curves_those_far_from_the_first_are_colored(number, monkeypatch):
    """Else nobody could tell them apart; one environment's large numbers do not outweigh the other's."""
    steps, shifts = np.linspace(0, 1000, 50), np.arange(number) * 5 % 13
    names = [f"variant-{shift}" for shift in shifts]  # so far from variant-0 in A, and in B reversed
    groups = {
        name: {env: {seed: plot.Curve(steps, steps, scale * (steps / 10 + shift)) for seed in (1, 2)}
               for env, scale, shift in (("A-v0", 1, far), ("B-v0", 1e6, (13 - far) / 10 if far else 0))}
        for name, far in zip(names, shifts)
    }  # fmt: skip
    kept = {}
    monkeypatch.setattr(compare, "save_figure", lambda figure, path: kept.setdefault(path, figure))
    compare.draw_curves(groups, dict.fromkeys(names, {}), "Many", Path("many"))
    figure = kept[Path("many")]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    for axis in figure.axes[:2]:
        colors = [line.get_color() for line in axis.lines]
        assert colors[0] == compare.OURS and len(set(colors)) == (12 if number == 12 else 1 + compare.FAR + 1)
        gray = {name for name, color in zip(names, colors) if color == compare.GRAY}
        assert gray == (set() if number == 12 else {"variant-1", "variant-2", "variant-3", "variant-4"})
        others = ["4 others, closer to variant-0"] * (number > 12)
        assert legend == [f"{name}, 2 seeds" for name in names if name not in gray] + others


def test_update_docs(monkeypatch, no_figure):
    """Only then the repository's own pages are written."""
    drawn = []
    monkeypatch.setattr(compare, "draw_curves", lambda *args: drawn.append(args[-1]))
    suite = make(updates=120)
    main(["compare", str(suite)])
    assert drawn == [Path("compare/made")] and not Path("results").exists()
    main(["compare", str(suite), "--update-docs", "--output", "elsewhere"])
    assert drawn[1:] == [ROOT / "docs/img/made"] and not Path("elsewhere").exists()
    assert {"made.csv", "made.json", "made_effects.csv", "made.md"} <= {path.name for path in Path("results").iterdir()}


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "benchmark/suites").glob("study_*.toml")])
def test_details_of_a_study(name):
    """Each variant of a script in the index of details switches a detail, whose tag stands in the flag's help."""
    suite = load_suite(name)
    tags = {variant.name: compare.tags_of(variant) for variant in suite.variants.values()}
    assert tags.pop("default") == "" and len({variant.changes for variant in suite.variants.values()}) == len(tags) + 1
    assert all(tags[each] for each in tags if not each.startswith("advantage"))
    if name == "study_classic":
        assert tags["pytorch-adam"] == "core-3 extra-1" and tags["no-clip-policy"] == "core-8"


BAD = [
    ("", "which suites? python -m benchmark compare SUITE ..."),
    ("clasic mujoco", "there is no suite clasic; did you mean classic"),
    ("one.toml", "nothing to compare with: give two suites, or one that has variants"),
    ("one.toml one.toml", "two of them are called one"),
    ("nope.csv one.toml", "cannot read nope.csv"),
    ("one.toml other.toml", "nothing to compare: no other has a finished run in an environment in which one has one"),
    ("one.toml none.toml", "no runs of suite none in runs/none, and no "),
    ("one.toml other.toml --runs-dir x", "--runs-dir is for a single suite"),
    ("made.toml --env-ids A-v1", "default has no environment A-v1; did you mean A-v0?"),
    ("made.toml --measure best", "--measure"),
    ("made.toml --output file", "cannot write to file"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input(words, message, capsys, no_figure):
    """One line on stderr, exit code 2, and nothing is written."""
    folder = Path.cwd()
    if "made" in words:
        make(seeds=2, updates=120)
    for name, env_id in (("one", "A-v0"), ("other", "B-v0"), ("none", "B-v0")):
        make_suite(folder, [env_id], [1, 2], name=name)
        for seed in (1, 2) if name != "none" else ():
            make_run(folder / "runs" / name, env_id, seed, [3] * 20)
    Path("file").touch()
    assert main(["compare", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and [line for line in err.splitlines() if message in line and "benchmark compare: error: " in line]
    assert err.count("error: ") == 1 and not Path("results").exists()
    assert not Path("compare").exists() or "made" in words


def test_plot_refuses_variants(capsys):
    assert main(["plot", str(make(seeds=2, updates=120))]) == 2
    assert "suite made has variants: python -m benchmark compare " in capsys.readouterr().err
