"""python -m benchmark.overview: what the cells of the figure say, beside the numbers that compare has written."""

import csv
from pathlib import Path

import pytest
from conftest import ROOT

from benchmark import compare, overview


@pytest.mark.parametrize("study", overview.STUDIES)
def test_cells_are_the_effects_of_compare(study):
    """Nothing is left out, and no mark is another; within a task all differences are divided by the same number."""
    script, found = overview.cells_of(study)
    table = csv.DictReader((ROOT / f"benchmark/results/{study}_effects.csv").read_text().splitlines())
    rows = [row for row in table if row["measure"] == "curve" and row["difference"]]
    assert (ROOT / script).exists() and sum(map(len, found.values())) == len(rows) > 0
    scales = {}
    for row in rows:
        cells = found[row["flags"], row["tags"]]
        (cell,) = [cell for task, cell in cells.items() if task in row["env_id"]]
        difference, low, high = (float(row[name]) for name in ("difference", "low", "high"))
        assert cell.clear == (not low <= 0 <= high) and cell.survives == (row["holm"] == "1")
        if difference:
            scales.setdefault(row["env_id"], []).append(difference / cell.effect)
    for values in scales.values():
        assert values == pytest.approx([values[0]] * len(values), rel=1e-3) and values[0] > 0


def test_figure(monkeypatch):
    """A row for each change that was made in two tasks at least, and as many numbers as there are cells."""
    lost, same, won = overview.Cell(-0.5, True, True), overview.Cell(0.1, False, False), overview.Cell(0.7, True, False)
    made = {
        "one": ("ppo.py", {("--a", "core-1"): {"A": lost, "B": same}, ("--once", "core-2"): {"A": won}}),
        "two": ("ppo_lstm.py", {("--a", "lstm-1"): {"A": won, "C": overview.Cell(0, False, False)}}),
    }
    kept = {}
    monkeypatch.setattr(overview, "STUDIES", tuple(made))
    monkeypatch.setattr(overview, "cells_of", made.__getitem__)
    monkeypatch.setattr(overview, "save_figure", lambda figure, path: kept.setdefault(path, figure))
    overview.draw(Path("figure"))
    (axis,) = kept[Path("figure")].axes
    texts = {text.get_text(): text for text in axis.texts}
    assert list(texts) == ["-0.50", "+0.10", "+0.70", "=", "ppo.py", "ppo_\nlstm.py"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["A", "B", "A", "C"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["--a  [core-1]"]
    assert [texts[word].get_weight() for word in ("-0.50", "+0.10", "+0.70")] == ["bold", "normal", "normal"]
    assert [patch.get_alpha() > 0 for patch in axis.patches] == [True, False, True, False]
    assert "2 of 4, 0 by chance" in kept[Path("figure")].get_suptitle()


def test_studies_are_there():
    """The figure is of all studies that have been made."""
    made = {path.name.removesuffix("_effects.csv") for path in compare.RESULTS.glob("study_*_effects.csv")}
    assert made == {*overview.STUDIES}
