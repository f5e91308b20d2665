"""Environments of games: recordings of the official code, each wrapper, stacks, episodes' boundaries, both backends.

ppo_atari.py has gymnasium's, ppo_atari_envpool.py has EnvPool's; the wrappers stand in ppo_atari_lstm.py as well, in
the same words. test_games.py says what games do in each script. The fixtures' README says how recordings were made.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zlib
from dataclasses import replace

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import Action, ALEInterface, LoggerMode, roms
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_atari
import ppo_atari_envpool
import ppo_atari_lstm
from ppo_atari import Args, make_envs

SCRIPTS = {"gymnasium": ppo_atari, "envpool": ppo_atari_envpool}


needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool exists for Linux only")
EACH_BACKEND = ["gymnasium", pytest.param("envpool", marks=needs_envpool)]
# No no-ops but one, no FIRE: with these both backends start a game in the same way.
ALIKE = {"noop_max": 1, "fire_reset": False}


def wrapper_of(env: gym.Env, kind: type) -> gym.Wrapper | None:
    """The wrapper of that kind around an environment, if there is one."""
    while not isinstance(env, kind):
        if not isinstance(env, gym.Wrapper):
            return None
        env = env.env
    return env


class FixedRandom:
    """Stands in for an environment's random generator; draws the same number again and again."""

    def __init__(self, number: int):
        self.number = number

    def integers(self, low: int, high: int) -> int:
        """The number, which must be possible."""
        assert low <= self.number < high
        return self.number


def digest(images: np.ndarray) -> list[int]:
    """A checksum of each image."""
    return [zlib.crc32(np.ascontiguousarray(image)) for image in images]


def uniform_policy(actions: int):
    """A policy for collect_rollout that takes all actions equally often."""
    return lambda obs: (torch.zeros(len(obs), actions), torch.zeros(len(obs)))


def backend_envs(backend: str, **changed):
    """The environments of the script with that backend."""
    return SCRIPTS[backend].make_envs(SCRIPTS[backend].Args(**changed))


def newest(obs: np.ndarray) -> np.ndarray:
    """The last frames [N, 84, 84] of stacks [N, frame_stack, 84, 84]; frames that are not stacked are the last ones."""
    return (obs[:, -1] if obs.ndim == 4 else obs).copy()


# ---------------------------------------------------------------------------------------------------------------------
# Recordings of the official code
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", ["Breakout", "Pong", "BeamRider"])
def test_official_recording(load_fixture, game):
    """Every number that the official wrappers gave, bit by bit: images, rewards, ends, lives and statistics."""
    with load_fixture(f"atari_{game}") as file:
        data = {key: file[key] for key in file.files}
    envs = make_envs(Args(env_id=game, num_envs=2))
    consoles, raw_rewards, lives = [env.unwrapped for env in envs.envs], [0.0, 0.0], [0, 0]
    for i, console in enumerate(consoles):
        console._np_random = FixedRandom(int(data["noops"][i]))

        # A single reset without a seed: BeamRider's first screen depends on how often the emulator was reset since the
        # game was loaded, and a seed would replace the fixed number of no-ops.
        def reset(*, seed=None, options=None, original=console.reset):
            return original()

        def step(action, i=i, original=console.step):
            result = original(action)
            raw_rewards[i] += result[1]
            return result

        def shown(action, i=i, original=envs.envs[i].step):
            result = original(action)
            lives[i] = result[4]["lives"]
            return result

        console.reset, console.step, envs.envs[i].step = reset, step, shown
    assert list(data["action_meanings"]) == consoles[0].get_action_meanings()

    def sha256(images) -> list[str]:
        return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in images]

    def official(obs: np.ndarray) -> np.ndarray:  # channels last
        return obs.transpose(0, 2, 3, 1)

    def state(obs: np.ndarray) -> dict:
        screens = [console.ale.getScreenRGB() for console in consoles]
        return {"obs_sha256": sha256(official(obs)), "obs_sum": official(obs).sum((1, 2, 3), np.int64),
                "screen_sha256": sha256(screens), "lives": [console.ale.lives() for console in consoles]}  # fmt: skip

    obs = envs.reset(1)
    for key, value in state(obs).items():
        np.testing.assert_array_equal(value, data[f"reset_{key}"], err_msg=key)
    whole = {
        (int(t), int(i)): image for t, i, image in zip(*(data[f"full_obs{end}"] for end in ("_index", "_env", "")))
    }
    assert len(whole) == 20
    rows = []
    for t, actions in enumerate(data["actions"]):
        for i in range(2):
            if (t, i) in whole:
                np.testing.assert_array_equal(official(obs)[i], whole.pop((t, i)), err_msg=f"observation {t}, {i}")
        raw_rewards[:] = 0, 0
        obs, rewards, dones, ends = envs.step(actions)
        # The official environments clip rewards; here training does.
        row = state(obs) | {"rewards": np.sign(rewards), "raw_rewards": list(raw_rewards), "dones": dones.copy()}
        row["lives_before_reset"] = lives.copy()
        row |= {"game_over": [False] * 2, "episode_return": [np.nan] * 2, "episode_length": [-1] * 2}
        for end in ends:
            assert not end.truncated
            row["game_over"][end.env] = True
            row["episode_return"][end.env], row["episode_length"][end.env] = end.episodic_return, end.length
        rows.append(row)
    for i in range(2):
        if (len(rows), i) in whole:
            np.testing.assert_array_equal(official(obs)[i], whole.pop((len(rows), i)))
    assert not whole
    for key in rows[0]:
        np.testing.assert_array_equal([row[key] for row in rows], data[key], err_msg=key)
    envs.close()


class Screens(gym.Env):
    """Shows given screens [K, 210, 160, 3], one in each frame."""

    observation_space, action_space = Box(0, 255, (210, 160, 3), np.uint8), Discrete(1)

    def __init__(self, screens: np.ndarray):
        self.screens = iter(screens)

    def step(self, action):
        """The next screen."""
        return next(self.screens), 0.0, False, False, {}


