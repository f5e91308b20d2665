"""Every detail of the LSTM scripts and its switch: the LSTM, networks and policies, hidden entries, normalization.

What stands in the same lines in the other scripts (test_same_lines.py) is proven there; what games do: test_games.py.
"""

import copy
import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_continuous import normalized, raw_observations, reference_stats, register

import ppo_atari_lstm
import ppo_lstm as ppo

PARTS = ("make_envs", "collect_rollout", "normalize_rewards", "compute_gae", "gradient_step")
ORIGINALS = {script: {name: getattr(script, name) for name in PARTS if hasattr(script, name)}
             for script in (ppo, ppo_atari_lstm)}  # fmt: skip
INF = math.inf
DISCRETE, CONTINUOUS = register(actions=Discrete(3)), register()
needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool exists for Linux only")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(agent, seed=1, scale=0.3):
    """The agent, with other weights: those of the start hardly let the policy depend on anything."""
    with torch.no_grad():
        for parameter in (parameter for parameter in agent.parameters() if parameter.requires_grad):
            parameter += scale * torch.randn(parameter.shape, generator=generator(seed))
    return agent


def make_agent(observations=Box(-1, 1, (3,)), actions=Discrete(3), seed=1, script=ppo, **changed):
    torch.manual_seed(seed)
    return script.Agent(observations, actions, script.Args(**{"lstm_size": 8} | changed))


class Spy:
    """Trains a little and keeps what goes through the parts of train(); each rollout with the agent that played it."""

    def __init__(self, monkeypatch, tmp_path, env_id=DISCRETE, updates=3, script=ppo, **changed):
        sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "lstm_size": 8}
        sizes |= {"learning_rate": 1e-2, "runs_dir": str(tmp_path)}
        self.script, self.originals = script, ORIGINALS[script]
        self.args = script.Args(**(sizes | {"env_id": env_id} | changed))
        self.args.total_timesteps = updates * self.args.batch_size
        self.agents, self.first_obs, self.first_states, self.rollouts = [], [], [], []
        self.steps, self.raw_rewards, self.scaled, self.gae_rewards = [], [], [], []
        for name in self.originals:
            monkeypatch.setattr(script, name, getattr(self, name))
        self.result = script.train(self.args)
        self.path = Path(self.result["run_dir"])

    def make_envs(self, *inputs):
        self.envs = self.originals["make_envs"](*inputs)
        return self.envs

    def collect_rollout(self, agent, envs, next_obs, state, args):
        self.agent = agent
        self.agents.append(copy.deepcopy(agent))
        self.first_obs.append(torch.tensor(next_obs))
        self.first_states.append(state.clone())
        rollout = self.originals["collect_rollout"](agent, envs, next_obs, state, args)
        kept = [torch.from_numpy(array) for array in (rollout.obs, rollout.actions)]
        self.rollouts.append(rollout._replace(obs=kept[0], actions=kept[1]))
        return rollout

    def normalize_rewards(self, rewards, *inputs):
        self.raw_rewards.append(rewards.copy())
        scaled = self.originals["normalize_rewards"](rewards, *inputs)
        self.scaled.append(scaled.copy())
        return scaled

    def compute_gae(self, rewards, *inputs):
        self.gae_rewards.append(rewards.numpy().copy())
        return self.originals["compute_gae"](rewards, *inputs)

    def gradient_step(self, agent, adam, minibatch, *inputs):
        terms, log_ratio = self.originals["gradient_step"](agent, adam, minibatch, *inputs)
        self.steps.append(minibatch._asdict() | {"log_ratio": log_ratio})
        return terms, log_ratio

    def update(self, number: int) -> list[dict]:
        """The gradient steps of one update."""
        size = self.args.update_epochs * self.args.num_minibatches
        return self.steps[number * size : (number + 1) * size]

    def epochs(self) -> list[tuple[int, list[dict]]]:
        """The gradient steps of each epoch, with the number of its update."""
        size, per_update = self.args.num_minibatches, self.args.update_epochs
        return [(i // per_update, self.steps[i * size : (i + 1) * size]) for i in range(len(self.steps) // size)]


@pytest.fixture
def spy(monkeypatch, tmp_path):
    return lambda env_id=DISCRETE, **changed: Spy(monkeypatch, tmp_path, env_id, **changed)


# The LSTM over sequences ----------------------------------------------------------------------------------------------
def one_by_one(lstm, x, state, dones):
    """What unroll() is to give, one step after the other."""
    outputs = []
    for t in range(len(x)):
        output, state = lstm(x[t : t + 1], tuple(state.unsqueeze(1)))
        outputs.append(output[0])
        state = torch.cat(state) * (~dones[t]).unsqueeze(-1)
    return torch.stack(outputs)


@st.composite
def patterns(draw) -> torch.Tensor:
    """Dones [T, N]: none, all, or at random; the first and the last row perhaps all alike."""
    size, seed = (draw(st.integers(1, 20)), draw(st.integers(1, 6))), draw(st.integers(0, 10**6))
    dones = np.random.default_rng(seed).random(size) < draw(st.sampled_from([0, 0.05, 0.2, 0.5, 0.9, 1]))
    for row in (0, -1):
        same = draw(st.sampled_from([None, False, True]))
        dones[row] = dones[row] if same is None else same
    return torch.from_numpy(dones)


@given(patterns(), st.integers(0, 10**6))
@example(torch.zeros(1, 1, dtype=torch.bool), 0)
@example(torch.ones(1, 1, dtype=torch.bool), 0)
@example(torch.ones(20, 6, dtype=torch.bool), 0)
@example(torch.zeros(20, 6, dtype=torch.bool), 0)
@settings(max_examples=60, deadline=None)
def test_lstm_3_and_5_unroll_is_one_step_after_the_other(dones, seed):
    """Outputs and gradients by inputs, state and weights, wherever episodes end. In float64: only logic can differ."""
    normal = lambda *shape: torch.randn(*shape, generator=generator(seed), dtype=torch.float64)  # noqa: E731
    lstm = torch.nn.LSTM(3, 4).double()
    for number, parameter in enumerate(lstm.parameters()):
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator(seed + number), dtype=torch.float64)
    x, state = normal(*dones.shape, 3).requires_grad_(), normal(2, dones.shape[1], 4).requires_grad_()
    weights, results = normal(*dones.shape, 4), []
    for method in (ppo.unroll, one_by_one):
        kept = dones.clone()
        output = method(lstm, x, state, dones)
        assert torch.equal(dones, kept)
        gradients = torch.autograd.grad((output * weights).sum(), [x, state, *lstm.parameters()])
        results.append([output.detach(), *gradients])
    assert results[0][0].shape == (*dones.shape, 4)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert (results[0][2].abs().sum((0, 2)) > 0).all()  # the state before the first step always counts


FORWARD = {
    "categorical": (Box(-1, 1, (3,)), Discrete(4), {}),
    "Gaussian": (Box(-1, 1, (3,)), Box(-1, 1, (2,)), {}),
    "no encoder": (Box(-1, 1, (3,)), Discrete(2), {"encoder": False}),
    "images": (Box(0, 255, (84, 84), np.uint8), Discrete(2), {"script": ppo_atari_lstm}),
}


@pytest.mark.parametrize("case", FORWARD)
def test_lstm_5_forward_equals_as_many_calls_of_step(case):
    """Policy and values, from a given state, in float32; and they do depend on state and dones."""
    observations, actions, changed = FORWARD[case]
    agent = shaken(make_agent(observations, actions, **changed), scale=0.05 if "images" in case else 0.3)
    steps, envs = 7, 5
    obs = torch.randn(steps, envs, *observations.shape, generator=generator(0))
    if "images" in case:
        obs = torch.randint(256, obs.shape, generator=generator(0), dtype=torch.uint8)
    dones = torch.rand(steps, envs, generator=generator(1)) < 0.3
    start = torch.randn(2, envs, 8, generator=generator(2))
    policies, values, state = [], [], start
    with torch.no_grad():
        for t in range(steps):
            policy, value, state = agent.step(obs[t], state)
            assert state.shape == (2, envs, 8) and value.shape == (envs,)
            policies.append(policy)
            values.append(value)
            state = state * (~dones[t]).unsqueeze(-1)
        expected = torch.stack(policies), torch.stack(values)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(agent(obs, start, dones), expected, **close)
        for other in (agent(obs, 0 * start, dones), agent(obs, start, ~dones)):
            assert not torch.allclose(other[1], expected[1], **close)


# [lstm-1] Initialization ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [8, 128])
def test_lstm_1_orthogonal_initialization(size):
    """The four gates' matrices as one: orthonormal columns. All biases are 0, the forget gate's too [extra-21]."""
    lstm = make_agent(Box(-1, 1, (5,)), lstm_size=size).lstm
    assert lstm.weight_ih_l0.shape == (4 * size, 64) and lstm.weight_hh_l0.shape == (4 * size, size)
    assert not lstm.bias_ih_l0.any() and not lstm.bias_hh_l0.any()
    for weight in (lstm.weight_ih_l0, lstm.weight_hh_l0):
        # The official matrices are these transposed: wh [128, 512], for which wh wh^T = I.
        official = weight.detach().T if weight.shape[0] >= weight.shape[1] else weight.detach()
        torch.testing.assert_close(official @ official.T, torch.eye(len(official)), rtol=0, atol=1e-5)
    assert lstm.bias_ih_l0.requires_grad and lstm.weight_hh_l0.requires_grad


def test_lstm_1_switched_off():
    """PyTorch's default: uniform within 1/sqrt(size), one bias too; the second bias is 0 all the same [extra-20]."""
    lstm = make_agent(lstm_size=64, lstm_orthogonal_init=False).lstm
    for tensor in (lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0):
        assert 0.9 / 8 < tensor.abs().max() <= 1 / 8
        assert tensor.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.15)
    assert not lstm.bias_hh_l0.any()


