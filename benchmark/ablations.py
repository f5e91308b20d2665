"""What switching a detail off does to learning, one flag changed at a time.

    python -m benchmark ablations classic    # ppo.py; runs what is missing, then writes benchmark/results/
    python -m benchmark ablations mujoco     # ppo_continuous.py
    python -m benchmark ablations lstm       # ppo_lstm.py
    python docs/index_details.py             # puts the effects into docs/details.md

Two numbers for each variant, as differences from the defaults with a 95% interval (Welch) over seeds: the mean of the
learning curve (how fast it learns) and its last point, the mean return of the last 100 episodes.
"""

import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from scipy import stats

from benchmark.files import write_file
from benchmark.plot import RETURN, metric_by_update
from benchmark.provenance import provenance
from benchmark.run import Display, Task, prepare, run_local, summarize
from benchmark.suite import ROOT, InputError, Job, read_metrics

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
LSTM = [
    ("lstm-1", "--no-lstm-orthogonal-init"),
    ("lstm-3", "--no-reset-lstm-state"),
    ("lstm-4", "--shuffle-lstm-steps"),
    ("lstm-5", "--no-reconstruct-lstm-state"),
    ("extra-22", "--no-encoder"),
    ("continuous-6", "--no-norm-obs"),
    ("continuous-8", "--no-norm-reward"),
    ("extra-14", "--no-bootstrap-truncated"),
]


class Study(NamedTuple):
    """Which variants are compared, and where."""

    script: str
    env_id: str
    total_timesteps: int
    variants: list[tuple[str, str]]
    flags: str = "--compile"  # of all variants


STUDIES = {
    "classic": Study("ppo.py", "CartPole-v1", 200_000, CLASSIC),
    "mujoco": Study("ppo_continuous.py", "HalfCheetah-v4", 200_000, CONTINUOUS),
    "lstm": Study("ppo_lstm.py", "CartPole-v1", 200_000, LSTM, "--bootstrap-truncated"),
}


@dataclass
class Args:
    """Runs the ablations."""

    study: tyro.conf.Positional[Literal["classic", "mujoco", "lstm"]]
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


def job(study: Study, flags: str, seed: int) -> Job:
    """The training of a variant with a seed."""
    words = f"{study.flags} --exp-name {name_of(flags)} --total-timesteps {study.total_timesteps} {flags}".split()
    return Job(study.script, study.env_id, seed, tuple(words), name_of(flags))


def scores(run_dir: Path) -> tuple[float, float]:
    """Mean of the learning curve, and its last point."""
    values = metric_by_update(read_metrics(run_dir), RETURN)
    return float(np.nanmean(values)), float(values[-1])


def difference(a: list[float], b: list[float]) -> str:
    """Difference of the means with the half-width of its 95% interval."""
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval()
    return f"{np.mean(a) - np.mean(b):+.0f} +- {(high - low) / 2:.0f}"


def main(args: Args) -> int:
    """Runs everything and writes the CSV; returns the exit code."""
    if args.workers < 1 or args.seeds < 2:  # one seed alone has no interval
        raise InputError("--workers must be at least 1, and --seeds at least 2")
    study, runs_dir = STUDIES[args.study], args.runs_dir.resolve()
    variants, results_file = study.variants, ROOT / f"benchmark/results/ablations_{args.study}.csv"
    pairs = [(flags, seed) for seed in range(1, args.seeds + 1) for flags in ["", *(flags for _, flags in variants)]]
    tasks = {pair: Task(job(study, *pair), runs_dir) for pair in pairs}
    prepare(runs_dir)
    stopped = run_local([*tasks.values()], args.workers, Display([*tasks.values()], f"Ablations: {args.study}"))
    if code := summarize([*tasks.values()], stopped):
        return code
    by_variant = {flags: [] for flags, _ in pairs}
    for (flags, _), task in tasks.items():
        by_variant[flags].append(scores(task.state.path))
    with io.StringIO() as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tag", "flags", "curve_mean", "final_return", "effect"])
        for tag, flags in [("default", ""), *variants]:
            (speed, final), (base_speed, base_final) = zip(*by_variant[flags]), zip(*by_variant[""])
            effect = f"{difference(speed, base_speed)} over the run, {difference(final, base_final)} at its end"
            row = [tag, flags, f"{np.mean(speed):.1f}", f"{np.mean(final):.1f}", effect if flags else ""]
            writer.writerow(row)
        write_file(results_file, file.getvalue())
    facts = provenance() | {"runs": sorted(task.state.path.name for task in tasks.values())}
    write_file(results_file.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
