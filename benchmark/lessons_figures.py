"""Draws the figures of docs/lessons.md and prints its table, from benchmark/results/lessons.csv.

    python -m benchmark.lessons_figures                        # docs/img/lessons.png and lessons_ablations.png
    python -m benchmark.lessons_figures --runs-dir runs        # after writing the CSV anew from runs of ppo_lessons.py

A run's variant is its --exp-name: none for lessons, no_reflection, wrong_rewards, no_selection, plain_transcripts,
ppo_RATE for a learning rate, and continued for PPO from distilled weights. Intervals are Student's over pre-training
seeds, 95%: the tasks of one seed share a model and are not independent.
"""

import csv
import io
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

from benchmark.files import write_file
from benchmark.plot import BESIDE, OURS
from benchmark.provenance import provenance
from benchmark.suite import ROOT, InputError
from benchmark.text import markdown_table

METRICS = ("eval/base", "eval/oracle", "eval/reward", "eval/distilled", "eval/others")
NAMES = {
    "lessons": "lessons",
    "no_selection": "no selection",
    "plain_transcripts": "rewards as text",
    "no_reflection": "random lessons",
    "wrong_rewards": "wrong rewards",
}
Runs = dict[str, dict[int, dict[str, list[tuple[int, float]]]]]  # by variant, seed and metric: attempts and values


@dataclass
class Args:
    """Draws the figures of docs/lessons.md and prints its table."""

    runs_dir: Path | None = None
    """where runs of ppo_lessons.py are, from which the CSV is written anew; default: the CSV stays as it is"""
    results: Path = ROOT / "benchmark" / "results" / "lessons.csv"
    """the CSV"""
    output: Path = ROOT / "docs" / "img"
    """where the figures are written"""


def collect(runs_dir: Path) -> list[tuple]:
    """The rows of the CSV: variant, seed, attempts, metric and value, of all runs below a directory."""
    rows = []
    for path in sorted(runs_dir.glob("*/metrics.jsonl")):
        config = json.loads((path.parent / "config.json").read_text())
        for line in map(json.loads, path.read_text().splitlines()):
            found = [(name, line[name]) for name in METRICS if name in line]
            variant = "lessons" if config["exp_name"] == "ppo_lessons" else config["exp_name"]
            rows += [(variant, config["seed"], line["charts/attempts"], *pair) for pair in found]
    if not rows:
        raise InputError(f"there are no runs of ppo_lessons.py in {runs_dir}")
    return sorted(rows, key=lambda row: row[:2])


def read(path: Path) -> Runs:
    """The CSV's values."""
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            values = runs[row["variant"]][int(row["seed"])][row["metric"]]
            values.append((int(row["attempts"]), float(row["value"])))
    return runs


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means [..] of samples [seeds, ..] and half-widths of their 95% Student-t intervals, nan for one seed."""
    mean, count = samples.mean(0), len(samples)
    if count < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, stats.t.ppf(0.975, count - 1) * samples.std(0, ddof=1) / np.sqrt(count)


def last(runs: Runs, variant: str, metric: str) -> np.ndarray:
    """The last value of a metric in each seed of a variant."""
    return np.array([seed[metric][-1][1] for seed in runs[variant].values() if metric in seed])


def best_ppo(runs: Runs) -> list[str]:
    """PPO's variants, the one with the highest last reward of the first seed at the front."""
    variants = [variant for variant in runs if variant.startswith("ppo_")]
    return sorted(variants, key=lambda variant: -last(runs, variant, "eval/reward")[0])


def draw_curve(axis, seeds: dict, color: str, style: str, label: str) -> None:
    """The mean reward of a variant's seeds against the attempts that they took."""
    grid = np.geomspace(48, max(points[-1][0] for s in seeds.values() for points in [s["eval/reward"]]), 200)
    curves = [np.interp(grid, *np.array(seed["eval/reward"]).T) for seed in seeds.values()]
    mean, half = interval(np.array(curves))
    axis.plot(grid, mean, style, color=color, label=f"{label}, {len(curves)} seed{'s' * (len(curves) > 1)}")
    axis.fill_between(grid, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)


