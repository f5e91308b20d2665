"""The benchmark's suites and its runner: what it reads, what it starts, and what survives which accident.

Accidents happen to a script that stands for a training (stand_in.py), which costs a tenth of a second; the last tests
do the same to ppo.py.
"""

import fcntl
import importlib
import itertools
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import forking
import numpy as np
import pytest
from conftest import ROOT
from rich.console import Console

import benchmark.run
import benchmark.worker
from benchmark import files, plot, suite
from benchmark.__main__ import main
from benchmark.suite import InputError, load_suite, read_metrics, run_state, scan_runs, suite_runs

WAIT = 300  # seconds after which a test gives up; a busy machine takes long to start a process
STAND_IN = ROOT / "tests" / "stand_in.py"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark.run, "POLL", 0.05)


def write_suite(*env_ids: str, seeds=(1,), script=STAND_IN, flags=()) -> str:
    """Writes suite.toml and returns its path."""
    lines = {"title": "A suite", "script": str(script), "env_ids": env_ids, "seeds": seeds, "flags": flags}
    lines = {key: list(value) if isinstance(value, tuple) else value for key, value in lines.items()}
    Path("suite.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
    return "suite.toml"


def run(*words: str) -> int:
    """python -m benchmark run suite.toml, in this process."""
    return main(["run", "suite.toml", *words])


def runs() -> dict[str, list[Path]]:
    """All run directories of the suite by job."""
    return scan_runs(Path("runs/suite"))


def steps(path: Path) -> list[int]:
    """global_step of all updates."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row["global_step"] for row in rows if "charts/SPS" in row]


def assert_complete(*jobs: str, batch: int = 8, updates: int = 8) -> None:
    """Each of these jobs, and nothing else, has one run directory, in which each update is there once."""
    found = runs()
    assert sorted(found) == sorted(jobs)
    for (path,) in found.values():
        assert steps(path) == [batch * n for n in range(1, updates + 1)]


class Harness:
    """The harness in a process of its own; its output goes to a file."""

    def __init__(self, *words: str, output: str = "output"):
        self.output = Path(output)
        command = [sys.executable, "-m", "benchmark", "run", "suite.toml", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def wait_for(self, condition) -> None:
        """Waits until condition() is true."""
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def end(self, number: signal.Signals | None = None) -> int:
        """Sends a signal, if any; returns the exit code."""
        if number:
            self.process.send_signal(number)
        return self.process.wait(WAIT)


def reached(env_id: str, step: int = 24):
    """Whether the run of this environment is at that step, as a function."""
    return lambda: any(run_state(p).global_step >= step for p in Path("runs/suite").glob(f"{env_id}__*__*"))


def trainings() -> list[int]:
    """Numbers of the processes that train in this test's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"--runs-dir" in words + [b"--runs-dir"] * (b"--resume" in words):
                if Path(os.readlink(path / "cwd")) == Path.cwd() and b"benchmark" not in words:
                    found.append(int(path.name))
        except OSError:  # it has just ended
            continue
    return found


# What suites say


def test_suites_of_the_repository():
    for path in suite.SUITES.glob("*.toml"):
        loaded = load_suite(path.stem)
        jobs = loaded.jobs()
        sizes = len(loaded.env_ids), len(loaded.seeds), len(loaded.variants)
        assert len({job.name for job in jobs}) == math.prod(sizes) == len(jobs)
        assert loaded.runs_dir == Path("runs") / path.stem


def test_jobs():
    write_suite("module:Env-v0", "ALE/Pong-v5", seeds=(3, 1), flags=("--exp-name", "trial"))
    jobs = load_suite("suite.toml").jobs()
    assert [(job.env_id, job.seed) for job in jobs[1:3]] == [("ALE/Pong-v5", 3), ("module:Env-v0", 1)]
    assert jobs[0].name == "module-Env-v0__trial__3"  # as the script names its run directory
    assert [job.seed for job in load_suite("suite.toml").jobs([7, 7])] == [7, 7]  # one for each environment


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("ppo*.py")))
def test_settings_are_read_as_the_script_has_them(name):
    script = importlib.import_module(name)
    settings = suite.script_settings(Path(script.__file__))
    assert {name: default for name, (_, default) in settings.items()} == asdict(script.Args())


FLAGS = ["--compile", "--no-norm-adv", "--total-timesteps=2_000", "--learning-rate", "1e-3", "--target-kl", "0.1"]


@pytest.mark.parametrize("flags", [FLAGS, ["--target-kl", "None", "--exp_name=a b", "--ent-coef", "0"]])
def test_flags_mean_what_they_mean_to_the_script(flags):
    settings = load_suite("classic", flags).settings["CartPole-v1"]
    expected = asdict(importlib.import_module("ppo").parse_args(["--compile", *flags]))
    assert settings == {name: value for name, value in expected.items() if name not in suite.FREE}


LISTS = """class Algorithm:
    hide: tuple[int, ...] | None = (1, 3)
    backend: Literal["gymnasium", "envpool"] = "gymnasium"
    steps: float = 5

class Args(Algorithm):
    names: list[str] = []
"""


def test_kinds_of_flags():
    """Several values, a choice, whole numbers in the form 1e6; settings that Args inherits."""
    Path("lists.py").write_text(LISTS)
    known = suite.script_settings(Path("lists.py"))
    assert {name: default for name, (_, default) in known.items()} == {
        "hide": (1, 3), "backend": "gymnasium", "steps": 5, "names": [],
    }  # fmt: skip
    words = ["--hide", "4", "-1", "--backend", "envpool", "--steps", "1e6", "--names"]
    expected = {"hide": [4, -1], "backend": "envpool", "steps": 1e6, "names": []}
    assert suite.parse_flags(words, known, "lists.py") == expected
    assert suite.parse_flags(["--hide", "None"], known, "lists.py") == {"hide": None}
    assert suite.fits("tuple[int, ...] | None", [1, 2]) and suite.fits("tuple[int, ...] | None", None)
    assert not suite.fits("tuple[int, ...] | None", [1, "2"]) and not suite.fits("tuple[int, ...] | None", 1)
    for words, message in (
        (["--hide", "x"], "type int, not 'x'"),
        (["--backend", "sb3"], "one of gymnasium, envpool, not"),
    ):
        with pytest.raises(InputError, match=message):
            suite.parse_flags(words, known, "lists.py")


def test_flags_of_one_environment():
    """They come after the suite's and before those of the command line; runs are compared with their environment's."""
    write_suite("A", "B", flags=("--total-timesteps", "8"))
    with open("suite.toml", "a") as file:
        file.write('[env_flags]\nB = ["--total-timesteps", "16", "--gamma", "0.25"]\n')
    made = load_suite("suite.toml", ["--gamma", "0.75"])
    assert made.flags == {
        "A": ("--total-timesteps", "8", "--gamma", "0.75"),
        "B": ("--total-timesteps", "8", "--total-timesteps", "16", "--gamma", "0.25", "--gamma", "0.75"),
    }
    assert [made.settings[env]["total_timesteps"] for env in "AB"] == [8, 16]
    assert {job.env_id: job.flags for job in made.jobs()} == made.flags
    made = load_suite("suite.toml")
    settings = made.settings["B"] | {"env_id": "B", "seed": 1}
    write_run("B__stand_in__1__1", settings, [UPDATE])
    assert [state.path.name for state in suite_runs(made, Path("runs/suite")).values()] == ["B__stand_in__1__1"]
    write_run("A__stand_in__1__1", settings | {"env_id": "A"}, [UPDATE])
    with pytest.raises(InputError, match="total_timesteps 16 instead of 8"):
        suite_runs(made, Path("runs/suite"))