@pytest.mark.parametrize("game", ["Breakout", "Pong", "BeamRider"])
def test_official_image_processing(load_fixture, game):
    """[extra-25] Maximum of two frames, gray, 84 x 84 pixels by averaging areas: exactly the official images."""
    data = load_fixture("atari_preproc")
    raw, official = data[f"{game}/raw_frames"], data[f"{game}/frame84"]
    screens = Screens(raw.reshape(-1, *raw.shape[2:]))
    env = ppo_atari.WarpFrame(ppo_atari.MaxAndSkip(screens, 2), cv2.INTER_AREA)
    for image in official:
        np.testing.assert_array_equal(env.step(0)[0], image)
    assert env.observation_space.contains(official[0])


def test_area_resize_switch(load_fixture):
    """Off, images are shrunk by OpenCV's bilinear interpolation, and look different."""
    screens = load_fixture("atari_preproc")["Breakout/raw_frames"].max(1)
    images = {}
    for area_resize in (True, False):
        envs = make_envs(Args(num_envs=1, area_resize=area_resize))
        images[area_resize] = np.stack([wrapper_of(envs.envs[0], ppo_atari.WarpFrame).observation(x) for x in screens])
        envs.close()
    for screen, image in zip(screens, images[False]):
        gray = cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY)
        np.testing.assert_array_equal(image, cv2.resize(gray, (84, 84), interpolation=cv2.INTER_LINEAR))
    difference = np.abs(images[True].astype(int) - images[False])
    assert 1 < difference.mean() < 4 and difference.max() > 50  # 1.9 and up to 113 where it was measured


# ---------------------------------------------------------------------------------------------------------------------
# Each wrapper, on a console without an emulator
# ---------------------------------------------------------------------------------------------------------------------


class Console(gym.Env):
    """A console whose games all go alike: frame k has gray level k and pays rewards[k].

    A life is lost in each of the frames `losses`; the game is over in the frame `over`, or cut off in the frame
    `limit`. `calls` lists what was done with the console: actions, "reset", and ("reset", seed).
    """

    observation_space, action_space = Box(0, 255, (210, 160, 3), np.uint8), Discrete(4)

    def __init__(self, lives=3, losses=(), over=None, limit=None, rewards=None, actions=("NOOP", "FIRE", "UP", "DOWN")):
        self.lives, self.losses, self.over, self.limit, self.rewards = lives, losses, over, limit, rewards or {}
        self.actions, self.frame, self.calls = list(actions), 0, []

    def get_action_meanings(self):
        """Names of the actions."""
        return self.actions

    def observe(self):
        """The screen, and what ALE says beside it."""
        lives = 0 if self.frame == self.over else self.lives - sum(frame <= self.frame for frame in self.losses)
        return np.full((210, 160, 3), self.frame, np.uint8), {"lives": lives}

    def reset(self, *, seed=None, options=None):
        """Starts a game."""
        super().reset(seed=seed)
        self.calls.append("reset" if seed is None else ("reset", seed))
        self.frame = 0
        return self.observe()

    def step(self, action):
        """Shows the next frame."""
        assert self.frame not in (self.over, self.limit), "a finished game was stepped"
        self.calls.append(int(action))
        self.frame += 1
        obs, info = self.observe()
        return obs, self.rewards.get(self.frame, 0.0), self.frame == self.over, self.frame == self.limit, info

    def new_calls(self) -> list:
        """What was done since the last time this was asked."""
        calls, self.calls = self.calls, []
        return calls


def level(obs: np.ndarray) -> int:
    """The frame that an observation shows."""
    assert obs.min() == obs.max()
    return int(obs.flat[0])


def test_atari_1_number_of_noops():
    """1 to noop_max, drawn from the environment's own generator, all of them."""
    console = Console()
    env = ppo_atari.NoopReset(console, 5)
    random, seen = gym.utils.seeding.np_random(3)[0], []
    for game in range(100):
        obs, _ = env.reset(seed=3 if game == 0 else None)
        first, *noops = console.new_calls()
        assert first == (("reset", 3) if game == 0 else "reset")
        assert noops == [0] * int(random.integers(1, 6))
        assert level(obs) == len(noops)
        seen.append(len(noops))
    assert set(seen) == {1, 2, 3, 4, 5}


def test_atari_1_off():
    console = Console()
    console._np_random = None  # nothing is drawn
    assert level(ppo_atari.NoopReset(console, 0).reset()[0]) == 0
    assert console.calls == ["reset"]


@pytest.mark.parametrize("end", ["over", "limit"])
def test_atari_1_a_game_that_ends_meanwhile(end):
    """Is followed by another one, for the no-ops that are left."""
    console = Console(**{end: 3})
    console._np_random = FixedRandom(5)
    obs, info = ppo_atari.NoopReset(console, 30).reset()
    assert console.calls == ["reset", 0, 0, 0, "reset", 0, 0]
    assert level(obs) == 2 and info == {"lives": 3}


