"""Runs of the LSTM scripts as their users see them: files, signals, resuming, playing, videos, what is refused.

The helpers are those of the other scripts' tests; what stands in the same lines there is proven there.
"""

import json
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, fields
from pathlib import Path

import forking
import gymnasium as gym
import numpy as np
import pytest
import test_runs
import torch
from gymnasium.spaces import Box, Discrete
from test_bad_input import (
    another_network,
    config_with_wrong_type,
    listing,
    no_config,
    no_statistics,
    refusal,
    truncated_checkpoint,
    zipped_pickle_bomb,
)
from test_runs import (
    BATCH,
    EPISODE,
    UPDATE,
    EchoEnv,
    Killed,
    assert_same_agent,
    checkpoint,
    files,
    flags,
    in_empty_folder,  # noqa: F401 - a fixture that every test uses
    metrics,
    train,
    update_steps,
    without_clock,
)

import ppo
import ppo_atari_lstm
import ppo_lstm

pytestmark = pytest.mark.slow  # these start whole runs

SCRIPT = Path(ppo_lstm.__file__).resolve()
PENDULUM = {"env_id": "Pendulum-v1"}
SHORT = {"env_id": "Pong", "num_steps": 8, "num_envs": 2, "update_epochs": 1, "noop_max": 1, "max_game_frames": 24}
GAME = SHORT | {"script": ppo_atari_lstm, "cuda": False}
HIDDEN = r"entries .* of each observation are hidden; --hide .*|nothing of the observations of .* is hidden; --hide .*"


@pytest.fixture(autouse=True)
def say_all_again():
    """What was said in one test may be said in the next."""
    for script in (ppo_lstm, ppo_atari_lstm):
        script.say.cache_clear()


def problems(stderr: str) -> list[str]:
    """The lines on stderr that do not show progress, nor say what is hidden."""
    return [line for line in test_runs.problems(stderr) if not re.fullmatch(HIDDEN, line)]


def small(updates: int, script=ppo_lstm, **changed):
    """Settings of a short run, by default of CartPole with updates of 64 samples."""
    sizes = {"num_envs": 2, "num_steps": 32, "num_minibatches": 2, "update_epochs": 2, "lstm_size": 16} | changed
    return script.Args(**({"total_timesteps": updates * sizes["num_envs"] * sizes["num_steps"]} | sizes))


def words(args) -> list[str]:
    """The command line that gives these settings."""
    hide = getattr(args, "hide", None)
    found = [word for word in flags(args) if not word.startswith("--hide")]
    return found + ([] if hide is None else ["--hide", *map(str, hide)])


@pytest.fixture(params=["gymnasium", "envpool"])
def backend(request):
    """Each backend; EnvPool exists for Linux only."""
    if request.param == "envpool":
        pytest.importorskip("envpool")
    return request.param


# Files ----------------------------------------------------------------------------------------------------------------
def test_files_of_a_run(capsys):
    """The default task is CartPole without its velocities; what is logged has the other scripts' names."""
    args = small(5, seed=3, exp_name="trial", learning_rate=1e-3)
    assert ppo_lstm.main(words(args)) == 0
    (path,) = Path("runs").iterdir()
    assert re.fullmatch(r"CartPole-v1__trial__3__\d+", path.name)
    assert files(path).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert json.loads((path / "config.json").read_text()).items() >= asdict(args).items()
    output = capsys.readouterr()
    assert re.fullmatch(rf"{path.resolve()}: 320 steps, mean return \d+\.\d\n", output.out)
    assert problems(output.err) == []

    assert (path / "metrics.jsonl").read_text().endswith("\n")
    rows = metrics(path)
    assert {frozenset(row) for row in rows} == {frozenset(EPISODE), frozenset(UPDATE)}
    for key in ("global_step", "wall_time"):
        assert all(earlier[key] <= later[key] for earlier, later in zip(rows, rows[1:]))
    assert update_steps(path) == [1, 2, 3, 4, 5]
    updates = [row for row in rows if row.keys() == UPDATE]
    rates = [row["charts/learning_rate"] for row in updates]
    assert rates == pytest.approx([1e-3 * part for part in (1, 0.8, 0.6, 0.4, 0.2)])
    for row in updates:
        assert 0.6 < row["losses/entropy"] <= np.log(2) + 1e-6
        assert row["losses/value_loss"] > 0 and row["charts/SPS"] > 0
        assert 0 <= row["losses/clipfrac"] <= 1
    episodes = [row for row in rows if row.keys() == EPISODE]
    assert len(episodes) > 5
    for row in episodes:
        assert row["charts/episodic_return"] == row["charts/episodic_length"] >= 8


