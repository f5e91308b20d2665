"""compute_gae against its definition, a sum over the rest of each episode."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ppo


def brute_force(rewards, values, dones, gamma, gae_lambda):
    """A_t = sum over k of (gamma * lambda)^k * delta_t+k, to the end of the episode or of the rollout."""
    steps, envs = rewards.shape
    advantages = np.zeros((steps, envs))
    for env in range(envs):
        for start in range(steps):
            for step in range(start, steps):
                next_value = 0.0 if dones[step, env] else values[step + 1, env]
                delta = rewards[step, env] + gamma * next_value - values[step, env]
                advantages[start, env] += (gamma * gae_lambda) ** (step - start) * delta
                if dones[step, env]:
                    break
    return advantages


@st.composite
def rollouts(draw):
    steps, envs = draw(st.integers(1, 24)), draw(st.integers(1, 4))
    numbers = st.floats(-10, 10, width=32)
    rewards = draw(hnp.arrays(np.float32, (steps, envs), elements=numbers))
    values = draw(hnp.arrays(np.float32, (steps + 1, envs), elements=numbers))
    dones = draw(hnp.arrays(bool, (steps, envs)))
    edge = draw(st.sampled_from(["none", "first", "last", "all", "never"]))
    if edge in ("first", "last"):
        dones[0 if edge == "first" else -1] = True
    elif edge in ("all", "never"):
        dones[:] = edge == "all"
    return rewards, values, dones


def gae(rewards, values, dones, gamma, gae_lambda):
    advantages, returns = ppo.compute_gae(*map(torch.from_numpy, (rewards, values, dones)), gamma, gae_lambda)
    return advantages.numpy(), returns.numpy()


@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_equals_the_definition(rollout, gamma, gae_lambda):
    rewards, values, dones = rollout
    advantages, returns = gae(rewards, values, dones, gamma, gae_lambda)
    # float32 in and out: 1e-6 relative to the largest numbers that are added up, 24 steps of at most 30 each
    np.testing.assert_allclose(advantages, brute_force(rewards, values, dones, gamma, gae_lambda), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(returns, advantages + values[:-1], rtol=1e-6, atol=1e-6)


@given(rollouts(), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_lambda_0_is_the_td_error_and_lambda_1_the_discounted_return(rollout, gamma):
    rewards, values, dones = rollout
    td_error = rewards + gamma * values[1:] * ~dones - values[:-1]
    np.testing.assert_allclose(gae(rewards, values, dones, gamma, 0.0)[0], td_error, rtol=1e-5, atol=1e-5)
    expected, following = np.zeros_like(rewards), values[-1].astype(float)
    for step in reversed(range(len(rewards))):
        following = rewards[step] + gamma * following * ~dones[step]
        expected[step] = following
    np.testing.assert_allclose(gae(rewards, values, dones, gamma, 1.0)[1], expected, rtol=1e-5, atol=1e-3)


@given(rollouts(), st.integers(0, 23), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_nothing_flows_over_the_end_of_an_episode(rollout, step, gamma, gae_lambda):
    """Whatever happens after a done changes nothing before it."""
    rewards, values, dones = rollout
    step %= len(rewards)
    dones[step] = True
    before = gae(rewards, values, dones, gamma, gae_lambda)[0][: step + 1]
    rewards[step + 1 :] += 5
    values[step + 1 :] -= 3
    np.testing.assert_array_equal(gae(rewards, values, dones, gamma, gae_lambda)[0][: step + 1], before)
