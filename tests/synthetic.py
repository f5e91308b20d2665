"""Suites and run directories with known contents, made without training; and what runs have written, read again."""

import fcntl
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BATCH = 512  # samples in one rollout of ppo.py


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Waits until no other process of these tests does the same on this machine."""
    with open(Path(tempfile.gettempdir()) / f"ppo37-tests-{os.getuid()}-{what}", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_suite(folder: Path, env_ids=("A-v0", "B-v0"), seeds=(1, 2, 3), updates=20, name="made", **entries) -> Path:
    """Writes a suite of ppo.py; returns its file."""
    table = {"title": "Made up", "script": "ppo.py", "env_ids": list(env_ids), "seeds": list(seeds)}
    table |= {"flags": ["--total-timesteps", str(updates * BATCH)]} | entries
    tables = {key: table.pop(key) for key in list(table) if isinstance(table[key], dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    for key, entries in tables.items():
        lines += [f"[{key}]", *(f"{json.dumps(entry)} = {json.dumps(value)}" for entry, value in entries.items())]
    (folder / f"{name}.toml").write_text("\n".join(lines) + "\n")
    return folder / f"{name}.toml"


def make_run(
    runs_dir: Path, env_id: str, seed: int, returns, total=20, episodes=True, entropy=0.5, exp_name="ppo", **settings
) -> Path:
    """Writes the run directory of ppo.py with an update for each of the returns.

    In each update, which takes 36 seconds, one episode ends with that return; without episodes none ever does.
    """
    path = runs_dir / re.sub(r"[^\w.-]", "-", f"{env_id}__{exp_name}__{seed}__{1_700_000_000 + seed}")
    path.mkdir(parents=True)
    config = {"env_id": env_id, "seed": seed, "num_envs": 4, "num_steps": 128, "total_timesteps": total * BATCH}
    config |= {"exp_name": exp_name, "compile": False}
    (path / "config.json").write_text(json.dumps(config | settings))
    with open(path / "metrics.jsonl", "w") as file:
        for update, value in enumerate(returns, start=1):
            time = {"wall_time": 36.0 * update}
            episode = {"charts/episodic_return": float(value), "charts/episodic_length": 10}
            losses = {"losses/entropy": entropy, "losses/explained_variance": None if update == 1 else 0.5}
            step = {"global_step": update * BATCH}
            if episodes:
                file.write(json.dumps({"global_step": update * BATCH - 100} | time | episode) + "\n")
            file.write(json.dumps(step | time | losses | {"charts/SPS": 1000}) + "\n")
    (path / "checkpoint.pt").touch()
    return path


def metrics(path: Path) -> list[dict]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def offline_records(path: Path) -> Iterator:
    """The records in a .wandb file: a log in LevelDB's format, whose records may be cut into several chunks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, contents = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # a block's end too small for a chunk's header
            position += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        contents += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or a record's last chunk
            record = Record()
            record.ParseFromString(contents)
            contents = b""
            yield record
