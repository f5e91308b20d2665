"""Measures training speed on this machine, all commands side by side.

    python -m benchmark throughput --peer 'CleanRL=python /path/to/cleanrl/ppo.py --total-timesteps {steps}'
    python -m benchmark throughput --script ppo_atari_envpool --modes eager compile amp
    python -m benchmark throughput --script ppo_continuous --num-envs 1 4 16 64 --batch-size 2048

Every command is run with a small and with a large number of steps ({steps} in the command): their difference leaves out
what start-up and compilation cost. The large number is chosen for each command so that the difference takes about
--seconds. The commands take turns, round after round, so that a machine whose speed drifts treats all alike. The table
gives medians over the rounds, with the median of the ratios within a round to each peer.

A command that fails is left out from then on, and reported; what the others and its own earlier rounds gave stays.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmark.files import write_file
from benchmark.provenance import provenance
from benchmark.suite import ROOT, InputError, writing
from benchmark.text import markdown_table, printable

PYTHON = shlex.quote(sys.executable)
MODES = {"eager": "", "compile": "--compile", "eager-amp": "--amp", "amp": "--compile --amp"}
MODES |= {"cudagraphs": "--compile --amp --cudagraphs"}


@dataclass
class Args:
    """Steps per second and peak memory of training commands, start-up left out."""

    peer: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """a command to compare with, as NAME=COMMAND with {steps} where the number of steps goes; may be repeated. It is
    run in an empty directory, so that its paths must be absolute"""
    script: str = "ppo"
    """our script"""
    modes: list[Literal["eager", "compile", "eager-amp", "amp", "cudagraphs"]] = field(
        default_factory=lambda: ["eager", "compile"]
    )
    """how our script is run: plain, with --compile, with --amp, with both, with both and --cudagraphs (where a script
    has them)"""
    num_envs: list[int] = field(default_factory=list)
    """instead of these: our script with these numbers of environments, beside the environments alone"""
    batch_size: int | None = None
    """with --num-envs, samples in one rollout, so that --num-steps is this by the number of environments"""
    flags: str = ""
    """flags for our script"""
    steps: int = 20_480
    """the small number of steps; with --num-envs at least two rollouts"""
    seconds: float = 20
    """how much longer the run with the large number of steps should take"""
    rounds: int = 5
    """how often every command is measured"""
    threads: int | None = None
    """of every command (OMP_NUM_THREADS); default: as many as it takes, with which some crawl beside other work"""
    output: Path | None = None
    """file for the table, as NAME.md; all measurements go into NAME.json beside it"""


class Failed(Exception):
    """A command that cannot be measured."""


def measure(command: str, steps: int, directory: str) -> tuple[float, float]:
    """Wall-clock seconds and peak memory in MiB of `command` for `steps` steps; raises Failed."""
    words = shlex.split(command.replace("{steps}", str(steps)))
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment, nothing = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, subprocess.DEVNULL
    with tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                words, cwd=directory, env=environment, stdin=nothing, stdout=nothing, stderr=stderr
            )
        except OSError as error:
            raise Failed(str(error)) from error
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C: leave no training behind
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # for Popen, which has not seen the process end
        if process.returncode:
            stderr.seek(0)
            last = stderr.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise Failed(f"exit code {process.returncode}: {last[0]}")
    return seconds, usage.ru_maxrss / 1024


def large_steps(command: str, small: int, seconds: float, directory: str) -> int:
    """The number of steps for which `command` takes about `seconds` longer than for `small`; raises Failed."""
    start_up, factor = measure(command, small, directory)[0], 2
    while (extra := measure(command, (1 + factor) * small, directory)[0] - start_up) < seconds / 3:
        factor *= 3
        if factor > 10**6:
            raise Failed(f"{factor // 3:,} times as many steps take no longer; does the command use {{steps}}?")
    return small * (1 + max(2, round(factor * seconds / extra)))


def table(speeds: dict[str, list[float]], memory: dict[str, float], baselines: list[str]) -> str:
    """Markdown table: median steps per second, peak memory, and the median of the rounds' ratios to each baseline."""
    speeds = {name: values for name, values in speeds.items() if values}
    baselines = [name for name in baselines if name in speeds]
    ratios = [f"vs {name}, median of the rounds' ratios" for name in baselines]
    lines = [["command", "steps/s, median", "min-max", "memory, MiB", *ratios]]
    for name, values in speeds.items():
        # A command that failed has fewer rounds than the others: zip pairs those that both have.
        ratios = [statistics.median(a / b for a, b in zip(values, speeds[baseline])) for baseline in baselines]
        spread = f"{min(values):,.0f}-{max(values):,.0f}"
        cells = [name, f"{statistics.median(values):,.0f}", spread, f"{memory[name]:,.0f}"]
        lines.append(cells + [f"{ratio:.2f}x" for ratio in ratios])
    return markdown_table(lines)


