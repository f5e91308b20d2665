"""What switching a detail off does to learning, one flag changed at a time.

    python -m benchmark.ablations classic    # ppo.py; runs what is missing, then writes benchmark/results/
    python -m benchmark.ablations mujoco     # ppo_continuous.py
    python docs/index_details.py             # puts the effects into docs/details.md

Two numbers for each variant, as differences from the defaults with a 95% interval (Welch) over seeds: the mean of the
learning curve (how fast it learns) and its last point, the mean return of the last 100 episodes.
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from scipy import stats

from benchmark.curves import ROOT, curve

CLASSIC = [
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
CONTINUOUS = [
    ("continuous-2", "--state-dependent-std"),
    ("continuous-4", "--shared-network"),
    ("continuous-5", "--no-clip-action"),
    ("continuous-5", "--squash-action"),
    ("continuous-6", "--no-norm-obs"),
    ("continuous-7", "--no-clip-obs"),
    ("continuous-8", "--no-norm-reward"),
    ("continuous-9", "--no-clip-reward"),
    ("extra-1", "--no-adam-eps-hat"),
    ("extra-14", "--bootstrap-truncated"),
]


class Study(NamedTuple):
    """Which variants are compared, and where."""

    script: str
    env_id: str
    total_timesteps: int
    variants: list[tuple[str, str]]


STUDIES = {
    "classic": Study("ppo", "CartPole-v1", 200_000, CLASSIC),
    "mujoco": Study("ppo_continuous", "HalfCheetah-v4", 200_000, CONTINUOUS),
}


@dataclass
class Args:
    """Runs the ablations."""

    study: tyro.conf.Positional[Literal["classic", "mujoco"]]
    """which variants"""
    runs_dir: Path = Path("runs/ablations")
    """where the run directories are"""
    seeds: int = 3
    """seeds 1 to this number"""
    workers: int = 2
    """runs at the same time"""


def name_of(flags: str) -> str:
    """Experiment name of a variant."""
    return "default" if not flags else flags.strip("-").replace(" ", "_")


def run(args: Args, flags: str, seed: int) -> Path:
    """The finished run directory of a variant and seed; trains it if there is none."""
    script, env_id, steps, _ = STUDIES[args.study]
    pattern = f"{env_id}__{name_of(flags)}__{seed}__*"
    for found in args.runs_dir.glob(pattern):
        if curve(found)[-1:] and curve(found)[-1][0] >= 0.99 * steps:
            return found
    command = [sys.executable, str(ROOT / f"{script}.py"), "--compile", "--exp-name", name_of(flags)]
    command += ["--env-id", env_id, "--seed", str(seed), "--runs-dir", str(args.runs_dir)]
    command += ["--total-timesteps", str(steps), *flags.split()]
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
    variants, results_file = STUDIES[args.study].variants, ROOT / f"benchmark/results/ablations_{args.study}.csv"
    jobs = [(flags, seed) for seed in range(1, args.seeds + 1) for flags in ["", *(flags for _, flags in variants)]]
    with ThreadPoolExecutor(args.workers) as pool:
        results = dict(zip(jobs, pool.map(lambda job: scores(run(args, *job)), jobs)))
    by_variant = {flags: [results[flags, seed] for seed in range(1, args.seeds + 1)] for flags, _ in jobs}
    with open(results_file, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tag", "flags", "curve_mean", "final_return", "effect"])
        for tag, flags in [("default", ""), *variants]:
            (speed, final), (base_speed, base_final) = zip(*by_variant[flags]), zip(*by_variant[""])
            effect = f"{difference(speed, base_speed)} over the run, {difference(final, base_final)} at its end"
            row = [tag, flags, f"{np.mean(speed):.1f}", f"{np.mean(final):.1f}", effect if flags else ""]
            writer.writerow(row)


if __name__ == "__main__":
    main()
