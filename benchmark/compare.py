"""Compares suites, or the variants of one: which is better, by how much, and how sure is that?

    python -m benchmark compare classic mine.toml            # two suites: their runs, else their committed curves
    python -m benchmark compare ablations_classic            # one with variants, compared with the first of them
    python -m benchmark compare ablations_classic --forest   # and a figure with a row for each variant
    python -m benchmark compare one.csv two.csv              # curves that plot or compare has written

Writes into the folder `compare` where you are: NAME.png and .svg (all curves, of more than 12 those in color that are
farthest from the first's, and the performance profile), NAME.md (the tables, with the method of each number) and
NAME_effects.csv, of a suite with variants also its curves, NAME.csv.

A run's score is its last mean return of 100 episodes or, with --measure curve, the mean of its whole curve, which also
says how fast it learned. Over environments scores are normalized: 0 is what the untrained policies had at the curves'
beginning, and 1 the first variant's mean. Runs that are not finished do not count.
"""

import csv
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from benchmark.files import write_file
from benchmark.plot import (
    OURS,
    RETURN,
    Curve,
    Groups,
    aggregate,
    collect,
    counted,
    history,
    legend_label,
    note,
    read_groups,
    save_figure,
    short_names,
    styled_pyplot,
    vertical_limits,
    write_curves,
)
from benchmark.provenance import provenance
from benchmark.statistics import (
    ENOUGH,
    Estimate,
    bootstrap_interval,
    by_chance,
    difference,
    holm,
    iqm,
    probability_of_improvement,
    sum_of_means,
)
from benchmark.suite import ROOT, InputError, Suite, Variant, load_suite, similar, writing
from benchmark.text import markdown_table, printable

RESULTS = ROOT / "benchmark" / "results"
MEASURES = {"final": "at the end", "curve": "over the run"}
FEW = 6  # curves that can have bands in one panel
MANY = 12  # curves that can be told apart in one panel
FAR = 8  # that are colored if there are more
GRAY = "0.82"  # the others
Scores = dict[str, dict[str, dict[int, float]]]  # by variant, environment and seed


@dataclass
class Args:
    """Compares suites, or the variants of one suite, with intervals."""

    what: tyro.conf.Positional[list[str]]
    """suites (names or .toml files) or .csv files with curves; all are compared with the first"""
    measure: Literal["final", "curve"] = "final"
    """a run's score: the mean return of its last 100 episodes, or the mean of its learning curve"""
    forest: bool = False
    """also draw a forest plot: a row for each variant, its effects with their intervals, sorted"""
    env_ids: list[str] | None = None
    """only these environments"""
    add: bool = False
    """of a suite with variants, keep the CSV's curves of seeds that have no run in runs_dir; else they are dropped"""
    runs_dir: Path | None = None
    """where the run directories of a single suite are; default: runs/SUITE"""
    output: Path = Path("compare")
    """folder for figures, tables and data"""
    update_docs: bool = False
    """write into docs/img and benchmark/results of the repository instead, for its own pages"""


class Effect(NamedTuple):
    """What a variant does in an environment."""

    name: str
    env_id: str
    scores: np.ndarray  # [seeds]
    difference: Estimate | None  # from the first variant; None for itself, and where there are too few seeds
    better: Estimate | None  # probability of improvement


def load(args: Args) -> tuple[Groups, dict[str, Variant], list[Suite], bool]:
    """Curves by name, variants of suites by that name, the suites, and whether a run was broken."""
    groups, variants, suites, broken = {}, {}, [], False
    for word in args.what:
        suite, name = None, Path(word).stem
        if word.endswith(".csv"):
            found = read_groups(Path(word))
        else:
            suite = load_suite(word)
            suites.append(suite)
            found, bad = curves_of(suite, args)
            broken |= bad
        for variant, curves in found.items():
            full = variant if variant and len(args.what) == 1 else ": ".join(filter(None, (name, variant)))
            if full in groups:
                raise InputError(f"two of them are called {full}")
            groups[full] = curves
            if suite:
                variants[full] = suite.variants[variant]
    if len(groups) < 2:
        raise InputError("nothing to compare with: give two suites, or one that has variants")
    return groups, variants, suites, broken


