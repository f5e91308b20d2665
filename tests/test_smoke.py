"""The suite "smoke" from the first run to the upload, by the commands that a user types."""

import csv
import json
import os
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from synthetic import metrics
from test_upload import read_offline

WAIT = 600  # seconds after which a command has hung
ENV_IDS, SEEDS, TOTAL = ("CartPole-v1", "Acrobot-v1"), (1, 2), 10_240
JOBS = {(env_id, seed) for env_id in ENV_IDS for seed in SEEDS}
RETURN = "charts/episodic_return"


@pytest.fixture
def type_command(tmp_path):
    """Runs python -m benchmark in tmp_path; returns its output. It must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_DATA_DIR": str(tmp_path / "w")}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "benchmark", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def contents(folder: Path) -> dict[Path, tuple]:
    """Everything in a folder: files with their bytes and the time of their last change, and folders."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else () for path in folder.rglob("*")}


class Page(HTMLParser):
    """What a page fetches, and its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Notes what is fetched, and where a script starts."""
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        self.inside = tag == "script"

    def handle_data(self, data: str) -> None:
        """Keeps scripts."""
        if self.inside:
            self.scripts.append(data)


@pytest.mark.slow
def test_smoke_suite(type_command, tmp_path):
    """run, plot, report and upload: each writes what it says, and doing it again changes nothing."""
    run = ("run", "smoke", "--runs-dir", "runs", "--preload", "--workers", "1")  # one import for all
    assert type_command(*run).splitlines()[-1] == "4 of 4 finished"
    paths = {}
    for path in tmp_path.glob("runs/*__ppo__*"):
        config = json.loads((path / "config.json").read_text())
        assert (config["env_id"], config["seed"]) not in paths
        paths[config["env_id"], config["seed"]] = path
    assert paths.keys() == JOBS
    rows = {job: metrics(path) for job, path in paths.items()}
    assert all(lines[-1]["global_step"] == TOTAL for lines in rows.values())

    check_plot(type_command("plot", "smoke", "--runs-dir=runs", "--results=results", "--output=img"), tmp_path, rows)
    type_command("report", "smoke", "--runs-dir=runs", "--output=report.html")
    check_report((tmp_path / "report.html").read_text(), paths, rows)
    upload = ["upload", "smoke", "--runs-dir=runs", "--project=trials"]
    assert type_command(*upload).endswith("default/trials (offline): 4 sent\n")
    for job, path in paths.items():
        (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
        sent = read_offline(file)
        assert {(run.run_id, run.project, run.run_group) for run in sent.runs} == {(path.name, "trials", "smoke")}
        assert (sent.config["env_id"], sent.config["seed"]) == job
        assert sent.history == rows[job]
        assert sent.artifacts == [("code", ["ppo.py"])]

    before = contents(tmp_path / "runs")
    assert type_command("run", "smoke", "--runs-dir", "runs") == "4 of 4 finished\n"
    assert type_command(*upload) == "default/trials (offline): 4 there already\n"
    assert contents(tmp_path / "runs") == before


def check_plot(output: str, folder: Path, rows: dict[tuple, list[dict]]) -> None:
    """The CSV has each run's curve, the table each environment with its seeds, and the figure both environments."""
    curves = defaultdict(list)
    with open(folder / "results/smoke.csv", newline="") as file:
        for row in csv.DictReader(file):
            curves[row["env_id"], int(row["seed"])].append((int(row["global_step"]), float(row["return_mean_100"])))
    assert curves.keys() == JOBS
    for job, curve in curves.items():
        assert [step for step, _ in curve] == list(range(512, TOTAL + 1, 512))
        assert curve[-1][1] == pytest.approx(np.mean([row[RETURN] for row in rows[job] if RETURN in row][-100:]), 1e-5)
    facts = json.loads((folder / "results/smoke.json").read_text())
    assert facts["command"].startswith("python -m benchmark plot smoke ") and len(facts["runs"]) == 4
    assert (folder / "results/smoke.md").read_text() == output
    table = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in output.splitlines())}
    for env_id in ENV_IDS:
        final = np.mean([curves[env_id, seed][-1][1] for seed in SEEDS])
        assert table[env_id][0].startswith(f"{final:.1f} +- ") and table[env_id][0].endswith("(2 seeds)")
        assert table[env_id][2].endswith("(5 seeds, 0.5M steps)")  # the official code's
    assert (folder / "img/smoke.png").read_bytes().startswith(b"\x89PNG")
    figure = (folder / "img/smoke.svg").read_text()
    assert "<svg " in figure and all(f"<!-- {env_id} -->" in figure for env_id in ENV_IDS)


def check_report(text: str, paths: dict[tuple, Path], rows: dict[tuple, list[dict]]) -> None:
    """The page fetches nothing, and has each metric of each run."""
    page = Page(text)
    assert page.fetched == []
    assert any(len(script) > 10**6 for script in page.scripts)  # plotly itself
    (script,) = [script for script in page.scripts if "const DATA = " in script]
    data, _ = json.JSONDecoder().raw_decode(script.partition("const DATA = ")[2])
    runs = [run for run in data["runs"] if not run["official"]]
    assert {(run["env"], int(run["seed"])): run["name"] for run in runs} == {
        job: path.name for job, path in paths.items()
    }
    for run in runs:
        lines = rows[run["env"], int(run["seed"])]
        assert run["metrics"].keys() == set().union(*lines) - {"global_step", "wall_time"}
        assert run["metrics"]["losses/entropy"][-1] == pytest.approx(lines[-1]["losses/entropy"], 1e-4)
        assert run["steps"][-1] == TOTAL and run["status"] == ""
