"""A run's directory and its life: metrics, checkpoints, kills, signals, resuming, playing, videos and tracking."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import forking
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import ppo
import ppo_continuous

pytestmark = pytest.mark.slow  # these start whole runs

SCRIPT = Path(ppo.__file__).resolve()
BOTH = pytest.mark.parametrize("script", [ppo, ppo_continuous])
BATCH = 64  # samples in one rollout of a small run
EPISODE = {"global_step", "wall_time", "charts/episodic_return", "charts/episodic_length"}
UPDATE = {
    "global_step", "wall_time", "charts/SPS", "charts/learning_rate", "losses/policy_loss", "losses/value_loss",
    "losses/entropy", "losses/approx_kl", "losses/old_approx_kl", "losses/official_approx_kl", "losses/clipfrac",
    "losses/explained_variance",
}  # fmt: skip


class PickyEnv(gym.Env):
    """Discrete actions 5, 6, 7 and observations 2 to 5, or small images; only actions of its own are accepted."""

    taken: set = set()

    def __init__(self, images=False):
        self.observation_space = Box(0, 255, (2, 3), np.uint8) if images else Discrete(4, start=2)
        self.action_space = Discrete(3, start=5)

    def reset(self, *, seed=None, options=None):
        """Starts the next episode."""
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.length = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        """Goes on for eight steps."""
        assert self.action_space.contains(action), action
        self.taken.add(int(action))
        self.length += 1
        return self.observation_space.sample(), 1.0, self.length == 8, False, {}


class BrokenRendererEnv(PickyEnv):
    """Its renderer raises at the third picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode, self.pictures = render_mode, 0

    def render(self):
        """Draws nothing, and then fails."""
        self.pictures += 1
        if self.pictures > 2:
            raise RuntimeError("the graphics card is on fire")
        return np.zeros((64, 64, 3), np.uint8)


class PickyBoxEnv(PickyEnv):
    """The same with actions of shape [2, 2], all with bounds of their own, in double precision."""

    taken: list = []

    def __init__(self, images=False):
        super().__init__(images)
        low = np.array([[-1, 2], [30, -400]], float)
        self.action_space = Box(low, low + np.array([[2, 1], [10, 100]]), dtype=np.float64)

    def step(self, action):
        """Goes on for eight steps, with a reward of 1000 in each."""
        assert self.action_space.contains(action) and action.dtype == self.action_space.dtype, action
        self.taken.append(action.copy())
        self.length += 1
        return self.observation_space.sample(), 1000.0, self.length == 8, False, {}


class EchoEnv(gym.Env):
    """Shows the same eight observations in every episode, and a ninth at its end; the reward is the action."""

    shown = 3 + np.sin(np.arange(9 * 2).reshape(9, 2) ** 2).astype(np.float32)

    def __init__(self):
        self.observation_space = Box(2, 4, (2,), np.float32)
        self.action_space = Box(-3, 3, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Starts the next episode."""
        super().reset(seed=seed)
        self.length = 0
        return self.shown[0], {}

    def step(self, action):
        """Goes on for eight steps."""
        self.length += 1
        return self.shown[self.length], float(action[0]), self.length == 8, False, {}


gym.register("test/Picky-v0", PickyEnv)
gym.register("test/BrokenRenderer-v0", BrokenRendererEnv)
gym.register("test/PickyBox-v0", PickyBoxEnv)
gym.register("test/Echo-v0", EchoEnv)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and leaves the handling of signals as it was."""
    monkeypatch.chdir(tmp_path)
    for script in (ppo, ppo_continuous):
        script.say.cache_clear()
        script.SIGNALS.clear()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def small(updates: int, script=ppo, **settings):
    """Settings of a short run of CartPole or, by ppo_continuous.py, of Pendulum, with updates of 64 samples."""
    sizes = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 2}
    sizes |= {"env_id": "Pendulum-v1"} if script is ppo_continuous else {}
    return script.Args(**(sizes | {"total_timesteps": updates * BATCH} | settings))


def script_of(args):
    """The script whose settings these are."""
    return sys.modules[type(args).__module__]


