"""Every detail of ppo_continuous.py and its switch, action spaces, normalization, EnvPool."""

import copy
import itertools
import json
import math
import random
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ppo_continuous as ppo

ORIGINALS = {name: getattr(ppo, name) for name in ("make_envs", "collect_rollout", "normalize_rewards", "compute_gae",
                                                   "gradient_step", "restore", "normalize_obs")}  # fmt: skip
ARGS = ppo.Args()
INF = math.inf
VECTOR, ACTIONS = Box(-INF, INF, (3,), np.float64), Box(-1, 1, (2,))


class Frame(NamedTuple):
    """One call of an environment: a reset, with action None, or a step."""

    action: np.ndarray | None
    obs: np.ndarray
    reward: float
    terminated: bool
    truncated: bool

    @property
    def done(self) -> bool:
        """The last frame of its episode."""
        return self.terminated or self.truncated


class Tape(gym.Env):
    """Gives random observations and rewards, ends at random, and keeps all that went in and out.

    Component i of an observation is of the order of 10^i around 5i; a quarter of the steps end the episode. The outlier
    is the number of a step, or "end" for all ends of episodes.
    """

    def __init__(self, observations=VECTOR, actions=ACTIONS, constant=(), outlier=None, reward=None, extreme=-1e5):
        self.observation_space, self.action_space, self.constant = observations, actions, list(constant)
        self.outlier, self.reward, self.extreme, self.tape, self.steps = outlier, reward, extreme, [], 0

    def observe(self, outlier=False):
        space = self.observation_space
        if isinstance(space, Discrete):
            return int(space.start + self.np_random.integers(space.n))
        values = np.arange(math.prod(space.shape), dtype=float)
        values = 5 * values + 10**values * self.np_random.normal(size=values.shape)
        values[self.constant] = 1e6
        if outlier:
            values[0] = self.extreme
        return values.reshape(space.shape).astype(space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.tape.append(Frame(None, self.observe(), 0.0, False, False))
        return self.tape[-1].obs, {}

    def step(self, action):
        self.steps += 1
        over, terminated = self.np_random.random(2) < (0.25, 0.5)
        terminated = bool(over and terminated)
        obs = self.observe(self.outlier == ("end" if over else self.steps))
        # Sixteenths are exact in float32.
        reward = float(self.np_random.integers(-48, 96)) / 16 if self.reward is None else self.reward
        self.tape.append(Frame(copy.deepcopy(action), obs, reward, terminated, bool(over) and not terminated))
        return *self.tape[-1][1:], {}


class Both(Tape):
    """Ends by termination and time limit at once."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated or truncated, terminated or truncated, info


class Wanted(gym.Env):
    """Shows x in {-1, 1}; rewards actions near 0 where x is 1, and large ones where it is -1."""

    observation_space, action_space = Box(-1, 1, (1,)), Box(-INF, INF, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.choice([-1.0, 1.0])
        return np.array([self.x], np.float32), {}

    def step(self, action):
        reward = -self.x * min(abs(float(action[0])), 3)
        self.x = self.np_random.choice([-1.0, 1.0])
        return np.array([self.x], np.float32), reward, self.np_random.random() < 0.2, False, {}


class Careless(Tape):
    """Overwrites the action that it is given."""

    def step(self, action):
        action *= 0
        return super().step(action)


NUMBERS = itertools.count()


def register(cls=Tape, **kwargs) -> str:
    """Registers an environment and returns its name."""
    env_id = f"test/Continuous{cls.__name__}{next(NUMBERS)}-v0"
    gym.register(env_id, cls, kwargs=kwargs, disable_env_checker=True)
    return env_id


TAPE, WANTED = register(), register(Wanted)


def truncated(rollout) -> list[tuple[int, int, np.ndarray]]:
    """Step, environment and last observation of the episodes that a time limit cut off."""
    return [(step, end.env, end.last_obs) for step, end in rollout.ends if end.truncated]


class Spy:
    """Trains a little and keeps what goes through the parts of train()."""

    def __init__(self, monkeypatch, tmp_path, env_id=TAPE, updates=3, **changed):
        sizes = {"num_steps": 16, "num_minibatches": 4, "update_epochs": 2, "runs_dir": str(tmp_path)}
        self.args = ppo.Args(**(sizes | {"env_id": env_id} | changed))
        self.args.total_timesteps = updates * self.args.batch_size
        self.rollouts, self.steps, self.scaled, self.gae_rewards, self.values = [], [], [], [], []
        self.stats_before, self.obs_stats_at_first = None, None
        for name in ("make_envs", "collect_rollout", "normalize_rewards", "compute_gae", "gradient_step"):
            monkeypatch.setattr(ppo, name, getattr(self, name))
        self.result = ppo.train(self.args)
        self.path = Path(self.result["run_dir"])
        self.metrics = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def make_envs(self, *inputs):
        self.envs = ORIGINALS["make_envs"](*inputs)
        return self.envs

    def collect_rollout(self, agent, *inputs, **options):
        self.agent = agent
        self.rollouts.append(ORIGINALS["collect_rollout"](agent, *inputs, **options))
        return self.rollouts[-1]

    def normalize_rewards(self, rewards, dones, returns, stats, args):
        self.scaled.append(ORIGINALS["normalize_rewards"](rewards, dones, returns, stats, args))
        self.return_stats = stats
        return self.scaled[-1]

    def compute_gae(self, rewards, *inputs):
        """Also notes the values of the last observations, which the critic gives now, before it changes."""
        self.gae_rewards.append(rewards.numpy().copy())
        with torch.no_grad():
            self.values.append([self.agent.critic(torch.from_numpy(last_obs)).item()
                                for _, _, last_obs in truncated(self.rollouts[-1])])  # fmt: skip
        return ORIGINALS["compute_gae"](rewards, *inputs)

    def gradient_step(self, *inputs):
        terms, log_ratio = ORIGINALS["gradient_step"](*inputs)
        self.steps.append(log_ratio)
        return terms, log_ratio

    @property
    def tapes(self) -> list[list[Frame]]:
        """What each environment did."""
        return [env.unwrapped.tape for env in self.envs.envs]

    def joined(self, name: str) -> np.ndarray:
        """An array of all rollouts, one after the other; observations with the one after the last step."""
        arrays = [getattr(rollout, name) for rollout in self.rollouts]
        if name == "obs":
            arrays = [array[:-1] for array in arrays] + [arrays[-1][-1:]]
        return np.concatenate(arrays)

    def received(self) -> list[np.ndarray]:
        """The actions that the first environment got."""
        return [frame.action for frame in self.tapes[0] if frame.action is not None]


@pytest.fixture
def spy(monkeypatch, tmp_path):
    return lambda env_id=TAPE, **changed: Spy(monkeypatch, tmp_path, env_id, **changed)


def make_agent(observations=3, actions=2, **changed) -> ppo.Agent:
    return ppo.Agent(Box(-1, 1, (observations,)), Box(-1, 1, (actions,)), ppo.Args(**changed))


def shaken(agent: ppo.Agent, seed: int) -> ppo.Agent:
    """The agent, with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return agent


VARIANTS = [{}, {"shared_network": True}, {"state_dependent_std": True},
            {"shared_network": True, "state_dependent_std": True}]  # fmt: skip


# The Gaussian policy --------------------------------------------------------------------------------------------------
@given(
    st.integers(0, 10**6), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 4), st.booleans(), st.floats(-6, 3)
)
@settings(max_examples=60, deadline=None)
def test_continuous_1_and_3_density_and_entropy_equal_torch_distributions(seed, batch, size, dependent, level):
    """For any batch dimensions, with one deviation for all states and with one for each."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mean, actions = 3 * normal(*batch, size), 3 * normal(*batch, size)
    log_std = level + normal(*batch, size) if dependent else level + normal(size)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    log_probs, entropy = ppo.log_probabilities(mean, log_std, actions)
    assert log_probs.shape == tuple(batch) and entropy.shape == log_std.shape[:-1]
    torch.testing.assert_close(log_probs, theirs.log_prob(actions), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy.expand(batch), theirs.entropy(), rtol=1e-10, atol=1e-10)

    rows = log_probs.numel()
    batch = ppo.Batch(None, None, *normal(4, rows))
    # The entropy weighs 1, and all else nothing: a policy of more entropy has the smaller loss.
    args = ppo.Args(ent_coef=1.0, vf_coef=0.0)
    loss, terms, log_ratio = ppo.ppo_loss(log_probs.flatten(), entropy, normal(rows), batch, 0.2, args)
    assert terms[2].item() == pytest.approx(theirs.entropy().mean().item(), rel=1e-10, abs=1e-10)
    assert (terms[0] - loss).item() == pytest.approx(theirs.entropy().mean().item(), rel=1e-9, abs=1e-9)
    old_log_probs = batch.log_probs
    torch.testing.assert_close(log_ratio, theirs.log_prob(actions).flatten() - old_log_probs, rtol=1e-10, atol=1e-10)


def play(agent, args, num_steps, env_id=TAPE):
    """One rollout of an agent that nobody trains, and the environments."""
    args = ppo.Args(**vars(args) | {"env_id": env_id, "num_steps": num_steps})
    envs = ppo.make_envs(args)
    obs = ppo.normalize_obs(envs.reset(3), agent.obs_stats, args, update=True)
    return ppo.collect_rollout(agent, envs, obs, args), envs


@pytest.mark.parametrize("variant", VARIANTS)
def test_continuous_1_actions_follow_the_policy(variant):
    """Noise of one sample is standard normal, and independent between components, environments and steps."""
    torch.manual_seed(1)
    agent = shaken(make_agent(**variant), 1)
    rollout, _ = play(agent, ppo.Args(num_envs=2, **variant), 3000)
    with torch.no_grad():
        mean, log_std = (x.numpy() for x in agent(torch.from_numpy(rollout.obs[:-1]))[:2])
    assert np.abs(mean).max() > 0.3 and log_std.max() - log_std.min() > 0.1
    noise = ((rollout.actions - mean) / np.exp(log_std)).reshape(3000, 4)
    error = 4 / math.sqrt(3000)  # four standard errors
    np.testing.assert_allclose(noise.mean(0), 0, atol=error)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(4), atol=1.5 * error)
    np.testing.assert_allclose([(noise[1:] * noise[:-1]).mean(), (noise**4).mean()], [0, 3], atol=5 * error)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_core_2_initialization(orthogonal):
    """Orthogonal with the gains of each head, biases 0; off: PyTorch's default."""
    agent = make_agent(orthogonal_init=orthogonal)
    for network, head_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, gain in zip(network[::2], (2**0.5, 2**0.5, head_gain), strict=True):
            weight = layer.weight.detach() / gain
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            assert torch.allclose(gram, torch.eye(len(gram)), rtol=0, atol=1e-5) == orthogonal
            assert layer.bias.any() != orthogonal
    assert not torch.equal(agent.actor[0].weight, agent.critic[0].weight)


