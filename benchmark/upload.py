"""Sends a suite's finished runs to Weights & Biases: settings, script, metrics and videos.

    python -m benchmark upload classic --project my-runs --entity my-team --tags baseline
    WANDB_MODE=offline python -m benchmark upload classic      # no account; send the written files with `wandb sync`

Repeating it changes nothing. A run's id is the name of its directory, as with --track, and the line of metrics.jsonl is
its step: so the service knows how far it has got, also after a connection that broke, and the rest is sent. What has
arrived is noted in uploaded.json in the run's directory, where wandb keeps its own files too. The script is sent as it
is today.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from benchmark.files import write_file
from benchmark.suite import ROOT, InputError, Job, RunState, Suite, load_suite, parse_line, suite_runs
from benchmark.text import printable

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


def read_record(run_dir: Path) -> dict[str, dict]:
    """What has been sent of a run, by destination; nothing if the record is missing or broken."""
    try:
        record = json.loads((run_dir / RECORD).read_bytes())
        return {destination: {"lines": int(sent["lines"]), "videos": sent["videos"]} for destination, sent in
                record.items()}  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def videos(run_dir: Path) -> list[Path]:
    """A run's videos; no symbolic links, for these could lead to any file."""
    if (run_dir / "videos").is_symlink():
        return []
    return sorted(path for path in run_dir.glob("videos/*.mp4") if path.is_file() and not path.is_symlink())


def local_contents(run_dir: Path) -> dict:
    """What a run has to send: the number of its metrics' lines, and its videos."""
    with open(run_dir / "metrics.jsonl", "rb") as file:
        lines = sum(1 for _ in file)
    return {"lines": lines, "videos": [path.name for path in videos(run_dir)]}


def send(args: Args, suite: Suite, job: Job, state: RunState, first_line: int) -> None:
    """Sends a run to Weights & Biases; offline, its metrics from first_line on. Raises what wandb raises."""
    import wandb

    script, name = ROOT / job.script, state.path.resolve().name
    if (state.path / "wandb").is_symlink():
        raise ValueError("its folder wandb is a symbolic link")
    rows = [parse_line(line) for line in (state.path / "metrics.jsonl").read_bytes().splitlines()]
    if None in rows:
        raise ValueError(f"line {rows.index(None) + 1} of its metrics.jsonl is broken")
    # What this process uses of the machine says nothing about the training.
    settings = wandb.Settings(console="off", disable_git=True, x_disable_stats=True)
    group = args.group or suite.name
    run = wandb.init(project=args.project, entity=args.entity, group=group, tags=args.tags, config=state.config,
                     dir=state.path, name=name, id=name, resume="allow", settings=settings)  # fmt: skip
    try:
        run.define_metric("*", step_metric="global_step")
        first_line = first_line if run.offline else run.starting_step
        for number, row in enumerate(rows[first_line:], first_line):
            run.log(row, step=number)
        with tempfile.TemporaryDirectory() as folder:  # log_code looks through a whole folder: this one has one file
            shutil.copy(script, folder)
            run.log_code(folder, name=f"source-{script.stem}")
        for video in videos(state.path):
            run.save(video, base_path=state.path, policy="now", glob=False)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
    if not run.offline:
        arrived = wandb.Api().run(run.path).lastHistoryStep + 1
        if arrived < len(rows):
            raise ConnectionError(f"only {arrived} of {len(rows)} lines have arrived")


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
    counts, in_a_row = {"sent": 0, "there already": 0, "unfinished": 0, "broken": 0, "failed": 0}, 0
    for job, state in runs.items():
        if not state.finished:
            reasons = {"broken": state.problem, "running": "it is still running"}
            reason = reasons.get(state.status, "it is unfinished")
            counts["broken" if state.status == "broken" else "unfinished"] += 1
            print(printable(f"{state.path.name} is not sent: {reason}"), file=sys.stderr)
            continue
        record, contents = read_record(state.path), local_contents(state.path)
        if record.get(destination) == contents:
            counts["there already"] += 1
            continue
        try:
            send(args, suite, job, state, record.get(destination, {}).get("lines", 0))
            write_file(state.path / RECORD, json.dumps(record | {destination: contents}, indent=1) + "\n")
        except Exception as error:  # wandb raises errors of many kinds
            counts["failed"] += 1
            in_a_row += 1
            reason = printable(" ".join(str(error).split()))[:300]
            print(f"{state.path.name} is not sent: {reason}", file=sys.stderr)
            if in_a_row == GIVE_UP:
                print(f"stopped after {GIVE_UP} failures in a row", file=sys.stderr)
                break
            continue
        in_a_row = 0
        counts["sent"] += 1
        print(f"{state.path.name}: {contents['lines']} lines, {len(contents['videos'])} videos", flush=True)
    print(printable(f"{destination}: ") + ", ".join(f"{count} {what}" for what, count in counts.items() if count))
    if counts["failed"]:
        print("the same command goes on where this one stopped", file=sys.stderr)
    return 1 if counts["failed"] or counts["broken"] else 0
