"""A run of ppo_atari.py as its user sees it: files, kills, signals, resuming, playing, videos, and what is refused.

The helpers are those of the other scripts' tests; what stands in the same lines there is proven there.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from test_atari import Tape
from test_bad_input import (
    another_network,
    config_with_wrong_type,
    listing,
    no_config,
    refusal,
    truncated_checkpoint,
    zipped_pickle_bomb,
)
from test_runs import (
    EPISODE,
    UPDATE,
    Killed,
    assert_same_agent,
    checkpoint,
    files,
    flags,
    in_empty_folder,  # noqa: F401 - a fixture that every test uses
    metrics,
    offline_records,
    problems,
    run_script,
    train,
    without_clock,
)

import ppo
import ppo_atari

pytestmark = pytest.mark.slow  # these start whole runs

SCRIPT = Path(ppo_atari.__file__).resolve()
BATCH = 16  # samples in one rollout of a small run
NO_BF16 = "this processor has no instructions for bfloat16: --amp will be slower than without"
BACKENDS = ["gymnasium", "envpool"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend; EnvPool exists for Linux only."""
    if request.param == "envpool":
        pytest.importorskip("envpool")
    return request.param


def small(updates: int, **changed) -> ppo_atari.Args:
    """Settings of a short run, with updates of 16 samples and games of at most 24 frames: six steps."""
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "noop_max": 1}
    return ppo_atari.Args(**(sizes | {"max_game_frames": 24, "total_timesteps": updates * BATCH} | changed))