def flags(args) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for name, value in asdict(args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words.append(f"--{flag}={value}")
    return words


def train(args) -> Path:
    """Trains and returns the run directory."""
    return Path(script_of(args).train(args)["run_dir"])


def metrics(path: Path) -> list[dict]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def update_steps(path: Path) -> list[int]:
    """The numbers of the updates in metrics.jsonl."""
    return [row["global_step"] // BATCH for row in metrics(path) if "losses/policy_loss" in row]


def checkpoint(path: Path) -> dict:
    """What checkpoint.pt holds, its counters and moments by name."""
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    state["update"], state["gradient_steps"], state["metrics_bytes"] = state["counts"].tolist()
    state["moment1"], state["moment2"] = state["moments"]
    return state


def tensors(state: dict) -> dict[str, torch.Tensor]:
    """The tensors in an agent's state, also those of its running statistics, by name."""
    found = {}
    for name, value in state.items():
        inner = tensors(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name}/{key}": tensor for key, tensor in inner.items()}
    return found


def assert_same_agent(state: dict, other: dict) -> None:
    """Two states of an agent are equal to the last bit."""
    state, other = tensors(state), tensors(other)
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def files(path: Path) -> dict[str, bytes]:
    """All files of a run with their contents."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def problems(stderr: str) -> list[str]:
    """The lines on stderr that do not show progress."""
    progress = r"\s*\S+: \d+ of \d+ steps, |episode \d+ of \d+: return "
    return [line for line in stderr.splitlines() if line.strip() and not re.match(progress, line)]


def without_clock(path: Path) -> list[str]:
    """The metrics as text without what depends on the machine's speed."""
    clock = ("wall_time", "charts/SPS")
    return [json.dumps({key: row[key] for key in row if key not in clock}) for row in metrics(path)]


def test_mujoco_leaves_nothing_behind():
    """MuJoCo warns of its own model file, in the terminal and in a file here, unless it is told not to."""
    done = run_script(Path(ppo_continuous.__file__), *flags(small(1, ppo_continuous, env_id="HalfCheetah-v4")))
    assert done.returncode == 0 and problems(done.stderr) == []
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]


def test_files_of_a_run(capsys):
    args = small(5, seed=3, exp_name="trial", learning_rate=1e-3)
    assert ppo.main(flags(args)) == 0
    (path,) = Path("runs").iterdir()
    assert re.fullmatch(r"CartPole-v1__trial__3__\d+", path.name)
    assert files(path).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    config = json.loads((path / "config.json").read_text())
    assert config.items() >= asdict(args).items()
    assert config["versions"].items() >= {"torch": torch.__version__, "gymnasium": gym.__version__}.items()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SCRIPT.parent, capture_output=True, text=True).stdout
    commit = config["commit"].removesuffix("-dirty").rpartition("-g")[2]  # a tag may come first
    assert head.startswith(commit) and len(commit) >= min(7, len(head))
    output = capsys.readouterr()
    assert re.fullmatch(rf"{path.resolve()}: 320 steps, mean return \d+\.\d\n", output.out)
    assert problems(output.err) == []
    returns = [row["charts/episodic_return"] for row in metrics(path) if "charts/episodic_return" in row]
    assert f"mean return {np.mean(returns):.1f}" in output.out


def test_metrics():
    path = train(small(5, env_id="CartPole-v1"))
    text, rows = (path / "metrics.jsonl").read_text(), metrics(path)
    assert text.endswith("\n")
    assert {frozenset(row) for row in rows} == {frozenset(EPISODE), frozenset(UPDATE)}
    for key in ("global_step", "wall_time"):
        assert all(earlier[key] <= later[key] for earlier, later in zip(rows, rows[1:]))
    assert update_steps(path) == [1, 2, 3, 4, 5]
    updates = [row for row in rows if row.keys() == UPDATE]
    rates = [row["charts/learning_rate"] for row in updates]
    assert rates == pytest.approx([2.5e-4 * part for part in (1, 0.8, 0.6, 0.4, 0.2)])
    for row in updates:
        assert 0.6 < row["losses/entropy"] <= np.log(2) + 1e-6
        assert row["losses/value_loss"] > 0
        assert row["losses/approx_kl"] >= -1e-6
        assert 0 <= row["losses/clipfrac"] <= 1
        assert row["charts/SPS"] > 0
    for row in rows:
        if row.keys() == EPISODE:
            assert row["charts/episodic_return"] == row["charts/episodic_length"] >= 8
            assert 0 < row["global_step"] <= 5 * BATCH


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_becomes_null(monkeypatch, value):
    """Where all returns are equal the explained variance has no value; JSON knows neither NaN nor infinity."""
    log = ppo.Run.log
    monkeypatch.setattr(ppo.Run, "log", lambda run, step, values: log(run, step, values | {"odd": value}))
    rows = metrics(train(small(2)))
    assert rows and all(row["odd"] is None for row in rows)


