"""SameStepVectorEnv returns what the library's SyncVectorEnv returns in same-step mode, at half its overhead."""

import gymnasium as gym
import numpy as np
import pytest

import ppo


def equal(ours, theirs):
    """Equality of nested infos."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in theirs)
    if theirs.dtype == object:
        return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs))
    return np.array_equal(ours, theirs)


@pytest.mark.parametrize(("env_id", "kwargs"), [("CartPole-v1", {}), ("CartPole-v1", {"max_episode_steps": 7}),
                                                ("FrozenLake-v1", {})])  # fmt: skip
def test_same_as_the_library(env_id, kwargs):
    """Step by step, with the infos of episodes' ends: FrozenLake has infos at every step, seven steps a truncation."""

    def make():
        return gym.wrappers.RecordEpisodeStatistics(gym.make(env_id, **kwargs))

    ours = ppo.SameStepVectorEnv([make] * 3, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    theirs = gym.vector.SyncVectorEnv([make] * 3, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    np.testing.assert_array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    theirs.action_space.seed(1)
    ends = 0
    for _ in range(300):
        actions = theirs.action_space.sample()
        a, b = ours.step(actions), theirs.step(actions)
        for x, y in zip(a[:4], b[:4]):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        for infos in (a[4], b[4]):  # the wall-clock time of an episode
            if "final_info" in infos:
                ends += 1
                infos["final_info"]["episode"].pop("t"), infos["final_info"]["episode"].pop("_t")
        ending = {key: value for key, value in b[4].items() if key.removeprefix("_").startswith("final_")}
        assert equal(a[4], ending)
    assert ends > 20