def test_continuous_2_one_deviation_for_each_action(spy):
    """It starts at 1, is trained, and is the same in all states."""
    agent = make_agent(actions=5)
    assert isinstance(agent.log_std, torch.nn.Parameter)
    torch.testing.assert_close(agent.log_std.detach(), torch.zeros(5), rtol=0, atol=0)
    assert agent.actor[-1].out_features == 5
    trained = spy(learning_rate=3e-3).agent
    assert (trained.log_std.abs() > 1e-4).all()
    mean, log_std, values = trained(torch.randn(7, 3))
    assert (mean.shape, log_std.shape, values.shape) == ((7, 2), (2,), (7,))


def test_continuous_2_state_dependent_deviations(spy):
    """No parameter but outputs of the network: about 1 everywhere at the start, then what each state needs."""
    agent = make_agent(actions=5, state_dependent_std=True)
    assert not any("log_std" in name for name in agent.state_dict())
    assert agent.actor[-1].out_features == 10
    mean, log_std, _ = agent(torch.randn(100, 3))
    assert mean.shape == log_std.shape == (100, 5)
    assert log_std.abs().max() < 0.1 and mean.abs().max() < 0.1

    states = torch.tensor([[-1.0], [1.0]])  # about normalized already
    learned = {}
    for dependent in (False, True):
        run = spy(WANTED, updates=30, num_steps=64, learning_rate=1e-2, state_dependent_std=dependent, seed=2)
        mean, log_std, _ = run.agent(states)
        learned[dependent] = log_std.expand(2, 1).exp().flatten().tolist()
    assert learned[False][0] == learned[False][1]
    assert learned[True][0] > 1.2 * learned[True][1]  # large actions pay in the first state, small ones in the second


@pytest.mark.parametrize("variant", VARIANTS)
def test_numpy_and_torch_networks_are_the_same(variant):
    """Also after the parameters changed, by Adam or by loading."""
    agent = make_agent(**variant)
    adam = ppo.Adam(agent)
    for seed in range(3):
        adam.parameters += 0.3 * torch.randn(adam.parameters.shape, generator=torch.Generator().manual_seed(seed))
        if seed == 2:
            agent.load_state_dict(shaken(make_agent(**variant), 5).state_dict())
        for shape in ((3,), (1, 3), (6, 3), (2, 5, 3)):
            obs = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
            for network in (agent.actor, agent.critic):
                ours, theirs = ppo.as_numpy(network)(obs), network(torch.from_numpy(obs))
                assert ours.shape == theirs.shape and ours.dtype == np.float32
                np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS[::2])
def test_another_network_acts_as_it_learns(spy, monkeypatch, variant):
    """Who edits the network changes the policy everywhere: what is no plain tanh network acts in PyTorch."""

    class Edited(ppo.Agent):
        def __init__(self, *spaces):
            super().__init__(*spaces)
            self.actor[1] = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.ReLU())

    monkeypatch.setattr(ppo, "Agent", Edited)
    run = spy(learning_rate=3e-3, **variant)
    for number in range(3):
        assert run.steps[8 * number].abs().max() < 2e-5  # the log-ratios of the first minibatch


@pytest.mark.parametrize("variant", VARIANTS)
def test_continuous_4_and_core_13_separate_or_shared_networks(variant):
    """The number of parameters, and whether learning values alone changes the policy's hidden layers."""
    agent, shared = make_agent(**variant), "shared_network" in variant
    hidden, heads = 3 * 64 + 64 + 64 * 64 + 64, 65 + (4 * 65 if "state_dependent_std" in variant else 2 * 65 + 2)
    adam = ppo.Adam(agent)
    assert len(adam.parameters) == sum(p.numel() for p in agent.parameters()) == heads + hidden * (1 if shared else 2)
    before, log_std_before = copy.deepcopy(agent.actor.state_dict()), copy.deepcopy(agent.log_std)
    values_before = copy.deepcopy(agent.critic.state_dict())
    minibatch = ppo.Batch(
        torch.randn(8, 3), torch.randn(8, 2), torch.randn(8), *torch.tensor([0.0, 1, 0]).repeat(8, 1).T
    )
    ppo.gradient_step(agent, adam, minibatch, 0.2, 1e-3, 1e-5, ppo.Args(ent_coef=0, clip_vloss=False))
    for name, value in agent.actor.state_dict().items():
        assert torch.equal(value, before[name]) != (shared and not name.startswith("4."))
    assert agent.log_std is None or torch.equal(agent.log_std, log_std_before)
    assert not any(torch.equal(value, values_before[name]) for name, value in agent.critic.state_dict().items())


