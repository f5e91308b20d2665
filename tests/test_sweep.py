"""python -m benchmark sweep: a search whose best answer is known, shared by processes, given up and failing trials."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from conftest import ROOT

import benchmark.run
from benchmark import sweep
from benchmark.__main__ import main
from benchmark.suite import load_suite, run_state, scan_runs

SCRIPT = (ROOT / "tests" / "stand_in.py").read_text().replace("float(update)", 'update * settings["gamma"]')


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """A suite whose mean return is 4.5 times gamma, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "POLL", 0.02)
    assert SCRIPT.count('settings["gamma"]') == 1
    Path("script.py").write_text(SCRIPT)
    Path("made.toml").write_text(
        'title = "A"\nscript = "script.py"\nenv_ids = ["Good-v0", "Crash-v0", "Wait-v0"]\nseeds = [1]\n'
        'flags = ["--total-timesteps", "64"]\n'
    )


def test_search(capsys):
    """It finds what is best, goes on when it is asked for more, and shares the work with another process."""
    words = ["sweep", "made.toml", "--space", "gamma=0.1..1", "num-envs=2,4", "--seeds", "1", "2"]
    assert main([*words, "--trials", "3"]) == 0
    first = capsys.readouterr().out
    assert len(re.findall(r"(?m)^trial \d: complete return \d\.\d --gamma 0?\.?\d+ --num-envs [24]$", first)) == 3
    runs = scan_runs(Path("runs/sweep_made"))
    assert len(runs) == 6 and all(run_state(path).finished for (path,) in runs.values())
    assert main([*words, "--trials", "3"]) == 0
    assert "trial 0: " not in (again := capsys.readouterr().out) and first.endswith(again)
    command = [sys.executable, "-m", "benchmark", *words, "--trials", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    while len(list(Path("runs/sweep_made").glob("*__trial*"))) == 6:  # until it has begun a trial
        assert other.poll() is None
    assert main([*words, "--trials", "8"]) == 0
    printed = [other.communicate()[0], capsys.readouterr().out]
    assert other.returncode == 0
    done = [int(number) for text in printed for number in re.findall(r"(?m)^trial (\d+): complete", text)]
    assert len(done) == len(set(done)) and 5 <= len(done) <= 6  # both may have been in their last trial
    best = re.search(r"\| ([\d.]+) \| ([\d.]+) \| ([24]) \|\n", again)
    value, gamma, envs = (float(best[i]) for i in (1, 2, 3))
    assert value == pytest.approx(gamma * (4.5 if envs == 2 else 2.5), abs=0.06)
    assert again.endswith(f" --env-id=Good-v0 --total-timesteps 64 --gamma {best[2]} --num-envs {best[3]}\n")
    values = [float(x) for x in re.findall(r"(?m)^trial \d: complete return (\S+)", first)]
    assert value == max(values)


class Trial:
    """Stands for Optuna's: takes reports, and gives up after some."""

    number = 0

    def __init__(self, enough):
        self.enough, self.reports = enough, []

    def report(self, value, step):
        self.reports.append((step, value))

    def should_prune(self):
        return len(self.reports) >= self.enough


def test_trial_that_falls_behind_is_given_up():
    """Its training is stopped, in the middle, and its run can be looked at; steps go on from seed to seed."""
    job = load_suite("made.toml").jobs()[2]
    assert job.env_id == "Wait-v0"
    runs_dir = Path("runs").resolve()
    benchmark.run.prepare(runs_dir)
    trial = Trial(enough=1)
    with pytest.raises(optuna.TrialPruned):
        sweep.measure(trial, job, runs_dir, index=2)
    (((path,)),) = scan_runs(runs_dir).values()
    assert run_state(path).status == "interrupted" and run_state(path).global_step == 24
    ((step, value),) = trial.reports
    assert 21 <= step <= 23 and value < 2.1
    Path("go").touch()
    trial = Trial(enough=100)
    assert sweep.measure(trial, job, runs_dir, index=0) == pytest.approx(4.5 * 0.99)  # the same run, to its end


def test_trials_that_fail(capsys):
    """They are counted and named, their logs stay, and they end nothing else."""
    assert main(["sweep", "made.toml", "--env-id", "Crash-v0", "--space", "gamma=0.1..1", "--trials", "2"]) == 2
    out, err = capsys.readouterr()
    assert len(re.findall(r"(?m)^trial \d: fail ", out)) == 2
    assert "benchmark sweep: error: no trial has been finished; what they printed is in " in err.splitlines()[-1]
    assert "the pole is on fire" in next(Path("runs/sweep_made/logs").iterdir()).read_text()


BAD = [
    ("", "--space: what is searched?"),
    ("--space gama=0..1", "--space: script.py has no flag --gama; did you mean gamma?"),
    ("--space gamma", "--space takes NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C, not gamma"),
    ("--space gamma=1..0.5", "--space: gamma=1..0.5 is no range"),
    ("--space gamma=0..1:log", "for a logarithm needs values above 0"),
    ("--space gamma=a..b", "--gamma needs a value of type float, not 'a'"),
    ("--space num-envs=2,x", "--num-envs needs a value of type int, not 'x'"),
    ("--space track=1,2", "--track is on or off, which is a variant"),
    ("--space exp-name=1..2", "--exp-name is no number"),
    ("--space seed=1,2", "--seed cannot be one of the flags: the harness sets it"),
    ("--space gamma=0..1 gamma=0.5..1", "--space has a flag twice"),
    ("--space gamma=0..1 --env-id Bad-v0", "suite made has no environment Bad-v0; did you mean Wait-v0"),
    ("--space gamma=0..1 --trials 0", "--trials must be at least 1, and --seeds whole numbers from 0"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input(words, message, capsys):
    """One line on stderr, exit code 2, and nothing is written."""
    assert main(["sweep", "made.toml", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark sweep: error: ") and message in line
    assert sorted(os.listdir()) == ["made.toml", "script.py"]


def test_without_optuna(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", "made.toml", "--space", "gamma=0..1"]) == 2
    assert "a search needs Optuna: pip install optuna" in capsys.readouterr().err


def test_ctrl_c_stops_the_training():
    """The run writes a checkpoint, as with run."""
    command = [sys.executable, "-m", "benchmark", "sweep", "made.toml", "--env-id", "Wait-v0", "--space", "gamma=0..1"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not any(run_state(path).global_step >= 24 for (path,) in scan_runs(Path("runs/sweep_made")).values()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    ((path,),) = scan_runs(Path("runs/sweep_made")).values()
    assert run_state(path).status == "interrupted"