def write_variants(**variants: list[str]) -> None:
    """Writes suite.toml with variants; copy.py is a copy of the stand-in beside it."""
    write_suite("A-v0", "B-v0", flags=("--gamma", "0.9"))
    Path("copy.py").write_text(STAND_IN.read_text())
    with open("suite.toml", "a") as file:
        file.write("".join(["[variants]\n", *(f"{key} = {json.dumps(words)}\n" for key, words in variants.items())]))


def test_variants():
    """Each has its own script, flags and settings, and its name is that of the experiment."""
    write_variants(default=[], near=["--gamma", "0.5"], mine=["copy.py", "--num-envs", "4"])
    made = load_suite("suite.toml", ["--num-steps", "2"])
    assert made.has_variants and made.baseline.name == "default"
    assert [(job.env_id, job.variant) for job in made.jobs()] == list(itertools.product(
        ("A-v0", "B-v0"), ("default", "near", "mine")))  # fmt: skip
    assert [Path(variant.script).name for variant in made.variants.values()] == [
        "stand_in.py",
        "stand_in.py",
        "copy.py",
    ]
    assert made.jobs()[2].flags == ("--gamma", "0.9", "--num-envs", "4", "--exp-name=mine", "--num-steps", "2")
    assert made.jobs()[2].name == "A-v0__mine__1"
    settings = [variant.settings["B-v0"] for variant in made.variants.values()]
    assert [(each["gamma"], each["num_envs"], each["exp_name"]) for each in settings] == [
        (0.9, 2, "default"), (0.5, 2, "near"), (0.9, 4, "mine")]  # fmt: skip