def draw_curves(runs: Runs):
    """Reward against graded attempts: lessons, their distillation, and PPO with several learning rates."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    draw_curve(axis, runs["lessons"], OURS, "-", "lessons")
    mean, half = interval(last(runs, "lessons", "eval/distilled"))
    attempts = np.mean([seed["eval/distilled"][-1][0] for seed in runs["lessons"].values()])
    axis.errorbar([attempts], [mean], yerr=np.nan_to_num(half), fmt="*", color=OURS, markersize=13, capsize=4,
                  markeredgecolor="white", label="distilled, empty context", zorder=5)  # fmt: skip
    for variant, style in zip(best_ppo(runs), ("-", "--", ":", "-.")):
        label = f"PPO, learning rate {variant.removeprefix('ppo_')}"
        draw_curve(axis, runs[variant], BESIDE[0], style, label)
    oracle = last(runs, "lessons", "eval/oracle").mean()
    axis.axhline(oracle, color="gray", linewidth=1, linestyle=":")
    axis.text(50, oracle + 0.015, "the perfect lesson", color="gray", fontsize=9)
    axis.set(xscale="log", xlabel="graded attempts at eight tasks", ylabel="mean reward", ylim=(0, 1.09))
    axis.legend(frameon=False, loc="lower right", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_ablations(runs: Runs):
    """What each variant ends with, as a share of the perfect lesson's reward."""
    import matplotlib.pyplot as plt

    bars = [(label, variant, "eval/reward") for variant, label in NAMES.items() if variant in runs]
    bars.insert(1, ("distilled", "lessons", "eval/distilled"))
    figure, axis = plt.subplots(figsize=(7, 0.55 * len(bars) + 1.1), layout="constrained")
    for place, (label, variant, metric) in enumerate(bars):
        values = last(runs, variant, metric) / last(runs, variant, "eval/oracle").clip(min=1e-9)
        mean, half = interval(values)
        attempts = np.mean([seed["eval/reward"][-1][0] for seed in runs[variant].values()])
        axis.barh(place, mean, color=OURS if variant == "lessons" else BESIDE[0], alpha=0.75)
        axis.errorbar([mean], [place], xerr=np.nan_to_num(half), color="black", capsize=4, linewidth=1)
        axis.plot(values, np.full(len(values), place), "o", color="black", markersize=3)
        axis.text(1.2, place, f"{attempts:.0f} attempts", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.5), xlabel="reward, as a share of the perfect lesson's", xticks=np.arange(0, 1.1, 0.2))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def table(runs: Runs) -> str:
    """The last numbers of all variants, seed by seed."""
    rows = [["variant", "seeds", "attempts", "reward", "distilled", "other lessons"]]
    for variant in [*(name for name in NAMES if name in runs), *best_ppo(runs), *(v for v in runs if v == "continued")]:
        attempts = [seed["eval/reward"][-1][0] for seed in runs[variant].values()]
        cells = [" / ".join(f"{value:.3f}" for value in last(runs, variant, metric)) or "-"
                 for metric in ("eval/reward", "eval/distilled", "eval/others")]  # fmt: skip
        seeds, counts = (" / ".join(map(str, found)) for found in (runs[variant], attempts))
        rows.append([variant, seeds, counts, *cells])
    return markdown_table(rows)


def main(args: Args) -> int:
    """Writes everything; returns the exit code."""
    try:
        if args.runs_dir:
            with io.StringIO() as file:
                csv.writer(file, lineterminator="\n").writerows([("variant", "seed", "attempts", "metric", "value"),
                                                                 *collect(args.runs_dir)])  # fmt: skip
                write_file(args.results, file.getvalue())
            facts = provenance() | {"command": f"python -m benchmark.lessons_figures --runs-dir {args.runs_dir}"}
            write_file(args.results.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
        runs = read(args.results)
        import matplotlib

        matplotlib.use("Agg")
        args.output.mkdir(parents=True, exist_ok=True)
        for name, figure in (("lessons", draw_curves(runs)), ("lessons_ablations", draw_ablations(runs))):
            figure.savefig(args.output / f"{name}.png", dpi=120)
    except (InputError, OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