def curves_of(suite: Suite, args: Args) -> tuple[Groups, bool]:
    """A suite's curves: of its runs, else those in the repository; those of variants are written as CSV."""
    runs_dir, known = args.runs_dir or suite.runs_dir, RESULTS / f"{suite.name}.csv"
    groups, parts, broken = collect(suite, runs_dir)
    if groups:
        if suite.has_variants and len(args.what) == 1:
            folder = RESULTS if args.update_docs else args.output
            with writing(folder):
                write_curves(folder / known.name, groups, RETURN, parts, args.add, history(runs_dir, parts))
            groups = read_groups(folder / known.name)  # the same digits as whoever has only the file
            return {name: groups[name] for name in suite.variants if name in groups}, broken
        return groups, broken
    if not known.exists():
        raise InputError(f"no runs of suite {suite.name} in {runs_dir}, and no {known}; start them with: "
                         f"python -m benchmark run {suite.name}")  # fmt: skip
    note(f"no runs in {runs_dir}: comparing what is in {known}")
    groups = read_groups(known)
    return {name: groups[name] for name in suite.variants if name in groups}, False


def score(curve: Curve, measure: str) -> float:
    """What a run is worth."""
    return float(curve.values[-1] if measure == "final" else np.nanmean(curve.values))


def finished(groups: Groups, env_ids: list[str]) -> Groups:
    """Without runs that are not finished, and with these environments only."""
    left = {
        name: {env: {s: c for s, c in curves.get(env, {}).items() if c.finished} for env in env_ids}
        for name, curves in groups.items()
    }
    for name, curves in groups.items():
        for env_id in env_ids:
            if out := [str(seed) for seed, curve in curves.get(env_id, {}).items() if not curve.finished]:
                note(f"{name}, {env_id}: seed {', '.join(out)} is unfinished and left out")
    return {name: {env: seeds for env, seeds in curves.items() if seeds} for name, curves in left.items()}


def effects(scores: Scores) -> list[Effect]:
    """Each variant in each environment, beside the first variant there."""
    first, *_ = scores
    found = []
    for env_id in scores[first]:
        base = scores[first][env_id]
        for name, envs in scores.items():
            if seeds := envs.get(env_id):
                values = np.array(list(seeds.values()))
                pair = (None, None)
                if name != first and (found_difference := difference(seeds, base)):
                    pair = found_difference, probability_of_improvement([values], [np.array(list(base.values()))])
                found.append(Effect(name, env_id, values, *pair))
    return found


def normalized(scores: Scores, groups: Groups) -> Scores:
    """Scores with 0 for untrained policies and 1 for the first variant's mean, where that has learned."""
    first, *_ = scores
    scaled = {name: {} for name in scores}
    for env_id, base in scores[first].items():
        starts = [curve.values[np.isfinite(curve.values)][0] for curves in groups.values()
                  for curve in curves.get(env_id, {}).values()]  # fmt: skip
        start, mean = float(np.mean(starts)), float(np.mean(list(base.values())))
        if mean - start <= 1e-6 * max(1, abs(start)):
            note(f"{env_id} is left out of what is normalized: {first} has not learned anything there")
            continue
        for name, envs in scores.items():
            if env_id in envs:
                scaled[name][env_id] = {seed: (x - start) / (mean - start) for seed, x in envs[env_id].items()}
    return scaled


def over_environments(scaled: Scores, name: str) -> Estimate | None:
    """Mean over environments of the difference of normalized scores from the first variant; None if seeds are few."""
    first, *_ = scaled
    common, parts = [env for env in scaled[first] if env in scaled[name]], []
    for env_id in common:
        ours, base = scaled[name][env_id], scaled[first][env_id]
        shared = sorted(ours.keys() & base.keys())
        if len(shared) >= 3:  # as in difference()
            parts.append((1 / len(common), np.array([ours[seed] - base[seed] for seed in shared])))
        else:
            parts += [(1 / len(common), np.array([*ours.values()])), (-1 / len(common), np.array([*base.values()]))]
    if not parts or min(len(sample) for _, sample in parts) < 2:
        return None
    return sum_of_means(parts, "t, Welch-Satterthwaite", min(len(sample) for _, sample in parts))