def test_core_2_initialization_of_the_other_layers():
    """Each switch is for its own layers."""
    for orthogonal, lstm_orthogonal in ((True, False), (False, True)):
        agent = make_agent(orthogonal_init=orthogonal, lstm_orthogonal_init=lstm_orthogonal, lstm_size=16)
        layers = [(layer, math.sqrt(2)) for layer in agent.network[::2]] + [(agent.actor.linear, 0.01)]
        for layer, gain in [*layers, (agent.critic, 1.0)]:
            weight = layer.weight.detach() / gain
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            assert torch.allclose(gram, torch.eye(len(gram)), rtol=0, atol=1e-5) == orthogonal
            assert layer.bias.any() != orthogonal
        assert agent.lstm.bias_ih_l0.any() == (not lstm_orthogonal)


@pytest.mark.parametrize("lstm_orthogonal_init", [True, False])
def test_extra_20_the_second_bias_is_frozen(spy, lstm_orthogonal_init):
    """It is none of Adam's tensors and 0 after the training; the first one is trained."""
    agent = make_agent(lstm_orthogonal_init=lstm_orthogonal_init)
    adam, frozen = ppo.Adam(agent), agent.lstm.bias_hh_l0
    assert not frozen.requires_grad and all(tensor is not frozen for tensor in adam.tensors)
    assert len(adam.parameters) == sum(p.numel() for p in agent.parameters()) - 4 * 8
    trained = spy(lstm_orthogonal_init=lstm_orthogonal_init).agent
    first, last = agent.lstm.bias_ih_l0.detach(), trained.lstm.bias_ih_l0.detach()
    assert (first - last).abs().min() > 1e-4
    assert not trained.lstm.bias_hh_l0.any()


