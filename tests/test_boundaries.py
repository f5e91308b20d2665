"""Episode boundaries: the rollout holds exactly the transitions that really happened."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo


class Clock(gym.Env):
    """Deterministic: observes (environment number, episode, step), is rewarded 100 * episode + step, counts its calls.

    Episode k ends with step (k + number) % 3 + 1: terminated for even k, truncated for odd k.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.number, self.episode, self.time, self.steps, self.resets = 0, -1, 0, 0, 0

    def observe(self):
        return np.array([self.number, self.episode, self.time], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.number = seed - 1  # train() seeds environment i with --seed + i
        self.episode, self.time, self.resets = self.episode + 1, 0, self.resets + 1
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.time += 1
        over = self.time == (self.episode + self.number) % 3 + 1
        terminated = over and self.episode % 2 == 0
        return self.observe(), 100 * self.episode + self.time, terminated, over and not terminated, {}


gym.register("test/Clock-v0", Clock)


def play(num_envs=3, num_steps=20):
    """Two rollouts in a row, and the environments."""
    args = ppo.Args(env_id="test/Clock-v0", num_envs=num_envs, num_steps=num_steps)
    envs = ppo.make_envs(args)
    agent = ppo.Agent(envs.observation_space, envs.action_space, args)
    obs = envs.reset(seed=1)
    first = ppo.collect_rollout(agent, envs, obs, args)
    second = ppo.collect_rollout(agent, envs, first.obs[-1], args)
    return first, second, envs


def test_every_row_is_a_transition_that_happened():
    first, second, envs = play()
    np.testing.assert_array_equal(first.obs[-1], second.obs[0])
    obs = np.concatenate([first.obs[:-1], second.obs])
    rewards, dones = (np.concatenate([getattr(first, name), getattr(second, name)]) for name in ("rewards", "dones"))
    ended = 0
    for step in range(40):
        for env in range(3):
            number, episode, time = obs[step, env]
            assert number == env
            assert rewards[step, env] == 100 * episode + time + 1  # the reward of leaving this very observation
            length = (episode + env) % 3 + 1
            assert dones[step, env] == (time + 1 == length)
            expected = (env, episode + 1, 0) if dones[step, env] else (env, episode, time + 1)
            assert tuple(obs[step + 1, env]) == expected
            ended += dones[step, env]
    assert ended > 40
    for env in envs.envs:  # no call that is not in the rollout
        assert env.unwrapped.steps == 40


def test_episode_statistics_cover_whole_episodes():
    """Also those that began in an earlier rollout."""
    first, second, _ = play(num_envs=2, num_steps=7)
    for rollout in (first, second):
        assert len(rollout.ends) == rollout.dones.sum()
        for step, end in rollout.ends:
            assert rollout.dones[step, end.env]
            episode = int(rollout.obs[step, end.env][1])
            size = (episode + end.env) % 3 + 1
            expected = (sum(100 * episode + time for time in range(1, size + 1)), size)
            assert (end.episodic_return, end.length) == expected


def test_truncated_episodes_give_their_last_observation():
    rollout = play()[0]
    seen = set()
    for step, end in rollout.ends:
        number, episode, time = rollout.obs[step, end.env]
        assert rollout.dones[step, end.env] and end.truncated == (episode % 2 == 1)
        np.testing.assert_array_equal(end.last_obs, [number, episode, time + 1])
        seen.add((step, end.env))
    assert seen == set(zip(*np.nonzero(rollout.dones))) and seen


@pytest.mark.parametrize("bootstrap", [False, True])
def test_bootstrap_truncated_adds_the_value_of_the_last_observation(monkeypatch, tmp_path, bootstrap):
    """And only there: terminations and ordinary steps keep the environment's reward."""
    seen, compute_gae, collect_rollout = [], ppo.compute_gae, ppo.collect_rollout

    def spy_rollout(agent, *rest):
        rollout = collect_rollout(agent, *rest)
        expected = rollout.rewards.copy()
        if bootstrap:
            for step, end in rollout.ends:
                if end.truncated:
                    expected[step, end.env] += 0.9 * agent.critic(torch.from_numpy(end.last_obs)).item()
            assert not np.array_equal(expected, rollout.rewards)
        seen.append(expected)
        return rollout

    def spy_gae(rewards, *rest):
        np.testing.assert_allclose(rewards.numpy(), seen[-1], rtol=1e-6)
        return compute_gae(rewards, *rest)

    monkeypatch.setattr(ppo, "collect_rollout", spy_rollout)
    monkeypatch.setattr(ppo, "compute_gae", spy_gae)
    ppo.train(ppo.Args(env_id="test/Clock-v0", gamma=0.9, num_envs=3, num_steps=8, total_timesteps=72,
                       bootstrap_truncated=bootstrap, runs_dir=str(tmp_path)))  # fmt: skip
    assert len(seen) == 3


def test_environments_are_seeded_apart():
    """[extra-35] Environment i gets seed + i: environment 1 of seed 10 starts like environment 0 of seed 11."""
    starts = {}
    for seed in (10, 11):
        envs = ppo.make_envs(ppo.Args(num_envs=3))
        starts[seed] = envs.reset(seed=seed).copy()
    np.testing.assert_array_equal(starts[10][1:], starts[11][:2])
    assert not np.array_equal(starts[10][0], starts[10][1])
