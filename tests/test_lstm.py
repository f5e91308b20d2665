"""Every detail of ppo_lstm.py and its switch: the LSTM, networks and policies, hidden velocities, normalization.

What stands in the same lines in the other scripts (test_same_lines.py) is proven there.
"""

import copy
import importlib.util
import json
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_continuous import normalized, raw_observations, reference_stats, register

import ppo_lstm as ppo

ORIGINALS = {name: getattr(ppo, name) for name in ("make_envs", "collect_rollout", "normalize_rewards", "compute_gae",
                                                   "gradient_step")}  # fmt: skip
INF = math.inf
DISCRETE, CONTINUOUS = register(actions=Discrete(3)), register()
needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool exists for Linux only")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(agent: ppo.Agent, seed=1, scale=0.3) -> ppo.Agent:
    """The agent, with other weights: those of the start hardly let the policy depend on anything."""
    with torch.no_grad():
        for parameter in (parameter for parameter in agent.parameters() if parameter.requires_grad):
            parameter += scale * torch.randn(parameter.shape, generator=generator(seed))
    return agent


def make_agent(observations=Box(-1, 1, (3,)), actions=Discrete(3), seed=1, **changed) -> ppo.Agent:
    torch.manual_seed(seed)
    return ppo.Agent(observations, actions, ppo.Args(**{"lstm_size": 8} | changed))


class Spy:
    """Trains a little and keeps what goes through the parts of train(); each rollout with the agent that played it."""

    def __init__(self, monkeypatch, tmp_path, env_id=DISCRETE, updates=3, **changed):
        sizes = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "lstm_size": 8}
        sizes |= {"learning_rate": 1e-2, "runs_dir": str(tmp_path)}
        self.args = ppo.Args(**(sizes | {"env_id": env_id} | changed))
        self.args.total_timesteps = updates * self.args.batch_size
        self.agents, self.first_obs, self.first_states, self.rollouts = [], [], [], []
        self.steps, self.raw_rewards, self.scaled, self.gae_rewards = [], [], [], []
        for name in ORIGINALS:
            monkeypatch.setattr(ppo, name, getattr(self, name))
        self.result = ppo.train(self.args)
        self.path = Path(self.result["run_dir"])

    def make_envs(self, *inputs):
        self.envs = ORIGINALS["make_envs"](*inputs)
        return self.envs

    def collect_rollout(self, agent, envs, next_obs, state, args):
        self.agent = agent
        self.agents.append(copy.deepcopy(agent))
        self.first_obs.append(next_obs.clone())
        self.first_states.append(state.clone())
        self.rollouts.append(ORIGINALS["collect_rollout"](agent, envs, next_obs, state, args))
        return self.rollouts[-1]

    def normalize_rewards(self, rewards, *inputs):
        self.raw_rewards.append(rewards.copy())
        scaled = ORIGINALS["normalize_rewards"](rewards, *inputs)
        self.scaled.append(scaled.copy())
        return scaled

    def compute_gae(self, rewards, *inputs):
        self.gae_rewards.append(rewards.numpy().copy())
        return ORIGINALS["compute_gae"](rewards, *inputs)

    def gradient_step(self, agent, adam, minibatch, *inputs):
        terms, log_ratio = ORIGINALS["gradient_step"](agent, adam, minibatch, *inputs)
        names = ("obs", "state", "dones", "actions", "log_probs", "advantages", "returns", "values")
        self.steps.append(dict(zip(names, minibatch, strict=True)) | {"log_ratio": log_ratio})
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
    "gray images": (Box(0, 255, (40, 36), np.uint8), Discrete(2), {}),
    "colored images": (Box(0, 255, (36, 44, 3), np.uint8), Box(-1, 1, (2,)), {}),
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
        layers = [(layer, math.sqrt(2)) for layer in agent.network.layers] + [(agent.actor.linear, 0.01)]
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
        torch.testing.assert_close((rollout.policy, rollout.values), (policies[:-1], values), **close)
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
        _, returns = ORIGINALS["compute_gae"](*inputs, 0.99, 0.95)
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
            log_probs = run.agents[number].actor.log_probabilities(rollout.policy, rollout.actions)[:, envs]
            torch.testing.assert_close(minibatch["log_probs"], log_probs)
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
    pytest.importorskip("envpool")  # exists for Linux only
    run = spy("Pong", num_envs=2, noop_max=1, max_game_frames=24, learning_rate=1e-3)
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