def update_steps(path: Path) -> list[int]:
    """The numbers of the updates in metrics.jsonl."""
    return [row["global_step"] // BATCH for row in metrics(path) if "losses/policy_loss" in row]


# Files ----------------------------------------------------------------------------------------------------------------
def test_files_of_a_run(capfd, backend):
    args = small(4, seed=3, exp_name="trial", learning_rate=1e-3, env_id="ALE/Breakout-v5", env_backend=backend)
    assert ppo_atari.main(flags(args)) == 0
    (path,) = Path("runs").iterdir()
    assert re.fullmatch(r"ALE-Breakout-v5__trial__3__\d+", path.name)
    assert files(path).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert json.loads((path / "config.json").read_text()) == asdict(args)
    output = capfd.readouterr()
    assert output.out == f"runs/{path.name}: 64 steps, mean return 0.0\n"
    assert problems(output.err) == []

    assert (path / "metrics.jsonl").read_text().endswith("\n")
    rows = metrics(path)
    assert {frozenset(row) for row in rows} == {frozenset(EPISODE), frozenset(UPDATE)}
    for key in ("global_step", "wall_time"):
        assert all(earlier[key] <= later[key] for earlier, later in zip(rows, rows[1:], strict=False))
    assert update_steps(path) == [1, 2, 3, 4]
    updates = [row for row in rows if row.keys() == UPDATE]
    rates = [row["charts/learning_rate"] for row in updates]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    for row in updates:
        assert 1.3 < row["losses/entropy"] <= np.log(4) + 1e-6
        assert row["charts/SPS"] > 0
    episodes = [row for row in rows if row.keys() == EPISODE]
    assert len(episodes) >= 2 * (32 // 6)
    for row in episodes:
        assert 3 <= row["charts/episodic_length"] <= 6  # steps, not frames; those of FIRE may count or not
        assert row["charts/episodic_return"] == 0


def test_seeds(backend):
    """The same seed gives the same run to the last bit, another seed another run. The no-ops differ as well."""
    settings = {"env_id": "Pong", "env_backend": backend, "noop_max": 30, "max_game_frames": 80}
    first, again, other = (train(small(3, seed=seed, runs_dir=name, **settings)) for seed, name in SEEDS)
    assert any(row.keys() == EPISODE for row in metrics(first))
    assert without_clock(first) == without_clock(again)
    assert without_clock(first) != without_clock(other)
    assert_same_agent(checkpoint(first)["agent"], checkpoint(again)["agent"])
    assert not torch.equal(checkpoint(first)["moment1"], checkpoint(other)["moment1"])


SEEDS = (1, "a"), (1, "b"), (2, "c")


def test_async_environments_give_the_same_run():
    """--async-envs changes where environments are, not what they do."""
    settings = {"env_backend": "gymnasium", "env_id": "Pong", "noop_max": 30, "max_game_frames": 80}
    envs = ppo_atari.make_envs(small(1, async_envs=True, **settings))
    assert isinstance(envs, gym.vector.AsyncVectorEnv)
    envs.close()
    one, several = (train(small(3, runs_dir=str(on), async_envs=on, **settings)) for on in (False, True))
    assert any(row.keys() == EPISODE for row in metrics(one))
    assert without_clock(one) == without_clock(several)
    assert_same_agent(checkpoint(one)["agent"], checkpoint(several)["agent"])


def test_amp(capfd):
    """Trains, goes on and plays with --amp; on a processor that is not made for it the user is told."""
    assert ppo_atari.main(flags(small(2, amp=True))) == 0
    (path,) = Path("runs").iterdir()
    assert ppo_atari.main(["--resume", str(path), "--total-timesteps", str(3 * BATCH)]) == 0
    assert ppo_atari.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    assert set(problems(capfd.readouterr().err)) <= {NO_BF16}
    assert update_steps(path) == [1, 2, 3]


# Kills, signals, resuming ---------------------------------------------------------------------------------------------
class Background:
    """The script in a process of its own, which leads a group of processes as in a terminal."""

    def __init__(self, args):
        command = [sys.executable, str(SCRIPT), *flags(args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Where tests run in the background SIGINT may be ignored, and processes inherit that.
        listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=listen, **pipes)

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

    def end(self, number: signal.Signals, group=False) -> tuple[int, str, str]:
        """Sends a signal, to all processes of the group if asked for; returns the exit code, stdout and stderr."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


def test_kill_and_resume():
    """A run killed at any moment goes on from its last checkpoint and ends as long as it was meant to be."""
    background = Background(small(20, checkpoint_interval=3))
    path = background.wait_for_update(7)
    code, _, _ = background.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    saved, reached = checkpoint(path)["update"], update_steps(path)[-1]
    assert saved % 3 == 0 and saved >= 6
    assert 0 <= reached - saved <= 3 and reached < 20
    assert checkpoint(path)["gradient_steps"] == saved * 2
    before = (path / "metrics.jsonl").read_bytes()[: checkpoint(path)["metrics_bytes"]]
    assert ppo_atari.main(["--resume", str(path)]) == 0
    assert (path / "metrics.jsonl").read_bytes().startswith(before)
    assert update_steps(path) == list(range(1, 21))
    rows = metrics(path)
    for key in ("global_step", "wall_time"):
        assert all(earlier[key] <= later[key] for earlier, later in zip(rows, rows[1:], strict=False))
    assert rows[-1]["charts/learning_rate"] == pytest.approx(2.5e-4 / 20)
    assert (checkpoint(path)["update"], checkpoint(path)["gradient_steps"]) == (20, 40)


def test_killed_before_the_first_checkpoint(monkeypatch):
    """Then all is done again, and to the last bit as if nothing had happened."""
    whole = train(small(4, runs_dir="whole"))
    original = ppo_atari.Run.end_update

    def end_update(run, rollout, values):
        original(run, rollout, values)
        if run.update == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ppo_atari.Run, "end_update", end_update)
        with pytest.raises(Killed):
            ppo_atari.train(small(4, runs_dir="killed"))
    (path,) = Path("killed").iterdir()
    assert checkpoint(path)["update"] == 0
    assert update_steps(path) == [1, 2]
    assert ppo_atari.main(["--resume", str(path)]) == 0
    assert without_clock(path) == without_clock(whole)
    assert_same_agent(checkpoint(path)["agent"], checkpoint(whole)["agent"])


def test_resume_restores_everything():
    """Weights, Adam's moments and steps, counters, recent returns and random numbers, exactly."""
    args = small(3, checkpoint_interval=2)
    path = train(args)
    rng = torch.get_rng_state()  # train() has drawn its last number
    state = checkpoint(path)
    torch.manual_seed(12345)
    agent = ppo_atari.Agent(Box(0, 255, (84, 84), np.uint8), Discrete(4), args)
    adam = ppo_atari.Adam(agent)
    run = ppo_atari.Run(ppo_atari.replace(args, resume=str(path)), agent, adam)
    run.save()
    run.close()
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same_agent(agent.state_dict(), state["agent"])
    assert_same_agent(agent.state_dict(), checkpoint(path)["agent"])
    assert torch.equal(adam.parameters, torch.cat([p.flatten() for p in agent.parameters()]))
    assert torch.equal(adam.moment1, state["moment1"]) and torch.equal(adam.moment2, state["moment2"])
    assert adam.moment1.any() and adam.moment2.any()
    assert (adam.steps, run.update, run.first_step) == (3 * 2, 3, 3 * BATCH)
    returns = [row["charts/episodic_return"] for row in metrics(path) if "charts/episodic_return" in row]
    assert list(run.returns) == returns and returns
    # Moments and parameters, each once: shared layers are not saved twice.
    assert (path / "checkpoint.pt").stat().st_size < 3 * 4.1 * len(adam.parameters) + 100_000


def test_resume_goes_on_with_other_games(monkeypatch):
    """The environments get another seed than at the start, for otherwise the first games would be played again."""
    seeds = []
    make_envs = ppo_atari.make_envs

    def make_and_watch(*inputs):
        envs = make_envs(*inputs)
        reset = envs.reset
        envs.reset = lambda *, seed: seeds.append(seed) or reset(seed=seed)
        return envs

    monkeypatch.setattr(ppo_atari, "make_envs", make_and_watch)
    path = train(small(2, seed=5))
    first = (path / "metrics.jsonl").read_bytes()
    assert ppo_atari.main(["--resume", str(path), "--total-timesteps", str(5 * BATCH)]) == 0
    assert seeds == [5, 5 + 2 * BATCH]
    assert (path / "metrics.jsonl").read_bytes().startswith(first)
    assert update_steps(path) == [1, 2, 3, 4, 5]
    assert checkpoint(path)["gradient_steps"] == 10
    assert json.loads((path / "config.json").read_text())["total_timesteps"] == 5 * BATCH
    rates = [row["charts/learning_rate"] for row in metrics(path) if "charts/learning_rate" in row]
    assert rates[2] == pytest.approx(2.5e-4 * 0.6)  # the schedule is the longer run's


def test_resuming_a_finished_run_changes_nothing(capfd):
    path = train(small(2))
    before, state = files(path), checkpoint(path)
    capfd.readouterr()
    assert ppo_atari.main(["--resume", str(path)]) == 0
    output = capfd.readouterr()
    assert output.out == f"{path}: 32 steps, mean return 0.0\n"
    assert problems(output.err) == []
    after = files(path)
    assert after.keys() == before.keys()
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert after["config.json"] == before["config.json"]
    assert_same_agent(checkpoint(path)["agent"], state["agent"])


SIGNALS = {
    "SIGTERM": (signal.SIGTERM, False, {}),
    # A terminal sends Ctrl-C to all processes of the script: those of the environments must not die of it.
    "Ctrl-C": (signal.SIGINT, True, {"env_backend": "gymnasium", "async_envs": True}),
    # So do timeout and schedulers of clusters with SIGTERM.
    "SIGTERM to all": (signal.SIGTERM, True, {"env_backend": "gymnasium", "async_envs": True}),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals(name):
    """The update is finished, a checkpoint written, and what to do said; going on works."""
    number, group, changed = SIGNALS[name]
    background = Background(small(3000, checkpoint_interval=1000, **changed))
    path = background.wait_for_update(4)
    code, out, err = background.end(number, group)
    assert (code, problems(err)) == (0, [])
    stopped_at = update_steps(path)[-1]
    assert 4 <= stopped_at < 3000
    assert checkpoint(path)["update"] == stopped_at
    assert checkpoint(path)["metrics_bytes"] == (path / "metrics.jsonl").stat().st_size
    lines = out.splitlines()
    assert lines[0].startswith(f"{path}: {stopped_at * BATCH} steps, mean return ")
    assert lines[1:] == [f"stopped by a signal; go on with: python ppo_atari.py --resume {path}"]
    more = str((stopped_at + 2) * BATCH)
    assert ppo_atari.main(["--resume", str(path), "--total-timesteps", more, "--no-async-envs"]) == 0
    assert update_steps(path) == list(range(1, stopped_at + 3))


def test_signal_between_two_updates(monkeypatch):
    """Training ends soon, with a checkpoint of all that was logged; the handlers are given back."""
    original = ppo_atari.Run.end_update

    def end_update(run, rollout, values):
        original(run, rollout, values)
        if run.update == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(ppo_atari.Run, "end_update", end_update)
    path = train(small(9, checkpoint_interval=5))
    assert update_steps(path) in ([1, 2, 3], [1, 2, 3, 4])
    assert checkpoint(path)["update"] == update_steps(path)[-1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# Playing and videos ---------------------------------------------------------------------------------------------------
def prefer(path: Path, action: int) -> None:
    """Makes a run's agent take that action in nearly all cases, whatever it sees."""
    state = checkpoint(path)
    state["agent"]["actor.weight"].zero_()
    state["agent"]["actor.bias"].zero_()[action] = 5.0
    torch.save(state, path / "checkpoint.pt")


def test_evaluate(capfd, backend):
    """The saved agent plays whole games, reproducibly, and nothing of the run is changed.

    In Freeway a chicken that always goes up crosses the street; one that always waits does not.
    """
    settings = {"env_id": "Freeway", "env_backend": backend, "max_game_frames": 700, "noop_max": 30}
    path = train(small(1, **settings))
    said = {}
    for name, action, extra in (("up", 1, []), ("again", 1, []), ("wait", 0, ["--eval-deterministic"])):
        prefer(path, action)
        before = files(path)
        capfd.readouterr()
        assert ppo_atari.main(["--evaluate", str(path), "--eval-episodes", "2", *extra]) == 0
        output = capfd.readouterr()
        assert output.err == ""
        said[name] = re.fullmatch(r"Freeway: return (\d+\.\d) \+- (\d+\.\d) over 2 games\n", output.out)
        assert said[name], output.out
        assert files(path) == before
    assert said["up"][0] == said["again"][0]
    assert float(said["up"][1]) > 0
    assert said["wait"].groups() == ("0.0", "0.0")


def test_evaluate_plays_in_the_other_backend_too(capfd):
    pytest.importorskip("envpool")  # exists for Linux only
    path = train(small(1))
    capfd.readouterr()
    assert ppo_atari.main(["--evaluate", str(path), "--eval-episodes", "2", "--env-backend", "gymnasium"]) == 0
    output = capfd.readouterr()
    assert (output.out, output.err) == ("Breakout: return 0.0 +- 0.0 over 2 games\n", "")


@pytest.mark.parametrize("frame_stack", [4, 1])
def test_evaluate_sees_what_the_training_sees(monkeypatch, capfd, frame_stack):
    """Its stacks are those of the rollouts, and its returns those of whole games, as printed."""
    monkeypatch.setattr(ppo_atari, "make_envs", lambda args, *videos: Tape(args.num_envs))
    path = train(small(1, frame_stack=frame_stack))
    tape, seen, forward = Tape(1), [], ppo_atari.Agent.forward
    monkeypatch.setattr(ppo_atari, "make_envs", lambda args, *videos: tape)
    monkeypatch.setattr(ppo_atari.Agent, "forward", lambda agent, x: seen.append(x.clone()) or forward(agent, x))
    capfd.readouterr()
    args = small(1, frame_stack=frame_stack, evaluate=str(path), eval_episodes=6, seed=4)
    returns = ppo_atari.evaluate(args)
    expected = [float(game[0]) for step in tape.steps for game in step["episodes"]]
    assert returns == expected and len(returns) == 6
    assert sum(step["dones"][0] for step in tape.steps) > 6  # lost lives were no ends
    assert tape.seeds == [4]
    np.testing.assert_array_equal(np.stack(seen), np.stack(tape.stacks(frame_stack)[:-1]))
    said = f"Breakout: return {np.mean(returns):.1f} +- {np.std(returns):.1f} over 6 games\n"
    assert capfd.readouterr().out == said


def test_evaluate_whatever_the_sizes_of_the_training(capfd):
    """One environment is played in; that a rollout of it could not be cut into minibatches matters to nobody."""
    path = train(small(1, num_envs=4, num_steps=2, num_minibatches=4))
    capfd.readouterr()
    assert ppo_atari.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    assert capfd.readouterr().err == ""


def test_videos_of_the_evaluation(capfd, backend):
    """One for each game. EnvPool cannot record, and so the games are played with gymnasium."""
    path = train(small(1, max_game_frames=60, env_backend=backend))
    before = files(path)
    capfd.readouterr()
    assert ppo_atari.main(["--evaluate", str(path), "--eval-episodes", "2", "--capture-video"]) == 0
    output = capfd.readouterr()
    assert re.fullmatch(r"Breakout: return \d\.\d \+- \d\.\d over 2 games\n", output.out)
    assert problems(output.err) == []
    after = files(path)
    videos = after.keys() - before.keys()
    assert len(videos) == 2
    assert all(name.startswith("videos/") and name.endswith(".mp4") and len(after[name]) > 1000 for name in videos)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("async_envs", [False, True])
def test_videos_of_the_training(capfd, async_envs):
    """Recording does not change the training."""
    settings = {"env_backend": "gymnasium", "async_envs": async_envs, "max_game_frames": 60, "noop_max": 30}
    plain, recorded = (train(small(2, runs_dir=str(on), capture_video=on, **settings)) for on in (False, True))
    assert problems(capfd.readouterr().err) == []
    videos = list((recorded / "videos").iterdir())
    assert videos and all(video.suffix == ".mp4" and video.stat().st_size > 1000 for video in videos)
    assert without_clock(plain) == without_clock(recorded)
    assert_same_agent(checkpoint(plain)["agent"], checkpoint(recorded)["agent"])


def test_tracking(monkeypatch):
    """Offline, Weights & Biases gets the settings and the same numbers that metrics.jsonl has."""
    import wandb

    wandb.teardown()  # what other tests have set must not last
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = small(2, track=True, wandb_project_name="trials", ent_coef=0.02)
    path = train(args)
    wandb.teardown()
    (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
    history, config, runs = [], {}, []
    for record in offline_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            runs.append((record.run.run_id, record.run.display_name, record.run.project))
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            keys = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append({key: value for key, value in keys.items() if not key.startswith("_")})
    assert set(runs) == {(path.name, path.name, "trials")}
    assert {key: config[key] for key in asdict(args)} == asdict(args)
    assert {frozenset(row) for row in history} == {frozenset(EPISODE), frozenset(UPDATE)}
    assert history == metrics(path)


# What is refused ------------------------------------------------------------------------------------------------------
POOL, GYM = "--env-backend envpool", "--env-backend gymnasium"
BAD_FLAGS = {
    "close game": ("--env-id Breakot", "there is no Atari game Breakot; did you mean Breakout?"),
    "close game in lower case": ("--env-id pong", "did you mean Pong"),
    "close game with a version": ("--env-id ALE/Brekout-v5", "Breakout"),
    "unknown game": ("--env-id Zzzzzzz", "there is no Atari game Zzzzzzz"),
    "no game": ("--env-id=", "there is no Atari game"),
    "not an Atari game": ("--env-id CartPole-v1", "there is no Atari game CartPole-v1"),
    "game of a module": ("--env-id json:Breakout-v5", "there is no Atari game json:Breakout-v5"),
    "old game": ("--env-id Breakout-v4", "Breakout-v4 skips frames or repeats actions by itself"),
    "older game": ("--env-id Breakout-v0", "use Breakout"),
    "game that skips frames": ("--env-id BreakoutDeterministic-v4", "use Breakout"),
    "game that repeats actions": ("--env-id BreakoutNoFrameskip-v0", "use Breakout"),
    "game's memory": ("--env-id Breakout-ram-v5", "there is no Atari game Breakout-ram-v5"),
    "negative no-ops": ("--noop-max=-1", "--noop-max must be from 0"),
    "0 frames for an action": ("--frame-skip 0", "--frame-skip must be from 1"),
    "0 frames in a stack": ("--frame-stack 0", "--frame-stack must be from 1"),
    "0 frames in a game": ("--max-game-frames 0", "--max-game-frames must be from 1"),
    "0 environments": ("--num-envs 0", "--num-envs must be from 1"),
    "0 steps": ("--num-steps 0", "--num-steps must be from 1"),
    "negative seed": ("--seed=-1", "--seed must be from 0"),
    "nan gamma": ("--gamma nan", "--gamma must be from 0"),
    "unequal minibatches": ("--num-envs 3 --num-steps 5 --num-minibatches 4", "15 samples cannot be cut into 4"),
    "minibatches of one sample": ("--num-envs 2 --num-steps 2 --num-minibatches 4", "one sample cannot be normalized"),
    "no whole rollout": ("--total-timesteps 1023", "1023 is below one rollout of 1024 steps"),
    "unknown backend": ("--env-backend brax", "--env-backend must be gymnasium or envpool, not brax"),
    "videos of EnvPool": ("--capture-video", "EnvPool cannot record videos: add --env-backend gymnasium"),
    "processes for EnvPool": ("--async-envs", "--async-envs is for --env-backend gymnasium"),
    "close flag": ("--frame-stak 4", "--frame-stack"),
    "text for an int": ("--frame-skip four", "--frame-skip"),
    "resume of nothing": ("--resume nowhere", "nowhere is not a run directory of ppo_atari.py"),
    "evaluation of nothing": ("--evaluate nowhere", "nowhere is not a run directory of ppo_atari.py"),
    "resume and evaluation": ("--resume a --evaluate b", "exclude each other"),
}
for backend_flag in (POOL, GYM):
    name = backend_flag.split()[1]
    BAD_FLAGS |= {
        f"arguments of {name} that are no JSON": (f"{backend_flag} --env-kwargs {{mode:3}}", "--env-kwargs {mode:3}"),
        f"arguments of {name} as a list": (f"{backend_flag} --env-kwargs [3]", "--env-kwargs [3]"),
        f"arguments of {name} as a number": (f"{backend_flag} --env-kwargs 3", "--env-kwargs 3"),
        f"empty arguments of {name}": (f"{backend_flag} --env-kwargs=", "--env-kwargs"),
        f"unknown argument of {name}": (f'{backend_flag} --env-kwargs {{"wind":3}}', "wind"),
    }
for key, value in (("img_height", 96), ("gray_scale", "false")):
    words = f'{POOL} --env-kwargs {{"{key}":{value}}}'
    BAD_FLAGS[f"{key} in the arguments of envpool"] = (words, "the game must show 84 x 84 gray pixels, not Box(0, 255")
for kind, shape in (("ram", "(128,)"), ("grayscale", "(210, 160)")):
    words = f'{GYM} --env-kwargs {{"obs_type":"{kind}"}}'
    BAD_FLAGS[f"{kind} instead of colors"] = (words, f"the game must show color images, not Box(0, 255, {shape}")


def test_envpool_steps_all_environments_whatever_its_arguments_are():
    """Their number is --num-envs, and one step is one of all of them."""
    pytest.importorskip("envpool")  # exists for Linux only
    args = small(1, env_backend="envpool", env_kwargs='{"num_envs": 3, "batch_size": 2, "stack_num": 4}')
    envs = ppo_atari.make_envs(args)
    assert envs.reset(seed=1)[0].shape == (args.num_envs, 84, 84)
    assert envs.step(np.zeros(args.num_envs, int))[0].shape == (args.num_envs, 84, 84)


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, capfd):
    words, fragment = BAD_FLAGS[case]
    if "arguments of envpool" in case:
        pytest.importorskip("envpool")  # exists for Linux only
    assert fragment in refusal(words.split(" "), capfd, ppo_atari)


def test_arguments_reach_the_environments(backend):
    """Breakout has 4 actions, the console 18."""
    for env_kwargs, actions in (("{}", 4), ('{"full_action_space": true}', 18)):
        envs = ppo_atari.make_envs(small(1, env_kwargs=env_kwargs, env_backend=backend))
        assert envs.single_action_space.n == actions
        envs.close()


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
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_directories(damage, flag, run_copy, capfd):
    damage(run_copy)
    assert DAMAGES[damage] in refusal([flag, str(run_copy)], capfd, ppo_atari)
    assert not Path("exploded").exists()


OTHER_NETWORKS = {
    "other frames": ("--frame-stack 2", "convolutions.0.weight"),
    "other actions": ("--env-id Freeway", "actor.weight"),
    "separate networks": ("--no-shared-network", "critic_network"),
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("case", OTHER_NETWORKS)
def test_checkpoint_of_another_network(case, flag, run_copy, capfd):
    """Loading would fail, or leave a part of the network as it was."""
    words, fragment = OTHER_NETWORKS[case]
    problem = refusal([flag, str(run_copy), *words.split()], capfd, ppo_atari)
    assert f"cannot use {run_copy}/checkpoint.pt" in problem and fragment in problem


def test_resume_cannot_change_the_size_of_a_rollout(run_copy, capfd):
    problem = refusal(["--resume", str(run_copy), "--num-envs", "4"], capfd, ppo_atari)
    assert "cannot change with --resume" in problem


def test_run_directory_of_another_script(capfd):
    path = ppo.train(ppo.Args(num_envs=2, num_steps=8, num_minibatches=2, total_timesteps=16))["run_dir"]
    for flag in ("--resume", "--evaluate"):
        assert "is not a run directory of ppo_atari.py" in refusal([flag, path], capfd, ppo_atari)


@pytest.mark.parametrize("words", ["--env-id Breakot", f"{GYM} --resume run"])
def test_one_line_on_stderr(words, run_copy):
    """Also with all that Python and the emulator print of themselves, and the exit code is the shell's."""
    truncated_checkpoint(run_copy)
    before = listing(Path.cwd())
    done = run_script(SCRIPT, *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"ppo_atari\.py: error: .*(Breakot|checkpoint\.pt).*\n", done.stderr)
    assert listing(Path.cwd()) == before


def test_without_envpool(capfd, monkeypatch):
    """Where EnvPool is not installed the run goes on with gymnasium and says so, in one line."""
    monkeypatch.setitem(sys.modules, "envpool", None)  # makes its import fail
    assert ppo_atari.main(flags(small(2))) == 0
    output = capfd.readouterr()
    fallback = "EnvPool is not installed (it exists for Linux only); using gymnasium"
    assert problems(output.err) == [fallback]
    (path,) = Path("runs").iterdir()
    assert output.out.startswith(f"{path}: 32 steps")
    assert ppo_atari.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    output = capfd.readouterr()
    assert output.err == fallback + "\n"
    assert output.out == "Breakout: return 0.0 +- 0.0 over 1 games\n"


def test_training_that_diverges(capfd):
    """A learning rate without sense: exit code 1, one line that names the update, and a checkpoint of use."""
    args = small(3, learning_rate=2e9, max_grad_norm=1e9)
    assert ppo_atari.main(flags(args)) == 1
    (path,) = Path("runs").iterdir()
    (line,) = problems(capfd.readouterr().err)
    said = r"ppo_atari\.py: error: update \d is not finite; (.*) keeps the last checkpoint"
    assert re.fullmatch(said, line)[1] == str(path)
    assert all(tensor.isfinite().all() for tensor in checkpoint(path)["agent"].values())
    assert ppo_atari.main(["--resume", str(path), "--learning-rate", "1e-4"]) == 0
    assert update_steps(path) == [1, 2, 3]


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        ppo_atari.main(["--help"])
    assert not stop.value.code
    output = capsys.readouterr()
    assert output.err == ""
    for field in fields(ppo_atari.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", output.out), field.name
    assert not list(Path.cwd().iterdir())


def test_every_game_id_has_its_game():
    """What users have in their scripts means one game."""
    for env_id in ("Breakout", "Breakout-v5", "ALE/Breakout-v5", "BreakoutNoFrameskip-v4"):
        assert ppo_atari.find_game(env_id) == "Breakout"
    games = {env_id for env_id in gym.registry if env_id.startswith("ALE/") and env_id.endswith("-v5")}
    assert len(games) > 60
    assert {f"ALE/{ppo_atari.find_game(env_id)}-v5" for env_id in games} == games
