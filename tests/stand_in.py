"""Stands for a training script in the harness's tests: the same files, flags and signals, but nothing is learned.

What it does depends on the environment: Crash-v0 raises in its third update, Exit-v0 ends its process there, Wait-v0
stops after three updates until there is a file "go", Deaf-v0 does so too but ignores signals, and Slow-v0 says in a
file "stopping" that it has had a signal, and ends when there is a file "stop".
"""

import fcntl
import json
import os
import re
import signal
import sys
import time
from pathlib import Path


class Args:
    """The settings; benchmark/suite.py reads them from this source."""

    exp_name: str = "stand_in"
    seed: int = 1
    runs_dir: str = "runs"
    resume: str | None = None
    checkpoint_interval: int = 1
    track: bool = False
    env_id: str = "Good-v0"
    total_timesteps: int = 64
    num_envs: int = 2
    num_steps: int = 4
    gamma: float = 0.99


def main() -> int:
    """Trains as far as it gets; returns the exit code."""
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    settings = {name: getattr(Args, name) for name in Args.__annotations__}
    words = sys.argv[1:]
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if not equals and words[0].startswith("-"):  # as tyro sees it
            print(f"stand_in.py: error: {flag} needs a value", file=sys.stderr)
            return 2
        name = flag.removeprefix("--").replace("-", "_")
        settings[name] = type(settings[name] or "")(value if equals else words.pop(0))
    update, metrics_bytes = 0, 0
    if settings["resume"]:
        path = Path(settings["resume"])
        problem = f"{path} is not a run directory of stand_in.py"
        try:
            settings = json.loads((path / "config.json").read_text())
            problem = f"cannot use {path / 'checkpoint.pt'}"
            update, metrics_bytes = json.loads((path / "checkpoint.pt").read_text())
        except (OSError, ValueError) as error:
            print(f"stand_in.py: error: {problem}: {error}", file=sys.stderr)
            return 2
    else:
        name = re.sub(r"[^\w.-]", "-", f"{settings['env_id']}__{settings['exp_name']}__{settings['seed']}")
        path = Path(settings["runs_dir"]) / f"{name}__{time.time_ns()}"
        path.mkdir(parents=True)
    metrics = open(path / "metrics.jsonl", "ab", buffering=0)
    try:
        fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"stand_in.py: error: {path} is still running: another process writes to it", file=sys.stderr)
        return 2
    (path / "config.json").write_text(json.dumps(settings))
    print("process", os.getpid())
    print(f"{os.environ.get('OMP_NUM_THREADS')} threads", flush=True)
    metrics.truncate(metrics_bytes)
    batch, env_id = settings["num_envs"] * settings["num_steps"], settings["env_id"]
    while update < settings["total_timesteps"] // batch:
        (path / "checkpoint.tmp").write_text(json.dumps([update, metrics.seek(0, os.SEEK_END)]))
        (path / "checkpoint.tmp").rename(path / "checkpoint.pt")
        while update == 3 and env_id in ("Wait-v0", "Deaf-v0", "Slow-v0") and not Path("go").exists():
            if stopped and env_id == "Slow-v0":
                Path("stopping").touch()
            if stopped and (env_id == "Wait-v0" or env_id == "Slow-v0" and Path("stop").exists()):
                return 0
            time.sleep(0.01)
        if update == 2 and env_id == "Crash-v0" and not Path("go").exists():
            raise RuntimeError("the pole is on fire")
        if update == 2 and env_id == "Exit-v0" and not Path("go").exists():
            os._exit(7)
        update += 1
        row = {"global_step": update * batch, "wall_time": update}
        metrics.write((json.dumps(row | {"charts/episodic_return": float(update)}) + "\n").encode())
        metrics.write((json.dumps(row | {"charts/SPS": 100, "losses/entropy": None}) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
