"""Draws a suite's learning curves beside those of the official code or of other suites, and writes its table.

    python -m benchmark plot classic                      # docs/img/classic.png and .svg, benchmark/results/classic.*
    python -m benchmark plot mujoco --statistic iqm       # interquartile mean instead of mean
    python -m benchmark plot atari --x hours              # over wall-clock time
    python -m benchmark plot classic --metric losses/entropy
    python -m benchmark plot classic --add                # more seeds, to those that the CSV has

A curve is the mean return of the last 100 episodes at the end of an update, as the official logger has it (eprewmean);
other metrics that belong to updates are shown as they are. Curves are thinned out and written as CSV, and everything is
drawn from that file: where there are no runs, the figure and the table come out of the CSV in this repository.

Bands and intervals are 95% intervals over seeds, for each environment by itself: of a mean Student's t, of an
interquartile mean, which needs 10 seeds, the percentile bootstrap (benchmark/statistics.py).
"""

import csv
import io
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from benchmark.files import write_file
from benchmark.provenance import provenance
from benchmark.statistics import ENOUGH, LEVEL, equivalence, interval, iqm
from benchmark.suite import (
    REFERENCE,
    ROOT,
    STARTED,
    InputError,
    Suite,
    intact_runs,
    list_of,
    load_suite,
    read_end,
    read_metrics,
    similar,
    writing,
)
from benchmark.text import markdown_table, printable

RETURN = "charts/episodic_return"
EPISODES = 100  # that a mean return is over
POINTS = 122  # updates kept of each curve
VARIANT_POINTS = 30  # of each in a suite with variants, of which there may be hundreds
SUITE_POINTS = 18_000  # of all curves of a suite with variants together, so that its CSV stays below 1 MB
STATISTICS = {"mean": np.mean, "iqm": iqm}
STATISTIC_NAMES = {"mean": "mean", "iqm": "interquartile mean"}
INTERVALS = {"mean": "95% interval (Student's t)", "iqm": "95% interval (bootstrap)"}
OURS, BESIDE, PUBLISHED = "#1763b8", ("#e07b00", "#2f8f4e", "#8f3fa8"), "#202020"


@dataclass
class Args:
    """Draws a suite's learning curves, and prints its table."""

    suite: tyro.conf.Positional[str]
    """name of a suite in benchmark/suites, or a .toml file"""
    statistic: Literal["mean", "iqm"] = "mean"
    """over seeds: the mean, or the interquartile mean, which leaves out the lowest and highest quarter (10 seeds)"""
    x: Literal["steps", "hours"] = "steps"
    """over what the curves are drawn: environment steps, or hours of training"""
    metric: str = RETURN
    """what is drawn"""
    add: bool = False
    """keep the CSV's curves of environments and seeds that have no run in runs_dir; without it, they are dropped"""
    runs_dir: Path | None = None
    """where the run directories are; default: runs/SUITE"""
    results: Path = ROOT / "benchmark" / "results"
    """where the curves (CSV, with a JSON file saying where they come from) and the table are written"""
    output: Path = ROOT / "docs" / "img"
    """where the figure is written"""


class Curve(NamedTuple):
    """What one run has reached, update by update."""

    steps: np.ndarray
    hours: np.ndarray
    values: np.ndarray  # nan before the first episode
    part: float = 1.0  # of its training that the run has done

    @property
    def finished(self) -> bool:
        """The run has been trained to its end."""
        return self.part >= 1


Curves = dict[str, dict[int, Curve]]  # by environment and seed
Groups = dict[str, Curves]  # by variant; of a suite without variants one, which has no name


def note(message: str) -> None:
    """Says something about the data that the user should know."""
    print(printable(message), file=sys.stderr)


def metric_by_update(columns: dict[str, np.ndarray], metric: str) -> np.ndarray:
    """A metric's value for each update; for a metric of episodes the mean of the last 100, nan before the first."""
    updates, values = np.isfinite(columns["charts/SPS"]), columns[metric]
    episodes = np.isfinite(values) & ~updates
    if not episodes.any():
        return values[updates]
    ended = episodes.cumsum()[updates]  # episodes by the end of each update
    first = np.maximum(ended - EPISODES, 0)
    sums = np.concatenate([[0], values[episodes].cumsum()])
    means = np.full(len(ended), np.nan)
    return np.divide(sums[ended] - sums[first], ended - first, out=means, where=ended > 0)