def marks(estimates: list[Estimate | None]) -> list[bool]:
    """Which of these survive Holm's correction among those that there are."""
    survivors = iter(holm([estimate.p for estimate in estimates if estimate]))
    return [bool(estimate) and next(survivors) for estimate in estimates]


def bounds(estimate: Estimate | None, form: str) -> str:
    """An interval as the table shows it."""
    return "-" if estimate is None or np.isnan(estimate.low) else f"{estimate.low:{form}} to {estimate.high:{form}}"


def tables(rows: list[Effect], scaled: Scores, measure: str) -> tuple[str, list[str]]:
    """The two Markdown tables with what is to be said about their numbers; and that by itself, line by line."""
    first, names = rows[0].name, short_names(dict.fromkeys(row.env_id for row in rows))
    survive = marks([row.difference for row in rows])
    form = ".1f" if max(np.abs(row.scores).max() for row in rows) > 2 else ".3f"  # shares of right answers are small
    lines = [["environment", "variant", f"{MEASURES[measure]}: mean +- std", f"difference from {first}", "95% interval",
              "method", "probability of improvement"]]  # fmt: skip
    for row, mark in zip(rows, survive):
        deviation = f" +- {row.scores.std(ddof=1):{form}}" if len(row.scores) > 1 else ""
        what, better = row.difference, row.better
        lines.append([
            names[row.env_id], row.name, f"{row.scores.mean():{form}}{deviation} ({counted(len(row.scores))})",
            f"{what.value:+{form}}{' *' * mark}" if what else "-", bounds(what, f"+{form}"),
            f"{what.method}, {counted(what.seeds)}" if what else "-",
            f"{better.value:.2f}" + (f" ({bounds(better, '.2f')})" if better.low == better.low else "") if better
            else "-",
        ])  # fmt: skip
    text = markdown_table(lines)

    tested = sum(row.difference is not None for row in rows)
    said = [
        f"Differences are of means over seeds: pair by pair where three seeds are shared (paired t), else Welch's t. "
        f"If no variant had any effect, {by_chance(tested)} intervals would miss 0 by chance. "
        f"{counted(sum(survive), 'difference')} survive{'s' * (sum(survive) == 1)} Holm's correction for {tested} "
        f"tests, marked *.",
        "The probability of improvement is the share of pairs of runs in which the variant's is better (ties half)"
        f", with a stratified bootstrap interval from {ENOUGH} seeds on.",
    ]
    if not any(scaled.values()):
        return text, said
    estimates = [None if name == first else over_environments(scaled, name) for name in scaled]
    lines, few = [["variant", "mean difference of normalized scores", "95% interval", "interquartile mean",
                   "95% interval", "probability of improvement"]], set()  # fmt: skip
    for (name, envs), estimate, mark in zip(scaled.items(), estimates, marks(estimates)):
        samples = [np.array(list(seeds.values())) for seeds in envs.values()]
        base = [np.array(list(scaled[first][env].values())) for env in envs]
        better = probability_of_improvement(samples, base) if estimate else None
        middle = "-", "-"
        if samples and min(map(len, samples)) >= ENOUGH:
            low, high = bootstrap_interval(samples, iqm)
            middle = f"{iqm(np.concatenate(samples)):.2f}", f"{low:.2f} to {high:.2f}"
        elif samples:
            few.add(min(map(len, samples)))
        difference_cells = (f"{estimate.value:+.2f}{' *' * mark}" if estimate else "-"), bounds(estimate, "+.2f")
        lines.append([name, *difference_cells, *middle, f"{better.value:.2f}" if better else "-"])
    environments = ", ".join(short_names(scaled[first]).values())
    said.append(
        f"Normalized scores over {environments}: 0 is an untrained policy, 1 the mean of {first}, both taken as known. "
        "Intervals of the mean are t with Welch and Satterthwaite's degrees of freedom, the environments weighing the "
        "same; those of interquartile means are stratified bootstraps."
    )
    if few:
        said.append(f"An interquartile mean needs {ENOUGH} seeds, and there are {min(few)}: '-' stands in its place.")
    return f"{text}\n\n{markdown_table(lines)}", said