TASKS = {
    "CartPole": {"env_id": "CartPole-v1"},
    "Pendulum": PENDULUM,
    "CartPole of EnvPool": {"env_id": "CartPole-v1", "env_backend": "envpool"},
    "Pong": GAME | {"env_backend": "gymnasium", "noop_max": 30, "max_game_frames": 80},
    "Pong of EnvPool": GAME | {"env_backend": "envpool", "noop_max": 30, "max_game_frames": 80},
}


@pytest.mark.parametrize("task", TASKS)
def test_seeds(task):
    """The same seed gives the same run to the last bit, another seed another run."""
    if "EnvPool" in task:
        pytest.importorskip("envpool")  # exists for Linux only
    changed = {"num_steps": 128} if task == "Pendulum" else {}
    seeds = ((1, "a"), (1, "b"), (2, "c"))
    first, again, other = (train(small(3, seed=seed, runs_dir=name, **TASKS[task] | changed)) for seed, name in seeds)
    assert any(row.keys() == EPISODE for row in metrics(first))
    assert without_clock(first) == without_clock(again)
    assert without_clock(first) != without_clock(other)
    assert_same_agent(checkpoint(first)["agent"], checkpoint(again)["agent"])
    assert not torch.equal(checkpoint(first)["moment1"], checkpoint(other)["moment1"])


@pytest.mark.parametrize(("game", "backend"), [("Pong", "envpool"), ("ALE/Breakout-v5", "gymnasium")])
def test_games(capfd, game, backend):
    """Trains, goes on and plays in each backend, with one frame at a time; test_games.py has other games and ids."""
    if backend == "envpool":
        pytest.importorskip("envpool")  # exists for Linux only
    args = small(2, **GAME | {"env_id": game, "env_backend": backend})
    assert ppo_atari_lstm.main(words(args)) == 0
    (path,) = Path("runs").iterdir()
    assert checkpoint(path)["agent"]["network.convolutions.0.weight"].shape == (32, 1, 8, 8)
    assert ppo_atari_lstm.main(["--resume", str(path), "--total-timesteps", "48"]) == 0
    assert ppo_atari_lstm.main(["--evaluate", str(path), "--eval-episodes", "2"]) == 0
    output = capfd.readouterr()
    assert problems(output.err) == []
    assert re.search(rf"^{game}: return -?\d+\.\d \+- \d+\.\d over 2 episodes$", output.out, re.M)
    rows = metrics(path)
    assert [row["global_step"] for row in rows if "charts/SPS" in row] == [16, 32, 48]
    lengths = [row["charts/episodic_length"] for row in rows if row.keys() == EPISODE]
    assert lengths and all(3 <= length <= 6 for length in lengths)  # steps, not frames; those of FIRE may count or not


def test_backend_of_games():
    """EnvPool unless gymnasium is asked for."""
    pytest.importorskip("envpool")  # exists for Linux only
    for changed, expected in (({}, True), ({"env_backend": "gymnasium"}, False)):
        envs = ppo_atari_lstm.make_envs(small(1, **GAME | changed))
        assert isinstance(envs, ppo_atari_lstm.EnvpoolEnvironments) == expected
        envs.close()


@pytest.mark.parametrize("script", [ppo_lstm, ppo_atari_lstm])
def test_without_envpool(script, capfd, monkeypatch):
    """Where EnvPool is not installed training goes on with gymnasium, and that is said in one line."""
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    settings = GAME if script is ppo_atari_lstm else {}
    assert script.main(words(small(1, **settings | {"env_backend": "envpool"}))) == 0
    fallback = "EnvPool is not installed (it exists for Linux only): using gymnasium"
    assert problems(capfd.readouterr().err) == [fallback]