def test_core_10_entropy_bonus_widens_the_policy():
    """Its gradient by each log standard deviation is 1, whatever the states."""
    agent = make_agent()
    adam = ppo.Adam(agent)
    minibatch = ppo.Batch(torch.randn(8, 3), torch.randn(8, 2), torch.randn(8), *torch.zeros(3, 8))
    ppo.gradient_step(agent, adam, minibatch, 0.2, 0, 1e-5, ppo.Args(ent_coef=0.1, vf_coef=0, max_grad_norm=INF))
    torch.testing.assert_close(adam.moment1[:2], torch.full((2,), -0.1 * 0.1))
    assert not adam.moment1[2:].any()


# Actions --------------------------------------------------------------------------------------------------------------
def bounds(low, high, dtype=np.float32) -> Box:
    return Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


ACTION_SPACES = {
    "asymmetric": Box(-0.3, 2.0, (3,)),
    "partly infinite": Box(-INF, 0.5, (1,)),
    "per dimension": bounds([-0.1, -INF, -0.7], [0.2, 0.1, INF]),
    "without 0": Box(0.5, 2.0, (2,)),
    "matrix": bounds([[-0.5, -0.4, -0.3], [-0.2, -0.1, 0]], [[0.5, 0.1, 0.2], [0.3, 0.4, 0.6]]),
    "scalar": Box(-0.5, 0.4, ()),
    "double": Box(-0.3, 0.7, (3,), np.float64),
}
BOUNDED = {name: space for name, space in ACTION_SPACES.items() if space.is_bounded()}


def check_form(received, space):
    for action in received:
        assert isinstance(action, np.ndarray | np.floating)
        assert action.shape == space.shape and action.dtype == space.dtype


@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_continuous_5_actions_are_clipped_for_the_environment_only(spy, space):
    """The rollout keeps the sample, the environment gets it within bounds, in its own shape and type."""
    run = spy(register(actions=space))
    samples, received = run.joined("actions"), run.received()
    assert samples.shape == (48, 1, math.prod(space.shape)) and samples.dtype == np.float32
    check_form(received, space)
    low, high = (np.broadcast_to(bound, space.shape).reshape(-1).tolist() for bound in (space.low, space.high))
    outside = 0
    for sample, action in zip(samples[:, 0].tolist(), received, strict=True):
        assert space.contains(np.asarray(action))
        clipped = [min(max(x, a), b) for x, a, b in zip(sample, low, high)]
        np.testing.assert_allclose(np.reshape(action, -1), clipped, rtol=1e-7)
        outside += sample != clipped
    assert outside > 5


@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_continuous_5_without_clipping(spy, space):
    """The environment gets the very sample."""
    run = spy(register(actions=space), clip_action=False)
    received = run.received()
    check_form(received, space)
    np.testing.assert_array_equal(np.reshape(received, (48, -1)), run.joined("actions")[:, 0])
    assert not all(space.contains(np.asarray(action)) for action in received)


@pytest.mark.parametrize("space", BOUNDED.values(), ids=BOUNDED)
@pytest.mark.parametrize("clip_action", [True, False])
def test_continuous_5_squashing(spy, space, clip_action):
    """Minus infinity to infinity becomes low to high; clip_action makes no difference."""
    run = spy(register(actions=space), squash_action=True, clip_action=clip_action)
    received, samples = run.received(), run.joined("actions")[:, 0].reshape(48, *space.shape)
    check_form(received, space)
    low, high = space.low.astype(float), space.high.astype(float)
    expected = low + (high - low) * (np.tanh(samples.astype(float)) + 1) / 2
    np.testing.assert_allclose(np.stack(received), expected, rtol=0, atol=1e-6)
    assert samples.max() > 1 and samples.min() < -1


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), st.floats(-50, 50, width=32), st.booleans())
@example(-1.9, 1.0, 9.5, False)
@settings(max_examples=200, deadline=None)
def test_continuous_5_squashed_actions_never_leave_the_bounds(a, b, sample, double):
    """Not even by rounding: an environment may refuse them."""
    space = bounds([min(a, b)], [max(a, b)], np.float64 if double else np.float32)
    action = ppo.environment_actions(np.array([[sample]], np.float32), space, ppo.Args(squash_action=True))
    assert space.contains(action[0]), f"{action[0]!r} is not in {space}"


@pytest.mark.parametrize(("low", "high", "expected"), [(-1, 1, 0), (0.5, 2, 0.5), (-2, -0.5, -0.5), (-INF, INF, 0)])
def test_extra_34_not_a_number_becomes_0(low, high, expected):
    """Before it is clipped."""
    space = bounds([low] * 3, [high] * 3)
    actions = ppo.environment_actions(np.array([[math.nan, 3, math.nan]], np.float32), space, ARGS)
    np.testing.assert_array_equal(actions, np.array([[expected, min(3, high), expected]], np.float32))


SWITCHES = {"clip": {}, "no clip": {"clip_action": False}, "squash": {"squash_action": True}}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ratio_is_1_in_the_first_minibatch_of_every_update(spy, switch, variant):
    """What the environment made of an action is none of the policy gradient's business."""
    run = spy(register(actions=Box(-0.3, 0.4, (2, 2))), learning_rate=3e-3, num_envs=2, **switch, **variant)
    assert len(run.steps) == 3 * 8
    for number in range(3):
        assert run.steps[8 * number].abs().max() < 2e-5  # float32 rounding
        assert run.steps[8 * number + 1].abs().max() > 1e-3


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_continuous_5_an_environment_cannot_change_the_stored_actions(spy, switch):
    """One that overwrites the array it is given spoils nothing but its own action."""
    run = spy(register(Careless), updates=1, **switch)
    assert not np.any(run.received())
    assert run.joined("actions").all()