def colors_of(groups: Groups) -> dict[str, str]:
    """A color for each: the first is blue as everywhere, the others differ from it and each other as far as possible.

    Where they are too many to be told apart, only those whose mean curves are farthest from the first's are colored.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    first, *others = groups
    colored = others
    if len(groups) > MANY:
        distances = dict.fromkeys(others, 0.0)
        for env_id, base in groups[first].items():
            x, center, *_ = aggregate([*base.values()], "mean", "steps")
            for name in (name for name in others if env_id in groups[name]):
                grid, values, *_ = aggregate([*groups[name][env_id].values()], "mean", "steps")
                distance = np.nanmean(np.abs(np.interp(x, grid, values) - center))
                distances[name] += distance / max(float(np.ptp(center[np.isfinite(center)])), 1e-9)
        farthest = sorted(others, key=distances.__getitem__)[-FAR:]
        colored = [name for name in others if name in farthest]
    palette = [to_hex(color) for name in ("Dark2", "tab20") for color in colormaps[name].colors]
    return {first: OURS} | dict.fromkeys(others, GRAY) | dict(zip(colored, itertools.cycle(palette)))


def draw_curves(groups: Groups, scaled: Scores, title: str, path: Path) -> None:
    """One panel for each environment, and one for the performance profile."""
    plt, EngFormatter = styled_pyplot()
    first, *_ = groups
    colors = colors_of(groups)
    labels = {name: printable(legend_label(name, groups[name])) for name in groups if colors[name] != GRAY}
    env_ids, profile = list(groups[first]), any(scaled.values())
    columns = min(len(env_ids) + profile, 3)
    rows = -(-(len(env_ids) + profile) // columns)
    width = max(4.2 * columns, 6)
    legend = max(1, int(width / (0.9 + 0.1 * max(map(len, labels)) + 0.6)))  # labels beside each other
    height = 3.3 * rows + 0.6 + 0.24 * -(-(len(labels) + 1) // legend)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    lines, names = {}, short_names(env_ids)
    styles = {
        name: {"color": color, "linewidth": 1.4, "zorder": 2.2 if color == GRAY else 2.4}
        for name, color in colors.items()
    }
    styles[first] |= {"linewidth": 2.2, "zorder": 3}
    for axis in axes.flat[len(env_ids) + profile :]:
        axis.set_axis_off()
    for axis, env_id in zip(axes.flat, env_ids):
        centers, bands = [], []
        for name, curves in groups.items():
            if env_id in curves:
                runs = list(curves[env_id].values())
                x, center, low, high = aggregate(runs, "mean", "steps")
                if len(groups) <= FEW and len(runs) > 2:
                    axis.fill_between(x, low, high, color=colors[name], alpha=0.16, linewidth=0)
                    bands += [*low, *high]
                for run in runs if len(groups) <= FEW and len(runs) == 2 else ():  # whose band would cover the panel
                    axis.plot(run.steps, run.values, color=colors[name], linewidth=0.9, alpha=0.6)
                    bands += [*run.values]
                (lines[name],) = axis.plot(x, center, **styles[name])
                centers += [*center]
        axis.set_ylim(*vertical_limits(centers, bands))
        axis.set_xlim(left=0)
        axis.set_title(printable(names[env_id]))
        axis.set_xlabel("steps")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.locator_params(axis="both", nbins=6)
    axes[0, 0].set_ylabel("return, mean of 100 episodes")
    if profile:
        axis, found = axes.flat[len(env_ids)], [seeds for envs in scaled.values() for seeds in envs.values()]
        all_scores = [value for seeds in found for value in seeds.values()]
        x = np.linspace(min(0, *all_scores), max(all_scores), 200)
        for name, envs in scaled.items():
            if envs:
                share = np.mean([np.mean(np.array([*s.values()])[:, None] >= x, axis=0) for s in envs.values()], axis=0)
                axis.plot(x, share, **styles[name])
        axis.set_title("performance profile")
        axis.set_xlabel("normalized score")
        axis.set_ylabel("share of runs at least as good")
    counts = {len(seeds) for curves in groups.values() for seeds in curves.values()} if len(groups) <= FEW else {1}
    band = " and 95% interval (Student's t)" * (max(counts) > 2)
    thin = "; thin: the two runs" * (2 in counts)
    figure.suptitle(printable(f"{title}: mean{band} over seeds{thin}"), fontsize=12, color="0.25")
    rest = [name for name in lines if name not in labels]
    if rest:
        labels[rest[0]] = f"{len(rest)} others, closer to {printable(first)}"
    handles = [lines[name] for name in labels]
    figure.legend(handles, labels.values(), loc="outside lower center", ncols=min(legend, len(labels)), frameon=False)
    save_figure(figure, path)


def draw_forest(rows: list[Effect], scaled: Scores, labels: dict[str, str], title: str, path: Path) -> None:
    """A row for each variant: its differences from the first with their intervals, sorted by their mean."""
    plt, _ = styled_pyplot()
    first, env_ids = rows[0].name, list(dict.fromkeys(row.env_id for row in rows))
    overall = {name: over_environments(scaled, name) for name in scaled if name != first}
    survive, panels = marks([row.difference for row in rows]), []
    for env_id in env_ids:
        here = {r.name: (r.difference, mark) for r, mark in zip(rows, survive) if r.env_id == env_id and r.difference}
        seeds = sorted({estimate.seeds for estimate, _ in here.values()})
        count = (
            f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else counted(seeds[0]) if seeds else "too few seeds"
        )
        panels.append((f"{short_names(env_ids)[env_id]}, {count}", "difference in return", here))
    if len(env_ids) > 1 and any(overall.values()):
        kept = {name: estimate for name, estimate in overall.items() if estimate}
        here = {name: (estimate, mark) for (name, estimate), mark in zip(kept.items(), marks(list(kept.values())))}
        panels.append(("over environments", "difference of normalized scores", here))

    def place(name: str) -> float:
        shown = [here[name][0].value for _, _, here in panels[-1:] if name in here]
        return shown[0] if shown else -np.inf

    order = sorted((name for name in scaled if any(name in here for _, _, here in panels)), key=place)
    size = (max(3.0 + 3.3 * len(panels), 7.5), 0.27 * len(order) + 1.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, (head, what, here) in zip(axes.flat, panels):
        for row, name in enumerate(order):
            if name in here:
                estimate, mark = here[name]
                clear = not estimate.low <= 0 <= estimate.high
                color = ("#b3261e" if estimate.value < 0 else "#2f8f4e") if clear else "0.45"
                error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                axis.errorbar([estimate.value], [row], xerr=error, fmt="o", ms=5, color=color, capsize=2.5,
                              linewidth=1.3, markerfacecolor=color if mark else "white")  # fmt: skip
        axis.axvline(0, color=OURS, linewidth=1.2)
        axis.set_title(printable(head), fontsize=11)
        axis.set_xlabel(what)
        axis.set_yticks(range(len(order)), [printable(labels.get(name, name)) for name in order], fontsize=9)
        axis.set_ylim(-0.7, len(order) - 0.3)
        axis.locator_params(axis="x", nbins=5)
    below = f"difference from {first}, 95% interval; filled: survives Holm's correction"
    figure.suptitle(f"{printable(title)}\n{printable(below)}", fontsize=11, color="0.25")
    save_figure(figure, path)


def tags_of(variant: Variant | None) -> str:
    """The details that a variant's flags are of: the tags in the help of these flags."""
    if variant is None:
        return ""
    source, tags = (ROOT / variant.script).read_text(), []
    for flag in variant.changes:
        if flag.startswith("--"):
            name = re.sub("=.*", "", flag[2:]).replace("-", "_")
            for line in re.findall(rf"(?m)^    (?:{name}|{name.removeprefix('no_')}): .*  # (.*)$", source):
                tags += re.findall(r"\[([a-z]+-\d+)\]", line)
    return " ".join(dict.fromkeys(tags))