@pytest.mark.parametrize("frame_skip", [1, 2, 4])
def test_atari_2_skipping(frame_skip):
    """Sum of the rewards, maximum of the last two frames (of the last one, if there is only one), pixel by pixel."""

    class Flicker(Console):
        def observe(self):  # even frames show one thing, odd ones another, both of them change
            obs, info = super().observe()
            obs[:, self.frame % 2 :: 2] = 0
            return obs, info

    console = Flicker(rewards={frame: 10.0**frame for frame in range(1, 9)})
    env = ppo_atari.MaxAndSkip(console, frame_skip)
    env.reset()
    for step in range(8 // frame_skip):
        obs, reward, terminated, truncated, info = env.step(step % 4)
        frames = range(step * frame_skip + 1, (step + 1) * frame_skip + 1)
        assert console.new_calls()[-frame_skip:] == [step % 4] * frame_skip
        assert reward == sum(10.0**frame for frame in frames) and info == {"lives": 3}
        assert not terminated and not truncated
        expected = np.zeros((210, 160, 3), np.uint8)
        for frame in frames[-2:]:
            expected[:, (frame + 1) % 2 :: 2] = frame
        np.testing.assert_array_equal(obs, expected)


@pytest.mark.parametrize("end", ["over", "limit"])
@pytest.mark.parametrize("frame", [5, 6, 7, 8])
def test_atari_2_a_game_that_ends_meanwhile(end, frame):
    """Ends the step at once, with the rewards so far."""
    console = Console(**{end: frame}, rewards={4: 1.0, 5: 10.0, 6: 100.0, 7: 1000.0, 8: 10000.0})
    env = ppo_atari.MaxAndSkip(console, 4)
    env.reset()
    assert env.step(1)[1:4] == (1.0, False, False)
    console.new_calls()
    _, reward, terminated, truncated, _ = env.step(2)
    assert console.new_calls() == [2] * (frame - 4)
    assert reward == int("1" * (frame - 4) + "0")
    assert (terminated, truncated) == (end == "over", end == "limit")


def test_atari_3_lives():
    """A lost life ends the episode, and a single no-op starts the next; the end of the game starts another game."""
    console = Console(losses=(2, 5), over=8)
    env = ppo_atari.EpisodicLife(console)
    for _ in range(3):
        assert level(env.reset()[0]) == 0
        assert console.new_calls() == ["reset"]
        ends = []
        while not ends or console.frame < 8:
            obs, reward, terminated, truncated, info = env.step(3)
            assert level(obs) == console.frame and not truncated
            if terminated:
                ends.append(console.frame)
                if console.frame < 8:
                    obs, info = env.reset()
                    assert console.new_calls()[-2:] == [3, 0]  # the game goes on
                    assert level(obs) == ends[-1] + 1
        assert ends == [2, 5, 8]
        console.new_calls()


def test_atari_3_more_lives_and_the_last_one():
    """Neither a life that was won nor that there is none left in a running game (as in Qbert) ends the episode."""
    console = Console(lives=1, losses=(3,))
    env = ppo_atari.EpisodicLife(console)
    env.reset()
    assert [env.step(0)[2] for _ in range(5)] == [False] * 5
    console = Console(lives=3)
    env = ppo_atari.EpisodicLife(console)
    env.reset()
    console.lives = 4
    assert not env.step(0)[2]
    console.lives = 3
    assert env.step(0)[2]  # the life that was won counts as one that can be lost


def test_atari_3_a_truncated_game_is_over():
    console = Console(limit=2)
    env = ppo_atari.EpisodicLife(console)
    env.reset()
    assert env.step(1)[2:4] == (False, False)
    assert env.step(1)[2:4] == (False, True)
    console.new_calls()
    assert level(env.reset()[0]) == 0
    assert console.new_calls() == ["reset"]


def test_atari_3_a_seed_restarts_the_game():
    console = Console(losses=(2,))
    env = ppo_atari.EpisodicLife(console)
    env.reset(seed=1)
    env.step(1)
    assert level(env.reset(seed=7)[0]) == 0
    env.step(1)
    assert env.step(1)[2]  # the lives are counted anew
    assert console.calls == [("reset", 1), 1, ("reset", 7), 1, 1]


def test_atari_4_fire_and_action_2():
    console = Console()
    env = ppo_atari.FireReset(console)
    for seed in (3, None):
        assert level(env.reset(seed=seed)[0]) == 2
        assert console.new_calls() == [("reset", 3) if seed else "reset", 1, 2]
        env.step(0)
        console.new_calls()


@pytest.mark.parametrize("end", ["over", "limit"])
@pytest.mark.parametrize(("frame", "calls", "shown"), [(1, [1, "reset", 2], 1), (2, [1, 2, "reset"], 0)])
def test_atari_4_a_game_that_ends_meanwhile(end, frame, calls, shown):
    """Is followed by another one, with which the agent goes on. The seed is not for that, or both would be the same."""

    class FirstGameEnds(Console):
        def reset(self, **kwargs):
            if self.calls:
                self.over = self.limit = None
            return super().reset(**kwargs)

    console = FirstGameEnds(**{end: frame})
    obs, _ = ppo_atari.FireReset(console).reset(seed=5)
    assert console.calls == [("reset", 5), *calls]
    assert level(obs) == shown


def test_atari_4_a_life_that_is_lost_meanwhile():
    """The next one begins with its own no-op; both actions are still taken only once."""
    console = Console(losses=(1, 6))
    env = ppo_atari.FireReset(ppo_atari.EpisodicLife(console))
    assert level(env.reset()[0]) == 3
    assert console.new_calls() == ["reset", 1, 0, 2]
    assert [env.step(3)[2] for _ in range(3)] == [False, False, True]


def test_atari_4_only_where_there_is_fire():
    """Freeway has no FIRE: its actions 1 and 2 would move the chicken. After a reset, no-ops are all that happened."""
    for game, hidden in (("Freeway", 0), ("Breakout", 8)):
        envs = make_envs(Args(env_id=game, num_envs=1))
        env = envs.envs[0]
        assert (wrapper_of(env, ppo_atari.FireReset) is None) == (game == "Freeway")
        assert ("FIRE" in env.unwrapped.get_action_meanings()) == (game == "Breakout")
        for noops in (1, 30):
            env.unwrapped._np_random = FixedRandom(noops)
            wrapper_of(env, ppo_atari.EpisodicLife).game_over = True
            env.reset()
            assert env.unwrapped.ale.getEpisodeFrameNumber() == noops + hidden
        envs.close()


@pytest.fixture(params=[ppo_atari, ppo_atari_lstm], ids=["ppo_atari", "ppo_atari_lstm"])
def make_console_envs(monkeypatch, request):
    """Builds the wrappers of make_envs() around a Console; returns the environments and the console."""

    def make(changed=None, **console):
        console = Console(**console)
        monkeypatch.setattr(gym, "make", lambda *args, **kwargs: console)
        args = {"num_envs": 1, "noop_max": 1} | (changed or {})
        args |= {"env_backend": "gymnasium"} if request.param is ppo_atari_lstm else {}
        envs = request.param.make_envs(request.param.Args(**args))
        monkeypatch.undo()
        return envs, console

    return make


REWARDS = {1: 1000.0, 5: 20.0, 11: 7.0, 12: -2.0, 18: -3.0, 32: 5.0, 36: 50.0, 41: 300.0, 50: 0.5}


@pytest.mark.parametrize("clip_reward", [True, False])
def test_all_wrappers_together(make_console_envs, clip_reward):
    """A game by definition, frame by frame, twice: what the agent sees and gets, and what is logged of it.

    [extra-26] [extra-27] The statistics are those of the whole game, with the steps and the rewards that the agent
    never sees: 2 agent steps at the start of a game and 3 after a lost life. No-ops at the start are not even steps.
    [atari-6] Rewards are clipped by training, and never here.
    """
    envs, console = make_console_envs({"clip_reward": clip_reward}, losses=(32,), over=56, rewards=REWARDS)
    obs = envs.reset(seed=4)
    for game in range(2):
        assert level(newest(obs)) == 9
        # A no-op; FIRE and action 2 of four frames each. Then the agent plays from frame 9.
        start = [0, *[1] * 4, *[2] * 4]
        if game == 0:
            assert console.new_calls() == [("reset", 4), *start]
        frame, own_steps, life_loss = 9, 0, False
        while True:
            obs, rewards, dones, ends = envs.step(np.array([3]))
            own_steps += 1
            paid = [REWARDS.get(frame + k, 0.0) for k in range(1, 5)]
            over = frame + 4 > 56
            frame = min(frame + 4, 56)
            if over:  # the game ends in the third frame of this step
                paid = paid[:3]
            assert rewards[0] == sum(paid)
            assert dones[0] == (frame == 33 or over) and len(ends) == over
            if frame == 33:
                assert console.new_calls() == [3] * 24 + [0] * 4 + [1] * 4 + [2] * 4
                frame, life_loss = 45, True
            if over:
                assert console.new_calls() == [3] * 11 + ["reset", *start]
                break
            assert level(newest(obs)) == frame
        assert life_loss and own_steps == 6 + 3
        env, episodic_return, length, last_obs, truncated = ends[0]
        assert (env, truncated) == (0, False) and level(newest(last_obs[None])) == 56
        assert length == own_steps + 3 + 2
        assert episodic_return == sum(REWARDS.values()) - REWARDS[1]  # frame 1 was the no-op


@pytest.mark.parametrize("end", ["over", "limit"])
def test_extra_28_how_a_game_ended(make_console_envs, end):
    """Truncated is what was cut off; its last observation is none of the next game's."""
    envs, console = make_console_envs(**{end: 16})
    envs.reset(seed=1)
    for _ in range(2):
        assert envs.step(np.array([3]))[3] == []
        obs, _, dones, ends = envs.step(np.array([3]))
        assert dones[0] and level(newest(obs)) == 9
        assert [(end.env, end.truncated) for end in ends] == [(0, end == "limit")]
        assert level(newest(ends[0].last_obs[None])) == 16


@pytest.mark.parametrize("skipped", [False, True])
def test_extra_35_seeds_of_environments(monkeypatch, skipped):
    """Environment i gets seed + i; a resumed run, as many more as steps were done. From 2**31 on they begin at 0."""
    for script in (ppo_atari, ppo_atari_lstm):
        consoles = [Console() for _ in range(3)]
        left = iter(consoles)
        monkeypatch.setattr(gym, "make", lambda *args, **kwargs: next(left))
        args = {"num_envs": 3, "noop_max": 0, "fire_reset": False}
        args |= {"env_backend": "gymnasium"} if script is ppo_atari_lstm else {}
        envs = script.make_envs(script.Args(**args))
        monkeypatch.undo()
        first_step = 4096 if skipped else 0
        envs.reset(2**31 - 4097, *[first_step] * skipped)
        for i, console in enumerate(consoles):
            assert console.new_calls() == [("reset", (2**31 - 4097 + first_step + i) % 2**31)]


@pytest.mark.parametrize(("changed", "calls"), [
    ({"fire_reset": False}, [3] * 4 + [0] * 4),
    ({"episodic_life": False}, [3] * 4),
    ({"frame_skip": 1}, [3, 0, 1, 2]),
    ({"frame_skip": 2, "fire_reset": False}, [3] * 2 + [0] * 2),
])  # fmt: skip
def test_switches_of_wrappers(make_console_envs, changed, calls):
    """What happens in the step in which a life is lost, with wrappers switched off or changed."""
    skip = changed.get("frame_skip", 4)
    start = 1 + 2 * skip * changed.get("fire_reset", True)
    envs, console = make_console_envs(changed, losses=(start + 1,))
    envs.reset(seed=1)
    assert len(console.new_calls()) == 1 + start
    _, _, dones, ends = envs.step(np.array([3]))
    assert console.new_calls() == calls
    assert dones[0] == changed.get("episodic_life", True) and ends == []


@pytest.mark.parametrize("end", ["over", "limit"])
def test_a_game_that_ends_in_hidden_steps(make_console_envs, end):
    """After a lost life the game may end before the agent is asked again: it then begins with a new game."""
    envs, console = make_console_envs(losses=(10,), **{end: 20})
    envs.reset(seed=1)
    console.new_calls()
    obs, _, dones, ends = envs.step(np.array([3]))  # frames 10 to 13; the hidden ones are 14 to 25
    assert dones[0] and ends == []
    # No-op; FIRE until the game ends; a new game with its own no-op and FIRE... then action 2 goes on in it.
    assert console.new_calls() == [3] * 4 + [0] * 4 + [1] * 3 + ["reset", 0] + [2] * 4
    assert level(newest(obs)) == 5
    obs, _, dones, _ = envs.step(np.array([3]))
    assert not dones[0] and level(newest(obs)) == 9


# ---------------------------------------------------------------------------------------------------------------------
# Stacks of frames
# ---------------------------------------------------------------------------------------------------------------------


class Projector(gym.Env):
    """Shows given images [K, 84, 84], one after the other; the episodes are cut off in the steps that dones [K] say."""

    action_space = Discrete(2)

    def __init__(self, images: np.ndarray, dones: list[bool]):
        self.images, self.dones = iter(images), iter(dones)

    def reset(self, *, seed=None, options=None):
        """Begins an episode with the next image."""
        return next(self.images), {}

    def step(self, action):
        """Shows the next image."""
        done = next(self.dones)
        return next(self.images), 0.0, False, done, {"episode": {"r": 0.0, "l": 1}} if done else {}


class ProjectorPool:
    """Projectors with EnvPool's interface."""

    def __init__(self, projectors: list[Projector]):
        self.projectors, self.over = projectors, [False] * len(projectors)

    def reset(self):
        """Begins an episode in each."""
        return np.stack([projector.reset()[0] for projector in self.projectors])[:, None], {}

    def step(self, actions, chosen=None):
        """Steps all or those chosen; those whose episode is over begin the next one."""
        chosen = range(len(self.projectors)) if chosen is None else chosen
        rows = []
        for i in chosen:
            projector = self.projectors[i]
            rows.append((projector.reset()[0], False) if self.over[i] else projector.step(0)[::3])
            self.over[i] = rows[-1][1]
        images, over = map(np.stack, zip(*rows))
        nothing = np.zeros(len(rows))
        return images[:, None], nothing.astype(np.float32), nothing > 0, over, {"terminated": nothing.astype(np.uint8)}


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_envpool])
@settings(max_examples=30, deadline=None)
@given(
    dones=st.integers(1, 4).flatmap(
        lambda envs: st.lists(st.lists(st.booleans(), min_size=envs, max_size=envs), min_size=1, max_size=9)
    ),
    frame_stack=st.integers(1, 4),
    zero_stack=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_atari_7_stacks_by_definition(script, dones, frame_stack, zero_stack, seed):
    """The last frames of the present episode, oldest first; what is missing is black [extra-24] or the first frame.

    The last observation of an episode is a stack as well.
    """
    num_envs = len(dones[0])
    images = np.random.default_rng(seed).integers(1, 256, (num_envs, 2 * len(dones) + 1, 84, 84), np.uint8)
    projectors = [Projector(images[env], [row[env] for row in dones]) for env in range(num_envs)]
    if script is ppo_atari:
        envs = ppo_atari.Environments(projectors, Args(frame_stack=frame_stack, zero_stack=zero_stack))
    else:
        envs = object.__new__(ppo_atari_envpool.EnvpoolEnvironments)  # EnvPool itself is not needed
        envs.make, envs.unplayed, envs.zero_stack = lambda seed: ProjectorPool(projectors), None, zero_stack
        envs.obs = np.zeros((num_envs, frame_stack, 84, 84), np.uint8)

    def stack(episode: list[np.ndarray]) -> list[np.ndarray]:
        shown = episode[-frame_stack:]
        return [np.zeros_like(shown[0]) if zero_stack else episode[0]] * (frame_stack - len(shown)) + shown

    left = [iter(rows) for rows in images]
    episodes = [[next(rows)] for rows in left]
    for row in [None, *dones]:
        if row is None:
            obs = envs.reset(seed=1)
        else:
            obs, _, step_dones, ends = envs.step(np.zeros(num_envs, int))
            assert step_dones.tolist() == row and [end.env for end in ends] == np.flatnonzero(row).tolist()
            for env in range(num_envs):
                episodes[env].append(next(left[env]))
            for end in ends:
                np.testing.assert_array_equal(end.last_obs, stack(episodes[end.env]))
                episodes[end.env] = [next(left[end.env])]
        assert obs.dtype == np.uint8 and obs.shape == (num_envs, frame_stack, 84, 84)
        for env in range(num_envs):
            np.testing.assert_array_equal(obs[env], stack(episodes[env]))


# ---------------------------------------------------------------------------------------------------------------------
# Episodes' boundaries
# ---------------------------------------------------------------------------------------------------------------------


def breakout_score(ram: np.ndarray) -> int:
    """The score on the screen: binary-coded decimals in two of the console's 128 bytes."""
    return 100 * (ram[76] & 15) + 10 * (ram[77] >> 4) + (ram[77] & 15)


def play_by_hand(backend: str, seed: int, actions: np.ndarray) -> tuple[dict, list]:
    """Plays actions [T, N] of Breakout with the library's own next-step autoreset, and leaves its reset steps out.

    Returns what T true steps of each environment gave, [T, N] each, and the first frames of its episodes. Environments
    get their actions each at its own pace, for every reset costs one of them a step.
    """
    steps, num_envs = actions.shape
    if backend == "gymnasium":
        made = make_envs(Args(num_envs=num_envs)).envs
        envs = gym.vector.SyncVectorEnv([lambda env=env: env for env in made], copy=False)
        frames, _ = envs.reset(seed=seed)
    else:
        import envpool

        envs = envpool.make_gymnasium("Breakout-v5", num_envs=num_envs, seed=seed, stack_num=1, episodic_life=True)
        frames = envs.reset()[0][:, 0]
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    names = ("frames", "rewards", "dones", "game_over", "scores")
    found, starts = {name: [[] for _ in range(num_envs)] for name in names}, [[start] for start in digest(frames)]
    taken, dones = np.zeros(num_envs, int), np.zeros(num_envs, bool)
    while taken.min() <= steps:  # one step more than is returned, before which a last reset may be due
        resetting = dones
        chosen = actions[np.minimum(taken, steps - 1), range(num_envs)]
        frames, rewards, terminations, truncations, infos = envs.step(chosen)
        checksums, dones = digest(frames.reshape(num_envs, 84, 84)), terminations | truncations
        for env in range(num_envs):
            if resetting[env]:
                assert rewards[env] == 0 and not dones[env]  # the dummy transition
                starts[env].append(checksums[env])
                continue
            if taken[env] < steps:
                if backend == "gymnasium":
                    ale = envs.envs[env].unwrapped.ale
                    ram, game_over = ale.getRAM(), ale.game_over()
                else:
                    ram, game_over = infos["ram"][env], bool(infos["terminated"][env])
                row = (checksums[env], rewards[env], dones[env], game_over, breakout_score(ram))
                for name, value in zip(names, row):
                    found[name][env].append(value)
            taken[env] += 1
    envs.close()
    return {name: np.array(values).T for name, values in found.items()}, starts


@pytest.mark.parametrize(("backend", "num_envs", "rollouts"), [
    ("gymnasium", 4, 3), pytest.param("envpool", 2, 4, marks=[needs_envpool, pytest.mark.slow]),
])  # fmt: skip
def test_core_1_every_row_is_a_transition_that_happened(backend, num_envs, rollouts):
    """Some thousand steps: no row is a reset, none is missing, and statistics are those of whole games.

    Beside it, the same games are played with the library's own autoreset, and the score is read from the screen.
    """
    script = SCRIPTS[backend]
    args = script.Args(num_envs=num_envs, num_steps=250)
    envs = script.make_envs(args)
    torch.manual_seed(1)
    next_obs, rows, ends = torch.from_numpy(envs.reset(seed=11)), [], []
    frames = [digest(newest(next_obs.numpy()))]
    for number in range(rollouts):
        rollout = script.collect_rollout(uniform_policy(4), envs, next_obs, args)
        obs, dones, next_obs = rollout.obs, torch.from_numpy(rollout.dones), rollout.obs[-1]
        # Within an episode a stack is the one before and a new frame; at its start there is one frame, and no more.
        continued = torch.where(dones[:, :, None, None, None], torch.tensor(0, dtype=torch.uint8), obs[:-1, :, 1:])
        assert torch.equal(obs[1:, :, :-1], continued)
        frames += [digest(newest(stacks)) for stacks in obs[1:].numpy()]
        rows.append((rollout.actions.numpy(), rollout.rewards, rollout.dones))
        for step, end in rollout.ends:
            assert not end.truncated
            np.testing.assert_array_equal(end.last_obs[:-1], obs[step, end.env, 1:])
            ends.append((number * 250 + step, *end[:3], digest(newest(end.last_obs[None]))[0]))
    envs.close()
    actions, rewards, dones = (np.concatenate(parts) for parts in zip(*rows))

    truth, starts = play_by_hand(backend, 11, actions)
    np.testing.assert_array_equal(rewards, truth["rewards"])
    np.testing.assert_array_equal(dones, truth["dones"])
    assert dones.sum() > 10 * num_envs and 2 * num_envs < truth["game_over"].sum() < dones.sum() / 3
    expected_ends, episode = [], np.zeros(num_envs, int)
    length = np.zeros(num_envs, int)
    assert frames[0] == [start[0] for start in starts]
    for t in range(len(dones)):
        length += 1
        for env in range(num_envs):
            if not dones[t, env]:
                assert frames[t + 1][env] == truth["frames"][t, env]
                continue
            episode[env] += 1
            assert frames[t + 1][env] == starts[env][episode[env]]
            if not truth["game_over"][t, env]:
                # [extra-27] In gymnasium the steps that the agent does not see are counted: no-op, FIRE and action 2
                # after a lost life, the last two of them at the start of a game.
                length[env] += 3 * (backend == "gymnasium")
                continue
            length[env] += 2 * (backend == "gymnasium")
            expected_ends.append((t, env, truth["scores"][t, env], length[env], truth["frames"][t, env]))
            length[env] = 0
    assert ends == expected_ends
    assert sum(score for _, _, score, _, _ in ends) > 10


# ---------------------------------------------------------------------------------------------------------------------
# Time limits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_extra_28_games_are_cut_off(backend):
    """At the same step in both backends where both start with a single no-op: frame 201, step 50, again and again."""
    script = SCRIPTS[backend]
    args = script.Args(env_id="Pong", num_envs=2, num_steps=120, max_game_frames=201, **ALIKE)
    envs, free = script.make_envs(args), script.make_envs(replace(args, max_game_frames=400_000))
    torch.manual_seed(3)
    start = torch.from_numpy(envs.reset(seed=1).copy())
    rollout = script.collect_rollout(uniform_policy(6), envs, start, args)
    assert np.flatnonzero(rollout.dones.all(1)).tolist() == np.flatnonzero(rollout.dones.any(1)).tolist() == [49, 99]
    assert [(step, end.env) for step, end in rollout.ends] == [(49, 0), (49, 1), (99, 0), (99, 1)]
    assert all(end.truncated and end.length == 50 for _, end in rollout.ends)
    # The last observation is what a game without a limit shows at that step.
    np.testing.assert_array_equal(free.reset(seed=1), start)
    returns = np.zeros(2)
    for step in range(50):
        obs, rewards, dones, ends = free.step(rollout.actions[step].numpy())
        returns += rewards
        assert not dones.any() and ends == []
    for env in range(2):
        step, end = rollout.ends[env]
        assert end.last_obs.shape == (4, 84, 84) and end.last_obs.dtype == np.uint8
        np.testing.assert_array_equal(end.last_obs, obs[env])
        assert not np.array_equal(end.last_obs[-1], rollout.obs[step + 1, env, -1])
    assert [end.episodic_return for _, end in rollout.ends[:2]] == returns.tolist()
    envs.close()
    free.close()


@needs_envpool
@pytest.mark.parametrize(("changed", "gymnasium", "envpool"), [
    # The emulator counts all frames of a game: here the no-op, and eight more for FIRE and action 2. The step in which
    # the limit is reached is the last one, though it may be short. EnvPool counts the agent's steps, rounded down.
    ({"noop_max": 1, "max_game_frames": 200}, 48, 50),
    ({"noop_max": 1, "max_game_frames": 203}, 49, 50),
    ({"noop_max": 1, "max_game_frames": 41, "frame_skip": 1}, 38, 41),
    (ALIKE | {"max_game_frames": 198}, 50, 49),
    (ALIKE | {"max_game_frames": 197}, 49, 49),
])  # fmt: skip
def test_extra_28_what_the_limit_counts(changed, gymnasium, envpool):
    for backend, expected in (("gymnasium", gymnasium), ("envpool", envpool)):
        envs = backend_envs(backend, env_id="Pong", num_envs=1, **changed)
        envs.reset(seed=1)
        for game in range(2):
            for step in range(1, expected + 1):
                _, _, dones, ends = envs.step(np.array([0]))
                assert dones[0] == len(ends) == (step == expected), (backend, game, step)
            assert ends[0].truncated
            assert ends[0].length == expected + (2 if backend == "gymnasium" and "fire_reset" not in changed else 0)
        envs.close()


# ---------------------------------------------------------------------------------------------------------------------
# The two backends beside each other
# ---------------------------------------------------------------------------------------------------------------------


def watch(envs: ppo_atari_envpool.EnvpoolEnvironments) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two lists that get consoles' memory [n, 128] and frames [n, 84, 84] from every call of EnvPool that follows."""
    memory, frames, make = [], [], envs.make

    def watched(method):
        def call(*args):
            result = method(*args)
            memory.append(result[-1]["ram"].copy())
            frames.append(result[0][:, 0].copy())
            return result

        return call

    def make_watched(seed):
        pool = make(seed)
        pool.reset, pool.step = watched(pool.reset), watched(pool.step)
        return pool

    envs.make, envs.unplayed = make_watched, None  # what has been made already is not watched
    return memory, frames


@needs_envpool
@pytest.mark.parametrize(("game", "frame_skip", "largest", "mean"), [
    ("Breakout", 4, 0, 0.0), ("Pong", 4, 20, 0.02), ("Seaquest", 4, 20, 0.02), ("Freeway", 4, 20, 0.03),
    ("Seaquest", 2, 20, 0.02), ("Seaquest", 1, 1, 0.001),
])  # fmt: skip
def test_backends_play_the_same_games(game, frame_skip, largest, mean):
    """With the wrappers that differ switched off: every byte of the console's memory, rewards, ends and statistics.

    Images differ by a few gray levels in few pixels, and only because EnvPool turns both frames gray, with the palette
    of the emulator, before it takes their maximum.
    """
    args = {"env_id": game, "num_envs": 1, "episodic_life": False, "frame_skip": frame_skip} | ALIKE
    ours, theirs = (backend_envs(backend, **args) for backend in SCRIPTS)
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    (memory, _), console, gray = watch(theirs), ours.envs[0].unwrapped, []
    original = console.step

    def step(action):
        result = original(action)
        gray.append(console.ale.getScreenGrayscale())
        return result

    console.step = step
    np.testing.assert_array_equal(ours.reset(seed=1), theirs.reset(seed=1))
    random, differences, games = np.random.default_rng(1), [], 0
    for _ in range(400):
        actions = random.integers(0, ours.action_space.n, 1)
        a, b = ours.step(actions), theirs.step(actions)
        for x, y in zip(a[1:3], b[1:3]):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(memory[-1][0], console.ale.getRAM())
        assert len(a[3]) == len(b[3]) == a[2][0]
        if a[2][0]:
            games += 1
            for name in ("env", "episodic_return", "length", "truncated"):
                assert getattr(a[3][0], name) == getattr(b[3][0], name)
            np.testing.assert_array_equal(a[0], b[0])
        else:
            image = np.max(gray[-min(frame_skip, 2) :], 0)
            image = cv2.resize(image, (84, 84), interpolation=cv2.INTER_AREA)
            np.testing.assert_array_equal(b[0][0, -1], image)
            differences.append(np.abs(newest(a[0]).astype(int) - newest(b[0])))
    assert games or frame_skip < 4 or game in ("Pong", "Freeway")  # these take longer
    assert np.max(differences) <= largest and np.mean(differences) <= mean
    ours.close()
    theirs.close()


@needs_envpool
def test_backends_agree_until_a_life_is_lost():
    """That step still is the same in both; then gymnasium's no-op takes four frames, EnvPool's a single one."""
    ours, theirs = (backend_envs(backend, num_envs=1, **ALIKE) for backend in SCRIPTS)
    (memory, their_frames), ale, our_frames = watch(theirs), ours.envs[0].unwrapped.ale, []

    def step(action, original=ours.envs[0].step):
        result = original(action)
        our_frames.append(result[0])
        return result

    ours.envs[0].step = step
    np.testing.assert_array_equal(ours.reset(seed=1), theirs.reset(seed=1))
    random, done, states = np.random.default_rng(1), False, []
    while not done:
        actions = random.integers(0, 4, 1)
        a, b = ours.step(actions), theirs.step(actions)
        done = a[2][0]
        for x, y in zip(a[1:3], b[1:3]):
            np.testing.assert_array_equal(x, y)
        assert a[3] == b[3] == []
        assert done or np.array_equal(memory[-1][0], ale.getRAM())
        states.append(actions[0])
    assert ale.lives() == 4
    np.testing.assert_array_equal(our_frames[-1], their_frames[-2][0])
    console = Emulator("breakout")
    console.frames(0)
    for action in states:
        console.frames(*[action] * 4)
    console.frames(0)
    np.testing.assert_array_equal(memory[-1][0], console.ale.getRAM())
    console.frames(0, 0, 0)
    np.testing.assert_array_equal(ale.getRAM(), console.ale.getRAM())
    ours.close()
    theirs.close()


class Emulator:
    """The emulator without any wrapper."""

    def __init__(self, rom: str):
        self.ale = ALEInterface()
        self.ale.setLoggerMode(LoggerMode.Error)
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(rom))
        self.actions = self.ale.getMinimalActionSet()

    def frames(self, *actions: int) -> float:
        """Does one action in each frame until the game is over; returns the sum of the rewards."""
        total = 0.0
        for action in actions:
            total += self.ale.act(self.actions[action])
            if self.ale.game_over():
                break
        return total

    def noops_until(self, memory: np.ndarray, fire: bool, limit: int) -> int:
        """Does no-ops, and FIRE at last, until the console's memory is the given one; returns their number."""
        for number in range(limit + 1):
            before = self.ale.cloneState()
            if fire:
                self.frames(1)
            if np.array_equal(self.ale.getRAM(), memory):
                return number
            self.ale.restoreState(before)
            self.frames(0)
        raise AssertionError(f"EnvPool did something else than up to {limit} no-ops")