def thin_out(length: int, points: int) -> np.ndarray:
    """Indices of so many of all points, evenly spaced, with the first and the last one."""
    return np.unique(np.linspace(0, length - 1, points).round().astype(int))


def run_curve(columns: dict[str, np.ndarray], metric: str, part: float, points: int = POINTS) -> Curve | None:
    """The curve in a run's metrics, thinned out; None if it has none."""
    if metric not in columns or "charts/SPS" not in columns:
        return None
    updates, values = np.isfinite(columns["charts/SPS"]), metric_by_update(columns, metric)
    if metric.startswith("eval/"):  # tests, the first of them before training
        updates = np.isfinite(columns[metric])
        values = columns[metric][updates]
    if not np.isfinite(values).any():
        return None
    keep = thin_out(len(values), points)
    return Curve(columns["global_step"][updates][keep], columns["wall_time"][updates][keep] / 3600, values[keep], part)


def collect(suite: Suite, runs_dir: Path, metric: str = RETURN) -> tuple[Groups, dict[str, float], bool]:
    """The curves of all runs, by run directory the part of its training that is done, and whether one is broken.

    Raises InputError if runs have other settings than the suite, or none has this metric.
    """
    points = POINTS
    if suite.has_variants:
        curves = len(suite.variants) * len(suite.env_ids) * len(suite.seeds)
        points = max(min(VARIANT_POINTS, SUITE_POINTS // curves), 2)
    runs, left_out = intact_runs(suite, runs_dir)
    groups, names, parts, broken = {name: defaultdict(dict) for name in suite.variants}, set(), {}, bool(left_out)
    for job, state in runs.items():
        try:
            columns = read_metrics(state.path)
        except OSError:
            columns = {}
        names |= columns.keys()
        part = parts[state.path.name] = 1.0 if state.finished else state.global_step / max(state.total_steps, 1)
        curve = run_curve(columns, metric, part if state.finished else min(part, 0.999), points)
        if curve is None:
            what = "no episode has ended" if metric == RETURN else f"there is no {metric}"
            left_out.append(f"{state.path.name} is left out: {what} in it")
            continue
        groups[job.variant][job.env_id][job.seed] = curve
    groups = {name: dict(curves) for name, curves in groups.items() if curves}
    if runs and not groups:
        if metric in names | {RETURN}:
            raise InputError(f"no run in {runs_dir} has an episode that ended")
        raise InputError(f"no run has a metric {metric}{similar(metric, names) or f'; there are {sorted(names)}'}")
    for message in left_out:
        note(message)
    for env_id in suite.env_ids if runs else ():
        found = {variant: {job.seed for job in runs if (job.env_id, job.variant) == (env_id, variant)}
                 for variant in suite.variants}  # fmt: skip
        if not any(found.values()):
            note(f"{env_id}: no runs")
            continue
        for variant, seeds in found.items():
            if missing := [seed for seed in suite.seeds if seed not in seeds]:
                note(f"{env_id}{f' {variant}' if variant else ''}: no run of seed {', '.join(map(str, missing))}")
    return groups, parts, broken


def add_curves(kept: Curves, new: Curves) -> Curves:
    """Both, seeds in order. A new curve replaces one of the same seed, but no finished one if it is unfinished."""
    both = {env_id: dict(seeds) for env_id, seeds in kept.items()}
    for env_id, seeds in new.items():
        known = both.setdefault(env_id, {})
        known |= {s: c for s, c in seeds.items() if c.finished or s not in known or not known[s].finished}
    return {env_id: dict(sorted(seeds.items())) for env_id, seeds in both.items()}


def write_curves(path: Path, groups: Groups, metric: str, parts: dict[str, float], add: bool, facts: dict) -> None:
    """Writes curves as CSV, and beside it as JSON where they come from; with add, what both had before is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = {}
    if add and path.exists():
        known, sidecar = read_groups(path), path.with_suffix(".json")
        groups = known | {name: add_curves(known.get(name, {}), curves) for name, curves in groups.items()}
        before = read_sidecar(sidecar)
        if set(before.get("runs", ())) <= parts.keys():  # the same runs again
            before = before.get("added_to")
        earlier = {"added_to": before} if before else {}
    with io.StringIO() as file:
        writer = csv.writer(file, lineterminator="\n")
        heads = ["variant"] * (groups.keys() != {""})
        heads += ["env_id", "seed", "global_step", "return_mean_100" if metric == RETURN else metric, "hours"]
        writer.writerow(heads)
        unfinished = {}
        for name, env_id, seed, curve in all_curves(groups):
            for step, hours, value in zip(*curve[:3]):
                row = [name, env_id, seed, int(step), f"{value:.6g}", f"{hours:.6g}"]
                writer.writerow(row[-len(heads) :])
            if not curve.finished:
                unfinished.setdefault(" ".join(filter(None, (env_id, name))), {})[seed] = round(curve.part, 3)
        write_file(path, file.getvalue())
    facts = provenance() | facts | {"runs": sorted(parts), "unfinished": unfinished} | earlier
    write_file(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


def history(runs_dir: Path, names: Iterable[str]) -> dict:
    """The commits at which runs were started, and which of these were resumed, as far as the harness has noted it.

    A run that is resumed plays other episodes from then on than it would have played without the interruption.
    """
    commits = dict.fromkeys(re.findall(rb'"commit": "([^"]+)"', read_end(runs_dir / STARTED, 1 << 20)))
    facts = {"trained_at": [commit.decode() for commit in commits]} if commits else {}
    logs = "".join(path.read_text(errors="replace") for path in (runs_dir / "logs").glob("*.log"))
    resumed = set(re.findall(r"(?m)^\$ .* --resume .*?([\w.-]+)'?$", logs))
    return facts | {"resumed": sorted(resumed.intersection(names))}


def read_sidecar(path: Path) -> dict:
    """What the JSON file beside a CSV says, nothing if there is none; raises InputError if it cannot be read."""
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_bytes())
        if not isinstance(facts, dict) or not list_of(str, facts.get("runs")):
            raise ValueError("it does not say which runs the curves are of")
        parts = [part for seeds in facts["unfinished"].values() for part in seeds.values()]
        if not list_of(int | float, parts):
            raise ValueError("it does not say which part of the unfinished runs is done")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return facts


def all_curves(groups: Groups) -> Iterable[tuple[str, str, int, Curve]]:
    """Variant, environment, seed and curve of each run."""
    for name, curves in groups.items():
        for env_id, seeds in curves.items():
            for seed, curve in seeds.items():
                yield name, env_id, seed, curve


def read_curves(path: Path) -> Curves:
    """Curves from a CSV of a suite without variants; raises InputError if that cannot be read."""
    return read_groups(path).get("", {})


def read_groups(path: Path) -> Groups:
    """Curves from a CSV, by variant; raises InputError if that cannot be read."""
    rows = defaultdict(list)
    unfinished = read_sidecar(path.with_suffix(".json")).get("unfinished", {})
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            unnamed = [] if next(reader)[0] == "variant" else [""]
            for row in reader:
                name, env_id, seed, *numbers = unnamed + row
                step, value, *hours = map(float, numbers)
                rows[name, env_id, int(seed)].append((step, *(hours or [np.nan]), value))
    except (OSError, ValueError, IndexError, StopIteration, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    groups = {}
    for (name, env_id, seed), points in rows.items():
        part = unfinished.get(" ".join(filter(None, (env_id, name))), {}).get(str(seed), 1.0)
        groups.setdefault(name, {}).setdefault(env_id, {})[seed] = Curve(*np.array(points).T, part)
    return groups


def aggregate(curves: list[Curve], statistic: str, x: str) -> tuple[np.ndarray, ...]:
    """x, statistic and interval of curves at common points, at each of those seeds that have got there.

    Over hours, a run that has finished keeps its last value, so that slower seeds go on beside it.
    """
    points = [(getattr(curve, x)[ok], curve.values[ok], curve.finished) for curve in curves
              for ok in [np.isfinite(curve.values)]]  # fmt: skip
    grid = np.linspace(min(p[0][0] for p in points), max(p[0][-1] for p in points), POINTS)
    keeps = [values[-1] if finished and x == "hours" else np.nan for _, values, finished in points]
    values = np.array([np.interp(grid, p[0], p[1], np.nan, keep) for p, keep in zip(points, keeps)])
    center, low, high = np.full((3, len(grid)), np.nan)
    present = np.isfinite(values)
    for mask in np.unique(present, axis=1).T:
        if mask.any():
            columns = (present == mask[:, None]).all(0)
            samples = values[np.ix_(mask, columns)]
            center[columns] = STATISTICS[statistic](samples, axis=0)
            low[columns], high[columns] = interval(samples, statistic)
    return grid, center, low, high


def counted(number: int, what: str = "seed") -> str:
    """1 seed, 2 seeds."""
    return f"{number} {what}{'s' * (number != 1)}"


def final_cells(
    curves: dict[int, Curve], statistic: str, form: str = ".1f", steps: float | None = None
) -> tuple[str, str, str]:
    """Final value with its deviation and seeds, its 95% interval, and the runtime, as the table shows them.

    The value is of these steps; where the curves end elsewhere, the first cell says where.
    Runs that are not finished count only where no run is.
    """
    finished = [curve for curve in curves.values() if curve.finished]
    chosen = finished or list(curves.values())
    if not chosen:
        return "-", "-", "-"
    finals = np.array([curve.values[-1] for curve in chosen])
    low, high = (float(bound) for bound in interval(finals, statistic))
    seeds = counted(len(chosen))
    if not finished:
        seeds += f", unfinished: {min(curve.part for curve in chosen):.0%} done"
    elif others := len(curves) - len(finished):
        seeds += f", {others} more unfinished"
    reached = max(curve.steps[-1] for curve in chosen)
    if steps and abs(reached / steps - 1) > 0.02:
        seeds += f", {reached / 1e6:.2g}M steps"
    deviation = f" +- {finals.std(ddof=1):{form}}" if len(finals) > 1 else ""
    hours = np.mean([curve.hours[-1] for curve in chosen])
    runtime = "-" if np.isnan(hours) else f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    bounds = "-" if np.isnan(low) else f"{low:{form}} to {high:{form}}"
    return f"{STATISTICS[statistic](finals):{form}}{deviation} ({seeds})", bounds, runtime


def beside(suite: Suite, args: Args, suffix: str) -> dict[str, Curves]:
    """What a suite is compared with: curves by what they are called, of the official code and of other suites."""
    groups = {}
    if suite.reference:
        path = REFERENCE / suite.reference
        path = path.with_name(f"{path.stem}{suffix}{path.suffix}")
        if args.metric == RETURN or path.is_file():  # of other metrics there may be none
            groups[suite.reference_label] = read_curves(path)
    for other in map(load_suite, suite.compare):
        path = args.results / f"{other.name}{suffix}.csv"
        if not path.exists():
            note(f"suite {other.name} is left out: there is no {path}; python -m benchmark plot {other.name} writes it")
            continue
        name = other.title if other.script == suite.script else Path(other.script).name
        taken = name in groups or name == Path(suite.script).name
        groups[f"{name} ({other.name})" if taken else name] = read_curves(path)
    groups = {name: {env: curves[env] for env in suite.env_ids if env in curves} for name, curves in groups.items()}
    return {name: curves for name, curves in groups.items() if curves}


def short_names(env_ids: Iterable[str]) -> dict[str, str]:
    """The environments' names without their modules, where these are different without them."""
    names = {env_id: env_id.rpartition(":")[2] for env_id in env_ids}
    return names if len(set(names.values())) == len(names) else {env_id: env_id for env_id in names}


def table(suite: Suite, ours: Curves, others: dict[str, Curves], published: dict, args: Args) -> str:
    """Markdown table of what was reached at the end."""
    script, what = Path(suite.script).name, f"{STATISTIC_NAMES[args.statistic]} +- std"
    form = ".1f" if args.metric == RETURN else ".4g"  # what is no return may be small
    heads = ["environment", f"{script}: {what}", "95% interval"]
    for name in others:
        heads += [f"{name}: {what}", "95% interval"]
    heads += [suite.published_label] * bool(published) + ["runtime"]
    lines, names = [heads], short_names(suite.env_ids)
    for env_id in suite.env_ids:
        final, bounds, runtime = final_cells(ours.get(env_id, {}), args.statistic, form)
        cells = [names[env_id], final, bounds]
        steps = max((curve.steps[-1] for curve in ours.get(env_id, {}).values()), default=None)
        for curves in others.values():
            cells += final_cells(curves.get(env_id, {}), args.statistic, form, steps)[:2]
        cells += ["{} +- {}".format(*published[env_id]) if env_id in published else "-"] * bool(published)
        lines.append([*cells, runtime])
    return markdown_table(lines)


def equivalence_table(suite: Suite, ours: Curves, official: Curves) -> str:
    """Markdown table: whether final returns are the official code's, but for differences that would not matter."""
    names = short_names(suite.env_ids)
    lines = [["environment", "difference", "90% interval", "margin", "p", "equivalent"]]
    for env_id, margin in suite.margins.items():
        finals = [np.array([curve.values[-1] for curve in curves.get(env_id, {}).values() if curve.finished])
                  for curves in (ours, official)]  # fmt: skip
        found = equivalence(*finals, margin)
        cells = ["-", "-", f"{margin:g}", "-", "one seed cannot say"]
        if found:
            interval_ = f"{found.low:+.1f} to {found.high:+.1f}"
            equal = "yes" if found.p < 1 - LEVEL else "not shown"
            cells = [f"{found.value:+.1f}", interval_, f"{margin:g}", f"{found.p:.2g}", equal]
        lines.append([names[env_id], *cells])
    return markdown_table(lines)


def legend_label(name: str, curves: Curves) -> str:
    """A name with its number of seeds, and how many of them are unfinished."""
    numbers = sorted({len(seeds) for seeds in curves.values() if seeds})
    seeds = counted(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} seeds"
    unfinished = sum(not curve.finished for seeds in curves.values() for curve in seeds.values())
    return f"{name}, {seeds}" + (f" ({counted(unfinished, 'run')} unfinished)" if unfinished else "")


def vertical_limits(centers: list[float], bands: list[float]) -> tuple[float, float]:
    """Where a panel ends: all centers are in it, and bands as long as they do not make the centers small."""
    low, high = np.nanmin(centers), np.nanmax(centers)
    if high - low < 1e-6:  # a flat curve needs a scale of its own
        return low - max(abs(low) / 4, 1), high + max(abs(high) / 4, 1)
    reach = (high - low) / 4
    low, high = max(np.nanmin([low, *bands]), low - reach), min(np.nanmax([high, *bands]), high + reach)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def styled_pyplot():
    """matplotlib.pyplot, for figures that look alike, and the formatter for 100k and 1M."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    plt.rcParams.update({
        "svg.hashsalt": "ppo37", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "0.9", "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.edgecolor": "0.4", "font.size": 11,
        "axes.titlesize": 12, "axes.titleweight": "bold", "xtick.color": "0.3", "ytick.color": "0.3",
        "text.parse_math": False,  # a name with dollar signs is no formula
    })  # fmt: skip
    return plt, EngFormatter


def save_figure(figure, path: Path) -> None:
    """Writes a figure as path.png and path.svg, the same bytes each time, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind, options in (
        ("png", {"dpi": 110, "metadata": {"Software": None}}),
        ("svg", {"metadata": {"Date": None, "Creator": None}}),
    ):
        contents = io.BytesIO()
        figure.savefig(contents, format=kind, **options)
        write_file(path.with_name(f"{path.name}.{kind}"), contents.getvalue())
    sys.modules["matplotlib.pyplot"].close(figure)


def draw(suite: Suite, ours: Curves, others: dict[str, Curves], published: dict, args: Args, path: Path) -> None:
    """Writes the figure as path.png and path.svg: one panel for each environment, one legend for all."""
    plt, EngFormatter = styled_pyplot()
    columns = 2 if len(suite.env_ids) == 4 else min(len(suite.env_ids), 3)
    rows = -(-len(suite.env_ids) // columns)
    size = (max(4.2 * columns, 6), 3.3 * rows + 0.9)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    groups = [(Path(suite.script).name, ours, OURS, "-")]
    for (name, curves), color in zip(others.items(), itertools.cycle(BESIDE)):
        timed = not any(np.isnan(curve.hours).any() for seeds in curves.values() for curve in seeds.values())
        if args.x == "steps" or timed:  # of the official code the time is not known
            groups.append((name, curves, color, "--"))
    what = f"return, mean of {EPISODES} episodes" if args.metric == RETURN else args.metric
    handles, names = {}, short_names(suite.env_ids)
    for index, axis in enumerate(axes.flat):
        if index >= len(suite.env_ids):
            axis.set_axis_off()
            continue
        env_id, ends, centers, bands = suite.env_ids[index], [], [], []
        for name, curves, color, style in groups:
            if not curves.get(env_id):
                continue
            x, center, low, high = aggregate(list(curves[env_id].values()), args.statistic, args.x)
            axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
            (line,) = axis.plot(x, center, style, color=color, linewidth=1.9)
            handles[color] = (line, legend_label(name, curves))
            ends.append(x[-1])
            centers, bands = [*centers, *center], [*bands, *low, *high]
        if not ours.get(env_id):
            axis.text(0.5, 0.5, "no runs yet", color="0.5", ha="center", transform=axis.transAxes)
        if env_id in published and ends:
            mean, deviation = published[env_id]
            # A little to the right of the curves' end, so that it hides nothing.
            marker = axis.errorbar(
                [1.04 * max(ends)], [mean], [deviation], fmt="D", color=PUBLISHED, ms=5, capsize=4, linewidth=1.3
            )
            handles[PUBLISHED] = (marker, suite.published_label)
            centers += [mean - deviation, mean + deviation]
        if ends:
            axis.set_ylim(*vertical_limits(centers, bands))
        axis.set_title(printable(names[env_id]))
        if index % columns == 0:
            axis.set_ylabel(printable(what))
        if index + columns >= len(suite.env_ids):
            axis.set_xlabel(printable(suite.steps_label) if args.x == "steps" else "hours of training")
        if args.x == "steps":
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlim(left=0)
        axis.locator_params(axis="both", nbins=6)
    over = f": {STATISTIC_NAMES[args.statistic]} and {INTERVALS[args.statistic]} over seeds"
    several = any(len(seeds) > 1 for _, curves, *_ in groups for seeds in curves.values())
    figure.suptitle(printable(suite.title) + over * several, fontsize=12, color="0.25")
    if handles:
        lines, labels = zip(*handles.values())
        labels = [*map(printable, labels)]
        for beside_each_other in range(len(lines), 0, -1):  # as many as fit
            below = {"loc": "outside lower center", "ncols": beside_each_other, "frameon": False}
            legend = figure.legend(lines, labels, **below)
            if legend.get_window_extent().width <= figure.bbox.width or beside_each_other == 1:
                break
            legend.remove()
        figure.set_figheight(size[1] + 0.24 * (-(-len(lines) // beside_each_other) - 1))
    save_figure(figure, path)


def main(args: Args) -> int:
    """Writes CSV, figure and table, and prints the table; returns 1 if a run could not be read."""
    suite = load_suite(args.suite)
    runs_dir = args.runs_dir or suite.runs_dir
    suffix = "" if args.metric == RETURN else "_" + re.sub(r"[^\w.-]", "-", args.metric)
    data = args.results / f"{suite.name}{suffix}.csv"
    if suite.has_variants:
        raise InputError(f"suite {suite.name} has variants: python -m benchmark compare {args.suite} draws them")
    groups, parts, broken = collect(suite, runs_dir, args.metric)
    if groups:
        with writing(args.results):
            write_curves(data, groups, args.metric, parts, args.add, history(runs_dir, parts))
    elif data.exists():
        note(f"no runs in {runs_dir}: drawing from {data}")
    else:
        raise InputError(f"no runs of suite {suite.name} in {runs_dir}, and no {data}; start them with: "
                         f"python -m benchmark run {args.suite}")  # fmt: skip
    ours = read_curves(data)
    for env_id, seeds in ours.items():
        for seed, curve in seeds.items():
            if not curve.finished:
                note(f"{env_id} seed {seed} is unfinished: {curve.part:.0%} of its steps are done")
    if args.x == "hours" and all(np.isnan(c.hours).all() for seeds in ours.values() for c in seeds.values()):
        raise InputError(f"{data} does not say how long the runs took")
    others = beside(suite, args, suffix)
    if args.statistic == "iqm":
        if few := [env_id for env_id, seeds in ours.items() if len(seeds) < ENOUGH]:
            raise InputError(f"the interquartile mean needs {ENOUGH} seeds, and {few[0]} has {len(ours[few[0]])}: of "
                             "few seeds it is little but the median; --statistic mean needs 2")  # fmt: skip
        for name, curves in list(others.items()):
            if any(len(seeds) < ENOUGH for seeds in curves.values()):
                note(
                    f"{name} is left out: it has fewer than {ENOUGH} seeds, of which an interquartile mean says little"
                )
                del others[name]
    published = suite.published if args.metric == RETURN else {}
    name = f"{suite.name}{suffix}" + "_iqm" * (args.statistic == "iqm")
    text = table(suite, ours, others, published, args)
    if suite.margins and args.metric == RETURN and suite.reference_label in others:
        text += f"\n\nEquivalence with the {suite.reference_label}, by two one-sided Welch's t tests at 5%:\n\n"
        text += equivalence_table(suite, ours, others[suite.reference_label])
    with writing(args.results):
        write_file(args.results / f"{name}.md", text + "\n")
    with writing(args.output):
        draw(suite, ours, others, published, args, args.output / (name + "_hours" * (args.x == "hours")))
    print(text)
    return 1 if broken else 0