def write_effects(path: Path, by_measure: dict[str, list[Effect]], variants: dict[str, Variant]) -> None:
    """Writes all effects as CSV, and beside it as JSON where they come from."""
    with io.StringIO() as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "flags", "tags", "env_id", "measure", "seeds", "mean", "difference", "low", "high",
                         "p", "method", "holm"])  # fmt: skip
        for measure, rows in by_measure.items():
            for row, mark in zip(rows, marks([row.difference for row in rows])):
                variant, what = variants.get(row.name), row.difference
                numbers = [f"{x:.6g}" for x in what[:4]] if what else [""] * 4
                names = [row.name, " ".join(variant.changes) if variant else "", tags_of(variant), row.env_id, measure]
                sample = [len(row.scores), f"{row.scores.mean():.6g}"]
                writer.writerow([*names, *sample, *numbers, what.method if what else "", int(mark)])
        write_file(path, file.getvalue())
    write_file(path.with_suffix(".json"), json.dumps(provenance(), indent=1) + "\n")


def main(args: Args) -> int:
    """Writes figures, tables and data, and prints the tables; returns 1 if a run could not be read."""
    if not args.what:
        raise InputError("which suites? python -m benchmark compare SUITE ...")
    if args.runs_dir and len(args.what) > 1:
        raise InputError("--runs-dir is for a single suite; those of several are in runs/SUITE")
    groups, variants, suites, broken = load(args)
    first, *others = groups
    known = list(groups[first])
    for env_id in args.env_ids or ():
        if env_id not in known:
            raise InputError(f"{first} has no environment {env_id}{similar(env_id, known)}")
    groups = finished(groups, args.env_ids or known)
    common = [env for env in groups[first] if any(env in groups[name] for name in others)]
    if not common:
        raise InputError(f"nothing to compare: no other has a finished run in an environment in which {first} has one")
    groups = {name: {env: curves[env] for env in common if env in curves} for name, curves in groups.items()}
    groups = {name: curves for name, curves in groups.items() if curves}
    for env_id, (name, curves) in itertools.product(common, groups.items()):
        steps = [max(c.steps[-1] for c in each[env_id].values()) for each in (groups[first], curves) if env_id in each]
        if abs(steps[-1] / steps[0] - 1) > 0.02:
            note(f"{env_id}: {name} has {steps[-1]:,.0f} steps, {first} {steps[0]:,.0f}")

    by_measure = {}
    for measure in MEASURES:
        scores = {
            name: {env: {seed: score(curve, measure) for seed, curve in seeds.items()} for env, seeds in curves.items()}
            for name, curves in groups.items()
        }
        by_measure[measure] = effects(scores)
        if measure == args.measure:
            scaled = normalized(scores, groups)
    rows = by_measure[args.measure]
    text, said = tables(rows, scaled, args.measure)

    single = suites[0] if len(args.what) == 1 and suites else None
    title = single.title if single else " and ".join(Path(word).stem for word in args.what)
    name = re.sub(r"[^\w.-]", "-", "-vs-".join(Path(word).stem for word in args.what))[:150]
    figures, data = (ROOT / "docs" / "img", RESULTS) if args.update_docs else (args.output, args.output)
    labels = {each: f"{each}  [{tags_of(variant)}]".replace("  []", "") for each, variant in variants.items()}
    with writing(data):
        data.mkdir(parents=True, exist_ok=True)
        write_file(data / f"{name}.md", "\n\n".join([text, *said]) + "\n")
        write_effects(data / f"{name}_effects.csv", by_measure, variants)
    with writing(figures):
        draw_curves(groups, scaled, title, figures / name)
        if args.forest:
            draw_forest(rows, scaled, labels, f"{title}, {MEASURES[args.measure]}", figures / f"{name}_forest")
    print("\n\n".join([text, *said, f"written to {printable(data)}"]))
    return 1 if broken else 0