# Kills, signals, resuming ---------------------------------------------------------------------------------------------
class Background:
    """The script in a process of its own."""

    def __init__(self, args):
        command = [SCRIPT, *words(args)]
        self.process = forking.Forked(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def wait_for_update(self, number: int) -> Path:
        """Waits until metrics.jsonl holds that update; returns the run directory."""
        deadline = time.monotonic() + 300
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
            out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


def test_kill_and_resume():
    """A run killed at any moment goes on from its last checkpoint and ends as long as it was meant to be."""
    background = Background(small(40, checkpoint_interval=5, **PENDULUM))
    path = background.wait_for_update(13)
    code, _, _ = background.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    saved, reached = checkpoint(path)["update"], update_steps(path)[-1]
    assert saved % 5 == 0 and saved >= 10
    assert 0 <= reached - saved <= 5 and reached < 40
    before = (path / "metrics.jsonl").read_bytes()[: checkpoint(path)["metrics_bytes"]]
    assert ppo_lstm.main(["--resume", str(path)]) == 0
    assert (path / "metrics.jsonl").read_bytes().startswith(before)
    assert update_steps(path) == list(range(1, 41))
    rows = metrics(path)
    for key in ("global_step", "wall_time"):
        assert all(earlier[key] <= later[key] for earlier, later in zip(rows, rows[1:]))
    assert rows[-1]["charts/learning_rate"] == pytest.approx(2.5e-4 / 40)
    assert (checkpoint(path)["update"], checkpoint(path)["gradient_steps"]) == (40, 40 * 4)
    # Each observation and each reward of the logged updates is in the statistics once; the observations after the two
    # restarts of both environments are there too.
    counts = {key: stats["count"].item() for key, stats in checkpoint(path)["agent"]["_extra_state"].items()}
    assert counts["obs"] == pytest.approx(1e-4 + 40 * BATCH + 2 * 2, abs=1e-5)
    assert counts["returns"] == pytest.approx(1e-4 + 40 * BATCH, abs=1e-5)


@pytest.mark.parametrize("task", ["CartPole", "Pendulum"])
def test_killed_before_the_first_checkpoint(task, monkeypatch):
    """Then all is done again, and to the last bit as if nothing had happened."""
    whole = train(small(6, runs_dir="whole", **TASKS[task]))
    original = ppo_lstm.Run.end_update

    def end_update(run, ends, values):
        original(run, ends, values)
        if run.update == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ppo_lstm.Run, "end_update", end_update)
        with pytest.raises(Killed):
            ppo_lstm.train(small(6, runs_dir="killed", **TASKS[task]))
    (path,) = Path("killed").iterdir()
    assert checkpoint(path)["update"] == 0
    assert update_steps(path) == [1, 2, 3]
    assert ppo_lstm.main(["--resume", str(path)]) == 0
    assert without_clock(path) == without_clock(whole)
    assert_same_agent(checkpoint(path)["agent"], checkpoint(whole)["agent"])


def test_resume_restores_everything(monkeypatch):
    """Weights, running statistics, Adam's moments and steps, counters, recent returns and random numbers, exactly."""
    args, trained = small(7, checkpoint_interval=3, **PENDULUM), []
    close = ppo_lstm.Run.close
    with monkeypatch.context() as patch:
        patch.setattr(ppo_lstm.Run, "close", lambda run: trained.append(run.agent) or close(run))
        path = train(args)
    rng = torch.get_rng_state()  # train() has drawn its last number
    state = checkpoint(path)
    torch.manual_seed(12345)
    agent = ppo_lstm.Agent(Box(-1, 1, (3,)), Box(-2, 2, (1,)), args)
    adam = ppo_lstm.Adam(agent)
    run = ppo_lstm.Run(ppo_lstm.replace(args, resume=str(path)), agent, adam)
    run.save()
    run.close()
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same_agent(agent.state_dict(), state["agent"])
    assert_same_agent(agent.state_dict(), checkpoint(path)["agent"])
    for name in ("obs_stats", "return_stats"):
        restored, original = vars(getattr(agent, name)), vars(getattr(trained[0], name))
        assert restored.keys() == original.keys() == {"mean", "var", "count"}
        assert all(np.array_equal(restored[key], value) for key, value in original.items())
        assert original["count"] > 7 * BATCH
    trainable = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    assert torch.equal(adam.parameters, torch.cat([parameter.flatten() for parameter in trainable]))
    assert torch.equal(adam.moment1, state["moment1"]) and torch.equal(adam.moment2, state["moment2"])
    assert adam.moment1.any()
    assert (adam.steps, run.update, run.global_step) == (7 * 4, 7, 7 * BATCH)