# [lstm-2] [lstm-3] States in the rollout ------------------------------------------------------------------------------
def replay(agent, obs, state, dones, reset: bool):
    """Policy and values [T+1, N, ...] for the observations of a rollout, the states before its steps and the last."""
    policies, values, states = [], [], [state]
    with torch.no_grad():
        for t in range(len(obs)):
            policy, value, state = agent.step(obs[t], state)
            policies.append(policy)
            values.append(value)
            if t < len(dones) and reset:
                state = state * (~torch.from_numpy(dones[t])).unsqueeze(-1)
            states.append(state)
    return torch.stack(policies), torch.stack(values), states


@pytest.mark.parametrize("env_id", [DISCRETE, CONTINUOUS])
@pytest.mark.parametrize("reset", [True, False])
def test_lstm_2_and_3_states_of_the_rollouts(spy, env_id, reset):
    """Zero at the start, carried on from step to step and from rollout to rollout, forgotten exactly at dones."""
    run = spy(env_id, updates=5, reset_lstm_state=reset)
    assert run.first_states[0].shape == (2, 4, 8) and not run.first_states[0].any()
    ends = np.stack([rollout.dones[-1] for rollout in run.rollouts])
    assert ends.any() and not ends.all()
    for number, rollout in enumerate(run.rollouts):
        agent, start = run.agents[number], run.first_states[number]
        policies, values, states = replay(agent, rollout.obs, start, rollout.dones, reset)
        close = {"rtol": 1e-5, "atol": 1e-6}
        log_probs, _ = agent.actor.log_probabilities(policies[:-1], rollout.actions)
        torch.testing.assert_close((rollout.log_probs, rollout.values), (log_probs, values), **close)
        torch.testing.assert_close(rollout.state, states[-2], **close)
        forgotten = (rollout.state == 0).all(2)
        for part in forgotten:  # h and c
            assert part.tolist() == (rollout.dones[-1] & reset).tolist()
        assert (rollout.state != 0).any(2).tolist() == (~forgotten).tolist()
        if number:
            assert torch.equal(start, run.rollouts[number - 1].state)
            assert torch.equal(run.first_obs[number], run.rollouts[number - 1].obs[-1])


@pytest.mark.parametrize("reset", [True, False])
def test_lstm_3_training_forgets_where_the_rollout_did(spy, reset):
    """With --no-reset-lstm-state nowhere, but then in both: the ratio of the first minibatch is 1."""
    run = spy(reset_lstm_state=reset)
    for number in range(3):
        first, second, *_ = run.update(number)
        assert first["log_ratio"].abs().max() < 2e-5
        assert second["log_ratio"].abs().max() > 1e-3
        assert run.rollouts[number].dones.any()
        assert all(step["dones"].any() == reset for step in run.update(number))


def test_core_5_advantages_end_with_the_episode_though_the_state_does_not(spy):
    """--no-reset-lstm-state is about the memory alone."""
    run = spy(reset_lstm_state=False)
    for number, (rollout, rewards) in enumerate(zip(run.rollouts, run.gae_rewards)):
        assert rollout.dones.any()
        inputs = torch.from_numpy(rewards), rollout.values, torch.from_numpy(rollout.dones)
        _, returns = ORIGINALS[ppo]["compute_gae"](*inputs, 0.99, 0.95)
        used = torch.cat([step["returns"] for step in run.update(number)[:2]], 1)  # the first epoch's
        torch.testing.assert_close(used.flatten().sort().values, returns.flatten().sort().values)


# [lstm-4] Minibatches -------------------------------------------------------------------------------------------------
def environments(run: Spy, number: int, minibatch: dict) -> list[int]:
    """Which environment of a rollout each of a minibatch's sequences is; ValueError if it is none from start to end."""
    obs = run.rollouts[number].obs[:-1]
    known = [obs[:, env].numpy().tobytes() for env in range(obs.shape[1])]
    return [known.index(minibatch["obs"][:, column].contiguous().numpy().tobytes())
            for column in range(minibatch["obs"].shape[1])]  # fmt: skip


@pytest.mark.parametrize("env_id", [DISCRETE, CONTINUOUS])
@pytest.mark.parametrize("replacement", [False, True])
def test_lstm_4_minibatches_are_whole_environments(spy, env_id, replacement):
    """In time order, with all that belongs to them; each once in an epoch, and shuffled anew in each [core-6]."""
    run = spy(env_id, num_envs=6, num_minibatches=3, update_epochs=4, minibatch_replacement=replacement)
    orders = []
    for number, minibatches in run.epochs():
        rollout, order = run.rollouts[number], []
        for minibatch in minibatches:
            envs = environments(run, number, minibatch)
            assert len(envs) == 2 and minibatch["obs"].shape[0] == 8
            order += envs
            assert torch.equal(minibatch["state"], run.first_states[number][:, envs])
            assert torch.equal(minibatch["dones"], torch.from_numpy(rollout.dones)[:, envs])
            assert torch.equal(minibatch["actions"], rollout.actions[:, envs])
            assert torch.equal(minibatch["values"], rollout.values[:-1, envs])
            assert torch.equal(minibatch["log_probs"], rollout.log_probs[:, envs])
            raw = minibatch["returns"] - minibatch["values"]
            torch.testing.assert_close(minibatch["advantages"], (raw - raw.mean()) / raw.std(correction=0),
                                       rtol=1e-4, atol=1e-5)  # fmt: skip
        orders.append(tuple(order))
    assert len(orders) == 3 * 4
    once = [sorted(order) == list(range(6)) for order in orders]
    assert not any(once[:8]) if replacement else all(once)  # 6 draws of 6 are all different in 1.5% of the cases
    assert len(set(orders)) > 9


