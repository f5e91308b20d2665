"""Makes one interactive page of all runs of suites: any metric of any run, smoothed, toggled and compared.

    python -m benchmark report classic mujoco --output report.html

The page is one file that needs no network: data, plotly.js and the few lines that connect the controls to it
(benchmark/report.html). Episodes' metrics are shown as the mean of the last 100 at each update.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import tyro
from plotly.colors import qualitative

from benchmark.files import write_file
from benchmark.plot import RETURN, metric_by_update, note, thin_out
from benchmark.suite import InputError, intact_runs, load_suite, read_metrics, writing
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
    output: Path = Path("runs/report.html")
    """the page"""


def numbers(values: np.ndarray) -> list[float | None]:
    """Five digits of each value; null where there is none."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


def load_runs(args: Args) -> tuple[list[dict], list[str]]:
    """What the page knows of each run, and what is to be said of broken ones; raises InputError if there is no run."""
    suites = [load_suite(name) for name in dict.fromkeys(args.suites)]
    found, broken = [], []
    for suite in suites:
        runs, problems = intact_runs(suite, args.runs_dir or suite.runs_dir)
        found += [(suite, *item) for item in runs.items()]
        broken += problems
    with_runs = {suite.name for suite, *_ in found}
    for suite in suites if found else ():
        if suite.name not in with_runs:
            note(f"no runs of {suite.name} in {args.runs_dir or suite.runs_dir}")
    scripts = Counter(Path(variant.script).name for suite in suites for variant in suite.variants.values())
    points, runs = int(np.clip(ALL_POINTS // max(len(found), 1), 30, POINTS)), []
    for suite, job, state in found:
        try:
            columns = read_metrics(state.path)
        except OSError:
            columns = {}
        if "charts/SPS" not in columns:
            note(f"{state.path.name} is left out: it has not done an update")
            continue
        updates, script = np.isfinite(columns["charts/SPS"]), Path(job.script).name
        keep = thin_out(updates.sum(), points)
        metrics = {
            name: metric_by_update(columns, name)[keep] for name in columns.keys() - {"global_step", "wall_time"}
        }
        runs.append({
            "name": state.path.name, "env": job.env_id, "seed": str(job.seed), "suite": suite.name,
            "script": script if scripts[script] == 1 else f"{script} ({job.variant or suite.name})",
            "status": "" if state.finished else "running" if state.running else "unfinished",
            "steps": columns["global_step"][updates][keep].astype(int).tolist(),
            "hours": numbers(columns["wall_time"][updates][keep] / 3600),
            "metrics": {name: numbers(values) for name, values in sorted(metrics.items())},
        })  # fmt: skip
    for problem in broken:
        note(problem)
    if not runs:
        raise InputError(f"no runs of {', '.join(suite.name for suite in suites)} in "
                         f"{args.runs_dir or ', '.join(str(suite.runs_dir) for suite in suites)}")  # fmt: skip
    return runs, broken


def page(runs: list[dict]) -> str:
    """The HTML."""
    figure = go.Figure().to_html(include_plotlyjs=True, full_html=False, div_id="figure", config={"responsive": True})
    data = {"runs": runs, "first_metric": RETURN, "colors": qualitative.D3}
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
