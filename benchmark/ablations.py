"""What switching a detail off does to learning: ppo.py on CartPole-v1 with one flag changed at a time.

    python -m benchmark.ablations       # runs what is missing, then writes benchmark/results/ablations.csv
    python docs/index_details.py        # puts the effects into docs/details.md

Two numbers for each variant, as differences from the defaults with a 95% interval (Welch) over seeds: the mean of the
learning curve (how fast it learns) and its last point, the mean return of the last 100 episodes.
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

from benchmark.classic import ROOT, curve

RESULTS = ROOT / "benchmark/results/ablations.csv"
VARIANTS = [
    ("core-2", "--no-orthogonal-init"),
    ("core-3", "--adam-eps 1e-8"),
    ("core-4", "--no-anneal-lr"),
    ("core-5", "--gae-lambda 1"),
    ("core-6", "--num-minibatches 1"),
    ("core-6", "--minibatch-replacement"),
    ("core-7", "--no-norm-adv"),
    ("core-7", "--norm-adv-per-batch"),
    ("core-8", "--no-clip-policy"),
    ("core-9", "--no-clip-vloss"),
    ("core-10", "--ent-coef 0"),
    ("core-11", "--max-grad-norm inf"),
    ("core-13", "--shared-network"),
    ("aux-1", "--anneal-clip"),
    ("aux-3", "--target-kl 0.01"),
    ("extra-1", "--no-adam-eps-hat"),
    ("extra-3", "--no-population-std"),
    ("extra-14", "--bootstrap-truncated"),
]


@dataclass
class Args:
    """Runs the ablations."""

    runs_dir: Path = Path("runs/ablations")
    """where the run directories are"""
    total_timesteps: int = 200_000
    """steps of each run"""
    seeds: int = 3
    """seeds 1 to this number"""
    workers: int = 2
    """runs at the same time"""


def name_of(flags: str) -> str:
    """Experiment name of a variant."""
    return "default" if not flags else flags.strip("-").replace(" ", "_")


def run(args: Args, flags: str, seed: int) -> Path:
    """The finished run directory of a variant and seed; trains it if there is none."""
    pattern = f"CartPole-v1__{name_of(flags)}__{seed}__*"
    for found in args.runs_dir.glob(pattern):
        if curve(found)[-1:] and curve(found)[-1][0] >= args.total_timesteps - 512:
            return found
    command = [sys.executable, str(ROOT / "ppo.py"), "--compile", "--exp-name", name_of(flags), "--seed", str(seed)]
    command += ["--runs-dir", str(args.runs_dir), "--total-timesteps", str(args.total_timesteps), *flags.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return max(args.runs_dir.glob(pattern))


def scores(run_dir: Path) -> tuple[float, float]:
    """Mean of the learning curve, and its last point."""
    values = np.array([value for _, value in curve(run_dir)])
    return float(np.nanmean(values)), float(values[-1])


def difference(a: list[float], b: list[float]) -> str:
    """Difference of the means with the half-width of its 95% interval."""
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval()
    return f"{np.mean(a) - np.mean(b):+.0f} +- {(high - low) / 2:.0f}"


def main() -> None:
    """Runs everything and writes the CSV."""
    args = tyro.cli(Args)
    jobs = [(flags, seed) for seed in range(1, args.seeds + 1) for flags in ["", *(flags for _, flags in VARIANTS)]]
    with ThreadPoolExecutor(args.workers) as pool:
        results = dict(zip(jobs, pool.map(lambda job: scores(run(args, *job)), jobs)))
    by_variant = {flags: [results[flags, seed] for seed in range(1, args.seeds + 1)] for flags, _ in jobs}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tag", "flags", "curve_mean", "final_return", "effect"])
        for tag, flags in [("default", ""), *VARIANTS]:
            (speed, final), (base_speed, base_final) = zip(*by_variant[flags]), zip(*by_variant[""])
            effect = f"{difference(speed, base_speed)} over the run, {difference(final, base_final)} at its end"
            row = [tag, flags, f"{np.mean(speed):.1f}", f"{np.mean(final):.1f}", effect if flags else ""]
            writer.writerow(row)


if __name__ == "__main__":
    main()