def test_metrics_are_in_the_units_of_the_environment():
    """ppo_continuous.py normalizes rewards, but logs, prints and plays with those of the environment."""
    path = train(small(3, ppo_continuous, env_id="test/PickyBox-v0"))
    rows = metrics(path)
    assert {frozenset(row) for row in rows} == {frozenset(EPISODE), frozenset(UPDATE)}
    episodes = [row for row in rows if row.keys() == EPISODE]
    assert [row["global_step"] for row in episodes] == [16 * (n // 2) for n in range(2, 26)]
    assert {(row["charts/episodic_return"], row["charts/episodic_length"]) for row in episodes} == {(8000, 8)}
    assert list(checkpoint(path)["returns"]) == [8000] * 24
    for row in rows:
        if row.keys() == UPDATE:
            assert row["losses/entropy"] == pytest.approx(4 * 0.5 * math.log(2 * math.pi * math.e), abs=0.05)


SEEDED = [(ppo, {}), (ppo_continuous, {}), (ppo_continuous, {"env_backend": "envpool"})]


@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision lowered")  # gymnasium's, about EnvPool's spaces
@pytest.mark.parametrize(("script", "settings"), SEEDED)
def test_seeds(script, settings):
    """The same seed gives the same run to the last bit, another seed another run."""
    if settings:
        pytest.importorskip("envpool")  # exists for Linux only
    seeds = ((1, "a"), (1, "b"), (2, "c"))
    first, again, other = (train(small(8, script, seed=seed, runs_dir=name, **settings)) for seed, name in seeds)
    assert any(row.keys() == EPISODE for row in metrics(first))
    assert without_clock(first) == without_clock(again)
    assert without_clock(first) != without_clock(other)
    states = [checkpoint(path) for path in (first, again, other)]
    assert_same_agent(states[0]["agent"], states[1]["agent"])
    assert not torch.equal(states[0]["moment1"], states[2]["moment1"])


class Background:
    """The script in a process of its own."""

    def __init__(self, args):
        words = [script_of(args).__file__, *flags(args)]
        self.process = forking.Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def wait_for_update(self, number: int) -> Path:
        """Waits until metrics.jsonl holds that update; returns the run directory."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            for path in Path("runs").glob("*/metrics.jsonl"):
                if any(f'"global_step": {number * BATCH}, ' in line for line in path.read_text().splitlines()):
                    return path.parent
            time.sleep(0.01)
        self.process.kill()
        raise AssertionError(f"update {number} never came: {self.process.communicate()}")

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        """Sends a signal; returns the exit code, stdout and stderr."""
        with self.process:
            self.process.send_signal(number)
            out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@BOTH
def test_kill_and_resume(script):
    """A run killed at any moment goes on from its last checkpoint and ends as long as it was meant to be."""
    args = small(300, script, checkpoint_interval=5)
    background = Background(args)
    path = background.wait_for_update(13)
    code, _, _ = background.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    saved, reached = checkpoint(path)["update"], update_steps(path)[-1]
    assert saved % 5 == 0
    assert saved >= 10
    assert 0 <= reached - saved <= 5
    assert reached < 300  # killed in the middle
    before = (path / "metrics.jsonl").read_bytes()[: checkpoint(path)["metrics_bytes"]]
    assert script.main(["--resume", str(path)]) == 0
    assert (path / "metrics.jsonl").read_bytes().startswith(before)
    assert update_steps(path) == list(range(1, 301))
    rows = metrics(path)
    for key in ("global_step", "wall_time"):
        assert all(earlier[key] <= later[key] for earlier, later in zip(rows, rows[1:]))
    assert rows[-1]["charts/learning_rate"] == pytest.approx(args.learning_rate / 300)
    assert checkpoint(path)["update"] == 300
    assert checkpoint(path)["gradient_steps"] == 300 * 4
    if script is ppo_continuous:
        # Each observation and each reward of the logged updates is in the statistics once; the observations after the
        # two restarts of both environments are there too.
        counts = {key: stats["count"] for key, stats in checkpoint(path)["agent"]["_extra_state"].items()}
        assert counts["obs"].item() == pytest.approx(1e-4 + 300 * BATCH + 2 * 2, abs=1e-5)
        assert counts["returns"].item() == pytest.approx(1e-4 + 300 * BATCH, abs=1e-5)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("updates_between_kills", [1, 3, 6])
def test_killed_again_and_again(monkeypatch, updates_between_kills):
    """Runs that are killed soon after resuming still give whole metrics: each update once, in order."""
    original, countdown = ppo.Run.end_update, [7]

    def end_update(run, rollout, values):
        original(run, rollout, values)
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed

    monkeypatch.setattr(ppo.Run, "end_update", end_update)
    with pytest.raises(Killed):
        ppo.train(small(12, checkpoint_interval=5))
    (path,) = Path("runs").iterdir()
    for _ in range(3):
        countdown[0] = updates_between_kills
        start = checkpoint(path)["update"]
        if start + updates_between_kills > 12:
            break
        with pytest.raises(Killed):
            ppo.main(["--resume", str(path)])
        assert update_steps(path) == list(range(1, start + updates_between_kills + 1))
    countdown[0] = 100
    assert ppo.main(["--resume", str(path)]) == 0
    assert update_steps(path) == list(range(1, 13))
    steps = [row["global_step"] for row in metrics(path)]
    assert steps == sorted(steps)
    # Each episode belongs to one environment, one after the other: their lengths fill at most the run.
    assert sum(row.get("charts/episodic_length", 0) for row in metrics(path)) <= 12 * BATCH


@BOTH
def test_killed_before_the_first_checkpoint(script, monkeypatch):
    """Then all is done again, and to the last bit as if nothing had happened."""
    whole = train(small(8, script, runs_dir="whole"))
    original = script.Run.end_update

    def end_update(run, rollout, values):
        original(run, rollout, values)
        if run.update == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "end_update", end_update)
        with pytest.raises(Killed):
            script.train(small(8, script, runs_dir="killed"))
    (path,) = Path("killed").iterdir()
    assert checkpoint(path)["update"] == 0
    assert update_steps(path) == [1, 2, 3]
    assert script.main(["--resume", str(path)]) == 0
    assert without_clock(path) == without_clock(whole)
    assert_same_agent(checkpoint(path)["agent"], checkpoint(whole)["agent"])


@BOTH
def test_resuming_a_finished_run_changes_nothing(script, capsys):
    path = train(small(3, script))
    before, state = files(path), checkpoint(path)
    capsys.readouterr()
    assert script.main(["--resume", str(path)]) == 0
    assert f"{path}: 192 steps, mean return " in capsys.readouterr().out
    after = files(path)
    assert after.keys() == before.keys()
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert after["config.json"] == before["config.json"]
    assert_same_agent(checkpoint(path)["agent"], state["agent"])


def test_resume_with_more_steps():
    path = train(small(4))
    first = (path / "metrics.jsonl").read_bytes()
    assert ppo.main(["--resume", str(path), "--total-timesteps", str(10 * BATCH)]) == 0
    assert (path / "metrics.jsonl").read_bytes().startswith(first)
    assert update_steps(path) == list(range(1, 11))
    assert json.loads((path / "config.json").read_text())["total_timesteps"] == 10 * BATCH
    rates = [row["charts/learning_rate"] for row in metrics(path) if "charts/learning_rate" in row]
    assert rates[4] == pytest.approx(2.5e-4 * 0.6)  # the schedule is the longer run's
    assert ppo.main(["--resume", str(path)]) == 0  # the extension has become the run's setting
    assert update_steps(path) == list(range(1, 11))


def test_resume_in_another_place(tmp_path):
    """A run directory may be moved, and knows all of its settings."""
    path = train(small(4, gamma=0.9, shared_network=True, ent_coef=0.0, exp_name="moved"))
    config = json.loads((path / "config.json").read_text())
    shutil.move(path, tmp_path / "elsewhere")
    assert ppo.main(["--resume", "elsewhere/", "--total-timesteps", str(6 * BATCH)]) == 0
    assert update_steps(tmp_path / "elsewhere") == list(range(1, 7))
    expected = config | {"total_timesteps": 6 * BATCH}
    assert json.loads((tmp_path / "elsewhere" / "config.json").read_text()) == expected


@BOTH
def test_resume_restores_everything(script, monkeypatch):
    """Weights, running statistics, Adam's moments and steps, counters, recent returns and random numbers, exactly."""
    args, trained = small(7, script, checkpoint_interval=3), []
    close = script.Run.close
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "close", lambda run: trained.append(run.agent) or close(run))
        path = train(args)
    rng = torch.get_rng_state()  # train() has drawn its last number
    state = checkpoint(path)
    torch.manual_seed(12345)
    spaces = (Box(-1, 1, (4,)), Discrete(2)) if script is ppo else (Box(-1, 1, (3,)), Box(-2, 2, (1,)))
    agent = script.Agent(*spaces, args)
    adam = script.Adam(agent)
    run = script.Run(script.replace(args, resume=str(path)), agent, adam)
    run.save()
    run.close()
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same_agent(agent.state_dict(), state["agent"])
    assert_same_agent(agent.state_dict(), checkpoint(path)["agent"])
    for name in ("obs_stats", "return_stats") if script is ppo_continuous else ():
        restored, original = vars(getattr(agent, name)), vars(getattr(trained[0], name))
        assert restored.keys() == original.keys() == {"mean", "var", "count"}
        for key, value in original.items():  # those of the run itself, of which the checkpoint is a copy
            assert np.asarray(restored[key]).dtype == np.float64
            assert np.array_equal(restored[key], value), (name, key)
        assert original["count"] > 7 * BATCH
    assert torch.equal(adam.parameters, torch.cat([p.flatten() for p in agent.parameters()]))
    assert torch.equal(adam.moment1, state["moment1"])
    assert torch.equal(adam.moment2, state["moment2"])
    assert adam.moment1.abs().sum() > 0
    assert (adam.steps, run.update, run.global_step) == (7 * 4, 7, 7 * BATCH)
    returns = [row["charts/episodic_return"] for row in metrics(path) if "charts/episodic_return" in row]
    assert list(run.returns) == returns[-100:]
    assert run.seconds > 0


@pytest.mark.parametrize(
    ("script", "number"), [(ppo, signal.SIGTERM), (ppo, signal.SIGINT), (ppo_continuous, signal.SIGTERM)]
)
def test_signals(script, number):
    """The update is finished, a checkpoint written, and what to do said; going on works."""
    background = Background(small(3000, script, checkpoint_interval=1000))
    path = background.wait_for_update(8)
    code, out, err = background.end(number)
    assert code == 0
    assert problems(err) == []
    stopped_at = update_steps(path)[-1]
    assert 8 <= stopped_at < 3000
    assert checkpoint(path)["update"] == stopped_at
    assert checkpoint(path)["metrics_bytes"] == (path / "metrics.jsonl").stat().st_size
    lines = out.splitlines()
    assert lines[0].startswith(f"{path.resolve()}: {stopped_at * BATCH} steps, mean return ")
    assert lines[1:] == [f"stopped by a signal; go on with: python {script.SCRIPT}.py --resume {path.resolve()}"]
    more = str((stopped_at + 2) * BATCH)
    assert script.main(["--resume", str(path), "--total-timesteps", more]) == 0
    assert update_steps(path) == list(range(1, stopped_at + 3))


def test_signal_between_two_updates(monkeypatch):
    """Also a signal that comes when the update has just ended leaves a checkpoint of that update."""
    original = ppo.Run.end_update

    def end_update(run, rollout, values):
        original(run, rollout, values)
        if run.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ppo.Run, "end_update", end_update)
    assert ppo.main(flags(small(9, checkpoint_interval=5))) == 0
    (path,) = Path("runs").iterdir()
    assert update_steps(path) == [1, 2, 3]
    assert checkpoint(path)["update"] == 3


