"""Compares the speed of training commands on this machine, side by side.

    python -m benchmark.throughput --peer 'CleanRL=python cleanrl/ppo.py --total-timesteps {steps}'

Every command is run with a small and with a large number of steps ({steps} in the command); their difference leaves
out what start-up and compilation cost. The large number is chosen for each command so that the difference takes about
--seconds. The commands take turns, round after round, so that a machine whose speed drifts treats all alike. The table
gives medians over the rounds, and the median of the ratios within a round to each peer.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    """Steps per second of training commands, start-up left out."""

    peer: list[str] = field(default_factory=list)
    """commands to compare with, as NAME=COMMAND with {steps} where the number of steps goes"""
    ours: list[str] = field(
        default_factory=lambda: [
            f"ppo.py={sys.executable} {ROOT / 'ppo.py'} --total-timesteps {{steps}}",
            f"ppo.py --compile={sys.executable} {ROOT / 'ppo.py'} --compile --total-timesteps {{steps}}",
        ]
    )
    """our commands, in the same form"""
    steps: int = 20_480
    """the small number of steps, a multiple of every command's rollout"""
    seconds: float = 20
    """how much longer the run with the large number of steps should take"""
    rounds: int = 5
    """how often every command is measured"""
    output: Path | None = None
    """file for all measurements, as JSON"""


def seconds(command: str, steps: int, directory: str) -> float:
    """Wall-clock seconds that `command` takes for `steps` steps; raises CalledProcessError if it fails."""
    start = time.perf_counter()
    words = shlex.split(command.replace("{steps}", str(steps)))
    subprocess.run(words, cwd=directory, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def table(speeds: dict[str, list[float]], baselines: list[str]) -> str:
    """Markdown table of the median steps per second, and of the median ratio to each baseline, round by round."""
    lines = ["| command | steps/s (median) | min-max |" + "".join(f" vs {name} |" for name in baselines)]
    lines.append("|---|---|---|" + "---|" * len(baselines))
    for name, values in speeds.items():
        ratios = [statistics.median(a / b for a, b in zip(values, speeds[baseline])) for baseline in baselines]
        spread = f"{min(values):,.0f}-{max(values):,.0f}"
        cells = [name, f"{statistics.median(values):,.0f}", spread, *(f"{ratio:.2f}x" for ratio in ratios)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table as it grows, and writes the numbers if asked to."""
    args = tyro.cli(Args)
    commands = dict(entry.split("=", 1) for entry in args.peer + args.ours)
    speeds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as directory:
        large = {}
        for name, command in commands.items():
            extra = seconds(command, 3 * args.steps, directory) - seconds(command, args.steps, directory)
            large[name] = args.steps * (1 + max(2, round(2 * args.seconds / max(extra, 0.1))))
        for round_number in range(1, args.rounds + 1):
            for name, command in commands.items():
                extra = seconds(command, large[name], directory) - seconds(command, args.steps, directory)
                speeds[name].append((large[name] - args.steps) / extra)
                print(f"round {round_number}: {name} {speeds[name][-1]:,.0f} steps/s", file=sys.stderr)
    baselines = [entry.split("=", 1)[0] for entry in args.peer] or list(commands)[:1]
    print(table(speeds, baselines))
    if args.output:
        facts = {"python": platform.python_version(), "cores": os.cpu_count(), "steps": [args.steps, large]}
        facts["steps_per_second"] = speeds
        args.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
