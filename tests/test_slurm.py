"""The runner on a real Slurm: one machine, started by start_slurm.sh; skipped only where that is impossible."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from conftest import ROOT
from synthetic import one_at_a_time

from benchmark.suite import find_runs, load_suite, run_state, suite_runs

pytestmark = pytest.mark.slow
WAIT = 300  # seconds after which a test gives up
SMALL = ["--total-timesteps", "2560", "--num-envs", "2", "--num-steps", "64"]
STAND_IN = str(ROOT / "tests" / "stand_in.py")
# python -m benchmark, but it asks Slurm more often.
BENCHMARK = """
import sys, benchmark.run, benchmark.slurm, benchmark.__main__
benchmark.run.POLL = benchmark.slurm.QUEUE_POLL = 0.5
sys.exit(benchmark.__main__.main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running Slurm."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("only root can start Slurm, and start_slurm.sh knows Debian alone")
    directory = tmp_path_factory.mktemp("slurm")
    command = ["bash", str(ROOT / "tests/start_slurm.sh"), str(directory)]
    with one_at_a_time("install"):
        started = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if started.returncode == 100:  # apt-get's exit code
        pytest.skip(f"Slurm cannot be installed: {started.stderr}")
    assert started.returncode == 0, started.stderr
    yield directory
    subprocess.run([*command, "stop"], timeout=60)


@pytest.fixture(autouse=True)
def in_empty_folder(cluster, tmp_path, monkeypatch):
    """Every test works in a folder of its own, and leaves no job in the queue."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", str(cluster / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    subprocess.run(["scancel", "--user", "root"], timeout=60)
    wait_for(lambda: not slurm("squeue", "--noheader"))


def slurm(*words: str) -> str:
    """Output of one of Slurm's commands."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_for(condition) -> None:
    """Waits until condition() is true."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, Path("output").read_text() if Path("output").exists() else ""
        time.sleep(0.2)


def write_suite(*env_ids: str, script: str = STAND_IN, flags: list[str] | None = None, file="suite.toml") -> None:
    """Writes suite.toml."""
    lines = {"title": "A suite", "script": script, "env_ids": env_ids, "seeds": [1], "flags": flags or []}
    Path(file).write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))


def start(*words: str, file="suite.toml") -> subprocess.Popen:
    """The harness in a process of its own."""
    command = [sys.executable, "-c", BENCHMARK, "run", file, *words]
    with open("output", "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def run_on_slurm(*words: str) -> int:
    """The harness with --launcher slurm, until it ends; returns its exit code."""
    return start("--launcher", "slurm", *words).wait(WAIT)


def rows(runs_dir: str = "runs/suite") -> dict[str, list[dict]]:
    """The metrics of all jobs' only runs, without what depends on the machine's speed."""
    found = {}
    for job in load_suite("suite.toml").jobs():
        (path,) = find_runs(Path(runs_dir), job)
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        found[job.env_id] = [{k: v for k, v in row.items() if k not in ("wall_time", "charts/SPS")} for row in lines]
    return found


def assert_complete(batch: int = 8, updates: int = 8) -> None:
    """All runs have each update once."""
    for run in rows().values():
        steps = [row["global_step"] for row in run if "losses/entropy" in row]
        assert steps == [batch * n for n in range(1, updates + 1)]


def waits() -> bool:
    """Whether the run that waits for "go" has come to that."""
    (job, *_) = load_suite("suite.toml").jobs()
    return any(run_state(path).global_step == 24 for path in find_runs(Path("runs/suite"), job))


def job_state(kind: str = "%T") -> str:
    """State of the only job in the queue."""
    return slurm("squeue", "--noheader", "--name", "suite", "--format", kind).strip()


def test_same_results_as_on_this_machine():
    """An array of two jobs gives the same runs as the local launcher does, and is not submitted again."""
    write_suite("CartPole-v1", "Acrobot-v1", script="ppo.py", flags=SMALL)
    assert run_on_slurm("--workers", "1") == 0
    assert Path("output").read_text().endswith("2 of 2 finished\n")
    assert_complete(128, 20)
    assert start("--runs-dir", "local", "--preload", "--workers", "1").wait(WAIT) == 0  # one import for both
    assert rows() == rows("local")
    before = set(Path("runs/suite/slurm").iterdir())
    assert len([path for path in before if path.name.endswith("submitted.pkl")]) == 2
    assert run_on_slurm() == 0
    assert set(Path("runs/suite/slurm").iterdir()) == before


def time_out(number: str) -> None:
    """The job's time is nearly up: Slurm says so before its end.

    However slow the machine is, the run has minutes to come here, to stop, and to end when the job's turn comes again:
    its limit is shortened only now, and only until the run has heard of it.
    """
    minutes = (datetime.now() - datetime.fromisoformat(job_state("%S"))) // timedelta(minutes=1)
    slurm("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes + 4}")
    wait_for(Path("stopping").exists)
    slurm("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    Path("stop").touch()


def preempt(number: str) -> None:
    """A job of a partition with priority takes the whole node until the run's job waits for it."""
    Path("stop").touch()
    wrapped = "until [ -e over ]; do sleep 1; done"
    slurm("sbatch", "--partition", "urgent", "--exclusive", "--output", "/dev/null", "--wrap", wrapped)
    wait_for(lambda: job_state() == "PENDING")
    Path("over").touch()


def requeue(number: str) -> None:
    """As after the failure of a node."""
    Path("stop").touch()
    slurm("scontrol", "requeue", number)


@pytest.mark.parametrize("disturb", [time_out, preempt, requeue])
def test_job_loses_its_node(disturb):
    """The run writes a checkpoint, the job is queued again, and the run goes on where it stopped."""
    write_suite("Slow-v0")
    harness = start("--launcher", "slurm", "--slurm", "time=10", "signal_delay_s=240")
    wait_for(waits)
    number = job_state("%A")
    disturb(number)
    log = Path("runs/suite/logs/Slow-v0__stand_in__1.log")
    wait_for(lambda: " --resume " in log.read_text())
    Path("go").touch()
    assert harness.wait(WAIT) == 0, Path("output").read_text()
    assert_complete()
    assert log.read_text().count("$ ") == 2
    assert "Restarts=1" in slurm("scontrol", "show", "job", number)


def test_watching_again():
    """Ctrl-C stops the watching alone; the same command watches the same job again; two submit nothing twice."""
    write_suite("Wait-v0")
    harness = start("--launcher", "slurm")
    wait_for(waits)
    harness.send_signal(signal.SIGINT)
    assert harness.wait(WAIT) == 130
    number = job_state("%A")
    assert f"Slurm goes on with {number}: scancel stops them.\n" in Path("output").read_text()
    seen = Path("output").read_text().count("Wait-v0 seed 1: running")
    both = [start("--launcher", "slurm") for _ in range(2)]
    wait_for(lambda: Path("output").read_text().count("Wait-v0 seed 1: running") == seen + 2)
    assert job_state("%A") == number
    Path("go").touch()
    assert [harness.wait(WAIT) for harness in both] == [0, 0]
    assert_complete()
    assert len(list(Path("runs/suite/slurm").glob("*submitted.pkl"))) == 1


def test_cancelled_job():
    """It is not queued again, counts as failed, and goes on the next time."""
    write_suite("Wait-v0")
    harness = start("--launcher", "slurm")
    wait_for(waits)
    number = job_state("%A")
    slurm("scancel", number)
    assert harness.wait(WAIT) == 1
    Path("go").touch()
    assert f"Wait-v0 seed 1 failed: Slurm job {number} ended" in Path("output").read_text()
    assert run_on_slurm() == 0
    assert_complete()


def test_failed_job():
    """The end of its log is shown."""
    write_suite("Good-v0", "Crash-v0")
    assert run_on_slurm() == 1
    output = Path("output").read_text()
    assert "Crash-v0 seed 1 failed: Slurm job" in output and "    RuntimeError: the pole is on fire\n" in output
    assert output.splitlines()[-2] == "1 of 2 finished, 1 failed"


def test_names_that_mean_something_to_slurm_or_the_shell():
    """Suite, directory, environments and options: all of it is in the script, and none of it runs."""
    name, folder = "a b's [1] $x #.toml", "r [1] $x 'q' \"d\" ;#"
    env_ids = ["m:Good-v0 $(touch pwned)", "m-Good-v0 `touch pwned`", "m;Good-v0 $(touch pwned)"]  # some collide
    write_suite(*env_ids, file=name)
    options = ['comment=it\'s $(touch pwned) "here"', "setup=touch set-up"]
    words = ["--launcher", "slurm", "--runs-dir", folder, "--slurm", *options]
    assert start(*words, file=name).wait(WAIT) == 0, Path("output").read_text()
    found = suite_runs(load_suite(name), Path(folder))
    assert [job.env_id for job in found] == env_ids and all(state.finished for state in found.values())
    assert len(list(Path(folder).glob("*__stand_in__1__*"))) == 3
    assert Path("set-up").exists() and not Path("pwned").exists()


def test_runs_that_are_left_alone():
    """One that somebody trains by hand, and one that is broken: nothing is submitted for them."""
    write_suite("Good-v0", "Crash-v0", "Other-v0")
    assert start().wait(WAIT) == 1
    for path in Path("runs/suite").glob("Other-v0__*"):
        shutil.rmtree(path)
    (by_hand,) = Path("runs/suite").glob("Good-v0__*")
    (broken,) = Path("runs/suite").glob("Crash-v0__*")
    (broken / "config.json").write_text("{")
    with open(by_hand / "metrics.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_on_slurm() == 1
    output = Path("output").read_text()
    assert output.splitlines()[-2] == "1 of 3 finished, 1 running elsewhere, 1 broken"
    assert f"Crash-v0 seed 1: {broken.resolve()} is broken: config.json cannot be read: " in output
    assert f"Good-v0 seed 1 is still running elsewhere: another process trains it in {by_hand.resolve()}\n" in output
    assert len(list(Path("runs/suite/slurm").glob("*submitted.pkl"))) == 1


def test_bad_options():
    write_suite("Good-v0")
    for option, message in (
        ("partition=nope", "nvalid partition"),
        ("tim=3", "Unavailable parameter"),
        ("x", "NAME="),
        ("comment=a\ntouch pwned", "a line break in it would be a line of Slurm's script"),
        ("--runs-dir=50%j", "the path has %, a backslash or a control character"),
    ):
        assert run_on_slurm(*(["--slurm"] * ("--" not in option)), option) == 2
        line = Path("output").read_text().splitlines()[-1]
        assert line.startswith("benchmark run: error: ") and message in line
