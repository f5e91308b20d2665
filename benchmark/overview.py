"""Draws the effects of all studies beside each other: docs/img/study_overview.png and .svg, from the committed curves.

    python -m benchmark.overview

A row is a change that was made in at least two tasks, a column a task. A number is the difference that the change made
in the mean of the learning curve, as a share of what the defaults learn: -1 is as bad as not learning at all, and =
says that all runs were the same. All runs, pairs, intervals and corrections are those of `python -m benchmark compare
STUDY --measure curve`.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmark import compare
from benchmark.plot import read_groups, save_figure, styled_pyplot
from benchmark.suite import ROOT, load_suite

STUDIES = ("study_classic", "study_mujoco", "study_walker2d", "study_lstm", "study_multidiscrete", "study_rlvr")
WORSE, BETTER = "#b3261e", "#2f8f4e"  # as in the forest plots


class Cell(NamedTuple):
    """What a change did in a task."""

    effect: float  # share of what the defaults learn
    clear: bool  # the 95% interval misses 0
    survives: bool  # Holm's correction within its study


def cells_of(study: str) -> tuple[str, dict[tuple[str, str], dict[str, Cell]]]:
    """A study's script, and its effects by change, as flags and tags, and by task."""
    suite = load_suite(study)
    groups = compare.finished(read_groups(compare.RESULTS / f"{study}.csv"), suite.env_ids)
    scores = {
        name: {env: {seed: compare.score(c, "curve") for seed, c in seeds.items()} for env, seeds in curves.items()}
        for name, curves in groups.items()
    }
    rows, found = compare.effects(compare.normalized(scores, groups)), {}
    names = {env_id: re.sub(r".*[:/]|-v\d+$", "", env_id) for env_id in suite.env_ids}
    for row, mark in zip(rows, compare.marks([row.difference for row in rows])):
        if what := row.difference:
            variant = suite.variants[row.name]
            key = " ".join(variant.changes), compare.tags_of(variant)
            cell = Cell(what.value, not what.low <= 0 <= what.high, mark)
            found.setdefault(key, {})[names[row.env_id]] = cell
    return suite.script, found


def draw(path: Path) -> None:
    """Writes the figure as path.png and path.svg."""
    tasks, table, labels = {}, {}, {}  # a task is a script and what it learns
    for study in STUDIES:
        script, found = cells_of(study)
        for (flags, tags), cells in found.items():
            cells = {(script, task): cell for task, cell in cells.items()}
            table.setdefault(flags, {}).update(cells)
            labels.setdefault(flags, f"{flags}  [{tags}]")
            tasks |= cells
    table = {flags: cells for flags, cells in table.items() if len(cells) > 1}
    order = sorted(table, key=lambda flags: np.mean([np.clip(cell.effect, -1, 1) for cell in table[flags].values()]))
    plt, _ = styled_pyplot()
    figure, axis = plt.subplots(figsize=(3.6 + 1.05 * len(tasks), 0.29 * len(order) + 1.9), layout="constrained")
    for row, flags in enumerate(order):
        for column, task in enumerate(tasks):
            if cell := table[flags].get(task):
                strength = 0.12 + 0.88 * min(abs(cell.effect) / 0.6, 1) if cell.clear else 0
                color, ink = WORSE if cell.effect < 0 else BETTER, "black" if cell.clear else "0.55"
                ink = "white" if strength > 0.6 else ink
                axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color=color, alpha=strength, lw=0))
                axis.text(column, row, f"{cell.effect:+.2f}" if cell.effect else "=", ha="center", va="center",
                          fontsize=9, color=ink, weight="bold" if cell.survives else None)  # fmt: skip
    scripts = [script for script, _ in tasks]
    for column in range(1, len(scripts)):
        line = {"color": "0.3", "lw": 1.2} if scripts[column] != scripts[column - 1] else {"color": "0.9", "lw": 0.8}
        axis.axvline(column - 0.5, **line)
    for script in dict.fromkeys(scripts):
        columns = [column for column, each in enumerate(scripts) if each == script]
        head = script.replace("_", "_\n")
        axis.text(np.mean(columns), len(order) - 0.2, head, ha="center", fontsize=9, weight="bold")
    axis.set_xlim(-0.5, len(tasks) - 0.5)
    axis.set_ylim(-0.5, len(order) - 0.5)
    axis.set_xticks(range(len(tasks)), [task for _, task in tasks], fontsize=10)
    axis.set_yticks(range(len(order)), [labels[flags] for flags in order], fontsize=9)
    axis.tick_params(length=0)
    axis.grid(axis="x", visible=False)
    axis.set_yticks(np.arange(len(order)) - 0.5, minor=True)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="y", which="minor")
    axis.tick_params(which="minor", length=0)
    clear = [cell.clear for cells in table.values() for cell in cells.values()]
    figure.suptitle(
        "Difference in the learning curve's mean, as a share of what the defaults learn\n"
        f"colored: 95% interval misses 0 ({sum(clear)} of {len(clear)}, {0.05 * len(clear):.0f} by chance); "
        "bold: survives Holm's correction; =: all runs the same",
        fontsize=10, color="0.25",
    )  # fmt: skip
    save_figure(figure, path)


def main() -> int:
    """Draws it into docs/img."""
    draw(ROOT / "docs" / "img" / "study_overview")
    return 0


if __name__ == "__main__":
    sys.exit(main())
