"""Makes one interactive page of all runs of suites: any metric of any run, smoothed, toggled and compared.

    python -m benchmark report classic mujoco --output report.html

The page is one file that needs no network: data, plotly.js and the few lines that connect the controls to it
(benchmark/report.html). It shows runs, or their means with 95% intervals (Student's t) over seeds, beside the curves of
the official code; a click on a curve shows the settings of its run. Episodes' metrics are shown as the mean of the last
100 at each update.

Of a suite without runs the page shows the curves in benchmark/results, which have fewer metrics.
"""

import csv
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import tyro
from plotly.colors import qualitative
from scipy import stats

from benchmark.files import write_file
from benchmark.plot import (
    RETURN,
    Curve,
    all_curves,
    metric_by_update,
    note,
    read_curves,
    read_groups,
    read_sidecar,
    thin_out,
)
from benchmark.statistics import LEVEL
from benchmark.suite import REFERENCE, ROOT, InputError, Suite, intact_runs, load_suite, read_metrics, writing
from benchmark.text import printable

TEMPLATE = Path(__file__).with_suffix(".html")
POINTS = 250  # of each curve, as long as there are few
ALL_POINTS = 40_000  # of one metric in all runs together, so that a page of hundreds of runs stays quick


@dataclass
class Args:
    """Makes one interactive HTML page of all runs of suites."""

    suites: tyro.conf.Positional[list[str]]
    """names of suites in benchmark/suites, or .toml files"""
    runs_dir: Path | None = None
    """where the run directories are; default: runs/SUITE for each suite"""
    results: Path = ROOT / "benchmark" / "results"
    """where the curves (CSV) are that stand for suites without runs"""
    output: Path = Path("runs/report.html")
    """the page"""


def numbers(values: np.ndarray) -> list[float | None]:
    """Five digits of each value; null where there is none."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


def curve_on_page(name: str, env_id: str, seed: int, script: str, curve: Curve, metric: str, **more) -> dict:
    """What the page knows of a run of which only a curve is known."""
    hours = numbers(curve.hours) if np.isfinite(curve.hours).all() else []
    return {
        "name": name, "env": env_id, "seed": str(seed), "script": script,
        "status": "" if curve.finished else "unfinished", "steps": curve.steps.astype(int).tolist(), "hours": hours,
        "metrics": {metric: numbers(curve.values)}, "settings": {}, "official": False,
    } | more  # fmt: skip


def committed_runs(suite: Suite, names: dict[str, str], results: Path) -> list[dict]:
    """What the page knows of a suite's runs from the CSV that `plot` or `compare` has written; empty without one."""
    path = results / f"{suite.name}.csv"
    if not path.exists():
        return []
    groups, facts = read_groups(path), read_sidecar(path.with_suffix(".json"))
    with open(path, newline="", encoding="utf-8") as file:
        head = next(csv.reader(file))
    column = head[head.index("global_step") + 1]
    metric = RETURN if column == "return_mean_100" else column
    known = {key: facts[key] for key in ("commit", "trained_at", "machine", "versions") if key in facts}
    runs = []
    for variant, env_id, seed, curve in all_curves(groups):
        settings = {"env_id": env_id, "seed": seed}
        settings |= suite.variants[variant].settings.get(env_id, {}) if variant in suite.variants else {}
        label = names.get(variant, f"{Path(suite.script).name} ({variant})")
        runs.append(curve_on_page(path.name, env_id, seed, label, curve, metric, settings=settings | known))
    return runs


def official_runs(suite: Suite) -> list[dict]:
    """What the page knows of the runs of the official code that a suite is compared with."""
    if not suite.reference:
        return []
    source = f"benchmark/reference/{suite.reference}"
    return [
        curve_on_page(source, env_id, seed, suite.reference_label, curve, RETURN, official=True)
        for _, env_id, seed, curve in all_curves({"": read_curves(REFERENCE / suite.reference)})
        if env_id in suite.env_ids
    ]