def test_run_of_variants(capsys):
    """Shown by name, extended by a seed and a variant; what is there is left alone, and other settings are refused."""
    variants = {"default": [], "mine": ["copy.py"]}
    write_variants(**variants)
    assert run("--dry-run", "--env-ids", "B-v0") == 0
    assert capsys.readouterr().out == "B-v0 default seed 1: start\nB-v0 mine seed 1: start\n"
    assert run("--env-ids", "B-v0", "--preload") == 0
    assert "B-v0 mine seed 1: finished, 64/64" in capsys.readouterr().out
    names = ["B-v0__default__1", "B-v0__mine__1"]
    assert_complete(*names)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*/*/*") if path.is_file()}
    write_variants(**variants, third=["--gamma", "0.25"])
    assert run("--seeds", "1", "2", "--env-ids", "B-v0") == 0
    assert_complete(*names, "B-v0__third__1", *(f"B-v0__{name}__2" for name in ("default", "mine", "third")))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    started = [json.loads(line) for line in Path("runs/suite/started.jsonl").read_text().splitlines()]
    assert len(started) == 2 and all(facts["commit"] for facts in started)
    write_variants(**variants, third=["--gamma", "0.3"])
    assert run() == 2
    assert "B-v0__third__1" in capsys.readouterr().err
    tasks = [benchmark.run.Task(job, Path("runs")) for job in load_suite("suite.toml").jobs()]
    console = Console(width=100, record=True, file=open(os.devnull, "w"))
    console.print(benchmark.run.Display(tasks, "A suite").table())
    assert re.search(
        r"environment +┃ variant +┃ seed .*B-v0 +│ third +│ 1 +│ waiting", console.export_text(), re.DOTALL
    )


BAD_VARIANTS = "variants must be a table of two or more lists of strings"
BAD_SUITES = [
    ("variants = 3", BAD_VARIANTS),
    ("variants = {a = []}", BAD_VARIANTS),
    ('variants = {a = [], b = "--compile"}', BAD_VARIANTS),
    ('variants = {a = [], "" = []}', BAD_VARIANTS),
    ('variants = {a = [], b = ["nope.py"]}', "its script nope.py does not exist"),
    ('variants = {a = [], b = ["--compil"]}', "ppo.py has no flag --compil; did you mean --compile?"),
    ('variants = {a = [], b = ["--gamma"]}', "--gamma needs a value"),
    ('variants = {a = [], b = ["--exp-name", "c"]}', "--exp-name cannot be one of a variant's flags"),
    ("title = ", "Invalid value"),
    ("", "title and script and env_ids and seeds missing"),
    ('titel = "a"', "unknown key titel; did you mean title?"),
    ("title = 3", "title must be a string, not 3"),
    ('env_ids = [""]', "env_ids must be a list of different strings, not ['']"),
    ('env_ids = "CartPole-v1"', "env_ids must be a list of different strings, not 'CartPole-v1'"),
    ("env_ids = []", "env_ids must be a list of different strings"),
    ('seeds = ["1"]', "seeds must be a list of different whole numbers from 0"),
    ("seeds = [1, 1]", "seeds must be a list of different whole numbers from 0"),
    ("seeds = [true]", "seeds must be a list of different whole numbers from 0"),
    ("seeds = [-1]", "seeds must be a list of different whole numbers from 0"),
    ('flags = "--compile"', "flags must be a list of strings"),
    ('script = "nope.py"', "its script nope.py does not exist"),
    ('script = "README.md"', "cannot read"),
    ('script = "tests/conftest.py"', "has no class Args"),
    ('reference = "nope.csv"', "there is no"),
    ('compare = "classic"', "compare must be a list of names of suites, not 'classic'"),
    ('compare = ["nope"]', "there is no suite nope to compare with"),
    ('compare = ["no/pe"]', "there is no suite no/pe to compare with"),
    ('script = "a\\u0000b.py"', "its script a\\x00b.py does not exist"),
    ("published = {CartPole-v1 = 3}", "published must be a table of [mean, standard deviation]"),
    ("published = {Pong = [3, 1]}", "published has Pong, which env_ids has not"),
    ("margins = {CartPole-v1 = 0}", "margins must be a table of numbers above 0"),
    ("margins = {Pong = 3}", "margins has Pong, which env_ids has not"),
    ('env_flags = ["--compile"]', "env_flags must be a table of lists of strings"),
    ('env_flags = {Pong = ["--compile"]}', "env_flags has Pong, which env_ids has not"),
    ('env_flags = {CartPole-v1 = ["--compil"]}', "ppo.py has no flag --compil; did you mean --compile?"),
    ('env_flags = {CartPole-v1 = ["--exp-name", "a"]}', "--exp-name must be the same for all environments"),
    ('flags = ["--compil"]', "ppo.py has no flag --compil; did you mean --compile?"),
    ('flags = ["--no-gamma"]', "ppo.py has no flag --no-gamma"),
    ('flags = ["compile"]', "ppo.py has no flag compile"),
    ('flags = ["--gamma"]', "--gamma needs a value"),
    ('flags = ["--num-envs", "many"]', "--num-envs needs a value of type int, not 'many'"),
    ('flags = ["--norm-adv=1"]', "--norm-adv takes no value"),
    ('flags = ["--seed", "3"]', "--seed cannot be one of the flags: the harness sets it"),
]


@pytest.mark.parametrize(("text", "message"), BAD_SUITES)
def test_bad_suite(text, message, capsys):
    good = {"title": '"A"', "script": '"ppo.py"', "env_ids": '["CartPole-v1"]', "seeds": "[1]"} if text else {}
    lines = [f"{key} = {value}" for key, value in good.items() if not text.startswith(f"{key} =")]
    Path("suite.toml").write_text("\n".join([*lines, text]))
    assert run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark run: error: ")
    assert message in line
    assert os.listdir() == ["suite.toml"]


BAD_COMMANDS = [
    ("rum classic", "there is no command rum; did you mean run?"),
    ("run clasic", "there is no suite clasic; did you mean classic"),
    ("run xyz", "there is no suite xyz; there are ablations_classic, "),
    ("run xyz.toml", "cannot read the suite xyz.toml: "),
    ("run classic --workers 0", "--workers must be at least 1, not 0"),
    ("run classic --workers 1.5", "error: --workers takes INT, not '1.5'"),
    ("run classic --seeds 1..3", "error: --seeds takes [INT [INT ...]], not '1..3'"),
    ("run classic --dry-run --seeds -1 2", "--seeds takes whole numbers from 0, not -1 2"),
    ("run classic --dry-run --seeds", "--seeds takes whole numbers from 0, not nothing"),
    ("run classic --env-ids CartPole-v0", "suite classic has no environment CartPole-v0; did you mean CartPole-v1?"),
    ("run classic --preload --launcher slurm", "--preload works with --launcher local only"),
    ("run classic --dry-run --slurm time=3", "--slurm needs --launcher slurm"),
    ("run classic --wrokers 2", "Unrecognized options: --wrokers"),
    ("run classic --extra=--gama", "ppo.py has no flag --gama; did you mean --gamma"),
    ("run classic --extra='", "--extra: No closing quotation"),
    ("run", "Missing"),
    ("report", "which suites?"),
]


@pytest.mark.parametrize(("words", "message"), BAD_COMMANDS)
def test_bad_command_line(words, message, capsys):
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not os.listdir()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_message_in_any_encoding(encoding):
    """What tyro says comes in a box, which looks different where the terminal knows no Unicode."""
    command = [sys.executable, "-m", "benchmark", "run", "classic", "--seeds", "1..3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "benchmark run: error: --seeds takes [INT [INT ...]], not '1..3'\n"


def test_help(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert "python -m benchmark COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    assert not stop.value.code
    assert "--launcher {local,slurm}" in capsys.readouterr().out


# What run directories say


def write_run(name: str, config: dict, rows: list[dict], checkpoint: bool = True) -> Path:
    """Writes a run directory."""
    path = Path("runs/suite") / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if checkpoint:
        (path / "checkpoint.pt").touch()
    return path


EPISODE = {"global_step": 6, "wall_time": 0.5, "charts/episodic_return": 3.5, "charts/episodic_length": 3}
UPDATE = {"global_step": 8, "wall_time": 0.6, "charts/SPS": 100, "losses/explained_variance": None}
CONFIG = {"num_envs": 2, "num_steps": 4, "total_timesteps": 23}


def test_run_state():
    later = [row | {"global_step": row["global_step"] + 8} for row in (EPISODE, UPDATE)]
    finished = run_state(write_run("A__x__1__1", CONFIG, [EPISODE, UPDATE, *later]))
    assert (finished.status, finished.global_step, finished.total_steps, finished.sps) == ("finished", 16, 16, 100)
    assert (finished.mean_return, finished.wall_time) == (3.5, 0.6)
    states = {"interrupted": True, "no checkpoint": False}
    for number, (status, checkpoint) in enumerate(states.items()):
        state = run_state(write_run(f"B__x__1__{number}", CONFIG, [EPISODE, UPDATE, later[0]], checkpoint))
        assert (state.status, state.global_step) == (status, 14)
    # The last episode of a run is logged before its last update.
    assert not run_state(write_run("C__x__1__1", CONFIG, [EPISODE | {"global_step": 16}])).finished


@pytest.mark.parametrize("updates", [0, 3, 40])
def test_mean_return_is_that_of_100_episodes(updates):
    """However many lines of updates stand between the episodes, beyond the part of the file that is always read."""
    returns = [-1e3, *np.random.default_rng(1).normal(size=100)]
    rows = [row for value in returns for row in [EPISODE | {"charts/episodic_return": value}, *[UPDATE] * updates]]
    path = write_run("A__x__1__1", CONFIG, rows)
    assert (path / "metrics.jsonl").stat().st_size > 16 * 1024 or not updates
    assert run_state(path).mean_return == pytest.approx(np.mean(returns[1:]))


BROKEN = [
    ("", "config.json cannot be read: "),
    ('{"num_envs": 2, "num_st', "config.json cannot be read: "),
    ("\xff", "config.json cannot be read: "),
    ("[" * 10**5, "config.json cannot be read: "),
    ("[]", "config.json holds no settings"),
    ("{}", "in config.json num_envs is missing, num_steps is missing, total_timesteps is missing"),
    ('{"num_envs": "x", "num_steps": 4, "total_timesteps": 23}', "in config.json num_envs is 'x'"),
    (
        '{"num_envs": true, "num_steps": 4.0, "total_timesteps": 23}',
        "in config.json num_envs is True, num_steps is 4.0",
    ),
    (
        '{"num_envs": 0, "num_steps": -1, "total_timesteps": NaN}',
        "num_envs is 0, num_steps is -1, total_timesteps is nan",
    ),
]


@pytest.mark.parametrize(("config", "problem"), BROKEN)
def test_broken_config(config, problem):
    path = write_run("A__x__1__1", {}, [UPDATE])
    (path / "config.json").write_text(config, encoding="latin-1")
    state = run_state(path)
    assert (state.status, state.total_steps, state.global_step) == ("broken", 0, 8)
    assert problem in state.problem


def test_settings_of_a_wrong_type():
    """Those of the script have the types that its source names."""
    write_suite("A")
    known = suite.script_settings(STAND_IN)
    right = settings(track=False, gamma=1, total_timesteps=8.0, resume=None)  # whole numbers are numbers; 8.0 is none
    assert run_state(write_run("A__x__1__1", right, []), known).problem == "in config.json total_timesteps is 8.0"
    wrong = settings(track=0, gamma="1", seed=None, resume=3)
    problem = run_state(write_run("A__x__1__2", wrong, []), known).problem
    assert sorted(problem.removeprefix("in config.json ").split(", ")) == [
        "gamma is '1'", "resume is 3", "seed is None", "track is 0",
    ]  # fmt: skip
    del right["env_id"]
    assert "env_id is missing" in run_state(write_run("A__x__1__3", right, []), known).problem


def test_empty_directory():
    Path("A__x__1__1").mkdir()
    state = run_state(Path("A__x__1__1"))
    assert (state.status, state.global_step, state.total_steps) == ("no checkpoint", 0, 0)
    assert math.isnan(state.mean_return) and math.isnan(state.sps)


TORN = [
    b'{"global_step": 9, "wall', b"\0" * 100, b"\n", b"3\n", b"[" * 10**4, b'{"charts/SPS": 300}\n',
    b'{"global_step": 9, "wall_time": 1, "charts/episodic_return": -',
    b'{"global_step": 9, "wall_time": 1, "charts/episodic_return": 12',
    b'{"global_step": 9, "wall_time": 1, "charts/SPS": 3',
    b'{"global_step": "x", "wall_time": 1, "charts/SPS": 300}\n', b'{"global_step": NaN, "wall_time": 1}\n',
    b'{"global_step": 9, "wall_time": null}\n',
]  # fmt: skip


@pytest.mark.parametrize("torn", TORN)
def test_torn_metrics(torn):
    """The last line may be torn, by a full disk for example: what stands before it counts."""
    path = write_run("A__x__1__1", CONFIG, [EPISODE, UPDATE])
    with open(path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    state = run_state(path)
    assert (state.global_step, state.mean_return) == (8, 3.5)
    assert state.sps == (300 if torn.endswith(b"}\n") and b"300" in torn else 100)
    assert read_metrics(path)["global_step"].tolist() == [6, 8]


def test_values_that_are_no_numbers():
    path = write_run(
        "A__x__1__1", CONFIG, [UPDATE, UPDATE | {"losses/entropy": "high"}, UPDATE | {"losses/entropy": 2}]
    )
    np.testing.assert_array_equal(read_metrics(path)["losses/entropy"], [np.nan, np.nan, 2])


def test_read_metrics():
    columns = read_metrics(write_run("A__x__1__1", CONFIG, [EPISODE, UPDATE, EPISODE | UPDATE]))
    assert columns.keys() == EPISODE.keys() | UPDATE.keys()
    np.testing.assert_array_equal(columns["charts/episodic_return"], [3.5, np.nan, 3.5])
    np.testing.assert_array_equal(columns["charts/SPS"], [np.nan, 100, 100])
    assert np.isnan(columns["losses/explained_variance"]).all()
    assert read_metrics(write_run("B__x__1__1", CONFIG, [])) == {}


def settings(env_id: str = "A", **changes) -> dict:
    """config.json of a run of the suite at hand."""
    return load_suite("suite.toml").settings[env_id] | {"env_id": env_id, "seed": 1, "runs_dir": "r"} | changes


def test_which_run_counts():
    """The newest finished run, else the one that got furthest."""
    write_suite("A", "B", "C", flags=("--total-timesteps", "8"))
    rows = [EPISODE, UPDATE]
    for number, length in enumerate((2, 0, 2, 1), 1):
        write_run(f"A__stand_in__1__{number}", settings(), rows[:length])
        write_run(f"B__stand_in__1__{number}", settings(env_id="B"), rows[: min(length, 1) if number == 1 else 0])
    write_run("A__stand_in__1__old", settings(gamma=0), rows)  # not a run directory's name
    chosen = suite_runs(load_suite("suite.toml"), Path("runs/suite"))
    assert {job.env_id: state.path.name for job, state in chosen.items()} == {
        "A": "A__stand_in__1__3",
        "B": "B__stand_in__1__1",
    }


def test_mixed_configurations(capsys):
    write_suite("A", flags=("--total-timesteps", "8"))
    write_run("A__stand_in__1__1", settings(track=True, checkpoint_interval=7), [EPISODE, UPDATE])
    assert run() == 0  # these make no difference to learning
    write_run("A__stand_in__1__2", settings(gamma=0.5), [EPISODE, UPDATE])
    capsys.readouterr()
    assert run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mixed configurations: " in line and "A__stand_in__1__2 has gamma 0.5 instead of 0.99 (suite suite)" in line


@pytest.mark.slow
def test_ten_thousand_run_directories():
    """1.0 s on an idle machine with 2 cores; it must be below 5 s there."""
    rows = [EPISODE] * 20 + [UPDATE]
    write_suite("A", seeds=tuple(range(10_000)))
    config = settings()
    for seed in range(10_000):
        write_run(f"A__stand_in__{seed}__1", config | {"seed": seed}, rows)
    loaded, start = load_suite("suite.toml"), time.process_time()
    assert len(suite_runs(loaded, Path("runs/suite"))) == 10_000
    assert time.process_time() - start < 5


# What is started


def test_run(capsys):
    """Everything once; what is finished is left alone; a missing seed is filled in later."""
    write_suite("Good-v0", "Other-v0")
    assert run("--dry-run") == 0
    assert capsys.readouterr().out == "Good-v0 seed 1: start\nOther-v0 seed 1: start\n"
    assert os.listdir() == ["suite.toml"]
    assert run("--workers", "2") == 0
    assert_complete("Good-v0__stand_in__1", "Other-v0__stand_in__1")
    output = capsys.readouterr().out
    assert "Good-v0 seed 1: finished, 64/64, 100 steps/s, return 4.5\n" in output
    assert output.endswith("2 of 2 finished\n")
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*/*/*") if path.is_file()}
    assert run() == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert run("--seeds", "2", "1") == 0
    names = [f"{env}-v0__stand_in__{seed}" for env in ("Good", "Other") for seed in (1, 2)]
    assert_complete(*names)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert run("--dry-run", "--seeds", "1") == 0
    assert "Good-v0 seed 1: finished (" in capsys.readouterr().out


@pytest.mark.parametrize(("workers", "threads"), [(1, 6), (4, 1), (2, 3), (9, 1)])
def test_threads(monkeypatch, workers, threads):
    """The workers share the cores."""
    monkeypatch.setattr(benchmark.run, "cores", lambda: 6)
    write_suite(*(f"{letter}-v0" for letter in "ABCDEFGHI"))
    assert run("--workers", str(workers)) == 0
    assert Path("runs/suite/logs/A-v0__stand_in__1.log").read_text().endswith(f"\n{threads} threads\n")


def test_crash(capsys):
    """A crash hides no other run, and its log is shown; the next time the run is resumed, and the results say so."""
    write_suite("Good-v0", "Crash-v0", "Other-v0")
    assert run("--workers", "1") == 1
    output = capsys.readouterr().out
    assert "Crash-v0 seed 1 failed: exit code 1 (" in output
    assert "    RuntimeError: the pole is on fire\n" in output
    assert "2 of 3 finished, 1 failed\n" in output
    assert "Good-v0 seed 1: finished" in output and "Other-v0 seed 1: finished" in output
    assert run("--dry-run") == 0
    assert re.search(r"Crash-v0 seed 1: resume \S+ at step 16 of 64\n", capsys.readouterr().out)
    Path("go").touch()
    assert run() == 0
    assert_complete(*(f"{env}-v0__stand_in__1" for env in ("Good", "Crash", "Other")))
    (resumed,) = plot.history(Path("runs/suite"), [path.name for path in Path("runs/suite").iterdir()])["resumed"]
    assert resumed.startswith("Crash-v0__stand_in__1__")


@pytest.mark.parametrize("preload", [False, True])
def test_a_script_that_cannot_start(capsys, preload):
    write_suite("Good-v0", script="broken.py")
    Path("broken.py").write_text("class Args:\n    seed: int = 1\n\nimport no_such_module\n")
    assert run(*["--preload"] * preload) == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in capsys.readouterr().out


def test_preloaded(capsys):
    """Whatever a run does to its process, the others of the same worker neither see nor suffer it."""
    write_suite("Crash-v0", "Good-v0", "Exit-v0", "Other-v0", flags=("--gamma", "0.5"))
    assert run("--workers", "1", "--preload") == 1
    output = capsys.readouterr().out
    assert "Crash-v0 seed 1 failed: exit code 1 (" in output and "    RuntimeError: the pole is on fire\n" in output
    assert "Exit-v0 seed 1 failed: exit code 7 (" in output
    assert "Good-v0 seed 1: finished" in output and "Other-v0 seed 1: finished" in output
    logs = [path.read_text() for path in Path("runs/suite/logs").iterdir()]
    assert len({re.search(r"process (\d+)", log)[1] for log in logs}) == 4  # each in a process of its own
    assert len({config["gamma"] for path in Path("runs/suite").glob("*/config.json")
                for config in [json.loads(path.read_text())]}) == 1  # fmt: skip
    assert not benchmark.worker.workers
    Path("go").touch()
    assert run("--preload") == 0
    assert_complete(*(f"{env}-v0__stand_in__1" for env in ("Crash", "Good", "Exit", "Other")))