def test_mlp_for_vectors():
    """Two layers of 64, a tanh after each, in front of the LSTM."""
    agent = shaken(make_agent(Box(-1, 1, (5,))))
    assert isinstance(agent.network, ppo.MLP) and agent.lstm.input_size == 64
    layers = [torch.nn.Linear(5, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
    reference = torch.nn.Sequential(*layers)
    reference.load_state_dict(dict(zip(reference.state_dict(), agent.network.state_dict().values(), strict=True)))
    x = torch.randn(7, 5, generator=generator(0))
    torch.testing.assert_close(agent.network(x), reference(x))


def test_extra_22_no_encoder():
    """Vectors go straight into the LSTM; images still need their convolutions."""
    agent = make_agent(Box(-1, 1, (5,)), encoder=False)
    assert agent.lstm.input_size == 5 and not list(agent.network.parameters())
    x = torch.randn(7, 5, generator=generator(0))
    assert torch.equal(agent.network(x), x)
    agent = make_agent(Box(0, 255, (36, 36), np.uint8), encoder=False)
    assert isinstance(agent.network, ppo.NatureCNN) and agent.lstm.input_size == 512


IMAGES = [((84, 84), True), ((96, 96, 3), True), ((36, 36), True), ((36, 53, 2), True), ((47, 84, 3), False)]


class FlattenChannelsLast(torch.nn.Module):
    """[B, C, H, W] -> [B, H * W * C], the order of TensorFlow, element by element."""

    def forward(self, x):
        _, channels, height, width = x.shape
        order = [(c, y, z) for y in range(height) for z in range(width) for c in range(channels)]
        return torch.stack([x[:, c, y, z] for c, y, z in order], 1)


@pytest.mark.parametrize(("shape", "scale_images"), IMAGES)
def test_nature_cnn_for_images_of_any_size(shape, scale_images):
    """As a plain network computes it in double precision: sizes, channels, scaling and the flattening [extra-18]."""
    agent = make_agent(Box(0, 255, shape, np.uint8), scale_images=scale_images, orthogonal_init=False)
    channels = (*shape, 1)[2]
    layers = [torch.nn.Conv2d(channels, 32, 8, 4), torch.nn.Conv2d(32, 64, 4, 2), torch.nn.Conv2d(64, 64, 3, 1)]
    convolutions = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.ReLU())])
    size = convolutions(torch.zeros(1, channels, *shape[:2])).numel()
    parts = [*convolutions, FlattenChannelsLast(), torch.nn.Linear(size, 512), torch.nn.ReLU()]
    reference = torch.nn.Sequential(*parts).double()
    with torch.no_grad():
        for theirs, ours in zip(reference.parameters(), agent.network.parameters(), strict=True):
            theirs.copy_(ours)  # fails if a shape is another one
    assert agent.lstm.input_size == 512
    obs = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=generator(0))
    kept = obs.clone()
    x = obs.view(3, *shape[:2], channels).movedim(-1, 1).double() / (255 if scale_images else 1)
    with torch.no_grad():
        features = agent.network(obs)
        torch.testing.assert_close(features.double(), reference(x), rtol=1e-4, atol=1e-5 if scale_images else 1e-2)
    assert features.dtype == torch.float32 and (features > 0).any()
    assert torch.equal(obs, kept)