def test_lstm_4_shuffled_steps(spy):
    """The mistake: each epoch still uses each step once, but no minibatch keeps the order of time."""
    run, orders = spy(shuffle_lstm_steps=True, num_envs=4, num_steps=8), set()
    for number, minibatches in run.epochs():
        rollout = run.rollouts[number]
        steps = {row.numpy().tobytes(): i for i, row in enumerate(rollout.obs[:-1].flatten(0, 1))}
        drawn = []
        for minibatch in minibatches:
            assert minibatch["obs"].shape == (8, 2, 3)
            found = [steps[row.numpy().tobytes()] for row in minibatch["obs"].flatten(0, 1)]
            for name, values in (("actions", rollout.actions), ("values", rollout.values[:-1])):
                assert torch.equal(minibatch[name].flatten(), values.flatten()[found])
            dones = torch.from_numpy(rollout.dones).flatten()[found]
            assert torch.equal(minibatch["dones"].flatten(), dones)
            with pytest.raises(ValueError):
                environments(run, number, minibatch)
            assert all(len({i % 4 for i in column}) > 1 for column in np.reshape(found, (8, 2)).T)  # of several envs
            drawn += found
        assert sorted(drawn) == list(range(32))
        orders.add(tuple(drawn))
    assert len(orders) == 3 * 2  # another one in each epoch


# [lstm-5] The states in training --------------------------------------------------------------------------------------
RATIO_TASKS = {
    "masked CartPole": ("CartPole-v1", {}),
    "Pendulum": ("Pendulum-v1", {}),
    "random discrete": (DISCRETE, {}),
    "random continuous": (CONTINUOUS, {"bootstrap_truncated": True}),
    "no encoder": (CONTINUOUS, {"encoder": False, "norm_obs": False}),
}


@pytest.mark.parametrize("task", RATIO_TASKS)
def test_lstm_5_ratio_is_1_in_the_first_minibatch_of_every_update(spy, task):
    """Training computes for the rollout's steps what the rollout did, until the first gradient step."""
    env_id, changed = RATIO_TASKS[task]
    run = spy(env_id, updates=5, num_steps=32, **changed)
    assert len(run.steps) == 5 * 4
    for number in range(5):
        first, second, *_ = run.update(number)
        assert first["log_ratio"].abs().max() < 3e-5  # float32 rounding
        assert second["log_ratio"].abs().max() > 1e-3
    assert any(state.any() for state in run.first_states[1:])


def test_lstm_5_ratio_is_1_in_games(spy):
    """With images too; the games end after six steps."""
    short = {"env_backend": "gymnasium", "noop_max": 1, "max_game_frames": 24}
    run = spy("Pong", script=ppo_atari_lstm, num_envs=2, learning_rate=1e-3, cuda=False, **short)
    for number in range(3):
        first, second, *_ = run.update(number)
        assert run.rollouts[number].dones.any()
        assert first["obs"].dtype == torch.uint8 and first["obs"].shape == (8, 1, 84, 84)
        assert first["log_ratio"].abs().max() < 3e-5
        assert second["log_ratio"].abs().max() > 1e-4


@pytest.mark.parametrize("task", ["random discrete", "random continuous", "Pendulum"])
def test_lstm_5_without_reconstruction_the_ratio_is_wrong(spy, task):
    """From the second update on; the first one begins with a state of 0 in any case."""
    env_id, changed = RATIO_TASKS[task]
    run = spy(env_id, updates=4, reconstruct_lstm_state=False, num_minibatches=1, **changed)
    assert run.update(0)[0]["log_ratio"].abs().max() < 3e-5
    for number in range(1, 4):
        assert run.first_states[number].any()
        assert not any(step["state"].any() for step in run.update(number))
        assert run.update(number)[0]["log_ratio"].abs().max() > 3e-4


def test_lstm_4_with_shuffled_steps_the_ratio_is_wrong(spy):
    """The states are then those of other histories; from the second update on it shows."""
    run = spy(updates=4, shuffle_lstm_steps=True)
    for number in range(1, 4):
        assert run.update(number)[0]["log_ratio"].abs().max() > 3e-4


# Networks -------------------------------------------------------------------------------------------------------------
def test_core_13_number_of_parameters():
    """Policy and value function share the encoder and the LSTM; with the article's 128 cells."""
    shared = (5 * 64 + 64 + 64 * 64 + 64) + 4 * (64 + 128 + 2) * 128
    for actions, policy in ((Discrete(3), 129 * 3), (Box(-1, 1, (2,)), 129 * 2 + 2)):
        agent = make_agent(Box(-1, 1, (5,)), actions, lstm_size=ppo.Args().lstm_size)
        assert sum(p.numel() for p in agent.parameters()) == shared + policy + 129


def test_encoder_of_vectors():
    """Two layers of 64, a tanh after each, in front of the LSTM."""
    agent = shaken(make_agent(Box(-1, 1, (5,))))
    assert agent.lstm.input_size == 64
    weight1, bias1, weight2, bias2 = agent.network.parameters()
    assert weight1.shape == (64, 5) and weight2.shape == (64, 64)
    x = torch.randn(7, 5, generator=generator(0))
    torch.testing.assert_close(agent.network(x), ((x @ weight1.T + bias1).tanh() @ weight2.T + bias2).tanh())


def test_extra_22_no_encoder():
    """Vectors go straight into the LSTM."""
    agent = make_agent(Box(-1, 1, (5,)), encoder=False)
    assert agent.lstm.input_size == 5 and not list(agent.network.parameters())
    x = torch.randn(7, 5, generator=generator(0))
    assert torch.equal(agent.network(x), x)