def test_only_ctrl_c_kills_after_a_signal(monkeypatch):
    """Schedulers send SIGTERM more than once; it must not cost the checkpoint that the first one asked for."""
    original, handlers = ppo.Run.end_update, []

    def end_update(run, rollout, values):
        original(run, rollout, values)
        for _ in range(3 if run.update == 2 else 0):
            os.kill(os.getpid(), signal.SIGTERM)
            handlers.append((signal.getsignal(signal.SIGTERM) == ppo.on_signal, signal.getsignal(signal.SIGINT)))

    monkeypatch.setattr(ppo.Run, "end_update", end_update)
    assert ppo.main(flags(small(9, checkpoint_interval=5))) == 0
    (path,) = Path("runs").iterdir()
    assert checkpoint(path)["update"] == 2
    assert handlers == [(True, signal.SIG_DFL)] * 3


def test_handlers_of_signals_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(small(1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_torn_files():
    """Half a line at the metrics' end and half a checkpoint beside the whole one are what a power cut may leave."""
    path = train(small(4))
    whole = (path / "metrics.jsonl").read_bytes()
    with open(path / "metrics.jsonl", "ab") as file:
        file.write(whole.splitlines()[-1][:40])
    (path / "checkpoint.pt.tmp").write_bytes((path / "checkpoint.pt").read_bytes()[:999])
    assert ppo.main(["--resume", str(path), "--total-timesteps", str(6 * BATCH)]) == 0
    assert (path / "metrics.jsonl").read_bytes().startswith(whole)
    assert update_steps(path) == list(range(1, 7))
    assert files(path).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}


@pytest.mark.parametrize("kept", [0, 3])
def test_lost_metrics(kept):
    """Without its metrics, or with a part of them only, a run still goes on, and what it adds can be read."""
    path = train(small(4))
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:kept]))
    assert ppo.main(["--resume", str(path), "--total-timesteps", str(6 * BATCH)]) == 0
    assert (path / "metrics.jsonl").read_bytes().startswith(b"".join(lines[:kept]))
    assert update_steps(path)[-2:] == [5, 6]