def parse_peers(entries: list[str]) -> dict[str, str]:
    """Commands of the peers by name; raises InputError."""
    peers = {}
    for entry in entries:
        name, _, command = entry.partition("=")
        if not name or "{steps}" not in command:
            raise InputError(f"--peer must be NAME=COMMAND with {{steps}} in the command, not {entry!r}")
        if name in peers:
            raise InputError(f"two peers have the name {name}")
        try:
            shlex.split(command)
        except ValueError as error:
            raise InputError(f"--peer {name}: {error}") from error
        peers[name] = command
    return peers


def all_commands(args: Args, peers: dict[str, str]) -> tuple[dict[str, str], dict[str, int]]:
    """Commands of the peers and of our script by name, and the small number of steps of each; raises InputError."""
    name = args.script.removesuffix(".py")
    script = ROOT / f"{name}.py"
    if not script.exists():
        raise InputError(f"there is no script {script}")
    if min(args.steps, args.rounds, 1 if args.threads is None else args.threads) < 1 or args.seconds <= 0:
        raise InputError("--steps, --rounds, --threads and --seconds must be above 0")
    if args.num_envs and not 1 <= min(args.num_envs) <= max(args.num_envs) <= (args.batch_size or math.inf):
        raise InputError("--num-envs must be above 0, and not above --batch-size")
    try:
        shlex.split(args.flags)
    except ValueError as error:
        raise InputError(f"--flags: {error}") from error
    ours = f"{PYTHON} {shlex.quote(str(script))} --total-timesteps {{steps}} {args.flags}"
    if not args.num_envs:
        modes = [MODES[mode] for mode in args.modes]
        own = {f"{name}.py {mode}".strip(): f"{ours} {mode}" for mode in modes}
        return beside(peers, own), dict.fromkeys([*peers, *own], args.steps)
    envs = f"{PYTHON} -m benchmark.env_only {shlex.quote(name)} --total-timesteps {{steps}} {args.flags}"
    own, small = {}, dict.fromkeys(peers, args.steps)
    for count in args.num_envs:
        num_steps = args.batch_size // count if args.batch_size else 128
        own[f"{count} envs"] = f"{ours} --num-envs {count} --num-steps {num_steps}"
        own[f"{count} envs, environments alone"] = f"{envs} --num-envs {count}"
        small[f"{count} envs"] = small[f"{count} envs, environments alone"] = max(args.steps, 2 * num_steps * count)
    return beside(peers, own), small


def beside(peers: dict[str, str], own: dict[str, str]) -> dict[str, str]:
    """All commands by name; raises InputError if a peer has the name of one of ours."""
    if same := peers.keys() & own.keys():
        raise InputError(f"a peer cannot have the name {min(same)}: that is our script's")
    return peers | own


def main(args: Args) -> int:
    """Measures, prints the table, and writes table and numbers after every round if asked to."""
    peers = parse_peers(args.peer)
    commands, small = all_commands(args, peers)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    baselines = list(peers) or list(commands)[: not args.num_envs]
    large, failures = {}, {}
    speeds: dict[str, list[float]] = {name: [] for name in commands}
    memory = dict.fromkeys(commands, 0.0)
    if args.output:
        with writing(args.output):  # now, not when the first round has been measured
            args.output.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.output.parent).close()

    def leave_out(name: str, error: Failed) -> None:
        failures[name] = str(error)
        print(printable(f"{name} is left out: {error}"), file=sys.stderr)

    with tempfile.TemporaryDirectory() as directory:
        for name, command in commands.items():
            try:
                large[name] = large_steps(command, small[name], args.seconds, directory)
            except Failed as error:
                leave_out(name, error)
        for round_number in range(1, args.rounds + 1):
            for name in [name for name in commands if name not in failures]:
                try:
                    long, peak = measure(commands[name], large[name], directory)
                    short, _ = measure(commands[name], small[name], directory)
                    if long <= short:
                        raise Failed(f"{large[name]:,} steps took no longer than {small[name]:,}; use longer --seconds")
                except Failed as error:
                    leave_out(name, error)
                    continue
                speeds[name].append((large[name] - small[name]) / (long - short))
                memory[name] = max(memory[name], peak)
                print(printable(f"round {round_number}: {name} {speeds[name][-1]:,.0f} steps/s"), file=sys.stderr)
            if output := args.output:
                output = output.with_suffix("") if output.suffix in (".md", ".json") else output
                facts = provenance() | {"commands": commands, "failures": failures, "small": small, "large": large}
                facts["threads"] = os.environ.get("OMP_NUM_THREADS")
                facts |= {"steps_per_second": speeds, "peak_mib": memory}
                write_file(output.with_name(f"{output.name}.json"), json.dumps(facts, indent=1) + "\n")
                write_file(output.with_name(f"{output.name}.md"), table(speeds, memory, baselines) + "\n")
    if any(speeds.values()):
        print(table(speeds, memory, baselines))
    for name, message in failures.items():
        print(printable(f"{name} failed: {message}"), file=sys.stderr)
    return 1 if failures else 0