class FlattenChannelsLast(torch.nn.Module):
    """[B, C, H, W] -> [B, H * W * C], the order of TensorFlow, element by element."""

    def forward(self, x):
        _, channels, height, width = x.shape
        order = [(c, y, z) for y in range(height) for z in range(width) for c in range(channels)]
        return torch.stack([x[:, c, y, z] for c, y, z in order], 1)


@pytest.mark.parametrize("scale_images", [True, False])
def test_nature_cnn(scale_images):
    """As a plain network computes it in double precision: sizes, scaling [atari-9] and the flattening [extra-18]."""
    space = Box(0, 255, (84, 84), np.uint8)
    agent = make_agent(space, script=ppo_atari_lstm, scale_images=scale_images, orthogonal_init=False)
    layers = [torch.nn.Conv2d(1, 32, 8, 4), torch.nn.Conv2d(32, 64, 4, 2), torch.nn.Conv2d(64, 64, 3, 1)]
    convolutions = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.ReLU())])
    parts = [*convolutions, FlattenChannelsLast(), torch.nn.Linear(64 * 7 * 7, 512), torch.nn.ReLU()]
    reference = torch.nn.Sequential(*parts).double()
    with torch.no_grad():
        for theirs, ours in zip(reference.parameters(), agent.network.parameters(), strict=True):
            theirs.copy_(ours)  # fails if a shape is another one
    assert agent.lstm.input_size == 512
    obs = torch.randint(256, (3, 84, 84), dtype=torch.uint8, generator=generator(0))
    kept = obs.clone()
    x = obs.unsqueeze(1).double() / (255 if scale_images else 1)
    with torch.no_grad():
        features = agent.network(obs)
        torch.testing.assert_close(features.double(), reference(x), rtol=1e-4, atol=1e-5 if scale_images else 1e-2)
    assert features.dtype == torch.float32 and (features > 0).any()
    assert torch.equal(obs, kept)


class Still(gym.Env):
    """Shows random images, or other arrays; its episodes have five steps."""

    def __init__(self, space, actions=Discrete(2)):
        self.observation_space, self.action_space = space, actions

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(10**6)))
        self.length = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.length += 1
        return self.observation_space.sample(), float(self.length), self.length == 5, False, {}


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (Box(0, 255, (7, 7, 3), np.uint8), 147),
        (Box(-1, 1, (2, 3), np.float64), 6),
        (Box(-1, 1, (), np.float64), 1),
        (Discrete(4), 4),
        (gym.spaces.Dict({"a": Discrete(2), "b": Box(-1, 1, (3,))}), 5),
        (gym.spaces.Tuple((Discrete(2), Box(-1, 1, (3,)))), 5),
        (MultiBinary(3), 3),
    ],
    ids=str,
)
def test_observations_become_vectors(spy, space, size, capsys):
    """One-hot if they are Discrete. That images are flattened is said, with the script for games."""
    ppo.say.cache_clear()
    run = spy(register(Still, space=space), updates=2, norm_obs=False)
    for rollout in run.rollouts:
        assert rollout.obs.shape == (9, 4, size) and rollout.obs.dtype == torch.float32
    if isinstance(space, Discrete):
        assert (rollout.obs.sum(-1) == 1).all() and (rollout.obs.max(-1).values == 1).all()
    assert all(run.update(number)[0]["log_ratio"].abs().max() < 3e-5 for number in range(2))
    assert run.rollouts[0].obs.std() > 0.1
    said = capsys.readouterr().err.count("images (7, 7, 3) are flattened here; ppo_atari_lstm.py has a convolutional")
    assert said == (size == 147)


# Policies -------------------------------------------------------------------------------------------------------------
@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 5), st.floats(0.1, 20))
@settings(max_examples=40, deadline=None)
def test_categorical_policy_equals_torch_distributions(seed, batch, size, scale):
    """Log-probabilities and entropies for any batch dimensions; without noise the most probable action."""
    actor = make_agent(actions=Discrete(size)).actor
    assert isinstance(actor, ppo.CategoricalActor)
    logits = scale * torch.randn(*batch, size, generator=generator(seed), dtype=torch.float64)
    actions = torch.randint(size, tuple(batch), generator=generator(seed))
    theirs = torch.distributions.Categorical(logits=logits)
    close = {"rtol": 1e-9, "atol": 1e-9}
    ours = [actor.log_probabilities(logits, actions), ppo_atari_lstm.log_probabilities(logits, actions)]
    for log_probs, entropy in ours:
        torch.testing.assert_close(log_probs, theirs.log_prob(actions), **close)
        torch.testing.assert_close(entropy, theirs.entropy(), **close)
    assert torch.equal(actor.sample(logits, 0 * actor.noise(*batch)), theirs.mode)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 4), st.floats(-5, 3))
@settings(max_examples=40, deadline=None)
def test_continuous_1_to_3_gaussian_policy_equals_torch_distributions(seed, batch, size, level):
    """Densities and the entropy for any batch dimensions; without noise the mean."""
    actor = make_agent(actions=Box(-1, 1, (size,))).actor.double()
    assert isinstance(actor, ppo.GaussianActor) and not actor.log_std.any()
    normal = lambda *shape: torch.randn(*shape, generator=generator(seed), dtype=torch.float64)  # noqa: E731
    actor.log_std.data = level + normal(size)
    means, actions = 3 * normal(*batch, size), normal(*batch, size) - 1
    theirs = torch.distributions.Independent(torch.distributions.Normal(means, actor.log_std.exp()), 1)
    close = {"rtol": 1e-9, "atol": 1e-9}
    log_probs, entropy = actor.log_probabilities(means, actions)
    torch.testing.assert_close(log_probs, theirs.log_prob(actions), **close)
    torch.testing.assert_close(entropy.expand(tuple(batch)), theirs.entropy(), **close)
    assert torch.equal(actor.sample(means, 0 * actor.noise(*batch)), means)


