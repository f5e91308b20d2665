"""Sends a suite's finished runs to Weights & Biases: settings, script, metrics and videos.

    python -m benchmark upload classic --project my-runs --entity my-team --tags baseline
    WANDB_MODE=offline python -m benchmark upload classic      # no account; send the written files with `wandb sync`

Repeating it changes nothing. A run's id is the name of its directory, as with --track, and the line of metrics.jsonl is
its step: so the service knows how far it has got, also after a connection that broke, and the rest is sent. What has
arrived is noted in uploaded.json in the run's directory, where wandb keeps its own files too. The script is sent as it
is today.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from benchmark.suite import ROOT, InputError, RunState, Suite, load_suite, suite_runs

RECORD = "uploaded.json"
GIVE_UP = 2  # runs in a row that cannot be sent: then it is the connection


@dataclass
class Args:
    """Sends a suite's finished runs to Weights & Biases; what is there already stays as it is."""

    suite: tyro.conf.Positional[str]
    """name of a suite in benchmark/suites, or a .toml file"""
    project: str = "ppo37"
    """project at Weights & Biases"""
    entity: str | None = None
    """user or team at Weights & Biases; default: the account's own"""
    group: str | None = None
    """group of the runs; default: the suite's name"""
    tags: list[str] = field(default_factory=list)
    """tags of the runs"""
    runs_dir: Path | None = None
    """where the run directories are; default: runs/SUITE"""


def read_record(run_dir: Path) -> dict:
    """What has been sent of a run, by destination; nothing if the record is missing or broken."""
    try:
        return json.loads((run_dir / RECORD).read_text())
    except (OSError, ValueError):
        return {}


def write_record(run_dir: Path, record: dict) -> None:
    """Replaces the record at once."""
    temporary = run_dir / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, run_dir / RECORD)


def local_contents(run_dir: Path) -> dict:
    """What a run has to send: the number of its metrics' lines, and its videos."""
    with open(run_dir / "metrics.jsonl", "rb") as file:
        lines = sum(1 for _ in file)
    return {"lines": lines, "videos": sorted(path.name for path in run_dir.glob("videos/*.mp4"))}


def send(args: Args, suite: Suite, state: RunState, first_line: int) -> None:
    """Sends a run to Weights & Biases; offline, its metrics from first_line on. Raises what wandb raises."""
    import wandb

    script, name = ROOT / suite.script, state.path.resolve().name
    # What this process uses of the machine says nothing about the training.
    settings = wandb.Settings(console="off", disable_git=True, x_disable_stats=True)
    group = args.group or suite.name
    run = wandb.init(project=args.project, entity=args.entity, group=group, tags=args.tags, config=state.config,
                     dir=state.path, name=name, id=name, resume="allow", settings=settings)  # fmt: skip
    try:
        run.define_metric("*", step_metric="global_step")
        first_line = first_line if run.offline else run.starting_step
        with open(state.path / "metrics.jsonl") as file:
            for number, line in enumerate(file):
                if number >= first_line:
                    run.log(json.loads(line), step=number)
        with tempfile.TemporaryDirectory() as folder:  # log_code looks through a whole folder: this one has one file
            shutil.copy(script, folder)
            run.log_code(folder, name=f"source-{script.stem}")
        run.save(str(state.path / "videos/*.mp4"), base_path=state.path, policy="now")
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
    if not run.offline:
        arrived = wandb.Api().run(run.path).lastHistoryStep + 1
        if arrived < number + 1:
            raise ConnectionError(f"only {arrived} of {number + 1} lines have arrived")


def main(args: Args) -> int:
    """Sends what is missing, one run after the other; returns 1 if something could not be sent."""
    import wandb

    suite = load_suite(args.suite)
    runs_dir = args.runs_dir or suite.runs_dir
    runs = suite_runs(suite, runs_dir)
    if not runs:
        raise InputError(f"no runs of suite {suite.name} in {runs_dir}")
    try:
        mode = wandb.setup().settings.mode
    except ValueError as error:  # pydantic's, about what environment variables say
        raise InputError(f"wandb: {' '.join(str(error).split())}") from error
    if mode == "disabled":
        raise InputError("WANDB_MODE is disabled: nothing would be sent")
    destination = f"{args.entity or 'default'}/{args.project}" + (f" ({mode})" if mode != "online" else "")
    counts, in_a_row = {"sent": 0, "there already": 0, "unfinished": 0, "failed": 0}, 0
    for job, state in runs.items():
        if not state.finished:
            counts["unfinished"] += 1
            print(f"{state.path.name} is not sent: it is unfinished", file=sys.stderr)
            continue
        record, contents = read_record(state.path), local_contents(state.path)
        if record.get(destination) == contents:
            counts["there already"] += 1
            continue
        try:
            send(args, suite, state, record.get(destination, {}).get("lines", 0))
            write_record(state.path, record | {destination: contents})
        except Exception as error:  # wandb raises errors of many kinds
            counts["failed"] += 1
            in_a_row += 1
            print(f"{state.path.name} is not sent: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            if in_a_row == GIVE_UP:
                print(f"stopped after {GIVE_UP} failures in a row", file=sys.stderr)
                break
            continue
        in_a_row = 0
        counts["sent"] += 1
        print(f"{state.path.name}: {contents['lines']} lines, {len(contents['videos'])} videos", flush=True)
    print(f"{destination}: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count))
    if counts["failed"]:
        print("the same command goes on where this one stopped", file=sys.stderr)
    return 1 if counts["failed"] else 0
