"""A run of the Atari scripts as their user sees it: files, kills, signals, resuming, playing, videos, bad input.

The helpers are those of the other scripts' tests; what stands in the same lines there is proven there.
"""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, fields
from pathlib import Path

import forking
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
import ppo_atari_envpool as pool
import ppo_atari_multigpu as multi

pytestmark = pytest.mark.slow  # these start whole runs

BATCH = 16  # samples in one rollout of a small run
NO_BF16 = "this processor has no instructions for bfloat16: --amp will be slower than without"


@pytest.fixture(params=[ppo_atari, pool], ids=["gymnasium", "envpool"])
def script(request):
    """Both scripts; EnvPool exists for Linux only. ppo_atari_multigpu.py differs in what test_distributed.py tests."""
    if request.param is pool:
        pytest.importorskip("envpool")
    return request.param


@pytest.fixture
def one_script():
    """Either of the scripts, for what they do in the same lines (test_same_lines.py)."""
    return pool if importlib.util.find_spec("envpool") else ppo_atari


def small(updates: int, script=ppo_atari, **changed):
    """Settings of a short run, with updates of 16 samples and games of at most 24 frames: six steps."""
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "noop_max": 1}
    return script.Args(**(sizes | {"max_game_frames": 24, "total_timesteps": updates * BATCH} | changed))


