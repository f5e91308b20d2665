"""Learning curves beside those of the official code on the same environments.

    python -m benchmark.curves classic run      # ppo.py: 3 environments x 5 seeds, 500,000 steps each
    python -m benchmark.curves mujoco run       # ppo_continuous.py: 3 environments x 5 seeds, 1,000,000 steps each
    python -m benchmark.curves mujoco plot      # benchmark/results/mujoco.csv, docs/img/mujoco.png and the table
    python -m benchmark.curves atari run --seeds 1 --workers 1 --flags='--compile --total-timesteps 2500000'

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
from typing import Literal, NamedTuple

import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
POINTS = 122  # updates kept of each curve


class Suite(NamedTuple):
    """What one figure shows."""

    script: str
    envs: tuple[str, ...]
    published: dict[str, tuple[float, float]]  # mean and standard deviation of the final return in the article


SUITES = {
    "classic": Suite("ppo", ("CartPole-v1", "Acrobot-v1", "MountainCar-v0"), {}),
    # The article's runs were on the -v2 environments of an older simulator.
    "mujoco": Suite(
        "ppo_continuous",
        ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"),
        {"HalfCheetah-v4": (2149, 1166), "Hopper-v4": (2449, 596), "Walker2d-v4": (3142, 982)},
    ),
    # The article's runs had 10,000,000 steps; no curve of the official code was recorded.
    "atari": Suite("ppo_atari", ("Pong",), {"Pong": (20.6, 0.4)}),
}


@dataclass
class Args:
    """Runs or plots a benchmark suite."""

    suite: tyro.conf.Positional[Literal["classic", "mujoco", "atari"]]
    """which environments"""
    command: tyro.conf.Positional[Literal["run", "plot"]]
    """what to do"""
    runs_dir: Path = Path("runs/benchmark")
    """where the run directories are"""
    seeds: int = 5
    """seeds 1 to this number"""
    workers: int = 2
    """runs at the same time"""
    flags: str = "--compile"
    """flags for the script"""


def find_run(args: Args, env_id: str, seed: int) -> Path | None:
    """The newest run directory of this environment and seed, or None."""
    found = sorted(args.runs_dir.glob(f"{env_id}__{SUITES[args.suite].script}__{seed}__*/checkpoint.pt"))
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
    script, envs, _ = SUITES[args.suite]

    def job(env_id: str, seed: int) -> int:
        command = [sys.executable, str(ROOT / f"{script}.py"), "--env-id", env_id, "--seed", str(seed)]
        run_dir = find_run(args, env_id, seed)
        command += ["--resume", str(run_dir)] if run_dir else ["--runs-dir", str(args.runs_dir), *args.flags.split()]
        result = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        tail = result.stderr.strip().splitlines()[-1:] or [""]
        print(f"{env_id} seed {seed}: exit code {result.returncode}; {tail[0]}", flush=True)
        return result.returncode != 0

    with ThreadPoolExecutor(args.workers) as pool:
        return sum(pool.map(job, *zip(*[(env_id, seed) for seed in range(1, args.seeds + 1) for env_id in envs])))


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
    """95% t-interval of the mean over seeds; not-a-number for one seed alone."""
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def cell(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds, as the table shows them."""
    deviation = f" +- {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{deviation} ({len(values)} seed{'s' * (len(values) > 1)})"


def plot(args: Args) -> None:
    """Writes the CSV of our curves and the figure (95% bootstrap bands), and prints the table (t-intervals)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    script, envs, published = SUITES[args.suite]
    reference, results = (ROOT / "benchmark" / kind / f"{args.suite}.csv" for kind in ("reference", "results"))
    ours = {env_id: {} for env_id in envs}
    for env_id in envs:
        for seed in range(1, args.seeds + 1):
            if run_dir := find_run(args, env_id, seed):
                ours[env_id][seed] = curve(run_dir)
    if any(ours.values()):
        write(results, ours)
    ours, official = read(results), read(reference) if reference.exists() else {}
    rng = np.random.default_rng(0)
    size = (max(4 * len(envs), 6), 3.6)
    figure, axes = plt.subplots(1, len(envs), figsize=size, constrained_layout=True, squeeze=False)
    print(f"| environment | measured | {script}.py | its 95% interval | official code | its 95% interval |")
    print("|---|---|---|---|---|---|")
    for axis, env_id in zip(axes[0], envs):
        finals = {}
        for name, curves, color in ((f"{script}.py", ours, "tab:blue"), ("official (ppo2)", official, "0.45")):
            if env_id not in curves:
                finals[name] = dict.fromkeys(("at the end", "last tenth"))
                continue
            seeds = list(curves[env_id].values())
            steps = np.array([step for step, _ in seeds[0]])
            returns = np.array([[value for _, value in points] for points in seeds])
            resampled = rng.choice(returns, (2000, len(returns))).mean(1)
            low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
            axis.plot(steps, returns.mean(0), color=color, label=f"{name}, {cell(returns[:, -1]).split('(')[1][:-1]}")
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
            finals[name] = {"at the end": returns[:, -1], "last tenth": returns[:, -len(steps) // 10 :].mean(1)}
        mine, theirs = finals.values()
        for when in mine:
            cells = []
            for values in (mine[when], theirs[when]):
                low, high = (np.nan, np.nan) if values is None else interval(list(values))
                cells.append("-" if values is None else cell(values))
                cells.append("-" if np.isnan(low) else f"{low:.1f} to {high:.1f}")
            print(f"| {env_id} | {when} | {' | '.join(cells)} |")
        if env_id in published:
            mean, deviation = published[env_id]
            label = f"article{', -v2' if args.suite == 'mujoco' else ', 10M steps'}: {mean} +- {deviation}"
            axis.errorbar([steps[-1]], [mean], [deviation], fmt="o", color="0.2", ms=4, capsize=3, label=label)
        axis.set(title=env_id, xlabel="environment steps", ylabel="mean return of 100 episodes")
        if np.ptp(axis.get_ylim()) < 50:  # a flat curve
            axis.set_ylim(returns[0, -1] - 50, returns[0, -1] + 50)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left" if env_id in published else "lower right", fontsize=8)
    (ROOT / "docs/img").mkdir(parents=True, exist_ok=True)
    figure.savefig(ROOT / f"docs/img/{args.suite}.png", dpi=110)


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    if arguments.command == "run":
        sys.exit(1 if run(arguments) else 0)
    plot(arguments)