def play(agent, env_id, num_steps, num_envs=2, greedy=False):
    """One rollout of an agent that nobody trains, as tensors."""
    args = ppo.Args(env_id=env_id, num_envs=num_envs, num_steps=num_steps, lstm_size=8, norm_obs=False)
    envs = ppo.make_envs(args)
    rollout = ppo.collect_rollout(agent, envs, envs.reset(3), torch.zeros(2, num_envs, 8), args, greedy)
    return rollout._replace(obs=torch.from_numpy(rollout.obs), actions=torch.from_numpy(rollout.actions))


@pytest.mark.parametrize("env_id", [DISCRETE, CONTINUOUS])
def test_greedy_rollouts_take_the_mode(env_id):
    """The most probable action or the mean, in every step."""
    agent = shaken(make_agent(actions=Discrete(3) if env_id == DISCRETE else Box(-1, 1, (2,))))
    rollout = play(agent, env_id, 50, greedy=True)
    policies, _, _ = replay(agent, rollout.obs, torch.zeros(2, 2, 8), rollout.dones, reset=True)
    mode = policies.argmax(-1) if env_id == DISCRETE else policies
    torch.testing.assert_close(rollout.actions, mode[:-1], rtol=1e-4, atol=1e-5)
    assert len(rollout.actions.unique()) > 1


def test_sampled_actions_follow_the_categorical_policy():
    """Gumbel argmax samples from the softmax; independently for each step and each environment."""
    agent = make_agent()
    torch.nn.init.zeros_(agent.actor.linear.weight)
    agent.actor.linear.bias.data = torch.tensor([0.2, 0.3, 0.5]).log()
    torch.manual_seed(0)
    actions = play(agent, DISCRETE, 1500).actions
    error = 4 * math.sqrt(0.25 / 1500)  # four standard errors
    for env in range(2):
        shares = torch.bincount(actions[:, env], minlength=3) / 1500
        torch.testing.assert_close(shares, torch.tensor([0.2, 0.3, 0.5]), rtol=0, atol=error)
    chance = 0.2**2 + 0.3**2 + 0.5**2
    assert (actions[:, 0] == actions[:, 1]).float().mean().item() == pytest.approx(chance, abs=error)
    assert (actions[1:] == actions[:-1]).float().mean().item() == pytest.approx(chance, abs=error)


def test_sampled_actions_follow_the_gaussian_policy():
    """Noise of one sample is standard normal, and independent between components, environments and steps."""
    agent = shaken(make_agent(actions=Box(-1, 1, (2,))))
    torch.manual_seed(0)
    rollout = play(agent, CONTINUOUS, 1500)
    policy, _, _ = replay(agent, rollout.obs[:-1], torch.zeros(2, 2, 8), rollout.dones, reset=True)
    noise = ((rollout.actions - policy) / agent.actor.log_std.exp()).detach().numpy().reshape(1500, 4)
    assert policy.std() > 0.1 and agent.actor.log_std.abs().max() > 0.1
    error = 4 / math.sqrt(1500)
    np.testing.assert_allclose(noise.mean(0), 0, atol=error)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(4), atol=1.5 * error)
    np.testing.assert_allclose([(noise[1:] * noise[:-1]).mean(), (noise**4).mean()], [0, 3], atol=5 * error)


def test_continuous_5_environments_get_clipped_actions(spy):
    """In their own shape and type; the rollout keeps what was drawn. Not-a-number becomes 0 [extra-34]."""
    space = Box(np.float32([[-0.3, -0.1]]), np.float32([[0.2, 0.4]]))
    for clip_action in (True, False):
        run = spy(register(actions=space), updates=1, clip_action=clip_action)
        for env in range(4):
            received = [frame.action for frame in run.envs.envs[env].unwrapped.tape if frame.action is not None]
            assert {action.shape for action in received} == {(1, 2)}
            stored = run.rollouts[0].actions[:, env].numpy().reshape(-1, 1, 2)
            expected = np.clip(stored, space.low, space.high) if clip_action else stored
            np.testing.assert_array_equal(np.stack(received), expected)
        assert np.abs(stored).max() > 0.4
    actions = np.array([[math.nan, 3]], np.float32)
    np.testing.assert_array_equal(ppo.environment_actions(actions, space, ppo.Args()), np.float32([[[0, 0.4]]]))


# Hidden entries -------------------------------------------------------------------------------------------------------
def hide_args(env_id: str, **changed) -> ppo.Args:
    return ppo.Args(**{"env_id": env_id, "num_envs": 2, "lstm_size": 8} | changed)


def ride(envs, steps: int) -> list[np.ndarray]:
    """The observations of a reset and of so many steps with actions at random, and then those of episodes' ends."""
    envs.action_space.seed(0)
    seen, last = [envs.reset(5).copy()], []
    for _ in range(steps):
        obs, _, _, ends = envs.step(np.stack([envs.action_space.sample() for _ in range(2)]))
        seen.append(obs.copy())
        for end in ends:
            last.append(end.last_obs)
            assert not np.array_equal(end.last_obs, obs[end.env])  # which is the next episode's first one
    return seen + last


# Two of CartPole's entries are hidden unless another choice is made, and none of any other task.
RIDES = [
    ("CartPole-v1", None, [1, 3]), ("CartPole-v1", (), []), ("CartPole-v1", (0,), [0]), ("CartPole-v1", (2, 0), [0, 2]),
    ("Pendulum-v1", (2,), [2]), ("Pendulum-v1", None, []), ("CartPole-v0", None, []),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["gymnasium", pytest.param("envpool", marks=needs_envpool)])