# Observations ---------------------------------------------------------------------------------------------------------
def reference_stats(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of values [n, ...] and of a pseudo-sample of weight 1e-4 with mean 0 and variance 1."""
    weight = len(values) + 1e-4
    mean = values.sum(0) / weight
    return mean, (1e-4 * (1 + mean**2) + ((values - mean) ** 2).sum(0)) / weight


@given(
    st.integers(0, 10**6),
    st.sampled_from([(), (1,), (3,), (2, 3)]),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([0, 1, -30, 1e6, -1e6]),
    st.sampled_from([0, 1e-3, 1, 1e4]),
)
@example(0, (2,), [1], 0, 0)
@example(0, (), [1, 1, 1, 1], 1e6, 0)
@example(1, (2,), [40, 1, 1, 3], 1e6, 1e-3)
@settings(max_examples=150, deadline=None)
def test_extra_31_running_statistics_equal_those_of_all_data(seed, shape, sizes, offset, scale):
    """Of all batches together with the initial pseudo-sample, whatever their sizes."""
    generator, stats, seen = np.random.default_rng(seed), ppo.RunningMeanStd(shape), []
    for size in sizes:
        batch = offset + scale * generator.normal(size=(size, *shape))
        kept = batch.copy()
        stats.update(batch)
        np.testing.assert_array_equal(batch, kept)
        seen.append(kept)
        mean, var = reference_stats(np.concatenate(seen))
        assert np.shape(stats.mean) == np.shape(stats.var) == shape
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stats.var, var, rtol=1e-7)
        assert np.all(stats.var > 0) and np.isfinite(stats.var).all()
        assert stats.count == pytest.approx(len(np.concatenate(seen)) + 1e-4, rel=1e-12)


@given(
    seed=st.integers(0, 2**31), steps=st.integers(1, 40), num_envs=st.integers(1, 4),
    offset=st.sampled_from([0.0, -3.0, 1e6]), scale=st.sampled_from([1e-3, 1.0, 1e4]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_extra_31_a_rollout_at_once_is_one_update_a_step(seed, steps, num_envs, offset, scale):
    """Its variances and what it leaves behind are those of update() with every step, after an earlier rollout too."""
    generator, ours, expected = np.random.default_rng(seed), ppo.RunningMeanStd(()), ppo.RunningMeanStd(())
    for _ in range(2):
        batches = offset + scale * generator.normal(size=(steps, num_envs))
        kept, variances = batches.copy(), []
        for batch in batches:
            expected.update(batch)
            variances.append(expected.var)
        np.testing.assert_allclose(ours.update_each(batches), variances, rtol=1e-9)
        np.testing.assert_array_equal(batches, kept)
        for name in ("mean", "var", "count"):
            np.testing.assert_allclose(getattr(ours, name), getattr(expected, name), rtol=1e-9)


def test_extra_31_initial_statistics():
    for shape in ((), (3,)):
        stats = ppo.RunningMeanStd(shape)
        np.testing.assert_array_equal(stats.mean, np.zeros(shape))
        np.testing.assert_array_equal(stats.var, np.ones(shape))
        assert stats.count == 1e-4


def vector(obs) -> np.ndarray:
    """An observation as a vector; integers are those of Discrete(4, start=2)."""
    return np.eye(4)[obs - 2] if isinstance(obs, int) else np.asarray(obs, float).reshape(-1)


def raw_observations(tapes) -> np.ndarray:
    """All observations [T+1, N, size] that an action followed: those of resets, but none of an episode's end."""
    return np.stack([[vector(frame.obs) for frame in tape if not frame.done] for tape in tapes], 1)


def normalized(raw: np.ndarray, clip=True) -> np.ndarray:
    """Step by step what the details say, by definition."""
    rows = []
    for step in range(len(raw)):
        mean, var = reference_stats(raw[: step + 1].reshape(-1, raw.shape[-1]))
        rows.append((raw[step] - mean) / np.sqrt(var + 1e-8))
    return np.clip(rows, -10, 10) if clip else np.stack(rows)


OBSERVATION_SPACES = {
    "vector": Box(-INF, INF, (3,), np.float64),
    "float32": Box(-INF, INF, (3,)),
    "matrix": Box(-INF, INF, (2, 3), np.float64),
    "scalar": Box(-INF, INF, (), np.float64),
    "discrete": Discrete(4, start=2),
}


@pytest.mark.parametrize("space", OBSERVATION_SPACES.values(), ids=OBSERVATION_SPACES)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_continuous_6_observations_are_normalized_step_by_step(spy, space, num_envs):
    """[extra-30] [extra-31] Each counts in the statistics before they are used; those at episodes' ends never do."""
    run = spy(register(observations=space), num_envs=num_envs, updates=4)
    raw = raw_observations(run.tapes)
    size = 4 if isinstance(space, Discrete) else math.prod(space.shape)
    assert raw.shape == (65, num_envs, size) and sum(frame.done for tape in run.tapes for frame in tape) > 5
    obs = run.joined("obs")
    assert obs.shape == raw.shape and obs.dtype == np.float32
    np.testing.assert_allclose(obs, normalized(raw), rtol=1e-4, atol=1e-6)
    mean, var = reference_stats(raw.reshape(-1, size))
    np.testing.assert_allclose(run.agent.obs_stats.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(run.agent.obs_stats.var, var, rtol=1e-8)
    assert run.agent.obs_stats.count == pytest.approx(65 * num_envs + 1e-4, rel=1e-12)
    if num_envs == 1:  # [extra-31] the very first one equals the mean of all, almost
        assert 0 < np.abs(obs[0]).max() < 0.011
    for earlier, later in zip(run.rollouts, run.rollouts[1:]):
        np.testing.assert_array_equal(earlier.obs[-1], later.obs[0])


@pytest.mark.parametrize("space", OBSERVATION_SPACES.values(), ids=OBSERVATION_SPACES)
def test_continuous_6_without_normalization(spy, space):
    """Raw observations reach the network, unclipped, and no statistics are kept."""
    run = spy(register(observations=space, outlier=10), norm_obs=False, num_envs=2)
    raw = raw_observations(run.tapes)
    np.testing.assert_array_equal(run.joined("obs"), raw.astype(np.float32))
    assert np.abs(raw).max() > 10 or isinstance(space, Discrete)
    assert run.agent.obs_stats.count == 1e-4 and not run.agent.obs_stats.mean.any()


def test_continuous_6_constant_components_stay_finite(spy):
    """Their variance approaches 0; what they are divided by does not reach it."""
    run = spy(register(constant=[0, 2]), updates=6, num_envs=2)
    obs = run.joined("obs")
    assert np.isfinite(obs).all() and np.abs(obs[:, :, [0, 2]]).max() < 0.01 and np.abs(obs[:, :, 1]).max() > 1
    for zero in (0.0, 1e6):
        stats = ppo.RunningMeanStd((1,))
        for _ in range(1000):
            assert abs(ppo.normalize_obs(np.full((1, 1), zero), stats, ARGS, update=True)).item() < 0.011
        assert np.isfinite(ppo.normalize_obs(np.full((1, 1), zero + 1), stats, ARGS, update=True)).all()


@pytest.mark.parametrize("clip", [True, False])
def test_continuous_7_normalized_observations_are_clipped(spy, clip):
    run = spy(register(outlier=150), num_steps=64, clip_obs=clip)
    obs, expected = run.joined("obs"), normalized(raw_observations(run.tapes), clip)
    np.testing.assert_allclose(obs, expected, rtol=1e-4, atol=1e-6)
    assert (obs.min() == -10) == clip and (obs.min() < -10) != clip


def test_continuous_7_both_bounds_and_only_with_normalization():
    rows = np.array([[-1000.0, 1000.0, 3.0]])
    for changed, expected in (({}, [[-10, 10, 3]]), ({"clip_obs": False}, rows), ({"norm_obs": False}, rows)):
        ours = ppo.normalize_obs(rows, ppo.RunningMeanStd((3,)), ppo.Args(**changed), update=False)
        np.testing.assert_allclose(ours, expected, rtol=1e-7)


def tiny_variance(shape) -> ppo.RunningMeanStd:
    """Statistics of mean 0 and variance 1e-8 over so many samples that some more hardly change them."""
    stats = ppo.RunningMeanStd(shape)
    stats.var, stats.count = np.full(shape, 1e-8), 1e12
    return stats


def test_extra_30_epsilon_stands_beside_the_variance():
    """Under the root, so that it weighs as much as a standard deviation of 1e-4."""
    obs, rewards = np.array([[3e-4]]), np.array([[3e-4]], np.float32)
    expected = pytest.approx(3 / math.sqrt(2), rel=1e-4)
    assert ppo.normalize_obs(obs, tiny_variance((1,)), ARGS, update=True).item() == expected
    dones, returns = np.zeros((1, 1), bool), np.zeros(1)
    assert ppo.normalize_rewards(rewards, dones, returns, tiny_variance(()), ARGS).item() == expected


def test_extra_33_observations_are_normalized_in_float64():
    """A component that hardly varies around 1e6 keeps its digits, of which float32 has only seven."""
    stats = ppo.RunningMeanStd((1,))
    stats.mean, stats.var, stats.count = np.array([1e6]), np.array([1e-4]), 1e9
    obs = ppo.normalize_obs(np.array([[1e6 + 0.02]]), stats, ARGS, update=True)
    assert obs.dtype == np.float64
    assert obs.item() == pytest.approx(2, rel=1e-3)


# Rewards --------------------------------------------------------------------------------------------------------------
def scaled_rewards(tapes, gamma, clip=True) -> np.ndarray:
    """Rewards [T, N] by definition, number by number."""
    steps = [[frame for frame in tape if frame.action is not None] for tape in tapes]
    returns, seen, rows = [0.0] * len(tapes), [], []
    for frames in zip(*steps, strict=True):
        returns = [gamma * value + frame.reward for value, frame in zip(returns, frames)]
        seen += returns
        deviation = math.sqrt(float(reference_stats(np.array(seen))[1]) + 1e-8)
        rows.append([frame.reward / deviation for frame in frames])
        returns = [0.0 if frame.done else value for value, frame in zip(returns, frames)]
    return np.clip(rows, -10, 10) if clip else np.array(rows)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_continuous_8_and_9_rewards_are_scaled_step_by_step(spy, num_envs, clip):
    """[extra-32] One deviation over all environments and rollouts, of returns that restart after an episode's end."""
    run = spy(num_envs=num_envs, updates=4, gamma=0.9, clip_reward=clip)
    expected = scaled_rewards(run.tapes, 0.9, clip)
    assert expected.shape == (64, num_envs) and run.joined("dones").sum() > 8
    ours = np.concatenate(run.gae_rewards)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert ours.dtype == np.float32
    assert run.return_stats is run.agent.return_stats
    assert run.return_stats.count == pytest.approx(64 * num_envs + 1e-4, rel=1e-12)
    if num_envs == 1:  # [extra-31] the very first one is divided by about 0.01
        assert (abs(ours[0]) == 10) == clip and (abs(ours[0]) > 50) != clip


def test_continuous_8_without_scaling(spy):
    """Raw rewards, unclipped, and no statistics."""
    run = spy(register(reward=-123.25), norm_reward=False, num_envs=2)
    assert (np.concatenate(run.gae_rewards) == -123.25).all()
    assert run.agent.return_stats.count == 1e-4


@pytest.mark.parametrize("reward", [1.0, -0.5])
def test_continuous_8_no_mean_is_subtracted(spy, reward):
    """What is always good stays good: a constant reward keeps its sign, and all get the scale of their step."""
    run = spy(register(reward=reward), num_envs=2, updates=4)
    ours = np.concatenate(run.gae_rewards)
    assert (np.sign(ours) == np.sign(reward)).all() and np.abs(ours[5:]).min() > 0.1
    np.testing.assert_array_equal(ours[:, 0], ours[:, 1])
    assert run.agent.return_stats.mean * reward > 0


def test_continuous_8_returns_go_on_in_the_next_rollout():
    """A cut between rollouts changes nothing; the caller's rewards stay as they were."""
    generator = np.random.default_rng(0)
    rewards, dones = generator.normal(size=(30, 2)).astype(np.float32), generator.random((30, 2)) < 0.1
    kept, results = rewards.copy(), []
    for cuts in ([0, 30], [0, 1, 7, 8, 30]):
        returns, stats = np.zeros(2), ppo.RunningMeanStd(())
        parts = [(rewards[a:b], dones[a:b]) for a, b in zip(cuts, cuts[1:])]
        scaled = np.concatenate([ppo.normalize_rewards(*part, returns, stats, ARGS) for part in parts])
        results.append((scaled, returns, stats.var))
        assert returns.any()
    for whole, cut in zip(*results):
        np.testing.assert_array_equal(whole, cut)
    np.testing.assert_array_equal(rewards, kept)


def test_episodes_keep_their_raw_returns(spy):
    """In the rollouts and in metrics.jsonl: the sum of what the environment gave, and the number of its steps."""
    run = spy(num_envs=2, updates=4)
    expected = []
    for tape in run.tapes:
        total = length = step = 0
        for frame in tape:
            if frame.action is None:
                total = length = 0
                continue
            total, length, step = total + frame.reward, length + 1, step + 1
            if frame.done:
                expected.append((step * 2, total, length))
    assert len(expected) > 8
    episodes = [(16 * number + step + 1, total, length) for number, rollout in enumerate(run.rollouts)
                for step, (_, total, length, *_) in rollout.ends]  # fmt: skip
    assert sorted((2 * step, total, length) for step, total, length in episodes) == sorted(expected)
    rows = [(row["global_step"], row["charts/episodic_return"], row["charts/episodic_length"])
            for row in run.metrics if "charts/episodic_return" in row]  # fmt: skip
    assert sorted(rows) == sorted(expected)


# Truncation -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changed", [{}, {"norm_reward": False}, {"norm_obs": False}, {"clip_obs": False}])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_extra_14_bootstrap_truncated(spy, bootstrap, changed):
    """Adds gamma * V(last observation, normalized) to the scaled reward of a truncation, and to no other."""
    run = spy(register(outlier="end"), num_envs=2, updates=4, gamma=0.9, bootstrap_truncated=bootstrap, **changed)
    frames = [[frame for frame in tape if frame.action is not None] for tape in run.tapes]
    rewards = np.array([[frame.reward for frame in row] for row in zip(*frames)])
    rewards = rewards if "norm_reward" in changed else scaled_rewards(run.tapes, 0.9)
    raw, found = raw_observations(run.tapes), []
    for number, (rollout, values) in enumerate(zip(run.rollouts, run.values, strict=True)):
        for (step, env, last_obs), value in zip(truncated(rollout), values, strict=True):
            step += 16 * number
            found.append((step, env))
            # By the statistics of this step, in which the last observation itself does not count.
            mean, var = reference_stats(raw[: step + 2].reshape(-1, 3))
            expected = frames[env][step].obs
            if "norm_obs" not in changed:
                expected = (expected - mean) / np.sqrt(var + 1e-8)
                expected = expected if "clip_obs" in changed else np.clip(expected, -10, 10)
            np.testing.assert_allclose(last_obs, expected, rtol=1e-4, atol=1e-6)
            assert last_obs.dtype == np.float32
            assert (last_obs[0] == -10) == (not changed or "norm_reward" in changed)
            rewards[step, env] += 0.9 * value * bootstrap
            assert abs(value) > 1e-4
    truncations = {(step, env) for env in range(2) for step in range(64) if frames[env][step].truncated}
    assert sorted(found) == sorted(truncations) and len(found) > 5
    assert any(frame.terminated for row in frames for frame in row)
    np.testing.assert_allclose(np.concatenate(run.gae_rewards), rewards, rtol=1e-5, atol=1e-6)


def test_extra_14_an_end_that_is_also_cut_off_is_an_end(spy):
    """Nothing follows what the task has ended, even if the time was up in the same step."""
    run = spy(register(Both), num_envs=2, updates=4, bootstrap_truncated=True, norm_reward=False)
    assert run.joined("dones").sum() > 8
    assert not any(end.truncated for rollout in run.rollouts for _, end in rollout.ends)
    np.testing.assert_array_equal(np.concatenate(run.gae_rewards), run.joined("rewards"))


# Checkpoints and playing ----------------------------------------------------------------------------------------------
def same(stats, saved: dict) -> bool:
    """Bit for bit."""
    return all(np.array_equal(getattr(stats, name), saved[name]) for name in ("mean", "var", "count"))


def saved_stats(path) -> dict:
    state = torch.load(Path(path) / "checkpoint.pt", weights_only=True)["agent"]["_extra_state"]
    return {which: {name: np.asarray(value) for name, value in state[which].items()} for which in ("obs", "returns")}


def test_checkpoint_holds_the_running_statistics(spy):
    """Exactly, the counts included, and so that loading them cannot run code."""
    run = spy()
    saved = saved_stats(run.path)
    assert run.agent.obs_stats.count > 40 and run.agent.return_stats.count > 40
    assert same(run.agent.obs_stats, saved["obs"]) and same(run.agent.return_stats, saved["returns"])


def test_loaded_statistics_go_on_like_the_original():
    """In float64 for ever: a count of float32 would stop growing at 2^24 single steps."""
    agent, other = make_agent(), make_agent()
    agent.obs_stats.update(np.random.default_rng(0).normal(size=(1000, 3)))
    agent.obs_stats.count += 2**24
    agent.return_stats.update(np.arange(5.0))
    state = agent.state_dict()
    kept = copy.deepcopy(state["_extra_state"])
    other.load_state_dict(state)
    for one in (agent, other):
        for _ in range(3):
            one.obs_stats.update(np.ones((1, 3)))
            one.return_stats.update(np.ones(1))
    assert same(other.obs_stats, vars(agent.obs_stats)) and same(other.return_stats, vars(agent.return_stats))
    assert agent.obs_stats.count == pytest.approx(2**24 + 1003 + 1e-4, rel=1e-12)
    for which in kept:  # a state that was taken stays what it was
        assert all(torch.equal(state["_extra_state"][which][name], kept[which][name]) for name in kept[which])


@pytest.mark.parametrize("through_main", [True, False])
def test_resumed_run_starts_with_the_saved_statistics(spy, monkeypatch, tmp_path, through_main):
    run = spy(num_envs=2, updates=3)
    saved, first = saved_stats(run.path), {}

    def spy_obs(obs, stats, args, update):
        first.setdefault("obs", copy.deepcopy(stats))
        return ORIGINALS["normalize_obs"](obs, stats, args, update)

    def spy_rewards(rewards, dones, returns, stats, args):
        first.setdefault("returns", copy.deepcopy(stats))
        first.setdefault("discounted", returns.copy())
        return ORIGINALS["normalize_rewards"](rewards, dones, returns, stats, args)

    monkeypatch.setattr(ppo, "normalize_obs", spy_obs)
    monkeypatch.setattr(ppo, "normalize_rewards", spy_rewards)
    if through_main:
        assert ppo.main(["--resume", str(run.path), "--total-timesteps", str(5 * 32)]) == 0
    else:
        ppo.train(ppo.Args(**vars(run.args) | {"resume": str(run.path), "total_timesteps": 5 * 32}))
    assert saved["obs"]["count"] > 97 and saved["returns"]["count"] > 95
    assert same(first["obs"], saved["obs"]) and same(first["returns"], saved["returns"])
    assert not first["discounted"].any()  # the environments restarted, so their returns did
    # The reset's observations, and those of two updates more.
    assert saved_stats(run.path)["obs"]["count"] == pytest.approx(saved["obs"]["count"] + 2 + 2 * 32, rel=1e-9)
    assert saved_stats(run.path)["returns"]["count"] == pytest.approx(saved["returns"]["count"] + 2 * 32, rel=1e-9)


def test_resuming_a_finished_run_changes_no_statistics(spy):
    """No action follows the observation of its reset, which is therefore none of the training's."""
    run = spy(num_envs=2)
    saved = saved_stats(run.path)
    assert ppo.main(["--resume", str(run.path)]) == 0
    for which, stats in saved_stats(run.path).items():
        assert all(np.array_equal(stats[name], saved[which][name]) for name in stats)


def evaluate(monkeypatch, *argv):
    """Plays; returns the returns, the agent and the frames of its environment."""
    kept = {}

    def spy_restore(path, agent, *rest):
        kept["agent"] = agent
        return ORIGINALS["restore"](path, agent, *rest)

    def spy_envs(*inputs):
        kept["envs"] = ORIGINALS["make_envs"](*inputs)
        return kept["envs"]

    monkeypatch.setattr(ppo, "restore", spy_restore)
    monkeypatch.setattr(ppo, "make_envs", spy_envs)
    returns = ppo.evaluate(ppo.parse_args([str(word) for word in argv]))
    return returns, kept["agent"], kept["envs"].envs[0].unwrapped.tape


@pytest.mark.parametrize("variant", [*VARIANTS[::2], {"squash_action": True}, {"norm_obs": False}])
def test_evaluation_normalizes_with_frozen_statistics(spy, monkeypatch, variant):
    """They stay as saved; with --eval-deterministic the environment gets the mean for the normalized observation."""
    space = Box(-0.02, 0.03, (2,))
    run = spy(register(actions=space, outlier=100), num_envs=2, **variant)
    saved = saved_stats(run.path)
    returns, agent, tape = evaluate(monkeypatch, "--evaluate", run.path, "--eval-deterministic", "--eval-episodes", 40)
    assert same(agent.obs_stats, saved["obs"]) and same(agent.return_stats, saved["returns"])
    assert len(returns) == 40 <= sum(frame.done for frame in tape)  # the last rollout is played to its end
    ends = [i for i, frame in enumerate(tape) if frame.done]
    starts = [0, *(end + 1 for end in ends)]
    assert returns == pytest.approx([sum(f.reward for f in tape[a : b + 1]) for a, b in zip(starts, ends[:40])])

    pairs = [(before.obs, after.action) for before, after in zip(tape, tape[1:]) if after.action is not None]
    obs, received = (np.stack(column) for column in zip(*pairs))
    if "norm_obs" not in variant:
        obs = np.clip((obs - saved["obs"]["mean"]) / np.sqrt(saved["obs"]["var"] + 1e-8), -10, 10)
        assert (obs == -10).any()
    with torch.no_grad():
        mean = agent(torch.from_numpy(obs).float())[0].numpy()
    expected = np.clip(mean, space.low, space.high)
    if "squash_action" in variant:
        expected = space.low + (space.high - space.low) * (np.tanh(mean) + 1) / 2
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)
    assert len(np.unique(received)) > 30


def test_evaluation_samples_from_the_policy_and_repeats_with_its_seed(spy, monkeypatch):
    run = spy(updates=1, clip_action=False)
    flags = ["--evaluate", run.path, "--eval-episodes", 100]
    (first, agent, tape), again = (evaluate(monkeypatch, *flags) for _ in range(2))
    other = evaluate(monkeypatch, *flags, "--seed", 7)
    assert first == again[0] and first != other[0]
    for a, b in zip(tape, again[2], strict=True):
        np.testing.assert_array_equal(a.obs, b.obs)
        np.testing.assert_array_equal(a.action, b.action)
    assert same(agent.obs_stats, saved_stats(run.path)["obs"])
    noise = np.stack([frame.action for frame in tape if frame.action is not None])  # the means are below 0.1
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.1 + 4 / math.sqrt(len(noise)))
    np.testing.assert_allclose(noise.std(0), 1, atol=0.05 + 4 / math.sqrt(2 * len(noise)))