SPACES = {
    "gray": (Box(0, 255, (84, 84), np.uint8), True),
    "colored": (Box(0, 255, (96, 96, 3), np.uint8), True),
    "as small as can be": (Box(0, 255, (36, 36, 3), np.uint8), True),
    "too small for the convolutions": (Box(0, 255, (35, 84), np.uint8), False),
    "too narrow for the convolutions": (Box(0, 255, (84, 35, 3), np.uint8), False),
    "channels first": (Box(0, 255, (3, 84, 84), np.uint8), False),
    "MiniGrid": (Box(0, 255, (7, 7, 3), np.uint8), False),
    "no bytes": (Box(0, 1, (84, 84), np.float32), False),
    "a vector of bytes": (Box(0, 255, (128,), np.uint8), False),
    "one number": (Box(0, 255, (), np.uint8), False),
    "no Box": (Discrete(84), False),
}


@pytest.mark.parametrize("case", SPACES)
def test_is_image(case):
    """Bytes in two or three dimensions, large enough for the convolutions to leave something."""
    space, expected = SPACES[case]
    assert ppo.is_image(space) is expected
    if expected:
        make_agent(space).network(torch.zeros(1, *space.shape, dtype=torch.uint8))


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
    ("space", "shape", "dtype"),
    [
        (Box(0, 255, (36, 40, 3), np.uint8), (36, 40, 3), torch.uint8),
        (Box(0, 255, (40, 36), np.uint8), (40, 36), torch.uint8),
        (Box(0, 255, (7, 7, 3), np.uint8), (147,), torch.float32),
        (Box(-1, 1, (2, 3), np.float64), (6,), torch.float32),
        (Box(-1, 1, (), np.float64), (1,), torch.float32),
        (Discrete(4), (4,), torch.float32),
    ],
    ids=str,
)
def test_observations_in_rollout_and_training(spy, space, shape, dtype):
    """Images stay as they are, as bytes; all else becomes vectors, one-hot if it is Discrete."""
    run = spy(register(Still, space=space), updates=2, norm_obs=False)
    for rollout in run.rollouts:
        assert rollout.obs.shape == (9, 4, *shape) and rollout.obs.dtype == dtype
    if isinstance(space, Discrete):
        assert (rollout.obs.sum(-1) == 1).all() and (rollout.obs.max(-1).values == 1).all()
    assert all(run.update(number)[0]["log_ratio"].abs().max() < 3e-5 for number in range(2))
    assert run.rollouts[0].obs.float().std() > 0.1


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
    torch.testing.assert_close(actor.log_probabilities(logits, actions), theirs.log_prob(actions), **close)
    torch.testing.assert_close(actor.entropy(logits), theirs.entropy(), **close)
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
    torch.testing.assert_close(actor.log_probabilities(means, actions), theirs.log_prob(actions), **close)
    torch.testing.assert_close(actor.entropy(means).expand(tuple(batch)), theirs.entropy(), **close)
    assert torch.equal(actor.sample(means, 0 * actor.noise(*batch)), means)


def play(agent, env_id, num_steps, num_envs=2):
    """One rollout of an agent that nobody trains."""
    args = ppo.Args(env_id=env_id, num_envs=num_envs, num_steps=num_steps, lstm_size=8, norm_obs=False)
    envs = ppo.make_envs(args)
    obs = torch.as_tensor(envs.reset(seed=3)[0], dtype=torch.float32)
    return ppo.collect_rollout(agent, envs, obs, torch.zeros(2, num_envs, 8), args)


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
    noise = ((rollout.actions - rollout.policy) / agent.actor.log_std.exp()).detach().numpy().reshape(1500, 4)
    assert rollout.policy.std() > 0.1 and agent.actor.log_std.abs().max() > 0.1
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


