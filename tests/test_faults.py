"""What users run into: odd environments, full disks, closed terminals, foreign files, edited copies of a script."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict, fields
from pathlib import Path

import forking
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium.spaces import Box, Discrete

pytestmark = pytest.mark.slow  # these start whole runs

NAMES = [name for name in ("ppo", "ppo_continuous", "ppo_lstm", "ppo_multidiscrete")
         if "\nclass Environments" in (ROOT / f"{name}.py").read_text()]  # fmt: skip
SCRIPTS = [__import__(name) for name in NAMES]
ALL = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
# Of what all scripts have in the same lines (test_same_lines.py), one is tested.
SHARED = pytest.mark.parametrize("script", SCRIPTS[:1], ids=NAMES[:1])
SMALL = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 256}
BATCH = 64
# What two environments are given; other scripts give them a number each.
ACTIONS = {"ppo_continuous": np.zeros((2, 1), np.float32), "ppo_multidiscrete": np.zeros((2, 1), int)}
# What the subprocesses import too: this very file is the module of the environments.
HERE = "test_faults"


class Base(gym.Env):
    """Episodes of ten steps; two observations, two actions or a box of one."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, box=False, render_mode=None):
        self.observation_space = Box(-1, 1, (2,), np.float32)
        self.action_space = Box(-1, 1, (1,), np.float32) if box else Discrete(2)
        self.render_mode, self.buffer, self.t = render_mode, np.zeros(2, np.float32), 0

    def render(self):
        """A small picture."""
        return np.ones((64, 64, 3), np.uint8)

    def show(self):
        """The observation."""
        return np.full(2, self.t / 10, np.float32)

    def result(self):
        """Reward, terminated, truncated, info."""
        return 1.0, self.t >= 10, False, {}

    def reset(self, *, seed=None, options=None):
        """Starts the next episode."""
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def step(self, action):
        """One step on."""
        self.t += 1
        return self.show(), *self.result()


class InfoOfEnds(Base):
    """Infos at the episodes' ends that fit into no common array, and an "episode" of its own."""

    def result(self):
        end = self.t >= 5 + self.np_random.integers(2)
        path = np.arange(self.np_random.integers(9))
        winner = None if self.np_random.random() < 0.5 else 1
        return 1.0, bool(end), False, {"path": path, "winner": winner, "episode": 7} if end else {}


class ArrayReward(Base):
    """Rewards of shape (1,)."""

    def result(self):
        return np.ones(1), self.t >= 10, False, {}


class Reuse(Base):
    """Hands out the same array again and again, and is cut off."""

    def show(self):
        self.buffer[:] = self.t / 10
        return self.buffer

    def result(self):
        return 1.0, False, self.t >= 10, {}


class Both(Base):
    """Ends and is cut off in the same step."""

    def result(self):
        return 1.0, self.t >= 10, self.t >= 10, {}


class Random(Base):
    """Draws from the global generators and from its spaces."""

    def show(self):
        return np.float32([np.random.uniform(), random.random()]) * self.observation_space.sample()

    def result(self):
        return float(np.sum(self.action_space.sample())) + random.random(), self.t >= 10, False, {}


class Endless(Base):
    """Has no end."""

    def result(self):
        return 1.0, False, False, {}


class Lost(Base):
    """Loses its connection."""

    def result(self):
        if self.t == 7:
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().result()


class FewSeeds(Base):
    """Knows ten seeds."""

    def reset(self, *, seed=None, options=None):
        assert seed is None or 0 <= seed < 10, seed
        return super().reset(seed=seed)


class NotFinite(Base):
    """Its 21st observation or reward is not a number."""

    calls = 0

    def __init__(self, what="reward", **kwargs):
        super().__init__(**kwargs)
        self.what = what

    def result(self):
        self.calls += 1
        return float("nan") if self.what == "reward" and self.calls == 21 else 1.0, self.t >= 10, False, {}

    def show(self):
        return super().show() * (float("nan") if self.what == "observation" and self.calls == 20 else 1)