def test_the_defaults_are_the_official_values():
    """Those of the table of details: a default that changes here changes every user's results."""
    official = {
        "env_id": "HalfCheetah-v4", "total_timesteps": 1_000_000, "num_steps": 2048, "num_envs": 1,
        "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4, "anneal_lr": True, "clip_coef": 0.2,
        "anneal_clip": False, "ent_coef": 0, "vf_coef": 0.5, "gamma": 0.99, "gae_lambda": 0.95, "max_grad_norm": 0.5,
        "adam_eps": 1e-5, "adam_eps_hat": True, "orthogonal_init": True, "norm_adv": True, "norm_adv_per_batch": False,
        "population_std": True, "minibatch_replacement": False, "clip_policy": True, "clip_vloss": True,
        "target_kl": None, "bootstrap_truncated": False, "shared_network": False, "state_dependent_std": False,
        "clip_action": True, "squash_action": False, "norm_obs": True, "clip_obs": True, "norm_reward": True,
        "clip_reward": True,
    }  # fmt: skip
    algorithm = [field.name for field in fields(ppo.AlgorithmArgs)]
    assert {name: getattr(ARGS, name) for name in algorithm} == {name: official.get(name) for name in algorithm}
    assert ARGS.env_id == official["env_id"] and len(official) == len(algorithm) + 1
    assert ppo.parse_args([]) == ARGS and ARGS.num_updates == 488


