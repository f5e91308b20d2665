"""Measures training speed on this machine, all commands side by side.

    python -m benchmark.throughput --peer 'CleanRL=python cleanrl/ppo.py --total-timesteps {steps}'
    python -m benchmark.throughput --num-envs 1 4 16 64 256 1024
    python -m benchmark.throughput --script ppo_continuous --num-envs 1 4 16 64 --batch-size 2048
    python -m benchmark.throughput --script ppo_atari --modes '' --compile '--compile --amp'

Every command is run with a small and with a large number of steps ({steps} in the command): their difference leaves out
what start-up and compilation cost. The large number is chosen for each command so that the difference takes about
--seconds. The commands take turns, round after round, so that a machine whose speed drifts treats all alike. The table
gives medians over the rounds, with the median of the ratios within a round to each peer.
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
PYTHON = shlex.quote(sys.executable)


@dataclass
class Args:
    """Steps per second and peak memory of training commands, start-up left out."""

    peer: list[str] = field(default_factory=list)
    """commands to compare with, as NAME=COMMAND with {steps} where the number of steps goes"""
    script: str = "ppo"
    """our script"""
    modes: list[str] = field(default_factory=lambda: ["", "--compile"])
    """flags that our script is measured with, one after the other"""
    num_envs: list[int] = field(default_factory=list)
    """instead of these: our script with these numbers of environments, beside the environments alone"""
    batch_size: int | None = None
    """with --num-envs, samples in one rollout, so that --num-steps is this by the number of environments"""
    flags: str = ""
    """flags for our script"""
    steps: int = 20_480
    """the small number of steps, rounded up to two rollouts"""
    seconds: float = 20
    """how much longer the run with the large number of steps should take"""
    rounds: int = 5
    """how often every command is measured"""
    output: Path | None = None
    """file for all measurements, as JSON"""


def measure(command: str, steps: int, directory: str) -> tuple[float, float]:
    """Wall-clock seconds and peak memory in MiB of `command` for `steps` steps; raises RuntimeError if it fails."""
    words = shlex.split(command.replace("{steps}", str(steps)))
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def table(speeds: dict[str, list[float]], memory: dict[str, float], baselines: list[str]) -> str:
    """Markdown table: median steps per second, peak memory, and the median of the rounds' ratios to each baseline."""
    lines = ["| command | steps/s, median | min-max | memory, MiB |" + "".join(f" vs {name} |" for name in baselines)]
    lines.append("|---|---|---|---|" + "---|" * len(baselines))
    for name, values in speeds.items():
        ratios = [statistics.median(a / b for a, b in zip(values, speeds[baseline])) for baseline in baselines]
        spread = f"{min(values):,.0f}-{max(values):,.0f}"
        cells = [name, f"{statistics.median(values):,.0f}", spread, f"{memory[name]:,.0f}"]
        lines.append("| " + " | ".join(cells + [f"{ratio:.2f}x" for ratio in ratios]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, and writes the numbers if asked to."""
    args = tyro.cli(Args)
    ours = f"{PYTHON} {shlex.quote(str(ROOT / args.script))}.py --total-timesteps {{steps}} {args.flags}"
    envs = f"{PYTHON} -m benchmark.env_only {args.script} --total-timesteps {{steps}} {args.flags}"
    commands, base = dict(entry.split("=", 1) for entry in args.peer), {}
    if args.num_envs:
        for count in args.num_envs:
            num_steps = args.batch_size // count if args.batch_size else 128
            commands[f"{count} envs"] = f"{ours} --num-envs {count} --num-steps {num_steps}"
            commands[f"{count} envs, environments alone"] = f"{envs} --num-envs {count}"
            base[f"{count} envs"] = base[f"{count} envs, environments alone"] = max(args.steps, 2 * num_steps * count)
    else:
        commands |= {f"{args.script}.py {mode}".strip(): f"{ours} {mode}" for mode in args.modes}
    speeds: dict[str, list[float]] = {name: [] for name in commands}
    memory = dict.fromkeys(commands, 0.0)
    with tempfile.TemporaryDirectory() as directory:
        large = {}
        for name, command in commands.items():
            small = base.setdefault(name, args.steps)
            factor, start_up = 2, measure(command, small, directory)[0]
            while (extra := measure(command, (1 + factor) * small, directory)[0] - start_up) < args.seconds / 3:
                factor *= 3
            large[name] = small * (1 + max(2, round(factor * args.seconds / extra)))
        for round_number in range(1, args.rounds + 1):
            for name, command in commands.items():
                (long, memory[name]), (short, _) = (measure(command, n, directory) for n in (large[name], base[name]))
                speeds[name].append((large[name] - base[name]) / (long - short))
                print(f"round {round_number}: {name} {speeds[name][-1]:,.0f} steps/s", file=sys.stderr)
    baselines = [entry.split("=", 1)[0] for entry in args.peer] or list(commands)[: not args.num_envs]
    print(table(speeds, memory, baselines))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"python": platform.python_version(), "cores": os.cpu_count(), "small": base, "large": large}
        args.output.write_text(json.dumps(facts | {"steps_per_second": speeds, "peak_mib": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