ENVS = [InfoOfEnds, ArrayReward, Reuse, Both, Random, Endless, Lost, FewSeeds, NotFinite]
for kind in ENVS:
    gym.register(f"fault/{kind.__name__}-v0", kind, disable_env_checker=True)
    gym.register(f"{kind.__name__}-v0", kind, disable_env_checker=True)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and leaves the handling of signals as it was."""
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    for script in SCRIPTS:
        monkeypatch.setattr(script, "SIGNALS", [])
        script.say.cache_clear()
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


def settings(script, env="InfoOfEnds", **changed):
    """Settings of a short run in one of the environments above."""
    kwargs = ({"box": True} if script.SCRIPT == "ppo_continuous" else {}) | changed.pop("env_kwargs", {})
    chosen = SMALL | {"env_id": f"fault/{env}-v0", "env_kwargs": json.dumps(kwargs)}
    chosen |= {"env_backend": "gymnasium"} if script.SCRIPT == "ppo_multidiscrete" else {}
    chosen |= {"hide": ()} if script.SCRIPT == "ppo_lstm" else {}  # without this it says that nothing is hidden
    return script.Args(**(chosen | changed))


def flags(args) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for name, value in asdict(args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple | list):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


def trained(script, env="InfoOfEnds", **changed) -> Path:
    """The run directory of a short run."""
    return Path(script.train(settings(script, env, **changed))["run_dir"])


def metrics(path: Path) -> list[dict]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def without_clock(path: Path) -> list[dict]:
    """The metrics without what depends on the machine's speed."""
    return [{key: row[key] for key in row if key not in ("wall_time", "charts/SPS")} for row in metrics(path)]


def own(script, env, **changed) -> list[str]:
    """The same command line, for another process, which imports this file."""
    return flags(settings(script, env, **{"env_id": f"{HERE}:{env}-v0"} | changed))


@pytest.fixture
def processes():
    """A test's processes, none of which outlives it."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def start(processes):
    """Starts a script as a process of its own, or by Python itself, which imports everything again."""

    def start(script, words, by_python=False, **options):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment} | options
        words = [script.__file__, *words]
        if by_python:
            processes.append(subprocess.Popen([sys.executable, *words], text=True, **options))
        else:
            processes.append(forking.Forked(words, **options))
        return processes[-1]

    return start


def wait_for(path_pattern: str, process, seconds=60) -> Path:
    """Waits until a file with contents is there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        for path in Path.cwd().glob(path_pattern):
            if path.stat().st_size:
                return path
        time.sleep(0.02)
    raise AssertionError(f"{path_pattern} never came")


def refused(script, words, capsys) -> str:
    """The one line with which a command is refused; nothing is left behind."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert script.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sorted(Path.cwd().rglob("*")) == before
    return line.removeprefix(f"{script.SCRIPT}.py: error: ")


# Valid environments ---------------------------------------------------------------------------------------------------
@ALL
@pytest.mark.parametrize("env", ["InfoOfEnds", "ArrayReward", "Reuse", "Both", "Random"])
def test_valid_environments_train(script, env):
    path = trained(script, env)
    lengths = {row["charts/episodic_length"] for row in metrics(path) if "charts/episodic_length" in row}
    assert lengths == ({5, 6} if env == "InfoOfEnds" else {10})


def ends_of(script, env):
    """The ends of episodes in a rollout."""
    args = settings(script, env)
    envs = script.make_envs(args)
    envs.reset(1)
    actions = ACTIONS.get(script.SCRIPT, np.zeros(2, int))
    return [end for _ in range(20) for end in envs.step(actions)[3]]


@ALL
def test_the_last_observation_of_a_reused_array(script):
    ends = ends_of(script, "Reuse")
    assert len(ends) == 4 and all(end.truncated for end in ends)
    for end in ends:
        np.testing.assert_array_equal(end.last_obs, np.float32([1, 1]))


@ALL
def test_terminated_and_truncated_at_once_is_terminated(script):
    ends = ends_of(script, "Both")
    assert len(ends) == 4 and not any(end.truncated for end in ends)


@ALL
def test_the_same_seed_gives_the_same_numbers(script):
    """Also to environments that use the global generators or their spaces' sample()."""
    first, again, other = (trained(script, "Random", seed=seed, runs_dir=str(i)) for i, seed in enumerate((3, 3, 4)))
    assert without_clock(first) == without_clock(again) != without_clock(other)