# What users hit -------------------------------------------------------------------------------------------------------
MIXED = {
    "dict": Dict({"a": Box(-1, 1, (2,)), "b": Discrete(3)}),
    "tuple": Tuple((Box(-1, 1, (2, 2)), MultiBinary(2))),
    "multibinary": MultiBinary((2, 2)),
}


class Sampled(gym.Env):
    """Observations of any space; rewards of shape (1,); draws from its spaces and from the global generators."""

    def __init__(self, observations=ACTIONS):
        self.observation_space, self.action_space = observations, Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        reward = -(action**2) + np.random.normal() + random.random()
        return self.observation_space.sample(), reward, self.t >= 10, False, {"episode": 3}


@pytest.mark.parametrize("space", MIXED.values(), ids=MIXED)
def test_other_observations_are_flattened(spy, space):
    run = spy(register(Sampled, observations=space), num_envs=2)
    assert run.joined("obs").shape == (49, 2, gym.spaces.flatdim(space)) and run.joined("obs").any()


def test_rewards_of_shape_1_and_global_random_numbers(spy):
    """A reward computed from an action of shape (1,) is a number; the same seed gives the same run."""
    env_id = register(Sampled)
    runs = [spy(env_id, num_envs=2, seed=seed) for seed in (3, 3, 4)]
    rewards = [run.joined("rewards") for run in runs]
    np.testing.assert_array_equal(rewards[0], rewards[1])
    assert not np.isclose(rewards[0], rewards[2]).any(-1).all()
    episodes = [row for row in runs[0].metrics if "charts/episodic_return" in row]
    assert len(episodes) == 8
    assert episodes[0]["charts/episodic_return"] == pytest.approx(rewards[0][:10, 0].sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "flags", "warned"),
    [(-100, 100, {}, True), (0, 1000, {}, True), (50, INF, {}, True), (-0.01, 0.01, {}, True), (-1, 1, {}, False),
     (-INF, INF, {}, False), (-3, 3, {}, False), (-0.4, 0.4, {}, False), (0, 1000, {"squash_action": True}, False)],
)  # fmt: skip
def test_bounds_far_from_the_policys_actions_are_told(capsys, low, high, flags, warned):
    """One line, for there training learns nothing and says nothing."""
    ppo.say.cache_clear()
    ppo.make_envs(ppo.Args(env_id=register(actions=Box(low, high, (2,))), num_envs=2, **flags))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned and all("--squash-action" in line for line in lines)