# Hidden velocities ----------------------------------------------------------------------------------------------------
def set_classic(env, position: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """Puts an environment of classic control into a state; returns its observation."""
    name = type(env).__name__
    if name == "CartPoleEnv":  # position, velocity, angle, angular velocity
        return np.array([position[0], velocity[0], position[1], velocity[1]])
    env.state = np.concatenate([position, velocity])
    return np.array(env._get_ob() if name == "AcrobotEnv" else env._get_obs() if name == "PendulumEnv" else env.state)


def set_mujoco(env, position: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """The same for MuJoCo, near its initial position."""
    env.set_state(env.init_qpos + 0.01 * position, velocity)
    return env._get_obs()


# How many positions and velocities the state has.
CLASSIC = {"CartPole-v1": 2, "Acrobot-v1": 2, "MountainCar-v0": 1, "MountainCarContinuous-v0": 1, "Pendulum-v1": 1}
MUJOCO = {"Hopper-v4": 6, "HalfCheetah-v4": 9, "Walker2d-v4": 9, "Swimmer-v4": 5, "InvertedPendulum-v4": 2,
          "InvertedDoublePendulum-v4": 3}  # fmt: skip
MUJOCO |= {env_id.replace("v4", "v5"): size for env_id, size in MUJOCO.items()}
MASKED = CLASSIC | MUJOCO


def velocity_args(env_id: str, **changed) -> ppo.Args:
    return ppo.Args(**{"env_id": env_id, "num_envs": 2, "lstm_size": 8} | changed)


@pytest.mark.parametrize("env_id", MASKED)
def test_hidden_entries_are_the_velocities(env_id):
    """They, and no others, change with the state's velocities; and they do not change with its positions."""
    env = ppo.make_envs(velocity_args(env_id)).envs[0]
    env.reset(seed=0)
    show = set_classic if env_id in CLASSIC else set_mujoco
    size, random = MASKED[env_id], np.random.default_rng(0)
    positions, velocities = (0.1 + 0.4 * random.random((2, size)) for _ in range(2))
    seen = [show(env.unwrapped, positions[i], velocities[j]).astype(float) for i, j in ((0, 0), (0, 1), (1, 0))]
    hidden = {entry % seen[0].size for entry in ppo.velocities(velocity_args(env_id))}  # some count from the end
    assert len(hidden) == size
    assert set(np.flatnonzero(seen[0] != seen[1])) == hidden
    if not env_id.startswith("InvertedDouble"):  # whose generalized forces are shown, too
        assert len(set(np.flatnonzero(seen[0] != seen[2])) & hidden) == 0


@pytest.mark.parametrize("env_id", ["Hopper-v4", "HalfCheetah-v5", "Walker2d-v4", "Swimmer-v5"])
def test_hidden_entries_are_the_velocities_also_where_all_positions_are_shown(env_id):
    """With this argument of their constructors the observations have more entries in front of the velocities."""
    args = velocity_args(env_id, env_kwargs='{"exclude_current_positions_from_observation": false}')
    env = ppo.make_envs(args).envs[0]
    env.reset(seed=0)
    size, random = MASKED[env_id], np.random.default_rng(0)
    position, velocities = np.zeros(size), random.random((2, size))
    seen = [set_mujoco(env.unwrapped, position, velocity) for velocity in velocities]
    masked = env.get_wrapper_attr("observation")(seen[0])
    assert (seen[0] != seen[1]).sum() == size
    assert not masked[seen[0] != seen[1]].any()
    np.testing.assert_array_equal(masked[seen[0] == seen[1]], seen[0][seen[0] == seen[1]])


def ride(envs, steps: int) -> list[np.ndarray]:
    """The observations of a reset and of so many steps with actions at random, and then those of episodes' ends."""
    envs.single_action_space.seed(0)
    seen, ends = [envs.reset(seed=5)[0].copy()], []
    for _ in range(steps):
        actions = np.stack([envs.single_action_space.sample() for _ in range(envs.num_envs)])
        obs, _, terminations, truncations, infos = envs.step(actions)
        seen.append(obs.copy())
        if "final_obs" in infos:
            for env in np.flatnonzero(terminations | truncations):
                ends.append(np.array(infos["final_obs"][env]))
                assert not np.array_equal(ends[-1], obs[env])  # which is the next episode's first one
    return seen + ends


RIDES = [(env_id, "gymnasium", {}) for env_id in MASKED if not env_id.endswith("v5")]
RIDES += [("CartPole-v1", "gymnasium", {"async_envs": True})]
RIDES += [pytest.param(env_id, "envpool", {}, marks=needs_envpool) for env_id in MASKED if not env_id.endswith("v5")]


@pytest.mark.parametrize(("env_id", "backend", "changed"), RIDES)
@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision lowered")  # gymnasium's, about EnvPool's spaces
def test_mask_velocity_hides_and_changes_nothing_else(env_id, backend, changed):
    """0 for velocities at any time, also in episodes' last observations; the task itself takes the same course."""
    seen = []
    for mask_velocity in (True, False):
        envs = ppo.make_envs(velocity_args(env_id, mask_velocity=mask_velocity, env_backend=backend, **changed))
        assert isinstance(envs, ppo.EnvpoolVectorEnv) == (backend == "envpool")
        seen.append(ride(envs, 60 if env_id in CLASSIC else 30))
        envs.close()
    masked, plain = seen
    assert len(masked) == len(plain) and (len(plain) > 61 or env_id != "CartPole-v1")  # some episodes ended
    hidden = list(ppo.velocities(velocity_args(env_id)))
    for ours, full in zip(masked, plain):
        assert not ours[..., hidden].any()
        expected = full.copy()
        expected[..., hidden] = 0
        np.testing.assert_array_equal(ours, expected)
    assert all(np.stack(plain[:30])[..., hidden].any((0, 1)))


def test_mask_velocity_is_for_listed_tasks_only(spy):
    """Of any version and from any module; others are shown as they are."""
    for env_id, expected in (("CartPole-v0", [1, 3]), ("CartPole-v1", [1, 3]), ("my_module:CartPole-v1", [1, 3]),
                             ("Swimmer-v5", range(-5, 0)), ("CartPole", [1, 3]), ("Taxi-v3", []), ("Pong", []),
                             ("CartPoleSwingUp-v1", []), ("test/CartPole-v1", [])):  # fmt: skip
        assert list(ppo.velocities(ppo.Args(env_id=env_id))) == list(expected)
        assert list(ppo.velocities(ppo.Args(env_id=env_id, mask_velocity=False))) == []
    for mask_velocity in (True, False):
        obs = spy("CartPole-v1", mask_velocity=mask_velocity, updates=1).rollouts[0].obs
        assert obs[..., [1, 3]].any() != mask_velocity
        assert obs[..., [0, 2]].all()


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
    "images": (register(Still, space=Box(0, 255, (36, 36), np.uint8), actions=Box(-1, 1, (2,))), {}, False, True),
    "images, discrete": (register(Still, space=Box(0, 255, (36, 36), np.uint8)), {}, False, False),
}


@pytest.mark.parametrize("case", NORMALIZED)
def test_continuous_6_to_9_normalization_is_for_vectors_and_continuous_actions(spy, case):
    """Of images only the rewards, and only for continuous actions; the rest reaches the learner as it is."""
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
    assert all(bool(rollout.truncated) == bootstrap for rollout in run.rollouts)


# Names of games -------------------------------------------------------------------------------------------------------
def test_every_spelling_of_a_game():
    """What users have in their scripts means one game."""
    for env_id in ("Breakout", "Breakout-v5", "ALE/Breakout-v5", "BreakoutNoFrameskip-v4"):
        assert ppo.find_game(env_id) == "Breakout"
    games = {env_id for env_id in gym.registry if env_id.startswith("ALE/") and env_id.endswith("-v5")}
    assert len(games) > 60
    assert {f"ALE/{ppo.find_game(env_id)}-v5" for env_id in games} == games


CLOSE_NAMES = {
    "Brekout": "Breakout", "pong": "Pong", "space invaders": "SpaceInvaders", "ALE/Brekout-v5": "Breakout",
    "spaceinvaders": "SpaceInvaders", "Pongg-v5": "Pong",
}  # fmt: skip


@pytest.mark.parametrize("env_id", CLOSE_NAMES)
def test_close_names_of_games(env_id):
    """No environment has such a name: the game that was probably meant is named."""
    with pytest.raises(ppo.InputError, match=f"no environment {env_id}; did you mean the .*{CLOSE_NAMES[env_id]}"):
        ppo.find_game(env_id)


@pytest.mark.parametrize("env_id", ["Breakout-v4", "Breakout-v0", "BreakoutDeterministic-v4", "BreakoutNoFrameskip-v0"])
def test_games_that_skip_frames_by_themselves(env_id):
    with pytest.raises(ppo.InputError, match=f"{env_id} skips frames .*: use Breakout"):
        ppo.find_game(env_id)


NO_GAMES = ["CartPole-v1", "CartPol-v1", "Pendulum-v1", "Pendulum-v0", "FrozenLake-v1", "MountainCar-v0", "Zork-v0", "",
            "my_module:Env-v0", "MiniGrid-MemoryS7-v0", "phys2d/CartPole-v1", "Nothing-v3"]  # fmt: skip


@pytest.mark.parametrize("env_id", NO_GAMES)
def test_other_environments_are_no_games(env_id):
    assert ppo.find_game(env_id) is None


def test_no_other_registered_environment_is_taken_for_a_game():
    """Blackjack, for one, is a card game in gymnasium and also an Atari game."""
    others = [env_id for env_id, spec in gym.registry.items() if spec.entry_point != "ale_py.env:AtariEnv"]
    assert "Blackjack-v1" in others and len(others) > 40
    for env_id in others:
        assert ppo.find_game(env_id) is None, env_id


@needs_envpool
@pytest.mark.parametrize("env_id", ["PacMan-v1", "DefendTheCenter-v1", "TicTacToe-v1", "Tetris-v0"])
def test_what_only_envpool_has_is_not_taken_for_a_game(env_id):
    """EnvPool is asked for these tasks, whose names are similar to those of games, and here refuses an argument."""
    import envpool

    assert env_id in envpool.list_all_envs()
    args = ppo.Args(env_id=env_id, env_backend="envpool", env_kwargs='{"no_such_argument": 1}')
    with pytest.raises(ppo.InputError, match=f"cannot make {env_id} with .*no_such_argument"):
        ppo.make_envs(args)


def test_environment_of_a_module_is_not_taken_for_a_game(tmp_path, monkeypatch):
    """my:Tennis-v5 is registered by the import of my.py, which comes with making it."""
    entry_point = "gymnasium.envs.classic_control:CartPoleEnv"
    (tmp_path / "my.py").write_text(f"import gymnasium\ngymnasium.register('Tennis-v5', '{entry_point}')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gym.envs.registration, "registry", gym.registry.copy())
    envs = ppo.make_envs(ppo.Args(env_id="my:Tennis-v5", num_envs=1))
    assert type(envs.envs[0].unwrapped).__name__ == "CartPoleEnv"


def test_image_of_a_dictionary(monkeypatch):
    """EnvPool's MiniGrid shows a dictionary, of which the agent sees the image, as a vector."""
    pytest.importorskip("envpool")  # exists for Linux only
    envs = ppo.make_envs(ppo.Args(env_id="MiniGrid-MemoryS7-v0", env_backend="envpool", num_envs=3))
    assert isinstance(envs.pool.observation_space, Dict)
    assert envs.single_observation_space.shape == (147,) and envs.single_observation_space.dtype == np.uint8
    obs, _ = envs.reset(seed=1)
    shown = envs.pool.step(np.full(3, 6))[0]["image"]  # action 6 does nothing
    np.testing.assert_array_equal(obs, shown.reshape(3, 147))
    assert obs.any() and not np.array_equal(obs[0], 0 * obs[0])