def test_resume_forgets_and_begins_other_episodes(monkeypatch):
    """[lstm-2] The state is 0 again, and the environments do not play their first episodes again [extra-35]."""
    seeds, states = [], []
    make_envs, collect = ppo_lstm.make_envs, ppo_lstm.collect_rollout

    def make_and_watch(*inputs):
        envs = make_envs(*inputs)
        reset = envs.reset
        envs.reset = lambda *seed: seeds.append(seed) or reset(*seed)
        return envs

    def collect_and_watch(agent, envs, next_obs, state, args):
        states.append(state.clone())
        return collect(agent, envs, next_obs, state, args)

    monkeypatch.setattr(ppo_lstm, "make_envs", make_and_watch)
    monkeypatch.setattr(ppo_lstm, "collect_rollout", collect_and_watch)
    path = train(small(2, seed=5))
    first = (path / "metrics.jsonl").read_bytes()
    assert ppo_lstm.main(["--resume", str(path), "--total-timesteps", str(4 * BATCH)]) == 0
    assert seeds == [(5, 0), (5, 2 * BATCH)]
    assert [bool(state.any()) for state in states] == [False, True, False, True]
    assert (path / "metrics.jsonl").read_bytes().startswith(first)
    assert update_steps(path) == [1, 2, 3, 4]
    assert json.loads((path / "config.json").read_text())["total_timesteps"] == 4 * BATCH


@pytest.mark.parametrize("task", ["CartPole", "Pendulum"])
def test_resuming_a_finished_run_changes_nothing(task, capsys):
    path = train(small(2, **TASKS[task]))
    before, state = files(path), checkpoint(path)
    capsys.readouterr()
    assert ppo_lstm.main(["--resume", str(path)]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"{path}: 128 steps, mean return ") and problems(output.err) == []
    after = files(path)
    assert after.keys() == before.keys()
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert after["config.json"] == before["config.json"]
    assert_same_agent(checkpoint(path)["agent"], state["agent"])


def test_signals():
    """The update is finished, a checkpoint written, and what to do said; going on works."""
    background = Background(small(3000, checkpoint_interval=1000))
    path = background.wait_for_update(4)
    code, out, err = background.end(signal.SIGTERM)
    assert (code, problems(err)) == (0, [])
    stopped_at = update_steps(path)[-1]
    assert 4 <= stopped_at < 3000
    assert checkpoint(path)["update"] == stopped_at
    assert checkpoint(path)["metrics_bytes"] == (path / "metrics.jsonl").stat().st_size
    lines = out.splitlines()
    assert lines[0].startswith(f"{path.resolve()}: {stopped_at * BATCH} steps, mean return ")
    assert lines[1:] == [f"stopped by a signal; go on with: python ppo_lstm.py --resume {path.resolve()}"]
    more = str((stopped_at + 2) * BATCH)
    assert ppo_lstm.main(["--resume", str(path), "--total-timesteps", more]) == 0
    assert update_steps(path) == list(range(1, stopped_at + 3))


# Playing and videos ---------------------------------------------------------------------------------------------------
def prefer(path: Path, action: int, logit: float) -> None:
    """Makes a run's agent prefer that action, whatever it sees."""
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    layer = "actor.linear" if "actor.linear.bias" in state["agent"] else "actor"
    state["agent"][f"{layer}.weight"].zero_()
    state["agent"][f"{layer}.bias"].zero_()[action] = logit
    torch.save(state, path / "checkpoint.pt")


def test_evaluate(capsys):
    """The saved agent plays, reproducibly, and nothing of the run is changed."""
    path = train(small(2))
    prefer(path, 0, 0.2)  # to the left in 55 of 100 cases
    before = files(path)
    capsys.readouterr()
    said, best = {}, ["--eval-deterministic"]
    for name, extra in (("first", []), ("again", []), ("other seed", ["--seed", "7"]), ("best", best)):
        assert ppo_lstm.main(["--evaluate", str(path), "--eval-episodes", "20", *extra]) == 0
        output = capsys.readouterr()
        assert problems(output.err) == []
        said[name] = re.fullmatch(r"CartPole-v1: return (\d+\.\d) \+- (\d+\.\d) over 20 episodes\n", output.out)
        assert said[name]
    assert said["first"][0] == said["again"][0] != said["other seed"][0]
    assert float(said["best"][1]) < 11  # always to the left: the pole falls after 8 to 10 steps
    assert float(said["first"][1]) > 14
    assert files(path) == before


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_evaluate_remembers_within_an_episode_only(norm_obs, reset):
    """The memory goes on from step to step and is emptied at an episode's end, unless the training did not do so.

    In this task all episodes show the same observations, and the reward is the action. Observations are normalized with
    the statistics of the training, which do not change.
    """
    path = train(small(3, env_id="test/Echo-v0", norm_obs=norm_obs, reset_lstm_state=reset))
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    state["agent"]["actor.linear.weight"] *= 100  # actions that differ from one observation to the next
    torch.save(state, path / "checkpoint.pt")
    stats = {name: tensor.numpy() for name, tensor in state["agent"]["_extra_state"]["obs"].items()}
    assert (stats["count"] > 3 * BATCH) == norm_obs
    args = ppo_lstm.parse_args(["--evaluate", str(path), "--eval-episodes", "4", "--eval-deterministic"])
    returns = ppo_lstm.evaluate(args)

    agent = ppo_lstm.Agent(Box(2, 4, (2,)), Box(-3, 3, (1,)), args)
    agent.load_state_dict(state["agent"])
    obs = EchoEnv.shown[:8]
    obs = np.clip((obs - stats["mean"]) / np.sqrt(stats["var"] + 1e-8), -10, 10) if norm_obs else obs
    memory, expected = torch.zeros(2, 1, 16), []
    for _ in range(4):
        total = 0.0
        for row in obs:
            with torch.no_grad():
                mean, _, memory = agent.step(torch.from_numpy(row).float()[None], memory)
            total += float(mean.clamp(-3, 3))
        expected.append(total)
        memory = torch.zeros(2, 1, 16) if reset else memory
    assert returns == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (np.ptp(expected) < 1e-5) == reset and abs(expected[0]) > 0.01