@pytest.mark.parametrize(("space", "words"), [(Discrete(3), "ppo.py"), (Box(0, 9, (2,), np.int64), "floating-point")])
def test_actions_of_another_kind_are_refused(space, words, tmp_path, capsys):
    assert ppo.main(["--env-id", register(actions=space), "--runs-dir", str(tmp_path / "runs")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line and "ppo_continuous.py needs Box actions" in line
    assert not (tmp_path / "runs").exists()


def test_what_is_not_finite_is_told_with_its_place(spy):
    """The raw reward, before its normalization."""
    with pytest.raises(FloatingPointError, match=r"a reward .* not finite at \[0, 0\]"):
        spy(register(reward=math.inf))
    with pytest.raises(FloatingPointError, match=r"observation .* not finite at \[7, 0, 0\]"):
        spy(register(outlier=7, extreme=math.nan))


def test_aux_3_early_stopping_looks_at_the_last_epoch(spy):
    """The mean over all epochs, which the first ones hold down, would go on for longer."""
    settings = {"updates": 1, "update_epochs": 8, "learning_rate": 3e-3}
    steps = spy(**settings).steps
    epochs = [ppo.policy_change(torch.stack(steps[4 * i : 4 * i + 4]), 0.2)["losses/approx_kl"] for i in range(8)]
    means = np.cumsum(epochs) / np.arange(1, 9)
    last = next(i for i in range(1, 8) if epochs[i] == max(epochs[: i + 1]) > 1.3 * means[i])
    target = (epochs[last] + max(means[last], *epochs[:last])) / 2
    assert len(spy(**settings, target_kl=target).steps) == 4 * (last + 1)


# Several environments -------------------------------------------------------------------------------------------------
def test_core_1_rollouts_of_several_environments(spy):
    """Of the right shapes; the environments differ, and each gets its own actions."""
    run = spy(num_envs=4)
    assert run.result["global_step"] == 3 * 64
    for rollout in run.rollouts:
        assert rollout.obs.shape == (17, 4, 3) and rollout.actions.shape == (16, 4, 2)
        assert rollout.rewards.shape == rollout.dones.shape == (16, 4)
        assert rollout.obs.dtype == rollout.actions.dtype == rollout.rewards.dtype == np.float32
        assert rollout.dones.dtype == bool and np.isfinite(rollout.obs).all()
    frames = [[frame for frame in tape if frame.action is not None] for tape in run.tapes]
    for env in range(4):
        np.testing.assert_array_equal(run.joined("rewards")[:, env], [frame.reward for frame in frames[env]])
        np.testing.assert_array_equal(run.joined("dones")[:, env], [frame.done for frame in frames[env]])
        received = np.stack([frame.action for frame in frames[env]])
        np.testing.assert_array_equal(np.clip(run.joined("actions")[:, env], -1, 1), received)
    assert len(np.unique(run.joined("actions")[0], axis=0)) == 4
    assert all(len(log_ratio) == 16 for log_ratio in run.steps) and len(run.steps) == 3 * 8


# EnvPool --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def envpool():
    return pytest.importorskip("envpool", exc_type=ImportError)


POOLS = [("Hopper-v4", {}), ("InvertedPendulum-v4", {}), ("InvertedPendulum-v4", {"max_episode_steps": 5}),
         ("Pendulum-v1", {"max_episode_steps": 9})]  # fmt: skip


class Recording:
    """A raw pool, driven by hand: transitions [T, N] without those in which EnvPool only restarts an environment."""

    def __init__(self, envpool, env_id, kwargs, seed, actions):
        steps, num_envs = actions.shape[:2]
        pool = envpool.make_gymnasium(env_id, num_envs=num_envs, seed=seed, **kwargs)
        first = pool.reset()[0]
        self.obs = [[first[env].copy()] for env in range(num_envs)]  # that an action followed
        self.terminal, self.rewards, self.terminations, self.truncations = ([{} for _ in self.obs] for _ in range(4))
        over = np.zeros(num_envs, bool)
        while any(len(obs) <= steps for obs in self.obs):
            # An environment that is about to restart ignores its action, and gets the same one again.
            row = [min(len(self.rewards[env]), steps - 1) for env in range(num_envs)]
            obs, rewards, terminations, truncations, _ = pool.step(actions[row, np.arange(num_envs)])
            for env in range(num_envs):
                step = len(self.rewards[env])
                if over[env]:
                    assert rewards[env] == 0
                    self.obs[env].append(obs[env].copy())
                elif step < steps:
                    self.rewards[env][step] = rewards[env]
                    self.terminations[env][step], self.truncations[env][step] = terminations[env], truncations[env]
                    if terminations[env] or truncations[env]:
                        self.terminal[env][step] = obs[env].copy()
                    else:
                        self.obs[env].append(obs[env].copy())
            over = ~over & (terminations | truncations)


def random_actions(space: Box, steps: int, num_envs: int) -> np.ndarray:
    size = (steps, num_envs, *space.shape)
    return np.random.default_rng(0).uniform(space.low, space.high, size).astype(space.dtype)


def pool_args(env_id, kwargs, **changed) -> ppo.Args:
    return ppo.Args(env_id=env_id, env_backend="envpool", env_kwargs=json.dumps(kwargs), **changed)


def test_envpool_makes_environments_once(envpool, monkeypatch):
    """Which takes long; but whoever starts them again, or with another seed, gets new ones."""
    make, seeds = envpool.make_gymnasium, []
    monkeypatch.setattr(
        envpool, "make_gymnasium", lambda *given, seed, **kw: seeds.append(seed) or make(*given, seed=seed, **kw)
    )
    envs = ppo.make_envs(pool_args("Pendulum-v1", {}, num_envs=3, seed=4))
    starts = [envs.reset(*given).copy() for given in ((4,), (4,), (4, 64))]
    assert seeds == [4, 4, 68]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])
    ppo.make_envs(pool_args("Pendulum-v1", {}, num_envs=3, seed=4)).reset(4, 64)
    assert seeds == [4, 4, 68, 4, 68]  # a run that goes on