@pytest.mark.parametrize("victim", ["run", "worker"])
def test_preloaded_run_is_killed(victim):
    """The run alone, or the process that forked it, without which nobody would learn of its end."""
    write_suite("Wait-v0", "Good-v0")
    harness = Harness("--workers", "1", "--preload")
    harness.wait_for(reached("Wait-v0"))
    process = int(re.search(r"process (\d+)", Path("runs/suite/logs/Wait-v0__stand_in__1.log").read_text())[1])
    parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])
    os.kill(process if victim == "run" else parent, signal.SIGKILL)
    assert harness.end() == 1
    output = harness.output.read_text()
    assert "Wait-v0 seed 1 failed: killed by SIGKILL (" in output and "Good-v0 seed 1: finished" in output
    assert not files.is_running(runs()["Wait-v0__stand_in__1"][0])
    Path("go").touch()
    assert run() == 0
    assert_complete("Wait-v0__stand_in__1", "Good-v0__stand_in__1")


def test_preloaded_harness_is_stopped_or_killed():
    """Ctrl-C ends its runs, which write checkpoints; without it they go on, and nothing starts them twice."""
    write_suite("Wait-v0")
    harness = Harness("--preload")
    harness.wait_for(reached("Wait-v0"))
    assert harness.end(signal.SIGINT) == 130
    assert "0 of 1 finished, 1 stopped\n" in harness.output.read_text()
    harness = Harness("--preload")
    harness.wait_for(lambda: files.is_running(runs()["Wait-v0__stand_in__1"][0]))
    assert harness.end(signal.SIGKILL) == -signal.SIGKILL
    harness = Harness("--preload")
    harness.wait_for(lambda: "elsewhere" in harness.output.read_text())
    Path("go").touch()
    assert harness.end() == 0
    assert_complete("Wait-v0__stand_in__1")