@needs_envpool
@pytest.mark.parametrize(
    ("game", "rom", "low", "high"), [("Breakout", "breakout", 0, 29), ("MsPacman", "ms_pacman", 1, 30)]
)
def test_what_envpool_does_at_a_reset(game, rom, low, high):
    """As documented: no-ops and FIRE of a frame each, at the start of a game and after a lost life alike.

    0 to 29 no-ops in games that have FIRE, 1 to 30 in others; between resets, exactly the emulator's own game.
    """
    envs = backend_envs("envpool", env_id=game, num_envs=1)
    (memory, _), console, fire = watch(envs), Emulator(rom), low == 0
    assert (Action.FIRE in console.actions) == fire
    envs.reset(seed=5)
    noops = {"game": [console.noops_until(memory[0][0], fire, 30)], "life": []}
    random, hidden = np.random.default_rng(2), 0
    for _ in range(800):
        action = random.integers(0, len(console.actions), 1)
        memory.clear()
        _, rewards, dones, ends = envs.step(action)
        assert rewards[0] == console.frames(*[action[0]] * 4)
        np.testing.assert_array_equal(memory[0][0], console.ale.getRAM())
        assert len(memory) == 1 + dones[0]
        if dones[0]:
            over = console.ale.game_over()
            assert [end.truncated for end in ends] == [False] * over
            if over:
                console.ale.reset_game()
            noops["game" if over else "life"].append(console.noops_until(memory[1][0], fire, 30))
            hidden += 1
    assert hidden > 3 and len(noops["life"]) > 1 and len(set(noops["life"])) > 1
    assert low <= min(noops["game"] + noops["life"]) and max(noops["game"] + noops["life"]) <= high
    envs.close()