def test_evaluate_forgets_at_lost_lives(monkeypatch):
    """As in training, where they end episodes; the game and its return go on."""
    path = train(small(1, **GAME | {"env_id": "Breakout", "env_backend": "gymnasium"}))
    prefer(path, 0, 5.0)  # does nothing: the first ball is lost after 23 steps
    states, dones, step, make_envs = [], [], ppo_atari_lstm.Agent.step, ppo_atari_lstm.make_envs

    def make_and_watch(*inputs):
        envs = make_envs(*inputs)
        env_step = envs.step

        def step_and_watch(actions):
            result = env_step(actions)
            dones.append(bool(result[2][0]))
            return result

        envs.step = step_and_watch
        return envs

    def step_and_keep(agent, obs, state):
        states.append(state.clone())
        return step(agent, obs, state)

    monkeypatch.setattr(ppo_atari_lstm, "make_envs", make_and_watch)
    monkeypatch.setattr(ppo_atari_lstm.Agent, "step", step_and_keep)
    line = ["--evaluate", str(path), "--eval-episodes", "1", "--max-game-frames", "200", "--eval-deterministic"]
    assert ppo_atari_lstm.evaluate(ppo_atari_lstm.parse_args(line)) == [0.0]
    assert sum(dones[:50]) == 2 and dones[:50].index(True) == 22  # the lost ball and the end of the game
    # Each rollout of 100 steps ends with a look at the value of what comes after it, from the state that goes on.
    assert [bool(state.any()) for state in states[:100]] == [False] + [not done for done in dones[:99]]


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluate_games_as_asked(greedy):
    """Samples of the policy, or its most probable action: with two actions nearly alike that shows."""
    path = train(small(1, **GAME | {"env_backend": "gymnasium"}))
    prefer(path, 2, 0.1)
    taken, make_envs = [], ppo_atari_lstm.make_envs

    def make_and_watch(*inputs):
        envs = make_envs(*inputs)
        env_step = envs.step
        envs.step = lambda actions: taken.append(int(actions[0])) or env_step(actions)
        return envs

    line = ["--evaluate", str(path), "--eval-episodes", "1", *["--eval-deterministic"] * greedy]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_atari_lstm, "make_envs", make_and_watch)
        ppo_atari_lstm.evaluate(ppo_atari_lstm.parse_args(line))
    assert len(taken) == 100 and (set(taken) == {2}) == greedy


@pytest.mark.parametrize("task", ["CartPole", "Pong"])
def test_evaluate_cuts_endless_episodes(task, capsys):
    """After --eval-max-steps steps."""
    args = small(1, **TASKS[task])
    path, script = train(args), test_runs.script_of(args)
    capsys.readouterr()
    assert script.main(["--evaluate", str(path), "--eval-episodes", "2", "--eval-max-steps", "3"]) == 0
    lengths = re.findall(r"after (\d+) steps", capsys.readouterr().err)
    assert lengths == ["3", "3"] if task == "CartPole" else all(0 < int(length) <= 3 for length in lengths)
    assert len(lengths) == 2


def test_evaluate_whatever_the_sizes_of_the_training(capsys):
    """One environment is played in; that it could not be shared by minibatches matters to nobody."""
    path = train(small(1, num_envs=4, num_minibatches=4))
    capsys.readouterr()
    assert ppo_lstm.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    assert problems(capsys.readouterr().err) == []