@pytest.mark.parametrize(("env_id", "hide", "hidden"), RIDES)
@pytest.mark.filterwarnings("ignore:.*(Box (low|high)'s precision lowered|out of date)")  # gymnasium's
def test_hide_hides_and_changes_nothing_else(env_id, hide, hidden, backend):
    """0 for these entries at any time, also in episodes' last observations; the task itself takes the same course."""
    if backend == "envpool":
        env_id = env_id.replace("CartPole-v0", "Acrobot-v1")  # EnvPool has one version of CartPole alone
    seen = []
    for choice in (hide, ()):
        envs = ppo.make_envs(hide_args(env_id, hide=choice, env_backend=backend))
        assert isinstance(envs, ppo.EnvpoolEnvironments) == (backend == "envpool")
        seen.append(ride(envs, 60))
        envs.close()
    masked, plain = seen
    assert len(masked) == len(plain) and (len(plain) > 61 or not env_id.startswith("CartPole"))  # some episodes ended
    for ours, full in zip(masked, plain):
        expected = full.copy()
        expected[..., hidden] = 0
        np.testing.assert_array_equal(ours, expected)
    assert np.stack(plain[:30]).any((0, 1)).all()


class Six(gym.Env):
    """Six numbers, none of which is a velocity, whatever the name that it is registered with."""

    observation_space, action_space = Box(-10, 10, (6,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.arange(1, 7, dtype=np.float32), {}

    def step(self, action):
        return np.arange(1, 7, dtype=np.float32), 1.0, False, False, {}


gym.register("LunarLander-v7", Six)


@pytest.mark.parametrize(("env_id", "said"), [
    ("CartPole-v1", "entries [1, 3] of each observation are hidden"), ("LunarLander-v7", "nothing of the observations"),
])  # fmt: skip
def test_what_is_hidden_is_said_and_not_guessed_from_a_name(env_id, said, capsys):
    """One line, once, with the flag that changes it."""
    ppo.say.cache_clear()
    envs = ppo.make_envs(hide_args(env_id))
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "--hide" in line
    if env_id == "LunarLander-v7":
        np.testing.assert_array_equal(envs.reset(1)[0], [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("backend", ["gymnasium", pytest.param("envpool", marks=needs_envpool)])
@pytest.mark.parametrize("hide", [(4,), (1, -1), (0, 7)])
def test_entries_that_do_not_exist(hide, backend):
    with pytest.raises(ppo.InputError, match=f"--hide {min(set(hide) - {0, 1})}: .* are 0 to 3"):
        ppo.make_envs(hide_args("CartPole-v1", hide=hide, env_backend=backend))


@pytest.mark.parametrize(("words", "hide"), [("", None), ("--hide", ()), ("--hide 2", (2,)), ("--hide 1 3", (1, 3))])
def test_hide_on_the_command_line(words, hide, tmp_path, monkeypatch):
    """And back from config.json, which has lists."""
    assert ppo.parse_args(words.split()).hide == hide
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(asdict(ppo.Args(hide=hide))))
    for flag in ("--resume", "--evaluate"):
        assert ppo.parse_args([flag, str(run)]).hide == hide
        assert ppo.parse_args([flag, str(run), "--hide", "0"]).hide == (0,)


@pytest.mark.parametrize("hide", [["1"], [1.5], [True], 3, "1 3", {}, [[1]]])
def test_hide_of_a_broken_config(hide, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(ppo.Args()) | {"hide": hide}))
    with pytest.raises(ppo.InputError, match="hide is"):
        ppo.parse_args(["--evaluate", str(tmp_path)])


# Normalization --------------------------------------------------------------------------------------------------------
def statistics(path: Path) -> dict:
    """The running statistics in a checkpoint."""
    return torch.load(path / "checkpoint.pt", weights_only=True)["agent"]["_extra_state"]


NORMALIZED = {
    "discrete actions": (DISCRETE, {}, True, True),
    "CartPole": ("CartPole-v1", {}, True, True),
    "neither": (DISCRETE, {"norm_obs": False, "norm_reward": False}, False, False),
    "continuous actions": (CONTINUOUS, {}, True, True),
    "not of observations": (CONTINUOUS, {"norm_obs": False}, False, True),
    "not of rewards": (CONTINUOUS, {"norm_reward": False}, True, False),
    "images": (register(Still, space=Box(0, 255, (6, 6), np.uint8), actions=Box(-1, 1, (2,))), {}, True, True),
}


@pytest.mark.parametrize("case", NORMALIZED)
def test_continuous_6_to_9_normalization(spy, case):
    """Of observations and of rewards, each with its switch; the rest reaches the learner as it is."""
    env_id, changed, of_obs, of_rewards = NORMALIZED[case]
    run = spy(env_id, **changed)
    assert json.loads((run.path / "config.json").read_text())["norm_obs"] == changed.get("norm_obs", True)
    saved = statistics(run.path)
    count = 4 * (3 * 8 + 1) if of_obs else 0
    assert saved["obs"]["count"].item() == run.agent.obs_stats.count == pytest.approx(1e-4 + count, rel=1e-12)
    assert saved["returns"]["count"].item() == pytest.approx(1e-4 + 3 * 32 * of_rewards, rel=1e-12)
    if env_id in (DISCRETE, CONTINUOUS):
        raw = raw_observations([env.unwrapped.tape for env in run.envs.envs])
        obs = torch.cat([rollout.obs[:-1] for rollout in run.rollouts] + [run.rollouts[-1].obs[-1:]]).numpy()
        np.testing.assert_allclose(obs, normalized(raw) if of_obs else raw, rtol=1e-4, atol=1e-6)
        if of_obs:
            mean, var = reference_stats(raw.reshape(-1, 3))
            np.testing.assert_allclose(saved["obs"]["mean"], mean, rtol=1e-9)
            np.testing.assert_allclose(saved["obs"]["var"], var, rtol=1e-8)
    scaled, rewards = np.concatenate(run.scaled), np.concatenate(run.raw_rewards)
    assert np.array_equal(scaled, rewards) != of_rewards
    if of_rewards and env_id in (DISCRETE, CONTINUOUS):
        dones = np.concatenate([rollout.dones for rollout in run.rollouts])
        returns, seen = np.zeros(4), []
        for step in range(24):
            returns = 0.99 * returns + rewards[step]
            seen += returns.tolist()
            expected = rewards[step] / np.sqrt(reference_stats(np.array(seen))[1] + 1e-8)
            np.testing.assert_allclose(scaled[step], np.clip(expected, -10, 10), rtol=1e-5)
            returns[dones[step]] = 0


def test_rewards_of_the_episodes_are_the_environments(spy):
    """What is logged is not normalized."""
    run = spy(CONTINUOUS, num_steps=32)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    logged = sorted(row["charts/episodic_return"] for row in rows if "charts/episodic_return" in row)
    expected = []
    for env in run.envs.envs:
        total = 0.0
        for frame in env.unwrapped.tape:
            total += frame.reward
            if frame.done:
                expected.append(total)
                total = 0.0
    assert logged == pytest.approx(sorted(expected)) and len(logged) > 20


# Time limits ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("env_id", [DISCRETE, CONTINUOUS])
def test_extra_14_bootstrap_truncated(spy, env_id, bootstrap, reset):
    """Adds gamma times the value of the last observation, seen with the memory of its own episode, and nothing else.

    Each environment is played again on its own, from what it recorded.
    """
    run = spy(env_id, bootstrap_truncated=bootstrap, reset_lstm_state=reset, gamma=0.9, updates=3, num_steps=16)
    tapes = [env.unwrapped.tape for env in run.envs.envs]
    raw = raw_observations(tapes)
    bonus = np.concatenate(run.gae_rewards) - np.concatenate(run.scaled)
    expected = np.zeros_like(bonus)
    for number, (agent, start, rollout) in enumerate(zip(run.agents, run.first_states, run.rollouts)):
        _, _, states = replay(agent, rollout.obs, start, rollout.dones, reset=False)
        state = start
        for t in range(16):
            with torch.no_grad():
                state = agent.step(rollout.obs[t], state)[2]  # before anything is forgotten
            step = number * 16 + t
            for env in range(4):
                frame = [frame for frame in tapes[env] if frame.action is not None][step]
                if not frame.truncated:
                    continue
                # By the statistics of all observations until then, the next episode's first one among them.
                mean, var = reference_stats(raw[: step + 2].reshape(-1, 3))
                last_obs = np.clip((frame.obs - mean) / np.sqrt(var + 1e-8), -10, 10)
                with torch.no_grad():
                    last_obs = torch.from_numpy(last_obs).float()[None]
                    expected[step, env] = 0.9 * agent.step(last_obs, state[:, env : env + 1])[1].item()
            if reset:
                state = state * (~torch.from_numpy(rollout.dones[t])).unsqueeze(-1)
    assert (expected != 0).sum() > 10 and np.abs(expected).max() > 0.05
    np.testing.assert_allclose(bonus, expected if bootstrap else 0 * expected, rtol=1e-3, atol=1e-5)
    assert all(bool(rollout.last_values) == bootstrap for rollout in run.rollouts)


# Games ----------------------------------------------------------------------------------------------------------------
def test_extra_14_bootstrap_truncated_games(spy):
    """Where a game was cut off, gamma times the value of its last image in its own memory is added, and only there."""
    short = {"env_backend": "gymnasium", "noop_max": 1, "max_game_frames": 24, "cuda": False}
    run = spy("Pong", script=ppo_atari_lstm, num_envs=2, gamma=0.9, bootstrap_truncated=True, **short)
    for rollout, agent, start, rewards in zip(run.rollouts, run.agents, run.first_states, run.gae_rewards):
        expected = np.sign(rollout.rewards)
        assert rollout.ends and all(end.truncated for _, end in rollout.ends)
        with torch.no_grad():
            state = start
            for t, obs in enumerate(rollout.obs[:-1]):
                state = agent.step(obs, state)[2]
                for env in (end.env for step, end in rollout.ends if step == t):
                    (last_obs,) = (end.last_obs for step, end in rollout.ends if (step, end.env) == (t, env))
                    value = agent.step(torch.from_numpy(last_obs)[None], state[:, env : env + 1])[1].item()
                    assert abs(value) > 1e-4
                    expected[t, env] += 0.9 * value
                state = state * (~torch.from_numpy(rollout.dones[t])).unsqueeze(-1)
        np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", [ppo, ppo_atari_lstm])
def test_aux_3_early_stopping_looks_at_the_last_epoch(script, spy, monkeypatch):
    """KL divergences of 0, 0 and 0.02 (k3) in three epochs: their mean is below the target 0.01, the last is not."""
    steps, original = [], ORIGINALS[script]["gradient_step"]

    def far_in_the_third_epoch(*inputs):
        terms, log_ratio = original(*inputs)
        steps.append(log_ratio)
        return terms, torch.full_like(log_ratio, 0.2 if len(steps) > 4 else 0.0)

    monkeypatch.setitem(ORIGINALS[script], "gradient_step", far_in_the_third_epoch)
    game = {"env_id": "Pong", "env_backend": "gymnasium", "cuda": False} if script is ppo_atari_lstm else {}
    spy(script=script, updates=1, update_epochs=5, num_envs=2, num_minibatches=2, target_kl=0.01, **game)
    assert len(steps) == 3 * 2