def update_steps(path: Path) -> list[int]:
    """The numbers of the updates in metrics.jsonl."""
    return [row["global_step"] // BATCH for row in metrics(path) if "losses/policy_loss" in row]


# Files ----------------------------------------------------------------------------------------------------------------
def test_files_of_a_run(capfd, script):
    args = small(4, script, seed=3, exp_name="trial", learning_rate=1e-3, env_id="ALE/Breakout-v5")
    assert script.main(flags(args)) == 0
    (path,) = Path("runs").iterdir()
    assert re.fullmatch(r"ALE-Breakout-v5__trial__3__\d+", path.name)
    assert files(path).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert json.loads((path / "config.json").read_text()).items() >= asdict(args).items()
    output = capfd.readouterr()
    assert output.out == f"{path.resolve()}: 64 steps, mean return 0.0\n"
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


def test_seeds(script):
    """The same seed gives the same run to the last bit, another seed another run. The no-ops differ as well."""
    settings = {"env_id": "Pong", "noop_max": 30, "max_game_frames": 80}
    first, again, other = (train(small(3, script, seed=seed, runs_dir=name, **settings)) for seed, name in SEEDS)
    assert any(row.keys() == EPISODE for row in metrics(first))
    assert without_clock(first) == without_clock(again)
    assert without_clock(first) != without_clock(other)
    assert_same_agent(checkpoint(first)["agent"], checkpoint(again)["agent"])
    assert not torch.equal(checkpoint(first)["moment1"], checkpoint(other)["moment1"])


SEEDS = (1, "a"), (1, "b"), (2, "c")


def test_amp(capfd):
    """Trains, goes on and plays with --amp; on a processor that is not made for it the user is told."""
    pool.say.cache_clear()
    assert pool.main(flags(small(2, pool, amp=True))) == 0
    (path,) = Path("runs").iterdir()
    assert pool.main(["--resume", str(path), "--total-timesteps", str(3 * BATCH)]) == 0
    assert pool.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    assert set(problems(capfd.readouterr().err)) <= {NO_BF16}
    assert update_steps(path) == [1, 2, 3]


# Kills, signals, resuming ---------------------------------------------------------------------------------------------
class Background:
    """A script in a process of its own."""

    def __init__(self, script, args):
        words = [script.__file__, *flags(args)]
        self.process = forking.Forked(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

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


def test_kill_and_resume(one_script):
    """A run killed at any moment goes on from its last checkpoint and ends as long as it was meant to be."""
    background = Background(one_script, small(20, one_script, checkpoint_interval=3))
    path = background.wait_for_update(7)
    code, _, _ = background.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    saved, reached = checkpoint(path)["update"], update_steps(path)[-1]
    assert saved % 3 == 0 and saved >= 6
    assert 0 <= reached - saved <= 3 and reached < 20
    assert checkpoint(path)["gradient_steps"] == saved * 2
    before = (path / "metrics.jsonl").read_bytes()[: checkpoint(path)["metrics_bytes"]]
    assert one_script.main(["--resume", str(path)]) == 0
    assert (path / "metrics.jsonl").read_bytes().startswith(before)
    assert update_steps(path) == list(range(1, 21))
    rows = metrics(path)
    for key in ("global_step", "wall_time"):
        assert all(earlier[key] <= later[key] for earlier, later in zip(rows, rows[1:], strict=False))
    assert rows[-1]["charts/learning_rate"] == pytest.approx(2.5e-4 / 20)
    assert (checkpoint(path)["update"], checkpoint(path)["gradient_steps"]) == (20, 40)


def test_killed_before_the_first_checkpoint(monkeypatch, one_script):
    """Then all is done again, and to the last bit as if nothing had happened."""
    whole = train(small(4, one_script, runs_dir="whole"))
    original = one_script.Run.end_update

    def end_update(run, *given):
        original(run, *given)
        if run.update == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(one_script.Run, "end_update", end_update)
        with pytest.raises(Killed):
            one_script.train(small(4, one_script, runs_dir="killed"))
    (path,) = Path("killed").iterdir()
    assert checkpoint(path)["update"] == 0
    assert update_steps(path) == [1, 2]
    assert one_script.main(["--resume", str(path)]) == 0
    assert without_clock(path) == without_clock(whole)
    assert_same_agent(checkpoint(path)["agent"], checkpoint(whole)["agent"])


def test_resume_restores_everything():
    """Weights, Adam's moments and steps, counters, recent returns and random numbers, exactly."""
    args = small(3, checkpoint_interval=2)
    path = train(args)
    rng = torch.get_rng_state()  # train() has drawn its last number
    state = checkpoint(path)
    torch.manual_seed(12345)
    agent = ppo_atari.Agent(Box(0, 255, (4, 84, 84), np.uint8), Discrete(4), args)
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
    assert (adam.steps, run.update, run.global_step) == (3 * 2, 3, 3 * BATCH)
    returns = [row["charts/episodic_return"] for row in metrics(path) if "charts/episodic_return" in row]
    assert list(run.returns) == returns and returns
    # Moments and parameters, each once: shared layers are not saved twice.
    assert (path / "checkpoint.pt").stat().st_size < 3 * 4.1 * len(adam.parameters) + 100_000


def test_resume_goes_on_with_other_games(monkeypatch, script):
    """The environments are told how far the run had come, for otherwise the first games would be played again."""
    starts = []
    make_envs = script.make_envs

    def make_and_watch(*inputs):
        envs = make_envs(*inputs)
        reset = envs.reset
        envs.reset = lambda *given: starts.append(given) or reset(*given)
        return envs

    monkeypatch.setattr(script, "make_envs", make_and_watch)
    path = train(small(2, script, seed=5))
    first = (path / "metrics.jsonl").read_bytes()
    assert script.main(["--resume", str(path), "--total-timesteps", str(5 * BATCH)]) == 0
    assert starts == [(5, 0), (5, 2 * BATCH)]
    assert (path / "metrics.jsonl").read_bytes().startswith(first)
    assert update_steps(path) == [1, 2, 3, 4, 5]
    assert checkpoint(path)["gradient_steps"] == 10
    assert json.loads((path / "config.json").read_text())["total_timesteps"] == 5 * BATCH
    rates = [row["charts/learning_rate"] for row in metrics(path) if "charts/learning_rate" in row]
    assert rates[2] == pytest.approx(2.5e-4 * 0.6)  # the schedule is the longer run's


def test_resuming_a_finished_run_changes_nothing(capfd, one_script):
    path = train(small(2, one_script))
    before, state = files(path), checkpoint(path)
    capfd.readouterr()
    assert one_script.main(["--resume", str(path)]) == 0
    output = capfd.readouterr()
    assert output.out == f"{path}: 32 steps, mean return 0.0\n"
    assert problems(output.err) == []
    after = files(path)
    assert after.keys() == before.keys()
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert after["config.json"] == before["config.json"]
    assert_same_agent(checkpoint(path)["agent"], state["agent"])


def test_signals(one_script):
    """The update is finished, a checkpoint written, and what to do said; going on works."""
    background = Background(one_script, small(3000, one_script, checkpoint_interval=1000))
    path = background.wait_for_update(4)
    code, out, err = background.end(signal.SIGTERM)
    assert (code, problems(err)) == (0, [])
    stopped_at = update_steps(path)[-1]
    assert 4 <= stopped_at < 3000
    assert checkpoint(path)["update"] == stopped_at
    assert checkpoint(path)["metrics_bytes"] == (path / "metrics.jsonl").stat().st_size
    lines = out.splitlines()
    assert lines[0].startswith(f"{path.resolve()}: {stopped_at * BATCH} steps, mean return ")
    name = Path(one_script.__file__).name
    assert lines[1:] == [f"stopped by a signal; go on with: python {name} --resume {path.resolve()}"]
    more = str((stopped_at + 2) * BATCH)
    assert one_script.main(["--resume", str(path), "--total-timesteps", more]) == 0
    assert update_steps(path) == list(range(1, stopped_at + 3))


# Playing and videos ---------------------------------------------------------------------------------------------------
def prefer(path: Path, action: int, by: float) -> None:
    """Makes a run's agent prefer that action, whatever it sees; by 8, it takes it in nearly all cases."""
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    state["agent"]["actor.weight"].zero_()
    state["agent"]["actor.bias"].zero_()[action] = by
    torch.save(state, path / "checkpoint.pt")


def test_evaluate(capfd, script):
    """The saved agent plays whole games, reproducibly, and nothing of the run is changed.

    In Freeway a chicken that always goes up crosses the street; one that always waits does not. Where an action is only
    a little more probable, it is the only one with --eval-deterministic, and one of three without.
    """
    path = train(small(1, script, env_id="Freeway", max_game_frames=400, noop_max=30))
    said = {}
    cases = {"up": (1, 8, []), "again": (1, 8, []), "wait": (0, 0.01, ["--eval-deterministic"]), "any": (0, 0.01, [])}
    for name, (action, by, extra) in cases.items():
        prefer(path, action, by)
        before = files(path)
        capfd.readouterr()
        assert script.main(["--evaluate", str(path), "--eval-episodes", "2", *extra]) == 0
        output = capfd.readouterr()
        assert problems(output.err) == []
        said[name] = re.fullmatch(r"Freeway: return (\d+\.\d) \+- (\d+\.\d) over 2 episodes\n", output.out)
        assert said[name], output.out
        assert files(path) == before
    assert said["up"][0] == said["again"][0]
    assert float(said["up"][1]) > 0
    assert said["wait"].groups() == ("0.0", "0.0")


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluate_takes_the_actions_asked_for(greedy, one_script, monkeypatch):
    """Samples of the policy, or its most probable action: with actions nearly alike that shows."""
    path = train(small(1, one_script))
    prefer(path, 2, 0.1)
    taken, make_envs = [], one_script.make_envs

    def make_and_watch(*inputs):
        envs = make_envs(*inputs)
        step = envs.step
        envs.step = lambda actions: taken.append(int(actions[0])) or step(actions)
        return envs

    monkeypatch.setattr(one_script, "make_envs", make_and_watch)
    line = ["--evaluate", str(path), "--eval-episodes", "1", *["--eval-deterministic"] * greedy]
    one_script.evaluate(one_script.parse_args(line))
    assert len(taken) == 100 and (set(taken) == {2}) == greedy


def test_ppo_atari_plays_the_runs_of_envpool(capfd):
    """Also to record them, which EnvPool cannot; the other way round, settings are missing."""
    pytest.importorskip("envpool")  # exists for Linux only
    path = train(small(1, pool))
    capfd.readouterr()
    assert ppo_atari.main(["--evaluate", str(path), "--eval-episodes", "2", "--capture-video"]) == 0
    output = capfd.readouterr()
    assert (output.out, problems(output.err)) == ("Breakout: return 0.0 +- 0.0 over 2 episodes\n", [])
    assert len(list(path.glob("videos/*.mp4"))) == 2
    own = train(small(1, runs_dir="own"))
    assert "is not a run directory of ppo_atari_envpool.py" in refusal(["--evaluate", str(own)], capfd, pool)


@pytest.mark.parametrize("frame_stack", [4, 1])
def test_evaluate_sees_what_the_training_sees(monkeypatch, capfd, frame_stack):
    """Its observations are those of the environments, and its returns those of whole games, as printed."""
    monkeypatch.setattr(ppo_atari, "make_envs", lambda args, *videos: Tape(args))
    path = train(small(1, frame_stack=frame_stack))
    tapes, seen, forward = [], [], ppo_atari.Agent.forward
    monkeypatch.setattr(ppo_atari, "make_envs", lambda args, *videos: tapes.append(Tape(args)) or tapes[0])
    monkeypatch.setattr(ppo_atari.Agent, "forward", lambda agent, x: seen.append(x.clone()) or forward(agent, x))
    capfd.readouterr()
    args = small(1, frame_stack=frame_stack, evaluate=str(path), eval_episodes=6, seed=4)
    returns = ppo_atari.evaluate(args)
    (tape,) = tapes
    expected = [end.episodic_return for step in tape.steps for end in step["ends"]]
    assert returns == expected[:6] and len(returns) == 6
    assert sum(step["dones"][0] for step in tape.steps) > len(expected)  # lost lives were no ends
    assert tape.starts == [(4, 0)]
    np.testing.assert_array_equal(np.stack(seen), np.stack(tape.seen()))
    said = f"Breakout: return {np.mean(returns):.1f} +- {np.std(returns):.1f} over 6 episodes\n"
    assert capfd.readouterr().out == said


def test_evaluate_whatever_the_sizes_of_the_training(capfd, one_script):
    """One environment is played in; that a rollout of it could not be cut into minibatches matters to nobody."""
    path = train(small(1, one_script, num_envs=4, num_steps=2, num_minibatches=4))
    capfd.readouterr()
    assert one_script.main(["--evaluate", str(path), "--eval-episodes", "1"]) == 0
    assert problems(capfd.readouterr().err) == []


def test_evaluate_cuts_long_games(capfd, script):
    """After --eval-max-steps steps."""
    path = train(small(1, script))
    capfd.readouterr()
    line = ["--evaluate", str(path), "--eval-episodes", "3", "--eval-max-steps", "3"]
    assert script.main(line) == 0
    lengths = [int(length) for length in re.findall(r"after (\d+) steps", capfd.readouterr().err)]
    assert len(lengths) == 3 and max(lengths) == 3


def test_videos_of_the_training(capfd):
    """Recording does not change the training."""
    settings = {"max_game_frames": 60, "noop_max": 30}
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
BAD_FLAGS = {
    "close game": ("--env-id Breakot", "no Atari game Breakot; did you mean Breakout?"),
    "close game in lower case": ("--env-id pong", "did you mean Pong"),
    "close game with a version": ("--env-id ALE/Brekout-v5", "Breakout"),
    "unknown game": ("--env-id Zzzzzzz", "no Atari game Zzzzzzz"),
    "no game": ("--env-id=", "no Atari game"),
    "not an Atari game": ("--env-id CartPole-v1", "no Atari game CartPole-v1"),
    "game of a module": ("--env-id json:Breakout-v5", "no Atari game json:Breakout-v5"),
    "old game": ("--env-id Breakout-v4", "Breakout-v4 skips frames or repeats actions by itself"),
    "older game": ("--env-id Breakout-v0", "use Breakout"),
    "game that skips frames": ("--env-id BreakoutDeterministic-v4", "use Breakout"),
    "game that repeats actions": ("--env-id BreakoutNoFrameskip-v0", "use Breakout"),
    "game's memory": ("--env-id Breakout-ram-v5", "no Atari game Breakout-ram-v5"),
    "0 frames for an action": ("--frame-skip 0", "--frame-skip must be from 1"),
    "0 frames in a stack": ("--frame-stack 0", "--frame-stack must be from 1"),
    "0 frames in a game": ("--max-game-frames 0", "--max-game-frames must be from 1"),
    "0 environments": ("--num-envs 0", "--num-envs must be from 1"),
    "0 steps": ("--num-steps 0", "--num-steps must be from 1"),
    "unequal minibatches": ("--num-envs 3 --num-steps 5 --num-minibatches 4", "15 samples cannot be cut into 4"),
    "minibatches of one sample": ("--num-envs 2 --num-steps 2 --num-minibatches 4", "one sample cannot be normalized"),
    "no whole rollout": ("--total-timesteps 1023", "1023 is below one rollout, 1024 steps"),
    "arguments that are no JSON": ("--env-kwargs {mode:3}", "--env-kwargs {mode:3}"),
    "arguments as a list": ("--env-kwargs [3]", "--env-kwargs [3]"),
    "arguments as a number": ("--env-kwargs 3", "--env-kwargs 3"),
    "empty arguments": ("--env-kwargs=", "--env-kwargs"),
    "unknown argument": ('--env-kwargs {"wind":3}', "wind"),
    "resume of nothing": ("--resume nowhere", "nowhere is not a run directory of ppo_atari"),
    "evaluation of nothing": ("--evaluate nowhere", "nowhere is not a run directory of ppo_atari"),
    "resume and evaluation": ("--resume a --evaluate b", "--resume or --evaluate, not both"),
}
SPECIAL = [
    (ppo_atari, '--env-kwargs {"obs_type":"ram"}', "the game must show color images, not Box(0, 255, (128,)"),
    (ppo_atari, '--env-kwargs {"obs_type":"grayscale"}', "the game must show color images, not Box(0, 255, (210, 160)"),
    (ppo_atari, '--env-kwargs {"frameskip":4}', "use --frame-skip, not frameskip in --env-kwargs"),
    (pool, '--env-kwargs {"img_height":96}', "the game must show 84 x 84 gray pixels, not Box(0, 255"),
    (pool, '--env-kwargs {"gray_scale":false}', "the game must show 84 x 84 gray pixels, not Box(0, 255"),
    (pool, "--capture-video", "EnvPool cannot record videos; ppo_atari.py --evaluate RUN --capture-video can"),
]


def test_envpool_steps_all_environments_whatever_its_arguments_are():
    """Their number is --num-envs, and one step is one of all of them."""
    pytest.importorskip("envpool")  # exists for Linux only
    args = small(1, pool, env_kwargs='{"num_envs": 3, "batch_size": 2, "stack_num": 4}')
    envs = pool.make_envs(args)
    assert envs.reset(1).shape == (args.num_envs, 4, 84, 84)
    assert envs.step(np.zeros(args.num_envs, int))[0].shape == (args.num_envs, 4, 84, 84)


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, script, capfd):
    line, fragment = BAD_FLAGS[case]
    assert fragment in refusal(line.split(" "), capfd, script)


@pytest.mark.parametrize(("script", "line", "fragment"), SPECIAL)
def test_bad_flags_of_one_script(script, line, fragment, capfd):
    if script is pool:
        pytest.importorskip("envpool")  # exists for Linux only
    assert fragment in refusal(line.split(" "), capfd, script)


def test_arguments_reach_the_environments(script):
    """Breakout has 4 actions, the console 18."""
    for env_kwargs, actions in (("{}", 4), ('{"full_action_space": true}', 18)):
        envs = script.make_envs(small(1, script, env_kwargs=env_kwargs))
        assert envs.action_space.n == actions
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
    assert f"cannot use {run_copy.resolve()}/checkpoint.pt" in problem and fragment in problem


def test_resume_cannot_change_the_size_of_a_rollout(run_copy, capfd):
    problem = refusal(["--resume", str(run_copy), "--num-envs", "4"], capfd, ppo_atari)
    assert "cannot change with --resume" in problem


def test_run_directory_of_another_script(capfd):
    path = ppo.train(ppo.Args(num_envs=2, num_steps=8, num_minibatches=2, total_timesteps=16))["run_dir"]
    for flag in ("--resume", "--evaluate"):
        assert "is not a run directory of ppo_atari.py" in refusal([flag, path], capfd, ppo_atari)


def test_one_line_on_stderr(one_script):
    """Also with all that Python and the emulator print of themselves, and the exit code is the shell's."""
    before = listing(Path.cwd())
    done = run_script(Path(one_script.__file__), "--env-id", "Breakot")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"ppo_atari\w*\.py: error: .*Breakout.*\n", done.stderr)
    assert listing(Path.cwd()) == before


def test_without_envpool(capfd, monkeypatch):
    """Where EnvPool is not installed, another script is named."""
    monkeypatch.setattr(pool.importlib.util, "find_spec", lambda name: None)
    said = "EnvPool is not installed (it exists for Linux only): ppo_atari.py does without it"
    assert said in refusal(flags(small(2, pool)), capfd, pool)


def test_training_that_diverges(capfd, one_script):
    """A learning rate without sense: exit code 1, one line that names the update, and a checkpoint of use."""
    args = small(3, one_script, learning_rate=2e9, max_grad_norm=1e9)
    assert one_script.main(flags(args)) == 1
    (path,) = Path("runs").iterdir()
    (line,) = problems(capfd.readouterr().err)
    said = r"ppo_atari\w*\.py: error: in update \d, .* is not finite.*; the last checkpoint in (.*) is good"
    assert re.fullmatch(said, line)[1] == str(path.resolve())
    assert all(tensor.isfinite().all() for tensor in checkpoint(path)["agent"].values())
    assert one_script.main(["--resume", str(path), "--learning-rate", "1e-4"]) == 0
    assert update_steps(path) == [1, 2, 3]


@pytest.mark.parametrize("script", [ppo_atari, pool, multi])
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