def test_preloading_can_be_stopped():
    """Ctrl-C need not wait until a script is imported."""
    Path("slow.py").write_text(
        "class Args:\n    seed: int = 1\n\nopen('importing', 'w')\nimport time\ntime.sleep(300)\n"
    )
    write_suite("Good-v0", script="slow.py")
    harness = Harness("--preload")
    harness.wait_for(Path("importing").exists)
    assert harness.end(signal.SIGINT) == 130
    assert "0 of 1 finished, 1 stopped\n" in harness.output.read_text()


def contents(folder: Path) -> dict[Path, bytes]:
    """All files in a folder with their bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("broken", "text", "reason"), [
    ("checkpoint.pt", "not what it was", "cannot be resumed: stand_in.py: error: cannot use "),
    ("config.json", '{"env_id": "Crash-v0", "seed"', "is broken: config.json cannot be read: "),
    ("config.json", None, "is broken: there is no config.json; "),
])  # fmt: skip
def test_broken_run(broken, text, reason, capsys):
    """One line says so, others go on, and nothing is started in its place, however often one tries."""
    write_suite("Crash-v0", "Good-v0")
    assert run("--seeds", "1") == 1
    (path,) = runs()["Crash-v0__stand_in__1"]
    (path / broken).unlink()
    if text:
        (path / broken).write_text(text)
    before = contents(path)
    Path("go").touch()
    for seeds, counts in (("1", "1 of 2"), ("12", "3 of 4")):
        capsys.readouterr()
        assert run("--seeds", *seeds) == 1
        output = capsys.readouterr().out
        (line,) = [line for line in output.splitlines() if reason in line]
        assert line.startswith(f"Crash-v0 seed 1: {path.resolve()} ")
        assert line.endswith("; repair it or move it away")
        assert f"{counts} finished, 1 broken\n" in output
        assert contents(path) == before
        assert len(runs()["Crash-v0__stand_in__1"]) == 1
    path.rename(path.with_name("aside"))
    assert run("--seeds", "1", "2") == 0
    assert_complete(*(f"{env}-v0__stand_in__{seed}" for env in ("Good", "Crash") for seed in (1, 2)))


def test_broken_setting(capsys):
    """A run that does not say how long it is meant to be would never be finished, and so be resumed for ever."""
    write_suite("Crash-v0", "Good-v0")
    run()
    (path,) = runs()["Crash-v0__stand_in__1"]
    config = json.loads((path / "config.json").read_text())
    del config["num_steps"]
    (path / "config.json").write_text(json.dumps(config))
    log = Path("runs/suite/logs/Crash-v0__stand_in__1.log")
    before = log.read_bytes()
    capsys.readouterr()
    for words in (["--dry-run"], []):
        assert run(*words) == (0 if words else 1)
        line = f"Crash-v0 seed 1: {path.resolve()} is broken: in config.json num_steps is missing; "
        assert capsys.readouterr().out.count(line) == 1
    assert log.read_bytes() == before


def test_good_run_beside_a_broken_one():
    """It is the one that counts."""
    write_suite("Crash-v0")
    write_run("Crash-v0__stand_in__1__1", {"seed": 1}, [UPDATE])
    assert run() == 1
    assert len(runs()["Crash-v0__stand_in__1"]) == 1
    Path("runs/suite/Crash-v0__stand_in__1__1").rename("runs/suite/aside")
    assert run() == 1  # it crashes
    Path("runs/suite/aside").rename("runs/suite/Crash-v0__stand_in__1__1")
    Path("go").touch()
    assert run() == 0
    _, path = runs()["Crash-v0__stand_in__1"]
    assert len(steps(path)) == 8


# Runs that somebody has started by hand


@contextmanager
def locked(path: Path):
    """Holds the lock of a run directory as a training does."""
    with open(path / "metrics.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def test_lock():
    path = write_run("A__x__1__1", CONFIG, [UPDATE | {"global_step": 16}])
    assert not files.is_running(path) and run_state(path).status == "finished"
    with locked(path):
        assert files.is_running(path)
        state = run_state(path)
        assert state.status == "running" and not state.finished
    assert not files.is_running(path)
    assert not files.is_running(Path("nowhere"))


def test_lock_without_fcntl(monkeypatch):
    """As on Windows."""
    path = write_run("A__x__1__1", CONFIG, [])
    with locked(path):
        monkeypatch.setattr(files, "fcntl", None)
        assert not files.is_running(path)


@pytest.mark.parametrize("rows", [[], [UPDATE], [UPDATE | {"global_step": 64}]])
def test_run_by_hand_is_left_alone(rows, capsys):
    """Wherever it has got to: it is shown and said to be running elsewhere, and nothing is started in its place."""
    write_suite("Good-v0", "Other-v0")
    path = write_run("Good-v0__stand_in__1__1", settings("Good-v0"), rows)
    (path / "checkpoint.pt").write_text("[0, 0]")
    with locked(path):
        before = contents(path)
        assert run("--dry-run") == 0
        assert capsys.readouterr().out == "Good-v0 seed 1: running already\nOther-v0 seed 1: start\n"
        assert run() == 1
        output = capsys.readouterr().out
        where = f"another process trains it in {path.resolve()}\n"
        assert output.endswith(
            f"Good-v0 seed 1 is still running elsewhere: {where}1 of 2 finished, 1 running elsewhere\n"
            "The same command goes on with what is not finished.\n"
        )
        assert "Good-v0 seed 1: elsewhere" in output
        assert contents(path) == before
    assert len(runs()["Good-v0__stand_in__1"]) == 1
    path.rename("aside")
    assert run() == 0


def test_run_by_hand_that_has_no_settings_yet():
    """It locks its directory before it writes into it."""
    write_suite("Good-v0")
    path = Path("runs/suite/Good-v0__stand_in__1__1")
    path.mkdir(parents=True)
    with locked(path):
        assert run() == 1
    assert run() == 0
    assert len(runs()["Good-v0__stand_in__1"]) == 2


def test_harness_beside_a_run_by_hand():
    """Neither disturbs the other; when the run has ended, the harness counts it, and goes on with what it left."""
    write_suite("Wait-v0", "Good-v0")
    words = [sys.executable, str(STAND_IN), "--env-id", "Wait-v0", "--runs-dir", "runs/suite", "--seed", "1"]
    by_hand = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while not reached("Wait-v0")():
        time.sleep(0.02)
    assert run() == 1
    assert by_hand.poll() is None
    by_hand.kill()
    by_hand.wait()
    Path("go").touch()
    assert run() == 0
    assert_complete("Wait-v0__stand_in__1", "Good-v0__stand_in__1")


def test_run_that_is_resumed_by_hand_at_the_same_moment(monkeypatch):
    """The lock was free when the harness looked: the script refuses, which does not make the run a broken one."""
    write_suite("Crash-v0")
    run()
    (path,) = runs()["Crash-v0__stand_in__1"]
    for module in (suite, benchmark.run):
        monkeypatch.setattr(module, "is_running", lambda path: False)
    with locked(path):
        (task,) = [benchmark.run.Task(job, Path("runs/suite").resolve()) for job in load_suite("suite.toml").jobs()]
        task.run(1)
        assert (task.status, task.note) == ("elsewhere", "")
        assert "is still running: another process writes to it" in task.tail()[-1]
        assert run() == 1  # which does not try for ever
    Path("go").touch()
    assert run() == 0
    assert_complete("Crash-v0__stand_in__1")


# Names and paths that mean something elsewhere


def test_environments_with_the_same_directory_name():
    """They are three jobs, each with its own run, lock and log, though their directories' names begin alike."""
    env_ids = ["m:Good-v0", "m-Good-v0", "m Good-v0"]
    write_suite(*env_ids)
    for _ in range(2):
        assert run("--workers", "3") == 0
        ((name, paths),) = runs().items()
        assert name == "m-Good-v0__stand_in__1" and len(paths) == 3
        assert sorted(json.loads((path / "config.json").read_text())["env_id"] for path in paths) == sorted(env_ids)
        assert all(len(steps(path)) == 8 for path in paths)
    jobs = load_suite("suite.toml").jobs()
    assert len({job.key for job in jobs}) == 3 and len(list(Path("runs/suite/logs").iterdir())) == 3
    for job, state in suite_runs(load_suite("suite.toml"), Path("runs/suite")).items():
        assert state.config["env_id"] == job.env_id