@ALL
def test_few_seeds(script):
    """A resumed run gives environments only the seeds that the run has given them before."""
    path = trained(script, "FewSeeds", seed=5)
    assert script.main(["--resume", str(path), "--total-timesteps", "512"]) == 0
    assert metrics(path)[-1]["global_step"] == 512


@ALL
def test_a_resumed_run_does_not_play_its_first_episodes_again(script):
    args = settings(script, "InfoOfEnds")
    envs = script.make_envs(args)
    actions = ACTIONS.get(script.SCRIPT, np.zeros(2, int))

    def lengths(first_step):
        envs.reset(1, first_step)
        return [(end.env, end.length) for _ in range(100) for end in envs.step(actions)[3]]

    assert lengths(0) == lengths(0) != lengths(64)


@SHARED
def test_errors_within_the_environment_keep_their_traceback(script, start):
    process = start(script, own(script, "Lost"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" in err and 'raise ConnectionResetError(104, "Connection reset by peer")' in err


@ALL
@pytest.mark.parametrize("what", ["reward", "observation"])
def test_what_is_not_finite_is_said(script, what, capsys):
    args = settings(script, "NotFinite", env_kwargs={"what": what})
    assert script.main(flags(args)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(rf"in update 1, an? {what} \[.*\] is not finite at \[2[01], 0", line), line


@ALL
def test_a_loss_that_is_not_finite_is_said(script, capsys, monkeypatch):
    original = script.ppo_loss

    def ppo_loss(*inputs):
        loss, terms, log_ratio = original(*inputs)
        return loss, terms * float("nan"), log_ratio

    monkeypatch.setattr(script, "ppo_loss", ppo_loss)
    assert script.main(flags(settings(script))) == 1
    assert "losses/policy_loss is not finite" in capsys.readouterr().err


@ALL
def test_evaluation_cuts_endless_episodes(script, capsys):
    path = trained(script, "Endless")
    words = ["--evaluate", str(path), "--eval-episodes", "2", "--eval-max-steps", "150", "--capture-video"]
    assert script.main(words) == 0
    assert "return 150.0 +- 0.0 over 2 episodes" in capsys.readouterr().out


@SHARED
@pytest.mark.slow
def test_videos_of_endless_episodes_are_cut(script, monkeypatch):
    """The recorder keeps some 1,000 frames in memory."""
    most, original = 0, script.SafeRecordVideo._capture_frame

    def capture(recorder):
        nonlocal most
        original(recorder)
        most = max(most, len(recorder.recorded_frames))

    monkeypatch.setattr(script.SafeRecordVideo, "_capture_frame", capture)
    trained(script, "Endless", capture_video=True, num_steps=600, total_timesteps=2400)
    assert 0 < most <= 1001  # it stops after one more


# Files ----------------------------------------------------------------------------------------------------------------
@SHARED
def test_two_processes_in_one_directory(script, start):
    """The second is refused, and rows are not doubled."""
    process = start(script, own(script, "InfoOfEnds", total_timesteps=10_000_000))
    path = wait_for("runs/*/metrics.jsonl", process).parent
    second = start(script, ["--resume", str(path), "--env-id", f"{HERE}:InfoOfEnds-v0"])
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2 and "is still running" in err and len(err.splitlines()) == 1
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 0
    steps = [row["global_step"] for row in metrics(path) if "losses/entropy" in row]
    assert steps == list(range(BATCH, steps[-1] + 1, BATCH))


@SHARED
def test_a_full_disk_ends_with_1(script):
    """Metrics that reach the limit of a file's size in the middle of a line."""
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));" \
           "sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip
    words = own(script, "InfoOfEnds", total_timesteps=1_000_000)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = forking.run(["-c", code, script.__file__, *words], env=environment, timeout=200)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-500:]


@SHARED
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_an_empty_run_directory_name(script, flag, capsys):
    assert "needs a run directory" in refused(script, [flag, ""], capsys)