@needs_envpool
def test_extra_35_envpool_seeds_environments_apart():
    """Environment 1 of seed 10 is environment 0 of seed 11, with its own numbers of no-ops at every reset."""
    played = {}
    for seed in (10, 11):
        envs = backend_envs("envpool", num_envs=2)
        random = np.random.default_rng(0)
        played[seed] = [envs.reset(seed=seed).copy()]
        for _ in range(150):
            played[seed].append(envs.step(np.full(2, random.integers(0, 4)))[0].copy())
        envs.close()
    ten, eleven = np.stack(played[10]), np.stack(played[11])
    np.testing.assert_array_equal(ten[:, 1], eleven[:, 0])
    assert not np.array_equal(ten[:, 0], eleven[:, 0])


@needs_envpool
def test_area_resize_switch_of_envpool():
    """It has the same two ways to shrink images: each is near to gymnasium's, and far from the other one."""
    played = {}
    for backend in SCRIPTS:
        for area_resize in (True, False):
            envs = backend_envs(backend, num_envs=1, area_resize=area_resize, **ALIKE)
            envs.reset(seed=1)
            frames = [newest(envs.step(np.array([1]))[0]) for _ in range(10)]
            played[backend, area_resize] = np.stack(frames).astype(int)
            envs.close()
    for area_resize in (True, False):
        assert np.abs(played["gymnasium", area_resize] - played["envpool", area_resize]).max() <= 1
        assert np.abs(played["gymnasium", area_resize] - played["envpool", not area_resize]).mean() > 1