@pytest.mark.parametrize("task", ["CartPole", "Pong"])
def test_videos_of_the_evaluation(task, capsys):
    """One for each episode.

    What the library that draws CartPole says without a display goes past Python, and is not looked at.
    """
    args = small(1, **TASKS[task])
    path, script = train(args), test_runs.script_of(args)
    before = files(path)
    capsys.readouterr()
    assert script.main(["--evaluate", str(path), "--eval-episodes", "2", "--capture-video"]) == 0
    output = capsys.readouterr()
    assert re.fullmatch(r"\S+: return -?\d+\.\d \+- \d+\.\d over 2 episodes\n", output.out)
    assert problems(output.err) == []
    after = files(path)
    videos = after.keys() - before.keys()
    assert len(videos) == 2
    assert all(name.startswith("videos/") and name.endswith(".mp4") and len(after[name]) > 1000 for name in videos)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("task", ["CartPole", "Pong"])
def test_recording_does_not_change_the_training(task, capsys):
    plain, recorded = (train(small(2, runs_dir=str(on), capture_video=on, **TASKS[task])) for on in (False, True))
    assert problems(capsys.readouterr().err) == []
    videos = list((recorded / "videos").iterdir())
    assert videos and all(video.suffix == ".mp4" and video.stat().st_size > 1000 for video in videos)
    assert without_clock(plain) == without_clock(recorded)
    assert_same_agent(checkpoint(plain)["agent"], checkpoint(recorded)["agent"])