@pytest.mark.parametrize(
    ("script", "flag"), [*((script, "--resume") for script in SCRIPTS), (SCRIPTS[0], "--evaluate")]
)
def test_each_field_of_a_config(script, flag, capsys):
    """A missing one is an error, never a default; so is one of a wrong type."""
    path = trained(script)
    config = json.loads((path / "config.json").read_text())
    for field in fields(script.Args):
        for damaged in (
            {key: value for key, value in config.items() if key != field.name},
            config | {field.name: {"a": 1}},
        ):
            (path / "config.json").write_text(json.dumps(damaged))
            assert field.name in refused(script, [flag, str(path)], capsys)
            script.say.cache_clear()


@ALL
def test_each_field_of_a_checkpoint(script, capsys):
    path = trained(script)
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    for name in state:
        for damaged in ({key: value for key, value in state.items() if key != name}, state | {name: "text"}):
            torch.save(damaged, path / "checkpoint.pt")
            assert "checkpoint.pt" in refused(script, ["--resume", str(path)], capsys)
            script.say.cache_clear()


@SHARED
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint.pt.tmp", "config.json.tmp"])
def test_symbolic_links_are_refused(script, name, capsys, tmp_path):
    path = trained(script)
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(outside)
    assert "symbolic links" in refused(script, ["--resume", str(path)], capsys)
    assert outside.read_text() == "precious"


@SHARED
@pytest.mark.parametrize("name", ["../x", "a b", "[x]", "/tmp/x", "ü*?"])
def test_names_stay_inside_runs_dir(script, name):
    path = trained(script, exp_name=name)
    assert path.parent == Path("runs").resolve() and list(Path("runs").iterdir()) == [Path("runs") / path.name]
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "runs"]


@SHARED
def test_a_foreign_module_needs_the_flag_again(script, start):
    path = trained(script)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"env_id": "evil:Evil-v0"}))
    Path("evil.py").write_text("open('exploded', 'w')\n")
    for flag in ("--resume", "--evaluate"):
        process = start(script, [flag, str(path)])
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "repeat its --env-id evil:Evil-v0" in err and len(err.splitlines()) == 1
    assert not Path("exploded").exists()


# Terminals and signals ------------------------------------------------------------------------------------------------
@SHARED
@pytest.mark.parametrize("stderr", ["closed", "full", "reader gone"])
def test_stderr_does_not_matter(script, start, stderr):
    words = own(script, "InfoOfEnds", total_timesteps=640)
    if stderr == "closed":
        process = start(script, words, by_python=True, stderr=None, preexec_fn=lambda: os.close(2))
    elif stderr == "full":
        with open("/dev/full", "w") as full:
            process = start(script, words, by_python=True, stderr=full)
    else:
        reader, writer = os.pipe()
        process = start(script, words, by_python=True, stderr=writer)
        os.close(reader), os.close(writer)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and ": 640 steps, mean return " in out