@pytest.mark.parametrize(("env_id", "kwargs"), POOLS)
def test_core_1_envpool_returns_the_transitions_that_happened(envpool, env_id, kwargs):
    """Those of a pool driven by hand: rewards, ends, first and last observations, returns and lengths."""
    envs = ppo.make_envs(pool_args(env_id, kwargs, num_envs=3, seed=4))
    assert isinstance(envs, ppo.EnvpoolEnvironments)
    actions = random_actions(envs.action_space, 400, 3)
    raw = Recording(envpool, env_id, kwargs, 9, actions)
    obs = envs.reset(9)
    assert obs.shape == (3, *envs.observation_space.shape)
    totals, lengths, count = np.zeros(3), np.zeros(3), 0
    for step in range(400):
        for env in range(3):
            np.testing.assert_array_equal(obs[env], raw.obs[env][step])
        obs, rewards, dones, ends = envs.step(actions[step])
        totals, lengths = totals + rewards, lengths + 1
        assert [end.env for end in ends] == np.flatnonzero(dones).tolist()
        for env in range(3):
            assert rewards[env] == raw.rewards[env][step]
            assert dones[env] == (step in raw.terminal[env])
        for env, episodic_return, length, last_obs, truncated in ends:
            np.testing.assert_array_equal(last_obs, raw.terminal[env][step])
            assert truncated == (not raw.terminations[env][step])
            assert length == lengths[env] and episodic_return == pytest.approx(totals[env], rel=1e-9)
            if "max_episode_steps" in kwargs and truncated:
                assert length == kwargs["max_episode_steps"]
            totals[env] = lengths[env] = 0
            count += 1
    assert count > 30
    assert any(any(truncations.values()) for truncations in raw.truncations) == ("max_episode_steps" in kwargs)
    assert any(any(row.values()) for row in raw.terminations) == (env_id != "Pendulum-v1")


@pytest.mark.parametrize(("env_id", "kwargs"), POOLS)
def test_core_1_envpool_rollouts_never_cross_an_episode(envpool, env_id, kwargs):
    """Every stored transition is one of a pool driven by hand with the same actions; two rollouts in a row."""
    args = pool_args(env_id, kwargs, num_envs=3, num_steps=60, norm_obs=False)
    envs = ppo.make_envs(args)
    agent = ppo.Agent(envs.observation_space, envs.action_space, args)
    torch.manual_seed(0)
    obs, rollouts = envs.reset(2), []
    for _ in range(2):
        rollouts.append(ppo.collect_rollout(agent, envs, obs, args))
        obs = rollouts[-1].obs[-1]
    stored = np.concatenate([rollout.actions for rollout in rollouts])
    space = envs.action_space
    actions = ppo.environment_actions(stored.reshape(360, -1), space, args).reshape(120, 3, *space.shape)
    assert (np.abs(stored) > space.high.max()).any()
    raw = Recording(envpool, env_id, kwargs, 2, actions)
    cut_off = {(60 * i + step, env): last for i, rollout in enumerate(rollouts)
               for step, env, last in truncated(rollout)}  # fmt: skip
    episodes = [(60 * i + step, total, length) for i, rollout in enumerate(rollouts)
                for step, (_, total, length, *_) in rollout.ends]  # fmt: skip
    expected = []
    for env in range(3):
        np.testing.assert_array_equal(rollouts[0].obs[0, env], raw.obs[env][0].astype(np.float32))
        start = 0
        for step in range(120):
            rollout, row = rollouts[step // 60], step % 60
            assert rollout.rewards[row, env] == np.float32(raw.rewards[env][step])
            assert rollout.dones[row, env] == (step in raw.terminal[env])
            np.testing.assert_array_equal(rollout.obs[row + 1, env], raw.obs[env][step + 1].astype(np.float32))
            cut = raw.truncations[env][step] and not raw.terminations[env][step]
            assert ((step, env) in cut_off) == cut
            if cut:
                np.testing.assert_array_equal(cut_off[step, env], raw.terminal[env][step].astype(np.float32))
            if step in raw.terminal[env]:
                total = sum(float(raw.rewards[env][t]) for t in range(start, step + 1))
                expected.append((step, pytest.approx(total, rel=1e-5), step + 1 - start))
                start = step + 1
    assert len(expected) > 5
    key = lambda episode: (episode[0], episode[2])  # noqa: E731
    assert [e[0] for e in sorted(episodes, key=key)] == [e[0] for e in sorted(expected, key=key)]
    for episode in expected:
        assert any(episode == other for other in episodes)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Pendulum-v1"])
def test_extra_35_envpool_environments_are_seeded_apart(envpool, env_id):
    """Environment i of seed s plays what environment 0 of seed s + i does."""
    args = pool_args(env_id, {"max_episode_steps": 20}, num_envs=3)
    played = {}
    for seed in (5, 6, 7):
        envs = ppo.make_envs(args)
        same_actions = random_actions(envs.action_space, 60, 1).repeat(3, 1)
        rows = [envs.reset(seed).copy()]
        rows += [envs.step(action)[0].copy() for action in same_actions]
        played[seed] = np.stack(rows)
    for i in (1, 2):
        np.testing.assert_array_equal(played[5][:, i], played[5 + i][:, 0])
        assert not np.isclose(played[5][:, i], played[5][:, 0]).all(-1).any()


@pytest.mark.parametrize(("env_id", "num_steps"), [("InvertedPendulum-v4", 16), ("Hopper-v4", 32), ("Pendulum-v1", 80)])
@pytest.mark.parametrize("num_envs", [1, 4])
def test_envpool_trains(envpool, spy, env_id, num_steps, num_envs):
    """And writes its episodes; playing and resuming work too."""
    run = spy(
        env_id, env_backend="envpool", num_envs=num_envs, num_steps=num_steps, updates=3, bootstrap_truncated=True
    )
    assert isinstance(run.envs, ppo.EnvpoolEnvironments)
    episodes = [row for row in run.metrics if "charts/episodic_return" in row]
    assert len(episodes) == run.joined("dones").sum() >= num_envs
    if env_id == "Pendulum-v1":
        assert {row["charts/episodic_length"] for row in episodes} == {200}
        assert {row["global_step"] for row in episodes} == {200 * num_envs}
        assert sum(len(truncated(rollout)) for rollout in run.rollouts) == num_envs
    size = (3 * num_steps + 1) * num_envs
    assert run.agent.obs_stats.count == pytest.approx(size + 1e-4, rel=1e-9)
    assert np.abs(run.joined("obs")).max() <= 10
    if num_steps == 16:
        total = str(4 * run.args.batch_size)
        assert ppo.main(["--resume", str(run.path), "--total-timesteps", total]) == 0
        assert len(ppo.evaluate(ppo.parse_args(["--evaluate", str(run.path), "--eval-episodes", "2"]))) == 2