def test_full_disk(monkeypatch, capsys):
    """The checkpoint from before stays whole; with space again the run goes on."""
    written = []

    class Disk:
        """Files whose third checkpoint is cut short."""

        def __init__(self, path, *mode, **more):
            self.file = open(path, *mode, **more)
            self.is_checkpoint = Path(path).name == "checkpoint.pt.tmp"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, contents):
            """Writes all, or half of it."""
            written.append(self.is_checkpoint)
            if self.is_checkpoint and sum(written) == 3:
                self.file.write(contents[: len(contents) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
            return self.file.write(contents)

    def failing_write(run, name, contents, write=ppo.Run.write):
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "open", Disk, raising=False)
            write(run, name, contents)

    with monkeypatch.context() as patch:
        patch.setattr(ppo.Run, "write", failing_write)
        with pytest.raises(OSError, match="No space left on device"):
            ppo.train(small(12, checkpoint_interval=4))
    (path,) = Path("runs").iterdir()
    assert checkpoint(path)["update"] == 4
    assert ppo.main(["--resume", str(path)]) == 0
    assert update_steps(path) == list(range(1, 13))


@pytest.mark.skipif(os.name != "posix", reason="limits of processes are POSIX's")
@pytest.mark.parametrize("script", [ppo])
def test_full_disk_in_a_process(script):
    """The write that does not fit ends the run with code 1 and one line; the checkpoint can be used."""
    code = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
sys.argv = {["x", *flags(small(5000, script, checkpoint_interval=5))]!r}
runpy.run_path({script.__file__!r}, run_name="__main__")
"""
    done = forking.run(["-c", code], timeout=120)
    assert done.returncode == 1, done.stderr
    (line,) = problems(done.stderr)
    assert line.startswith(f"{script.SCRIPT}.py: error: ")
    (path,) = Path("runs").iterdir()
    saved = checkpoint(path)["update"]
    assert saved > 5 and script.main(["--resume", str(path), "--total-timesteps", str((saved + 2) * BATCH)]) == 0
    assert update_steps(path) == list(range(1, saved + 3))


def trained_to_prefer_the_left() -> Path:
    """A run whose agent pushes the cart to the left in 55 of 100 cases, whatever it sees."""
    path = train(small(2))
    state = checkpoint(path)
    state["agent"]["actor.4.weight"].zero_()
    state["agent"]["actor.4.bias"].copy_(torch.tensor([0.2, 0.0]))
    torch.save(state, path / "checkpoint.pt")
    return path


def test_evaluate(capsys):
    """The saved agent plays, reproducibly, and nothing of the run is changed."""
    path = trained_to_prefer_the_left()
    before = files(path)
    capsys.readouterr()
    said, best = {}, ["--eval-deterministic"]
    for name, extra in (("first", []), ("again", []), ("other seed", ["--seed", "7"]), ("best", best)):
        assert ppo.main(["--evaluate", str(path), "--eval-episodes", "20", *extra]) == 0
        output = capsys.readouterr()
        assert problems(output.err) == []
        said[name] = re.fullmatch(r"CartPole-v1: return (\d+\.\d) \+- (\d+\.\d) over 20 episodes\n", output.out)
        assert said[name]
    assert said["first"][0] == said["again"][0] != said["other seed"][0]
    assert float(said["best"][1]) < 11  # always to the left: the pole falls after 8 to 10 steps
    assert float(said["first"][1]) > 14
    assert files(path) == before


def test_evaluate_returns_what_it_prints(capsys):
    path = trained_to_prefer_the_left()
    capsys.readouterr()
    returns = ppo.evaluate(small(2, evaluate=str(path), eval_episodes=5))
    assert len(returns) == 5
    assert f"return {np.mean(returns):.1f} +- {np.std(returns):.1f} over 5 episodes" in capsys.readouterr().out


def policy_of(state: dict, obs: np.ndarray) -> np.ndarray:
    """Means that the actor of a saved agent gives for normalized observations, computed here."""
    x = obs.astype(np.float64)
    for layer in range(3):
        weight, bias = (state[f"actor.{2 * layer}.{name}"].double().numpy() for name in ("weight", "bias"))
        x = x @ weight.T + bias
        x = np.tanh(x) if layer < 2 else x
    return x


@pytest.mark.parametrize("norm_obs", [True, False])
def test_evaluate_uses_the_statistics_of_the_training(norm_obs, capsys):
    """Played with the saved mean and variance, which the played episodes do not change; without noise if asked for."""
    path = train(small(5, ppo_continuous, env_id="test/Echo-v0", norm_obs=norm_obs))
    state = checkpoint(path)
    state["agent"]["actor.4.weight"] *= 30  # actions that differ from one observation to the next
    torch.save(state, path / "checkpoint.pt")
    stats = {name: tensor.numpy() for name, tensor in state["agent"]["_extra_state"]["obs"].items()}
    assert (stats["count"] > 5 * BATCH) == norm_obs
    obs = EchoEnv.shown[:8]
    normalized = (obs - stats["mean"]) / np.sqrt(stats["var"] + 1e-8) if norm_obs else obs
    expected, unlike = (policy_of(state["agent"], x).clip(-3, 3).sum() for x in (normalized, obs - 3 * (not norm_obs)))
    assert abs(expected - unlike) > 0.1  # unlike: normalized where it should not be, or the other way round
    before = files(path)
    capsys.readouterr()
    args = small(5, ppo_continuous, env_id="test/Echo-v0", norm_obs=norm_obs, evaluate=str(path), eval_episodes=20)
    returns = ppo_continuous.evaluate(ppo_continuous.replace(args, eval_deterministic=True))
    assert returns == pytest.approx([expected] * 20, rel=1e-4)
    said = set()
    for seed in ("1", "1", "2"):
        flags = ["--evaluate", str(path), "--eval-episodes", "20", "--seed", seed]
        assert ppo_continuous.main(flags) == 0
        output = capsys.readouterr()
        assert problems(output.err) == []
        said.add(output.out.splitlines()[-1])
    assert len(said) == 2  # the same seed, the same noise
    for line in said:
        mean, spread = re.fullmatch(r"test/Echo-v0: return (-?\d+\.\d) \+- (\d+\.\d) over 20 episodes", line).groups()
        assert float(spread) > 0.5  # the sum of eight samples with a standard deviation of about 1, some clipped
    assert files(path) == before


@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision lowered")  # gymnasium's, about EnvPool's spaces
def test_envpool(capsys):
    """A run with EnvPool goes on with EnvPool, and its agent plays there and in gymnasium."""
    pytest.importorskip("envpool")  # exists for Linux only
    path = train(small(14, ppo_continuous, env_backend="envpool"))
    assert ppo_continuous.main(["--resume", str(path), "--total-timesteps", str(21 * BATCH)]) == 0
    assert problems(capsys.readouterr().err) == []
    assert update_steps(path) == list(range(1, 22))
    episodes = [row for row in metrics(path) if row.keys() == EPISODE]
    # Episodes of 200 steps, 400 of both environments: two of each before the resuming, and one after it.
    assert [row["global_step"] for row in episodes] == [400, 400, 800, 800, 14 * BATCH + 400, 14 * BATCH + 400]
    assert all(row["charts/episodic_length"] == 200 for row in episodes)
    assert all(-200 * 16.3 < row["charts/episodic_return"] < 0 for row in episodes)  # no step costs more than 16.3
    assert json.loads((path / "config.json").read_text())["env_backend"] == "envpool"
    before = files(path)
    for extra in ([], ["--env-backend", "gymnasium"]):
        assert ppo_continuous.main(["--evaluate", str(path), "--eval-episodes", "2", *extra]) == 0
        output = capsys.readouterr()
        assert problems(output.err) == []
        said = re.fullmatch(r"Pendulum-v1: return -(\d+\.\d) \+- \d+\.\d over 2 episodes\n", output.out)
        assert 0 < float(said[1]) < 200 * 16.3
    assert ppo_continuous.main(["--evaluate", str(path), "--capture-video"]) == 2
    assert "EnvPool cannot record videos: add --env-backend gymnasium" in capsys.readouterr().err
    assert files(path) == before


def test_videos_of_the_training(capsys):
    path = train(small(3, capture_video=True))
    videos = sorted((path / "videos").iterdir())
    assert videos
    assert all(video.suffix == ".mp4" and video.stat().st_size > 1000 for video in videos)
    assert problems(capsys.readouterr().err) == []
    assert update_steps(path) == [1, 2, 3]


@BOTH
def test_recording_does_not_change_the_training(script):
    plain, recorded = (train(small(3, script, runs_dir=str(on), capture_video=on)) for on in (False, True))
    assert without_clock(plain) == without_clock(recorded)
    assert_same_agent(checkpoint(plain)["agent"], checkpoint(recorded)["agent"])
    assert list((recorded / "videos").iterdir())


@pytest.mark.parametrize(("script", "episodes"), [(ppo, 3), (ppo_continuous, 2)])
def test_videos_of_the_evaluation(script, episodes, capsys):
    path = train(small(2, script))
    before = files(path)
    assert script.main(["--evaluate", str(path), "--eval-episodes", str(episodes), "--capture-video"]) == 0
    assert problems(capsys.readouterr().err) == []
    after = files(path)
    videos = after.keys() - before.keys()
    assert len(videos) == episodes
    assert all(name.startswith("videos/") and name.endswith(".mp4") and len(after[name]) > 1000 for name in videos)
    assert {name: after[name] for name in before} == before


def test_failing_renderer(capsys):
    assert ppo.main(flags(small(4, env_id="test/BrokenRenderer-v0", capture_video=True))) == 0
    (line,) = problems(capsys.readouterr().err)
    assert "recording failed: RuntimeError: the graphics card is on fire" in line
    (path,) = Path("runs").iterdir()
    assert update_steps(path) == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*initialised with render_mode='rgb_array' that is not in the possible")
def test_environment_without_a_renderer(capsys):
    assert ppo.main(flags(small(4, env_id="test/Picky-v0", capture_video=True))) == 0
    (line,) = problems(capsys.readouterr().err)
    assert line.startswith("no videos, test/Picky-v0 cannot be recorded: ")


def test_failing_encoder(capsys, monkeypatch):
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    def write_videofile(*args, **kwargs):
        raise OSError("encoder not found,\n\nsee the manual")

    monkeypatch.setattr(ImageSequenceClip, "write_videofile", write_videofile)
    assert ppo.main(flags(small(4, capture_video=True))) == 0
    (line,) = problems(capsys.readouterr().err)
    assert "recording failed: OSError: encoder not found, see the manual" in line
    (path,) = Path("runs").iterdir()
    assert update_steps(path) == [1, 2, 3, 4]


def offline_records(path: Path):
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


@pytest.mark.parametrize(("script", "rows"), [(ppo, 40), (ppo_continuous, 20 + 6)])
def test_tracking(script, rows, monkeypatch):
    """Offline, Weights & Biases gets the settings and the same numbers that metrics.jsonl has, when resumed too.

    Where it goes on it counts on: `wandb sync` drops rows whose steps it has had already.
    """
    import wandb

    wandb.teardown()  # what other tests have set must not last
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = small(20, script, track=True, wandb_project_name="trials", ent_coef=0.02)
    path = train(args)
    wandb.teardown()
    train(replace(args, resume=str(path), total_timesteps=24 * BATCH))
    wandb.teardown()
    history, steps, config, runs, code = [], [], {}, [], []
    files = sorted(path.glob("wandb/offline-run-*/run-*.wandb"))
    for record in itertools.chain.from_iterable(map(offline_records, files)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            runs.append((record.run.run_id, record.run.display_name, record.run.project))
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "artifact":
            code += [Path(entry.local_path).read_text() for entry in record.artifact.manifest.contents]
        elif kind == "history":
            keys = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append({key: value for key, value in keys.items() if not key.startswith("_")})
            steps.append(record.history.step.num)
    assert len(files) == 2 and set(runs) == {(path.name, path.name, "trials")}
    assert config.items() >= (asdict(args) | {"resume": str(path), "total_timesteps": 24 * BATCH}).items()
    assert len(history) >= rows
    assert history == metrics(path)
    assert steps == list(range(len(history)))
    assert code == [Path(script.__file__).read_text()] * 2


def test_training_in_a_thread():
    """Signals can be handled in the main thread only; elsewhere the training works without that."""
    results = []
    thread = threading.Thread(target=lambda: results.append(ppo.train(small(2))))
    thread.start()
    thread.join(60)
    assert [result["global_step"] for result in results] == [2 * BATCH]


@pytest.mark.parametrize("env_kwargs", ["{}", '{"images": true}'])
def test_actions_that_do_not_start_at_0(env_kwargs, capsys):
    """The environment gets actions of its own; Discrete observations and images become vectors. It checks both."""
    PickyEnv.taken.clear()
    path = train(small(3, env_id="test/Picky-v0", env_kwargs=env_kwargs))
    assert PickyEnv.taken == {5, 6, 7}
    state = checkpoint(path)["agent"]
    assert state["actor.4.bias"].shape == (3,)
    assert state["actor.0.weight"].shape == (64, 6 if "images" in env_kwargs else 4)
    PickyEnv.taken.clear()
    capsys.readouterr()
    assert ppo.main(["--evaluate", str(path)]) == 0
    assert PickyEnv.taken == {5, 6, 7}
    assert capsys.readouterr().out == "test/Picky-v0: return 8.0 +- 0.0 over 10 episodes\n"


@pytest.mark.parametrize("flag", ["--clip-action", "--squash-action"])
@pytest.mark.parametrize("env_kwargs", ["{}", '{"images": true}'])
def test_actions_of_any_shape(flag, env_kwargs, capsys):
    """The environment gets actions of its own shape, type and bounds; it checks that, in training and when playing."""
    PickyBoxEnv.taken.clear()
    args = small(3, ppo_continuous, env_id="test/PickyBox-v0", env_kwargs=env_kwargs)
    assert ppo_continuous.main([*flags(args), flag]) == 0
    (path,) = Path("runs").iterdir()
    assert len(PickyBoxEnv.taken) == 3 * BATCH
    taken = np.stack(PickyBoxEnv.taken)
    space = PickyBoxEnv().action_space
    at_a_bound = ((taken == space.low) | (taken == space.high)).mean()
    assert at_a_bound > 0.3 if flag == "--clip-action" else at_a_bound == 0
    spread = (taken - space.low).std(0) / (space.high - space.low).ravel().reshape(2, 2)
    assert (spread > 0.1).all() if flag == "--squash-action" else spread[0, 0] > 0.1
    state = checkpoint(path)["agent"]
    assert state["log_std"].shape == (4,)
    assert state["actor.0.weight"].shape == (64, 6 if "images" in env_kwargs else 4)
    PickyBoxEnv.taken.clear()
    capsys.readouterr()
    assert ppo_continuous.main(["--evaluate", str(path)]) == 0
    assert len(PickyBoxEnv.taken) == 100  # ten episodes of eight steps; playing goes on to the end of a rollout
    assert capsys.readouterr().out == "test/PickyBox-v0: return 8000.0 +- 0.0 over 10 episodes\n"


def test_frozen_lake():
    path = train(small(3, env_id="FrozenLake-v1", env_kwargs='{"is_slippery": false}'))
    assert checkpoint(path)["agent"]["actor.0.weight"].shape == (64, 16)
    assert update_steps(path) == [1, 2, 3]


def run_script(script: Path, *words: str) -> subprocess.CompletedProcess:
    """Runs a script as a user would, without what helps the tests to find it."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "100"}
    return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=120, env=env)


def test_help():
    done = run_script(SCRIPT, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for field in fields(ppo.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", done.stdout), field.name
    assert not list(Path.cwd().iterdir())


def test_help_of_ppo_continuous(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        ppo_continuous.main(["--help"])
    assert not stop.value.code
    output = capsys.readouterr()
    assert output.err == ""
    for field in fields(ppo_continuous.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", output.out), field.name


def test_copy_of_the_script(tmp_path):
    """One file is all it takes; a copy under another name gives its name to its runs."""
    shutil.copy(SCRIPT, tmp_path / "my_ppo.py")
    done = run_script(tmp_path / "my_ppo.py", "--total-timesteps", "512")
    assert done.returncode == 0, done.stderr
    (path,) = Path("runs").iterdir()
    assert path.name.startswith("CartPole-v1__my_ppo__1__")
    assert json.loads((path / "config.json").read_text())["exp_name"] == "my_ppo"
