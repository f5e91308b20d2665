"""Learning curves of ppo.py on classic control, beside those of the official code on the same environments.

    python -m benchmark.classic run     # 3 environments x 5 seeds, 500,000 steps each, into runs/classic
    python -m benchmark.classic plot    # benchmark/results/classic.csv, docs/img/classic.png and the table

`run` skips what is finished and resumes what was interrupted. A curve is the mean return of the last 100 episodes at
the end of an update, as the official logger has it (eprewmean).
"""

import csv
import json
import subprocess
import sys
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
ENVS = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0")
REFERENCE, RESULTS = ROOT / "benchmark/reference/classic.csv", ROOT / "benchmark/results/classic.csv"
POINTS = 122  # updates kept of 976: every eighth


@dataclass
class Args:
    """Runs or plots the classic-control benchmark."""

    command: tyro.conf.Positional[Literal["run", "plot"]]
    """what to do"""
    runs_dir: Path = Path("runs/classic")
    """where the run directories are"""
    seeds: int = 5
    """seeds 1 to this number"""
    workers: int = 2
    """runs at the same time"""


def find_run(runs_dir: Path, env_id: str, seed: int) -> Path | None:
    """The newest run directory of this environment and seed, or None."""
    found = sorted(runs_dir.glob(f"{env_id}__ppo__{seed}__*/checkpoint.pt"))
    return found[-1].parent if found else None


def curve(run_dir: Path) -> list[tuple[int, float]]:
    """(global_step, mean return of the last 100 episodes) at the end of each update; nan before the first episode."""
    returns, points = deque(maxlen=100), []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "charts/episodic_return" in row:
            returns.append(row["charts/episodic_return"])
        else:
            points.append((row["global_step"], float(np.mean(returns)) if returns else float("nan")))
    return points


def run(args: Args) -> int:
    """Starts all missing runs; returns how many failed."""

    def job(env_id: str, seed: int) -> int:
        command = [sys.executable, str(ROOT / "ppo.py"), "--env-id", env_id, "--seed", str(seed)]
        run_dir = find_run(args.runs_dir, env_id, seed)
        command += ["--resume", str(run_dir)] if run_dir else ["--runs-dir", str(args.runs_dir)]
        result = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        tail = result.stderr.strip().splitlines()[-1:] or [""]
        print(f"{env_id} seed {seed}: exit code {result.returncode}; {tail[0]}")
        return result.returncode != 0

    with ThreadPoolExecutor(args.workers) as pool:
        return sum(pool.map(job, *zip(*[(env_id, seed) for seed in range(1, args.seeds + 1) for env_id in ENVS])))


def read(path: Path) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """Curves by environment and seed from a CSV."""
    curves = defaultdict(lambda: defaultdict(list))
    with open(path) as file:
        for row in csv.DictReader(file):
            curves[row["env_id"]][int(row["seed"])].append((int(row["global_step"]), float(row["return_mean_100"])))
    return curves


def write(path: Path, curves: dict) -> None:
    """Writes curves as CSV: env_id, seed, global_step, return_mean_100."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_id", "seed", "global_step", "return_mean_100"])
        for env_id, seeds in curves.items():
            for seed, points in seeds.items():
                keep = np.unique(np.linspace(0, len(points) - 1, POINTS).round().astype(int))
                writer.writerows([env_id, seed, points[i][0], f"{points[i][1]:.2f}"] for i in keep)


def interval(values: list[float]) -> tuple[float, float]:
    """95% t-interval of the mean over seeds."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def plot(args: Args) -> None:
    """Writes the CSV of our curves and the figure (95% bootstrap bands), and prints the table (t-intervals)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = {env_id: {} for env_id in ENVS}
    for env_id in ENVS:
        for seed in range(1, args.seeds + 1):
            if run_dir := find_run(args.runs_dir, env_id, seed):
                ours[env_id][seed] = curve(run_dir)
    if any(ours.values()):
        write(RESULTS, ours)
    ours, official = read(RESULTS), read(REFERENCE)
    rng = np.random.default_rng(0)
    figure, axes = plt.subplots(1, len(ENVS), figsize=(12, 3.6), constrained_layout=True)
    print("| environment | measured | ppo.py | official code | official 95% interval |\n|---|---|---|---|---|")
    for axis, env_id in zip(axes, ENVS):
        finals = {}
        for name, curves, color in (("official (baselines ppo2)", official, "0.45"), ("ppo.py", ours, "tab:blue")):
            seeds = list(curves[env_id].values())
            steps = np.array([step for step, _ in seeds[0]])
            returns = np.array([[value for _, value in points] for points in seeds])
            resampled = rng.choice(returns, (2000, len(returns))).mean(1)
            low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
            axis.plot(steps, returns.mean(0), color=color, label=f"{name}, {len(seeds)} seeds")
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
            finals[name] = {"at the end": returns[:, -1], "last tenth": returns[:, -len(steps) // 10 :].mean(1)}
        reference, mine = finals.values()
        for when in reference:
            low, high = interval(list(reference[when]))
            cells = [f"{x.mean():.1f} +- {x.std(ddof=1):.1f} ({len(x)} seeds)" for x in (mine[when], reference[when])]
            print(f"| {env_id} | {when} | {cells[0]} | {cells[1]} | {low:.1f} to {high:.1f} |")
        axis.set(title=env_id, xlabel="environment steps", ylabel="mean return of 100 episodes")
        if np.ptp(axis.get_ylim()) < 50:  # a flat curve
            axis.set_ylim(returns[0, -1] - 50, returns[0, -1] + 50)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
    (ROOT / "docs/img").mkdir(parents=True, exist_ok=True)
    figure.savefig(ROOT / "docs/img/classic.png", dpi=110)


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    if arguments.command == "run":
        sys.exit(1 if run(arguments) else 0)
    plot(arguments)