# ---------------------------------------------------------------------------------------------------------------------
# Names of games, and what cannot be made
# ---------------------------------------------------------------------------------------------------------------------


def one_clear_line(refused: pytest.ExceptionInfo) -> str:
    """The message of an InputError, which must be one line and no longer than a few."""
    message = str(refused.value)
    assert message and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_names_of_a_game(backend):
    for env_id in ("Breakout", "Breakout-v5", "ALE/Breakout-v5", "BreakoutNoFrameskip-v4"):
        assert SCRIPTS[backend].find_game(env_id) == "Breakout"


def test_every_game_that_gymnasium_has_is_found():
    games = [env_id for env_id in gym.registry if re.fullmatch(r"ALE/.*-v5", env_id)]
    assert len(games) > 100
    for env_id in games:
        name = env_id.removeprefix("ALE/").removesuffix("-v5")
        for variant in (env_id, name, f"{name}-v5", f"{name}NoFrameskip-v4"):
            assert ppo_atari.find_game(variant) == name


@needs_envpool
def test_every_game_that_envpool_has_is_found():
    """EnvPool has other environments too, some of them with -v5 as well."""
    import envpool
    from envpool.atari.registration import atari_game_list

    games = {"".join(word.capitalize() for word in rom.split("_")) for rom in atari_game_list}
    assert len(games) > 100 and "Ant-v5" in envpool.list_all_envs()
    for name in games:
        for variant in (f"ALE/{name}-v5", name, f"{name}-v5", f"{name}NoFrameskip-v4"):
            assert ppo_atari_envpool.find_game(variant) == name
    for env_id in envpool.list_all_envs():
        if env_id.endswith("-v5") and env_id.removesuffix("-v5") not in games:
            with pytest.raises(ppo_atari_envpool.InputError, match=f"no Atari game {env_id}"):
                ppo_atari_envpool.find_game(env_id)