# What is refused ------------------------------------------------------------------------------------------------------
POOL = "--env-backend envpool --env-id"
BAD_FLAGS = {
    "environments that cannot be shared": ("--num-envs 6 --num-minibatches 4", "6 envs cannot be shared equally by 4"),
    "more minibatches than environments": ("--num-envs 2 --num-minibatches 4", "2 envs cannot be shared equally by 4"),
    "minibatches of one sample": ("--num-envs 4 --num-steps 1 --num-minibatches 4", "one sample cannot be normalized"),
    "no whole rollout": ("--total-timesteps 1023", "1023 is below one rollout, 1024 steps"),
    "0 cells": ("--lstm-size 0", "--lstm-size must be from 1"),
    "negative cells": ("--lstm-size=-128", "--lstm-size must be from 1"),
    "0 environments": ("--num-envs 0", "--num-envs must be from 1"),
    "negative seed": ("--seed=-1", "--seed must be from 0"),
    "nan gamma": ("--gamma nan", "--gamma must be from 0"),
    "Discrete observations of EnvPool": (
        f"{POOL} FrozenLake-v1",
        "observations Discrete(16) need --env-backend gymnasium",
    ),
    "close id of EnvPool": (f"{POOL} HalfCheeta-v4", "did you mean HalfCheetah-v4"),
    "unknown id of EnvPool": (f"{POOL} Zork-v0", "EnvPool has no Zork-v0"),
    "environment that EnvPool does not have": (f"{POOL} test/Odd-v0", "EnvPool has no test/Odd-v0"),
    "MultiDiscrete actions": ("--env-id test/MultiDiscreteActions-v0", "not MultiDiscrete"),
    "integer Box actions": ("--env-id test/IntegerBox-v0", "floating-point numbers, not Box(0, 5, (2,), int64)"),
    "close environment id": ("--env-id CartPol-v1", "CartPole"),
    "unknown environment id": ("--env-id Nothing-v3", "Nothing"),
    "old environment version": ("--env-id Pendulum-v0", "Pendulum"),
    "missing environment module": ("--env-id no_such_module:Env-v0", "no_such_module"),
    "environment arguments as a list": ("--env-kwargs [3]", "--env-kwargs [3]"),
    "environment arguments that are no JSON": ("--env-kwargs {size:3}", "--env-kwargs {size:3}"),
    "unknown environment argument": ('--env-kwargs {"wind":3}', "wind"),
    "entry that does not exist": ("--hide 1 4", "--hide 4: the entries of an observation are 0 to 3"),
    "resume of nothing": ("--resume nowhere", "nowhere is not a run directory of ppo_lstm.py"),
    "evaluation of nothing": ("--evaluate nowhere", "nowhere is not a run directory of ppo_lstm.py"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, capfd):
    """One line on stderr, exit code 2, nothing created."""
    line, fragment = BAD_FLAGS[case]
    if POOL in line:
        pytest.importorskip("envpool")  # exists for Linux only
    assert fragment in refusal(line.split(" "), capfd, ppo_lstm)


GYM = "--env-backend gymnasium"
BAD_GAMES = {
    "environments that cannot be shared": ("--num-envs 6 --num-minibatches 4", "6 envs cannot be shared equally by 4"),
    "0 frames for an action": ("--frame-skip 0", "--frame-skip must be from 1"),
    "0 frames in a game": ("--max-game-frames 0", "--max-game-frames must be from 1"),
    "negative no-ops": ("--noop-max=-1", "--noop-max must be from 0"),
    "videos of EnvPool": ("--env-id Pong --capture-video", "EnvPool cannot record videos: add --env-backend gymnasium"),
    "unknown argument of EnvPool": ('--env-id Pong --env-kwargs {"wind":3}', "wind"),
    "unknown argument": (f'{GYM} --env-id Pong --env-kwargs {{"wind":3}}', "wind"),
    "larger images of EnvPool": ('--env-id Pong --env-kwargs {"img_height":96}', "must show 84 x 84 gray pixels"),
    "colors of EnvPool": ('--env-id Pong --env-kwargs {"gray_scale":false}', "must show 84 x 84 gray pixels"),
    "arguments of EnvPool as a list": ("--env-id Pong --env-kwargs [3]", "--env-kwargs [3]"),
    "memory instead of images": (f'{GYM} --env-kwargs {{"obs_type":"ram"}}', "the game must show color images"),
    "frames skipped twice": (f'{GYM} --env-kwargs {{"frameskip":4}}', "use --frame-skip"),
    "no game": ("--env-id CartPole-v1", "there is no Atari game CartPole-v1"),
    "unknown game": ("--env-id Brekout", "did you mean Breakout?"),
    "game in lower case": ("--env-id pong", "did you mean Pong"),
    "game that skips frames": ("--env-id BreakoutDeterministic-v4", "use Breakout"),
}


@pytest.mark.parametrize("case", BAD_GAMES)
def test_bad_flags_of_games(case, capfd):
    """One line on stderr, exit code 2, nothing created."""
    line, fragment = BAD_GAMES[case]
    if GYM not in line:
        pytest.importorskip("envpool")  # exists for Linux only
    assert fragment in refusal(line.split(" "), capfd, ppo_atari_lstm)


# What tyro refuses itself: it draws a box, and exits.
BAD_WORDS = [
    (ppo_lstm, "--lstm-size large", "--lstm-size"), (ppo_lstm, "--lstm-sise 4", "--lstm-size"),
    (ppo_lstm, "--hide angle", "--hide"), (ppo_lstm, "--hide 1.5", "--hide"), (ppo_lstm, "--noop-max 3", "--noop-max"),
    (ppo_lstm, "--env-backend brax", "--env-backend"), (ppo_lstm, "--compile", "--compile"),
    (ppo_atari_lstm, "--hide 3", "--hide"), (ppo_atari_lstm, "--frame-stack 4", "--frame-stack"),
    (ppo_atari_lstm, "--env-backend auto", "--env-backend"), (ppo_atari_lstm, "--no-encoder", "--no-encoder"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "line", "fragment"), BAD_WORDS)
def test_bad_words(script, line, fragment, capfd):
    with pytest.raises(SystemExit) as stop:
        script.main(line.split(" "))
    output = capfd.readouterr()
    assert stop.value.code == 2 and fragment in output.err and output.out == ""
    assert listing(Path.cwd()) == {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one update, to be copied."""
    return train(small(1, runs_dir=str(tmp_path_factory.mktemp("finished"))))


@pytest.fixture
def run_copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run")).relative_to(tmp_path)


DAMAGES = {
    no_config: "config.json",
    config_with_wrong_type: "is not a run directory",
    truncated_checkpoint: "cannot use ",
    another_network: "cannot use ",
    zipped_pickle_bomb: "cannot use ",
    no_statistics: "cannot use ",
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_directories(damage, flag, run_copy, capfd):
    damage(run_copy)
    assert DAMAGES[damage] in refusal([flag, str(run_copy)], capfd, ppo_lstm)
    assert not Path("exploded").exists()


OTHER_NETWORKS = {
    "other cells": ("--lstm-size 8", "lstm.weight_ih_l0"),
    "no encoder": ("--no-encoder", "lstm.weight_ih_l0"),
    "other observations": ("--env-id Acrobot-v1 --hide", "cannot reshape"),
    "continuous actions": ("--env-id Pendulum-v1 --hide", "cannot reshape"),
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("case", OTHER_NETWORKS)
def test_checkpoint_of_another_network(case, flag, run_copy, capfd):
    """Loading would fail, or leave a part of the network as it was."""
    line, fragment = OTHER_NETWORKS[case]
    problem = refusal([flag, str(run_copy), *line.split()], capfd, ppo_lstm)
    assert f"cannot use {run_copy.resolve()}/checkpoint.pt" in problem and fragment in problem


def test_resume_cannot_change_the_size_of_a_rollout(run_copy, capfd):
    problem = refusal(["--resume", str(run_copy), "--num-envs", "4"], capfd, ppo_lstm)
    assert "cannot change with --resume" in problem


def test_run_directory_of_another_script(capfd):
    path = ppo.train(ppo.Args(num_envs=2, num_steps=8, num_minibatches=2, total_timesteps=16))["run_dir"]
    for flag in ("--resume", "--evaluate"):
        assert "is not a run directory of ppo_lstm.py" in refusal([flag, path], capfd, ppo_lstm)


def test_one_line_on_stderr(run_copy):
    """Also of what is printed past Python, and the exit code is the shell's."""
    before = listing(Path.cwd())
    done = forking.run([SCRIPT, "--env-id", "CartPol-v1"])
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"ppo_lstm\.py: error: .*CartPole.*\n", done.stderr)
    assert listing(Path.cwd()) == before


def test_training_that_diverges(capfd):
    """A learning rate without sense: exit code 1, one line that names the update, and a checkpoint of use."""
    assert ppo_lstm.main(words(small(3, learning_rate=2e9, max_grad_norm=1e9, **PENDULUM))) == 1
    (path,) = Path("runs").iterdir()
    (line,) = problems(capfd.readouterr().err)
    said = r"ppo_lstm\.py: error: in update \d, .* is not finite.*; the last checkpoint in (.*) is good"
    assert re.fullmatch(said, line)[1] == str(path.resolve())
    weights = {key: value for key, value in checkpoint(path)["agent"].items() if key != "_extra_state"}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert ppo_lstm.main(["--resume", str(path), "--learning-rate", "1e-4"]) == 0
    assert update_steps(path) == [1, 2, 3]


@pytest.mark.parametrize("script", [ppo_lstm, ppo_atari_lstm])
def test_help(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert not stop.value.code
    output = capsys.readouterr()
    assert output.err == ""
    for field in fields(script.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", output.out), field.name
    assert not list(Path.cwd().iterdir())


# Learning -------------------------------------------------------------------------------------------------------------
class Recall(gym.Env):
    """Shows 1 or -1 at first and then 0; the fifth action is rewarded with 1 if it says what was shown, else with 0."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.time = int(self.np_random.integers(2)), 0
        return np.array([2 * self.cue - 1], np.float32), {}

    def step(self, action):
        self.time += 1
        over = self.time == 5
        return np.zeros(1, np.float32), float(over and action == self.cue), over, False, {}


gym.register("test/Recall-v0", Recall)
RECALL = {
    "env_id": "test/Recall-v0", "num_envs": 16, "num_steps": 20, "num_minibatches": 2, "update_epochs": 4,
    "learning_rate": 1e-2, "anneal_lr": False, "lstm_size": 16, "clip_coef": 0.2,
}  # fmt: skip


def learn(updates: int, **changed) -> float:
    """Trains on Recall until the last 100 episodes gave more than 0.95 on average; returns the best such mean."""
    best, end_update = [0.0], ppo_lstm.Run.end_update

    def spy(run, ends, values):
        end_update(run, ends, values)
        if len(run.returns) == 100:
            best.append(float(np.mean(run.returns)))
        if best[-1] > 0.95:
            ppo_lstm.SIGNALS.append("success")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_lstm, "SIGNALS", [])
        patch.setattr(ppo_lstm.Run, "end_update", spy)
        ppo_lstm.train(small(updates, **RECALL | changed))
    return max(best)


@pytest.mark.parametrize("seed", [1, 2])
def test_learns_to_remember(seed):
    assert learn(60, seed=seed) > 0.95


def test_without_memory_nothing_can_be_recalled(monkeypatch):
    """The test above is about memory: with a state that is emptied before each step chance is the limit."""
    step, unroll = ppo_lstm.Agent.step, ppo_lstm.unroll
    monkeypatch.setattr(ppo_lstm.Agent, "step", lambda agent, obs, state: step(agent, obs, 0 * state))
    monkeypatch.setattr(ppo_lstm, "unroll", lambda lstm, x, s, dones: unroll(lstm, x, 0 * s, torch.ones_like(dones)))
    assert 0.3 < learn(30) < 0.75  # the best of 29 means of 100 coin tosses is 0.6 or so