def test_keys_of_jobs():
    """Plain names stay as they are; others that a directory cannot tell apart get different ones."""

    def key(env_id, exp_name="x", seed=1):
        return suite.Job("ppo.py", env_id, seed, (), exp_name).key

    assert key("Good-v0", "stand_in") == "Good-v0__stand_in__1"
    names = [key("a:b"), key("a-b"), key("a/b"), key("a__b", "c"), key("a", "b__c"), key("a_", "c"), key("a", "_c")]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)


STRANGE = [
    "[red]Good-v0[/]",
    "[/]",
    ":smile:",
    "Good-v0\n\x1b[31m",
    "-Good-v0",
    "$(touch pwned) `touch pwned`",
    "*?[a]",
]


def test_strange_environments(capsys):
    """Rich, the shell, globs and the terminal take nothing in a name for their own."""
    write_suite(*STRANGE)
    assert run() == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output and not Path("pwned").exists()
    assert "Good-v0\\n\\x1b[31m seed 1: finished" in output
    found = suite_runs(load_suite("suite.toml"), Path("runs/suite"))
    assert sorted(state.config["env_id"] for state in found.values()) == sorted(STRANGE)
    assert {len(paths) for paths in runs().values()} == {1}


def test_table_of_strange_environments():
    """A title or a name is no markup: an unknown tag would be an error, and a known one would not be seen."""
    write_suite(*STRANGE)
    tasks = [benchmark.run.Task(job, Path("runs")) for job in load_suite("suite.toml").jobs()]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(benchmark.run.Display(tasks, "[bold]A[/nothing] :x:").table())
    text = console.export_text()
    for name in ("[bold]A[/nothing] :x:", *STRANGE):
        assert files_text(name) in text


def files_text(name: str) -> str:
    """The name without what would break a line."""
    return name.replace("\n", "\\n").replace("\x1b", "\\x1b")