@pytest.mark.parametrize("backend", EACH_BACKEND)
@pytest.mark.parametrize(("env_id", "said"), [
    ("Breakout-v4", "use Breakout"),
    ("Breakout-v0", "use Breakout"),
    ("BreakoutDeterministic-v4", "use Breakout"),
    ("BreakoutNoFrameskip-v0", "use Breakout"),
    ("Brakout", "did you mean Breakout"),
    ("breakout", "did you mean Breakout"),
    ("BREAKOUT", "did you mean Breakout"),
    ("beamrider", "did you mean BeamRider"),
    ("CartPole-v1", "no Atari game CartPole-v1"),
    ("Breakout-v6", "Breakout"),
    ("", "no Atari game"),
    ("-v5", "no Atari game -v5"),
])  # fmt: skip
def test_names_of_no_game(backend, env_id, said):
    with pytest.raises(SCRIPTS[backend].InputError) as refused:
        backend_envs(backend, env_id=env_id, num_envs=1)
    assert said in one_clear_line(refused)


@needs_envpool
def test_a_game_that_envpool_does_not_have():
    with pytest.raises(ppo_atari_envpool.InputError) as refused:
        backend_envs("envpool", env_id="TicTacToe3D", num_envs=1)
    assert "no Atari game TicTacToe3D" in one_clear_line(refused)
    with pytest.raises(ppo_atari_lstm.InputError) as refused:
        ppo_atari_lstm.make_envs(ppo_atari_lstm.Args(env_id="TicTacToe3D", env_backend="envpool", num_envs=1))
    assert "TicTacToe3D" in one_clear_line(refused)
    backend_envs("gymnasium", env_id="TicTacToe3D", num_envs=1).close()