@SHARED
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_hangup(script, start, ignored):
    """A closed terminal ends the run with a checkpoint; under nohup it goes on."""
    ignore = {"by_python": True, "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    words = own(script, "InfoOfEnds", total_timesteps=10_000_000, checkpoint_interval=10**6)
    process = start(script, words, **(ignore if ignored else {}))
    path = wait_for("runs/*/metrics.jsonl", process).parent
    process.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 0
    updates = [row["global_step"] for row in metrics(path) if "losses/entropy" in row]
    counts = torch.load(path / "checkpoint.pt", weights_only=True)["counts"]
    assert counts[0].item() * BATCH == updates[-1]


@SHARED
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch"])
def test_ctrl_c_while_it_starts(script, start, library):
    """While it imports gymnasium, and with that NumPy, and while it imports PyTorch."""
    process = start(script, own(script, "InfoOfEnds", total_timesteps=10_000_000), by_python=True)
    time.sleep(0 if sys.platform == "linux" else 1)
    while sys.platform == "linux" and library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT and err == ""


# The command line -----------------------------------------------------------------------------------------------------
@SHARED
def test_steps_in_scientific_notation(script):
    words = [*flags(settings(script)), "--total-timesteps", "1.28e2"]
    assert script.main(words) == 0
    (path,) = Path("runs").iterdir()
    assert metrics(path)[-1]["global_step"] == 128


@SHARED
def test_a_switch_with_a_value_names_the_other_switch(script, capsys):
    assert "--no-anneal-lr" in refused(script, ["--anneal-lr", "False"], capsys)


def test_actions_of_the_other_kind_name_the_script(capsys):
    import ppo

    assert "ppo_continuous.py" in refused(ppo, ["--env-id", "Pendulum-v1"], capsys)


@ALL
@pytest.mark.parametrize("words", [["--env-id", "Nothing-v7"], ["--env-kwargs", '{"wind": 3}'], ["--gamma", "7"]])
def test_refused_starts_leave_nothing(script, words, capsys):
    assert refused(script, [*flags(settings(script)), *words], capsys)


@SHARED
def test_output_is_progress_alone(script, start):
    """No warnings, no tracebacks, also not of the imports."""
    process = start(script, own(script, "InfoOfEnds"), by_python=True)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and len(out.splitlines()) == 1
    assert [line for line in err.splitlines() if line.strip() and not re.match(r"\S+: \d+ of \d+ steps, ", line)] == []


@SHARED
def test_cuda_without_a_gpu(script, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([*flags(settings(script)), "--cuda"]) == 0
    assert "PyTorch finds no GPU: using the CPU" in capsys.readouterr().err


@pytest.mark.slow
def test_compilers(monkeypatch, capsys, start):
    """$CXX is used; one that is not there is refused, and a broken one is one line."""
    import ppo

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not there" in refused(ppo, ["--compile"], capsys)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "TORCHINDUCTOR_CACHE_DIR": str(Path.cwd() / "c")}
    process = start(ppo, [*own(ppo, "InfoOfEnds"), "--compile"], env=environment | {"CXX": "/bin/false"})
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in err
    assert len([line for line in err.splitlines() if "error" in line.lower()]) == 1


# Edits of a copy ------------------------------------------------------------------------------------------------------
EDITS = {
    "another width": [("nn.Linear(64, 64)", "nn.Linear(64, 96)"), ("nn.Linear(64, int", "nn.Linear(96, int"),
                      ("nn.Linear(64, 1)", "nn.Linear(96, 1)")],  # fmt: skip
    "ReLU": [("nn.Tanh()", "nn.ReLU()")],
    "LayerNorm": [("return [first, nn.Tanh(),", "return [first, nn.LayerNorm(64), nn.Tanh(),")],
    "a fourth term": [
        ("torch.stack([policy_loss, value_loss, entropy])", "torch.stack([policy_loss, value_loss, entropy, loss])"),
        ('"losses/value_loss", "losses/entropy")', '"losses/value_loss", "losses/entropy", "losses/loss")'),
    ],
    "an own class": [
        ("class Agent(nn.Module):", "class Doubled(nn.Sequential):\n    def forward(self, x):\n"
         "        return 2 * super().forward(x).abs()\n\n\nclass Agent(nn.Module):"),
        ("self.actor = nn.Sequential(", "self.actor = Doubled("),
    ],
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_train(edit, capsys):
    """Acting falls back to PyTorch where it must, says so once, and is always the network itself."""
    source = (ROOT / "ppo.py").read_text()
    for old, new in EDITS[edit]:
        assert old in source, old
        source = source.replace(old, new)
    module = types.ModuleType("edited")
    module.__file__ = str(Path("edited.py").resolve())
    sys.modules["edited"] = module  # where dataclasses and annotations look names up
    exec(compile(source, module.__file__, "exec"), vars(module))
    args = module.Args(**SMALL)
    path = Path(module.train(args)["run_dir"])
    rows = [row for row in metrics(path) if "losses/policy_loss" in row]
    assert len(rows) == 4 and ("losses/loss" in rows[0]) == (edit == "a fourth term")
    said = capsys.readouterr().err.count("it acts in PyTorch")
    assert said == (edit in ("ReLU", "LayerNorm", "an own class"))
    agent = module.Agent(Box(-1, 1, (4,)), Discrete(2), args)
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(50, 4)
    with torch.inference_mode():
        acted = module.as_numpy(agent.actor)(x.numpy())
    np.testing.assert_allclose(acted, agent.actor(x).detach().numpy(), rtol=1e-4, atol=1e-4)
    del sys.modules["edited"]