@pytest.mark.parametrize("name", ["[1]*?", "a b'c\"d", "$HOME %j", "line\nbreak", "\udcff"])
def test_strange_folder(name, capsys, monkeypatch):
    """For the runs, and the suite."""
    Path(name).mkdir()
    monkeypatch.chdir(name)
    write_suite("Good-v0")
    Path("suite.toml").rename("[s] *?.toml")
    for _ in range(2):
        assert main(["run", "[s] *?.toml"]) == 0
        ((path,),) = scan_runs(Path("runs/[s] *?")).values()
        assert len(steps(path)) == 8
    assert main(["run", "[s] *?.toml", "--seeds", "-3"]) == 2
    assert main(["run", "no\nsuite.toml"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_suite_without_a_name(capsys):
    """runs/.. is not where its runs should go."""
    write_suite("Good-v0")
    Path("suite.toml").rename("...toml")
    assert main(["run", "...toml"]) == 2
    assert "the file's name is that of the suite, and .. is no name" in capsys.readouterr().err


def test_runs_are_found_from_anywhere(monkeypatch):
    """A relative --runs-dir is that of where the command was given, also for what is started later."""
    write_suite("Good-v0")
    monkeypatch.setattr(benchmark.run, "Display", leaving(benchmark.run.Display, monkeypatch))
    folder = Path.cwd()
    assert run("--runs-dir", "here") == 0
    assert Path.cwd() != folder and len(scan_runs(folder / "here")) == 1


def leaving(display: type, monkeypatch):
    """A Display that changes the working directory when it is made."""

    def make(*args):
        Path("elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        return display(*args)

    return make


def test_terminal_that_cannot_show_a_name():
    write_suite("π-v0")
    command = [sys.executable, "-m", "benchmark", "run", "suite.toml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u03c0-v0 seed 1: finished" in done.stdout


# Symbolic links, and files that are being written


def test_links_are_not_followed():
    """What a log or a lock leads to belongs to somebody else."""
    write_suite("Good-v0", "Other-v0")
    for folder, name in (("logs", "Good-v0__stand_in__1.log"), (".locks", "Other-v0__stand_in__1")):
        Path("runs/suite", folder).mkdir(parents=True)
        Path("runs/suite", folder, name).symlink_to(Path("precious").resolve())
    Path("precious").write_text("as it was")
    assert run() == 1
    assert Path("precious").read_text() == "as it was"
    assert runs() == {}


def test_file_is_replaced_at_once(monkeypatch):
    """A link is replaced too, and not followed; what fails leaves the old file, and nothing beside it."""
    Path("precious").write_text("as it was")
    Path("file").symlink_to("precious")
    files.write_file(Path("file"), "new")
    assert not Path("file").is_symlink() and Path("file").read_text() == "new"
    assert Path("precious").read_text() == "as it was"
    assert os.stat("file").st_mode == os.stat("precious").st_mode
    Path("folder").mkdir()
    with pytest.raises(OSError):
        files.write_file(Path("folder"), "new")
    monkeypatch.setattr(files.os, "replace", read_only)
    with pytest.raises(OSError):
        files.write_file(Path("file"), "newer")
    assert sorted(os.listdir()) == ["file", "folder", "precious"] and Path("file").read_text() == "new"


def test_links_to_runs_can_be_read():
    """Whoever keeps a run on another disk has put the link there."""
    write_suite("A", flags=("--total-timesteps", "8"))
    path = write_run("A__stand_in__1__1", settings(), [EPISODE, UPDATE])
    path.rename("disk")
    path.symlink_to(Path("disk").resolve())
    assert run() == 0


def test_run_without_a_checkpoint():
    """It was killed before it had written one: it starts anew."""
    write_suite("Good-v0")
    Path("runs/suite/Good-v0__stand_in__1__1").mkdir(parents=True)
    assert run() == 0
    empty, path = runs()["Good-v0__stand_in__1"]
    assert not list(empty.iterdir()) and len(steps(path)) == 8


@pytest.mark.parametrize("runs_dir", ["file", "file/inside"])
def test_directory_that_cannot_be_written(runs_dir, capsys):
    write_suite("Good-v0")
    Path("file").touch()
    assert run("--runs-dir", runs_dir) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark run: error: cannot ") and runs_dir in line


def test_directory_without_permission(capsys, monkeypatch):
    """As on a file system that is mounted read-only."""
    write_suite("Good-v0")
    monkeypatch.setattr(benchmark.run.tempfile, "TemporaryFile", read_only)
    assert run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"cannot write to \S+/runs/suite: \[Errno 30\] Read-only file system", line)


def read_only(*_, **__):
    """Fails as a read-only file system does."""
    raise OSError(30, "Read-only file system")


# Accidents


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "killed by SIGKILL"),
        (signal.SIGTERM, "stopped before its end by a signal that did not come from here"),
    ],
)
def test_worker_is_killed(number, reason):
    write_suite("Wait-v0", "Good-v0")
    harness = Harness("--workers", "2")
    harness.wait_for(lambda: reached("Wait-v0")() and reached("Good-v0", 64)() and len(trainings()) == 1)
    (process,) = trainings()
    os.kill(process, number)
    assert harness.end() == 1
    output = harness.output.read_text()
    assert f"Wait-v0 seed 1 failed: {reason} (" in output
    assert "1 of 2 finished, 1 failed\n" in output
    Path("go").touch()
    assert run() == 0
    assert_complete("Wait-v0__stand_in__1", "Good-v0__stand_in__1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_harness_is_stopped(number):
    """It stops its runs, which write checkpoints, and starts no others."""
    write_suite("Wait-v0", "Good-v0")
    harness = Harness("--workers", "1")
    harness.wait_for(reached("Wait-v0"))
    assert harness.end(number) == 130
    assert trainings() == []
    assert "0 of 2 finished, 2 stopped\n" in harness.output.read_text()
    assert list(runs()) == ["Wait-v0__stand_in__1"]
    Path("go").touch()
    assert run() == 0
    assert_complete("Wait-v0__stand_in__1", "Good-v0__stand_in__1")


def test_output_that_nobody_reads():
    """As with `| head`: the runs are stopped like with Ctrl-C, which nothing would listen to any more."""
    write_suite("Wait-v0", "Good-v0")
    command = [sys.executable, "-m", "benchmark", "run", "suite.toml", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.wait(WAIT) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
    assert trainings() == []
    Path("go").touch()
    assert run() == 0
    assert "Good-v0__stand_in__1" in runs()


def test_a_second_signal_kills():
    write_suite("Deaf-v0")
    harness = Harness()
    harness.wait_for(reached("Deaf-v0"))
    harness.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert harness.process.poll() is None and len(trainings()) == 1
    assert harness.end(signal.SIGINT) == 130
    assert trainings() == []


def test_harness_is_killed():
    """Its runs go on; the next harness does not start them again, and takes over what they leave."""
    write_suite("Wait-v0", "Deaf-v0", "Good-v0")
    harness = Harness("--workers", "2")
    harness.wait_for(lambda: reached("Wait-v0")() and reached("Deaf-v0")())
    assert harness.end(signal.SIGKILL) == -signal.SIGKILL
    left = trainings()
    assert len(left) == 2
    harness = Harness("--workers", "2", output="second")
    harness.wait_for(reached("Good-v0", 64))
    harness.wait_for(lambda: harness.output.read_text().count("elsewhere") >= 2)
    assert trainings() == left
    (process,) = [p for p in left if b"Wait-v0" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(process, signal.SIGKILL)  # the second harness resumes it, while the other one goes on by itself
    harness.wait_for(lambda: len(now := trainings()) == 2 and process not in now)
    Path("go").touch()
    assert harness.end() == 0, harness.output.read_text()
    assert_complete(*(f"{env}-v0__stand_in__1" for env in ("Wait", "Deaf", "Good")))


def test_a_slow_look_does_not_hide_the_end_of_a_run(monkeypatch):
    """The display may read a run's state just before its end, and be done with that only after the end was seen."""
    write_suite("Good-v0")
    (job,) = load_suite("suite.toml").jobs()
    task, slow, states = benchmark.run.Task(job, Path("runs/suite")), threading.Event(), []

    def look(path, known):
        states.append(len(states))
        state = states[-1]
        if state == 0:
            slow.set()
            time.sleep(0.3)
        return SimpleNamespace(path=path, number=state)

    monkeypatch.setattr(benchmark.run, "run_state", look)
    task.state = SimpleNamespace(path=Path("runs/suite/run"))
    display = threading.Thread(target=task.look)
    display.start()
    slow.wait(WAIT)
    task.look()
    assert task.state.number == 1
    display.join()
    assert task.state.number == 1 and states == [0, 1]


def test_a_job_that_others_leave_between_two_looks(monkeypatch):
    """Others are seen to train it, and have ended before that is asked again: what they left undone is done here."""
    write_suite("Good-v0")
    (job,) = load_suite("suite.toml").jobs()
    lock = Path("runs/suite/.locks") / job.key
    lock.parent.mkdir(parents=True)
    descriptors, ask = [files.take_lock(lock)], benchmark.run.Task.is_elsewhere

    def is_elsewhere(task):
        answer = ask(task)
        if descriptors:
            os.close(descriptors.pop())
        return answer

    monkeypatch.setattr(benchmark.run.Task, "is_elsewhere", is_elsewhere)
    assert run() == 0
    assert_complete("Good-v0__stand_in__1")
    assert not descriptors


def test_two_harnesses_at_once():
    write_suite("Wait-v0", "Good-v0", "Other-v0", seeds=(1, 2))
    both = [Harness("--workers", "2", output=name) for name in ("first", "second")]
    for harness in both:
        harness.wait_for(lambda harness=harness: "elsewhere" in harness.output.read_text() or reached("Other-v0", 64)())
    Path("go").touch()
    assert [harness.end() for harness in both] == [0, 0]
    assert_complete(*(f"{env}-v0__stand_in__{seed}" for env in ("Wait", "Good", "Other") for seed in (1, 2)))
    logs = Counter(line for log in Path("runs/suite/logs").iterdir() for line in log.read_text().splitlines())
    commands = {line: count for line, count in logs.items() if line.startswith("$")}
    assert len(commands) == 6 and set(commands.values()) == {1}


def test_table():
    """On a terminal there is a live table."""
    write_suite("Good-v0", "Crash-v0")
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "benchmark", "run", "suite.toml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=child, stderr=child, env=environment)
    os.close(child)
    output = b""
    while select.select([parent], [], [], WAIT)[0]:
        try:
            output += os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
    os.close(parent)
    assert process.wait(WAIT) == 1
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    last = text[text.rindex("A suite") :]
    assert re.search(r"Crash-v0 +│ 1 +│ failed +│ 16/64 +│ 100 steps/s +│ return 1.5 +│", last)
    assert re.search(r"Good-v0 +│ 1 +│ finished +│ 64/64 +│ 100 steps/s +│ return 4.5 +│", last)
    assert "the pole is on fire" in last


def test_table_is_drawn_less_often_the_longer_it_takes(monkeypatch):
    """It may take a two-hundredth of one core; but a run that ends is shown at once."""
    write_suite("Good-v0", seeds=(1, 2))
    tasks = [benchmark.run.Task(job, Path("runs")) for job in load_suite("suite.toml").jobs()]
    display, now, drawn = benchmark.run.Display(tasks, "A suite"), [0.0], []

    def draw(table, refresh):
        drawn.append(now[0])
        now[0] += 0.02

    clock = SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: now[0])
    monkeypatch.setattr(benchmark.run, "time", clock)
    display.live = SimpleNamespace(update=draw)
    for second in range(20):
        now[0] = float(second)
        tasks[0].status = "waiting" if second < 7 else "running"
        display.update()
    assert drawn == [0, 5, 7, 12, 17]


# The same with ppo.py

EXPLODING = """
import os
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv


class Exploding(CartPoleEnv):
    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 400 and not os.path.exists("go"):
            raise RuntimeError("the pole is on fire")
        return super().step(action)


gym.register("Exploding-v0", Exploding, max_episode_steps=500)
"""
SMALL = ("--total-timesteps", "2560", "--num-envs", "2", "--num-steps", "64", "--checkpoint-interval", "1")


@pytest.mark.slow
def test_accidents_of_ppo(capsys):
    """A crash in the middle, a broken checkpoint and a run that is finished already."""
    Path("exploding.py").write_text(EXPLODING)
    write_suite("exploding:Exploding-v0", "CartPole-v1", script="ppo.py", flags=SMALL)
    assert run("--workers", "1", "--preload") == 1  # one import for both
    output = capsys.readouterr().out
    assert "exploding:Exploding-v0 seed 1 failed: exit code 1" in output
    assert "    RuntimeError: the pole is on fire\n" in output
    Path("go").touch()
    finished = runs()["CartPole-v1__ppo__1"][0] / "metrics.jsonl"
    before = finished.read_bytes()
    (broken,) = runs()["exploding-Exploding-v0__ppo__1"]
    checkpoint = (broken / "checkpoint.pt").read_bytes()
    (broken / "checkpoint.pt").write_bytes(checkpoint[:1000])
    assert run() == 1
    assert f"{broken.resolve()} cannot be resumed: ppo.py: error: " in capsys.readouterr().out
    (broken / "checkpoint.pt").write_bytes(checkpoint)
    assert run() == 0
    assert_complete("exploding-Exploding-v0__ppo__1", "CartPole-v1__ppo__1", batch=128, updates=20)
    assert finished.read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_and_resuming_of_ppo():
    """Stopped and resumed, it has every update once; while it runs nobody can resume it by hand."""
    write_suite("CartPole-v1", script="ppo.py", flags=("--total-timesteps", "12800", *SMALL[2:]))
    harness = Harness()
    harness.wait_for(reached("CartPole-v1", 128))
    (process,) = trainings()
    os.kill(process, signal.SIGSTOP)
    ((path,),) = runs().values()
    assert files.is_running(path)
    second = forking.run([ROOT / "ppo.py", "--resume", path])
    assert second.returncode == 2
    assert second.stderr.endswith(f"{path.name} is still running: another process writes to it\n")
    os.kill(process, signal.SIGCONT)
    assert harness.end(signal.SIGINT) == 130
    ((path,),) = runs().values()
    assert 0 < len(steps(path)) < 100
    assert run() == 0
    assert_complete("CartPole-v1__ppo__1", batch=128, updates=100)