@pytest.mark.parametrize("backend", EACH_BACKEND)
@pytest.mark.parametrize("env_kwargs", ['{"no_such_setting": 1}', "[1]", "{"])
def test_settings_that_a_backend_does_not_have(backend, env_kwargs):
    with pytest.raises(SCRIPTS[backend].InputError) as refused:
        backend_envs(backend, num_envs=1, env_kwargs=env_kwargs)
    assert "--env-kwargs" in one_clear_line(refused)


@pytest.mark.parametrize("script", [ppo_atari, ppo_atari_lstm])
@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_missing_rom_in_gymnasium(monkeypatch, tmp_path, script, folder):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path / folder))
    backend = {"env_backend": "gymnasium"} if script is ppo_atari_lstm else {}
    with pytest.raises(script.InputError) as refused:
        script.make_envs(script.Args(num_envs=1, **backend))
    assert "Breakout" in one_clear_line(refused)


@needs_envpool
@pytest.mark.parametrize("script", [ppo_atari_envpool, ppo_atari_lstm])
def test_a_missing_rom_in_envpool(tmp_path, script):
    """Refused in one line, like everything else. In another process: EnvPool looks for ROMs when it is imported."""
    argv = [sys.executable, script.__file__, "--num-envs", "1", "--num-minibatches", "1"]
    argv += ["--runs-dir", str(tmp_path / "runs")]
    environment = os.environ | {"ENVPOOL_ASSETS_PATH": str(tmp_path)}
    result = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=tmp_path)
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith(f"{script.SCRIPT}.py: error: cannot make Breakout")
    assert "Traceback" not in result.stderr and not (tmp_path / "runs").exists()