def load_runs(args: Args) -> tuple[list[dict], list[str]]:
    """What the page knows of each run, and what is to be said of broken ones; raises InputError if there is no run."""
    suites = [load_suite(name) for name in dict.fromkeys(args.suites)]
    found, broken, runs = [], [], []
    for suite in suites:
        intact, problems = intact_runs(suite, args.runs_dir or suite.runs_dir)
        found += [(suite, *item) for item in intact.items()]
        broken += problems
    scripts = Counter(Path(variant.script).name for suite in suites for variant in suite.variants.values())

    def label(suite: Suite, variant: str) -> str:
        script = Path(suite.variants[variant].script).name
        return script if scripts[script] == 1 else f"{script} ({variant or suite.name})"

    points = int(np.clip(ALL_POINTS // max(len(found), 1), 30, POINTS))
    for suite, job, state in found:
        try:
            columns = read_metrics(state.path)
        except OSError:
            columns = {}
        if "charts/SPS" not in columns:
            note(f"{state.path.name} is left out: it has not done an update")
            continue
        updates = np.isfinite(columns["charts/SPS"])
        keep = thin_out(updates.sum(), points)
        metrics = {
            name: metric_by_update(columns, name)[keep] for name in columns.keys() - {"global_step", "wall_time"}
        }
        runs.append({
            "name": state.path.name, "env": job.env_id, "seed": str(job.seed), "script": label(suite, job.variant),
            "status": "" if state.finished else "running" if state.running else "unfinished",
            "steps": columns["global_step"][updates][keep].astype(int).tolist(),
            "hours": numbers(columns["wall_time"][updates][keep] / 3600),
            "metrics": {name: numbers(values) for name, values in sorted(metrics.items())},
            "settings": state.config, "official": False,
        })  # fmt: skip
    with_runs, lacking = {suite.name for suite, *_ in found}, []
    for suite in suites:
        if suite.name not in with_runs:
            names = {variant: label(suite, variant) for variant in suite.variants}
            kept, where = committed_runs(suite, names, args.results), args.runs_dir or suite.runs_dir
            runs += kept
            instead = f": showing {args.results / suite.name}.csv" if kept else ""
            lacking.append(f"no runs of {suite.name} in {where}{instead}")
    if not runs:
        raise InputError(f"no runs of {', '.join(suite.name for suite in suites)} in "
                         f"{args.runs_dir or ', '.join(str(suite.runs_dir) for suite in suites)}")  # fmt: skip
    for message in (*lacking, *broken):
        note(message)
    official = {run["script"] + run["env"] + run["seed"]: run for suite in suites for run in official_runs(suite)}
    return [*runs, *official.values()], broken


def first_metric(runs: list[dict]) -> str:
    """The metric that the page shows first: returns, if there are any."""
    names = [name for run in runs for name in run["metrics"]]
    return RETURN if RETURN in names else names[0]


def page(runs: list[dict]) -> str:
    """The HTML."""
    figure = go.Figure().to_html(include_plotlyjs=True, full_html=False, div_id="figure", config={"responsive": True})
    # Of how many standard errors half an interval is, by the number of seeds; one alone has no interval.
    seeds = max(Counter((run["script"], run["env"]) for run in runs).values())
    errors = [0, 0, *stats.t.ppf((1 + LEVEL) / 2, np.arange(1, seeds)).tolist()]
    data = {"runs": runs, "first_metric": first_metric(runs), "colors": qualitative.D3, "errors": errors}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name can end the script element
    return TEMPLATE.read_bytes().decode().replace("<!-- FIGURE -->", figure).replace("/* DATA */", text)


def main(args: Args) -> int:
    """Writes the page; returns 1 if a run could not be read."""
    if not args.suites:
        raise InputError("which suites? python -m benchmark report SUITE ...")
    runs, broken = load_runs(args)
    text = page(runs).encode()
    with writing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.output, text)
    print(f"{printable(args.output)}: {len(runs)} runs, {len(text) / 2**20:.1f} MiB")
    return 1 if broken else 0
