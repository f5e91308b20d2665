"""Measures what the harness itself costs.

    python -m benchmark.harness_cost              # one training with and without the harness, taking turns
    python -m benchmark.harness_cost --synthetic  # 10,000 run directories to scan; 45 runs of 10M steps to plot

A training under the harness is compared with the same command given by hand, start-up included; medians over rounds.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmark import plot
from benchmark.suite import ROOT, load_suite, suite_runs

SUITE = """title = "Cost"
script = "ppo.py"
env_ids = ["CartPole-v1"]
seeds = [1]
flags = ["--total-timesteps", "{steps}"]
"""
LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl", "official_approx_kl", "clipfrac")


@dataclass
class Args:
    """What the harness costs."""

    synthetic: bool = False
    """measure scanning and plotting made-up runs instead"""
    steps: int = 500_000
    """of each training"""
    rounds: int = 3
    """how often each of both is timed"""


def timed(*words: str, folder: Path) -> float:
    """Seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=open(folder / "log", "w")
    )
    return time.perf_counter() - start


def overhead(args: Args, folder: Path) -> None:
    """Times a training by hand and under the harness."""
    (folder / "cost.toml").write_text(SUITE.format(steps=args.steps))
    by_hand, harness = [], []
    for number in range(args.rounds):
        where = ("--runs-dir", str(folder / f"runs{number}"))
        by_hand.append(
            timed("ppo.py", "--total-timesteps", str(args.steps), "--runs-dir", str(folder / "hand"), folder=folder)
        )
        harness.append(
            timed("-m", "benchmark", "run", str(folder / "cost.toml"), "--workers", "1", *where, folder=folder)
        )
        print(f"round {number + 1}: {by_hand[-1]:.2f} s by hand, {harness[-1]:.2f} s under the harness", flush=True)
    ratio = statistics.median(b / a for a, b in zip(by_hand, harness)) - 1
    print(f"{statistics.median(by_hand):.2f} s, {statistics.median(harness):.2f} s: {ratio:+.1%}")


def make_run(runs: Path, env_id: str, seed: int, updates: int) -> None:
    """Writes a finished run with so many updates of 1024 steps, and two episodes in each."""
    path, rng, lines = runs / f"{env_id}__ppo__{seed}__{1_700_000_000 + seed}", random.Random(f"{env_id} {seed}"), []
    path.mkdir(parents=True)
    config = {"env_id": env_id, "seed": seed, "num_envs": 8, "num_steps": 128, "total_timesteps": updates * 1024}
    (path / "config.json").write_text(json.dumps(config))
    for update in range(1, updates + 1):
        row = {"global_step": update * 1024, "wall_time": update * 1.5}
        for _ in range(2):
            episode = {"charts/episodic_return": rng.gauss(update / updates, 0.1), "charts/episodic_length": 512}
            lines.append(json.dumps(row | episode))
        losses = {f"losses/{name}": rng.random() for name in LOSSES}
        lines.append(json.dumps(row | losses | {"charts/learning_rate": 2.5e-4, "charts/SPS": 700}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "checkpoint.pt").touch()


def synthetic(folder: Path) -> None:
    """Times looking through 10,000 runs of 100 updates, and plotting 45 of 9,765."""
    for envs, seeds, updates in ((100, 100, 100), (9, 5, 9765)):
        suite, runs = folder / f"made{envs}.toml", folder / f"runs{envs}"
        names, numbers = [f"Env{number}-v0" for number in range(envs)], list(range(1, seeds + 1))
        flags = ["--num-envs", "8", "--total-timesteps", str(updates * 1024)]
        entries = {"title": "Made", "script": "ppo.py", "env_ids": names, "seeds": numbers, "flags": flags}
        suite.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items()))
        for name in names:
            for seed in numbers:
                make_run(runs, name, seed, updates)
        start = time.perf_counter()
        if envs == 100:
            found = suite_runs(load_suite(str(suite)), runs)
            print(f"{len(found):,} run directories scanned in {time.perf_counter() - start:.1f} s", flush=True)
        else:
            plot.main(plot.Args(str(suite), runs_dir=runs, results=folder / "results", output=folder / "img"))
            print(f"{envs * seeds} runs of {updates * 1024:,} steps plotted in {time.perf_counter() - start:.1f} s")


def main(args: Args) -> None:
    """Measures one or the other, in a temporary directory."""
    with tempfile.TemporaryDirectory() as folder:
        synthetic(Path(folder)) if args.synthetic else overhead(args, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(Args))
