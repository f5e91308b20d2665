"""Every detail of the Atari scripts' algorithm and its switch: network, rollout, update, training.

What stands in the same lines in ppo.py (test_same_lines.py) is proven there. Most tests train in environments without
an emulator, which show random images, so that every image tells where it belongs. The scripts' environments themselves
are tested in test_atari_envs.py.
"""

import copy
import json
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_atari as ppo
import ppo_atari_envpool as pool
import ppo_atari_multigpu as multi

SCRIPTS = [ppo, pool, multi]
PARTS = ("collect_rollout", "compute_gae", "gradient_step", "make_envs")
ORIGINALS = {script: {name: getattr(script, name) for name in PARTS} for script in SCRIPTS}
COEFFICIENTS = {script: script.Adam.coefficients for script in SCRIPTS}
ACTIONS = 3
INF = math.inf


def spaces(frame_stack: int) -> tuple[Box, Discrete]:
    """Of observations and of actions."""
    return Box(0, 255, (frame_stack, 84, 84), np.uint8), Discrete(ACTIONS)


class Tape:
    """Shows random images, loses lives and ends games at random, and keeps all that went in and out.

    As with the real ones, what it returns is overwritten by its next step, and a done is followed by the next episode's
    first observation within the same step.
    """

    def __init__(self, args, reward=None):
        self.num_envs, self.reward, self.starts, self.steps = args.num_envs, reward, [], []
        self.observation_space, self.action_space = spaces(args.frame_stack)
        self.obs = np.zeros((self.num_envs, *self.observation_space.shape), np.uint8)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)

    def show(self) -> np.ndarray:
        """Observations of different brightness."""
        brightness = self.random.integers(32, 256, (*self.obs.shape[:2], 1, 1))
        return self.random.integers(0, brightness, self.obs.shape, np.uint8)

    def reset(self, seed: int, first_step: int = 0):
        """Keeps the first observations as well."""
        self.starts.append((seed, first_step))
        self.random = np.random.default_rng(seed + first_step)
        self.first_obs = self.show()
        self.obs[:] = self.first_obs
        return self.obs

    def step(self, actions):
        """Ends 30% of the games in each step, half of them by a time limit, and 15% of the lives."""
        chance = self.random.random(self.num_envs)
        terminated, truncated = (0.15 <= chance) & (chance < 0.3), chance > 0.85
        games = terminated | truncated
        dones = games | (chance < 0.15)
        shown, following = self.show(), self.show()
        points = self.random.integers(-4, 9, self.num_envs)
        rewards = points / 8 if self.reward is None else np.full(self.num_envs, self.reward(len(self.steps)))
        self.returns += 10 * points  # other numbers than the rewards
        self.lengths += 1
        ends = [
            ppo.EpisodeEnd(int(env), float(self.returns[env]), int(self.lengths[env]), shown[env], bool(truncated[env]))
            for env in np.flatnonzero(games)
        ]
        self.returns[games], self.lengths[games] = 0, 0
        obs = np.where(dones[:, None, None, None], following, shown)
        self.steps.append({"actions": actions.copy(), "obs": obs, "rewards": rewards, "dones": dones, "ends": ends})
        self.obs[:] = obs
        return self.obs, rewards, dones, ends

    def seen(self) -> list[np.ndarray]:
        """What an agent sees [N, frame_stack, 84, 84] at the start and after each step."""
        return [self.first_obs, *(step["obs"] for step in self.steps)]

    def close(self):
        """Nothing is open."""


class Spy:
    """Trains a little in Tape and keeps what goes through the parts of train()."""

    def __init__(self, monkeypatch, tmp_path, script=ppo, updates=3, reward=None, emulator=False, **changed):
        sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "runs_dir": str(tmp_path)}
        self.script, self.args = script, script.Args(**(sizes | changed))
        self.args.total_timesteps = updates * self.args.batch_size
        self.reward, self.emulator, self.envs, self.rollouts, self.steps = reward, emulator, [], [], []
        self.learning_rates, self.gae_rewards, self.last_values = [], [], []
        for name in PARTS:
            monkeypatch.setattr(script, name, getattr(self, name))

        def coefficients(adam, learning_rate, args):
            self.learning_rates.append(learning_rate)
            return COEFFICIENTS[script](adam, learning_rate, args)

        monkeypatch.setattr(script.Adam, "coefficients", coefficients)
        self.result = script.train(self.args)
        self.path = Path(self.result["run_dir"])
        self.metrics = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        self.updates = [row for row in self.metrics if "losses/policy_loss" in row]

    def make_envs(self, args, *videos):
        make = ORIGINALS[self.script]["make_envs"]
        self.envs.append(make(args) if self.emulator else Tape(args, self.reward))
        return self.envs[-1]

    def collect_rollout(self, agent, *inputs):
        self.agent = agent
        rollout = ORIGINALS[self.script]["collect_rollout"](agent, *inputs)
        self.rollouts.append(copy.deepcopy(rollout))  # whose rewards train() may change
        return rollout

    def compute_gae(self, rewards, *inputs):
        """Also notes the values of the last observations, which the critic gives now, before it changes."""
        self.gae_rewards.append(rewards.clone())
        with torch.no_grad():
            ends = [end for _, end in self.rollouts[-1].ends if end.truncated]
            self.last_values.append([self.agent(torch.from_numpy(end.last_obs)[None])[1].item() for end in ends])
        return ORIGINALS[self.script]["compute_gae"](rewards, *inputs)

    def gradient_step(self, agent, adam, minibatch, clip_coef, step_size, epsilon, args):
        step = ORIGINALS[self.script]["gradient_step"]
        terms, log_ratio = step(agent, adam, minibatch, clip_coef, step_size, epsilon, args)
        minibatch = {name: tensor.clone() for name, tensor in minibatch._asdict().items()}
        self.steps.append(minibatch | {"terms": terms, "log_ratio": log_ratio, "clip_coef": float(clip_coef),
                                       "epsilon": float(epsilon), "adam_steps": adam.steps})  # fmt: skip
        return terms, log_ratio

    def update(self, number):
        """The gradient steps of one update."""
        size = self.args.update_epochs * self.args.num_minibatches
        return self.steps[number * size : (number + 1) * size]


@pytest.fixture
def spy(monkeypatch, tmp_path):
    return lambda **changed: Spy(monkeypatch, tmp_path, **changed)


def make_agent(script=ppo, orthogonal_init=False, seed=1, **changed):
    """An agent; the initialization of PyTorch, with biases, hides less and is faster than the orthogonal one."""
    torch.manual_seed(seed)
    args = script.Args(orthogonal_init=orthogonal_init, **changed)
    return script.Agent(*spaces(args.frame_stack), args)


def images(batch: int, frame_stack=4, seed=0) -> torch.Tensor:
    """Random images [batch, frame_stack, 84, 84]."""
    return torch.randint(256, (batch, frame_stack, 84, 84), dtype=torch.uint8, generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The network ----------------------------------------------------------------------------------------------------------
class FlattenChannelsLast(torch.nn.Module):
    """[B, C, H, W] -> [B, H * W * C] in the order of TensorFlow, element by element."""

    def forward(self, x):
        _, channels, height, width = x.shape
        order = [(c, y, x) for y in range(height) for x in range(width) for c in range(channels)]
        return torch.stack([x[:, c, y, z] for c, y, z in order], 1)


def reference_network(network: ppo.NatureCNN, head: torch.nn.Linear, frame_stack: int) -> torch.nn.Sequential:
    """The network of Mnih et al. 2015 in double precision, with the weights of an agent's network and head."""
    layers = [torch.nn.Conv2d(frame_stack, 32, 8, 4), torch.nn.Conv2d(32, 64, 4, 2), torch.nn.Conv2d(64, 64, 3, 1)]
    layers = [part for layer in layers for part in (layer, torch.nn.ReLU())] + [FlattenChannelsLast()]
    layers += [torch.nn.Linear(64 * 7 * 7, 512), torch.nn.ReLU(), torch.nn.Linear(512, head.out_features)]
    sequential = torch.nn.Sequential(*layers).double()
    with torch.no_grad():
        for ours, theirs in zip(sequential.parameters(), [*network.parameters(), *head.parameters()], strict=True):
            ours.copy_(theirs)
    return sequential


@pytest.mark.parametrize("changed", [{}, {"shared_network": False}, {"frame_stack": 1}, {"scale_images": False}])
def test_atari_7_8_9_network(changed):
    """Bytes in, logits and values in float32 out, as a plain network computes them; also for a single image."""
    agent = make_agent(**changed)
    args = agent.network.args
    assert (agent.critic_network is None) == args.shared_network
    actor = reference_network(agent.network, agent.actor, args.frame_stack)
    critic = reference_network(agent.critic_network or agent.network, agent.critic, args.frame_stack)
    for batch in (1, 5):
        obs = images(batch, args.frame_stack)
        kept = obs.clone()
        with torch.no_grad():
            logits, values = agent(obs)
            x = obs.double() / (255 if args.scale_images else 1)
            expected = actor(x), critic(x).squeeze(-1)
        assert (logits.shape, values.shape) == ((batch, ACTIONS), (batch,))
        assert logits.dtype == values.dtype == torch.float32
        close = {"rtol": 1e-4, "atol": 1e-5 * (1 if args.scale_images else 255)}
        torch.testing.assert_close((logits.double(), values.double()), expected, **close)
        assert torch.equal(obs, kept) and obs.dtype == torch.uint8


@pytest.mark.parametrize("scale_images", [True, False])
def test_atari_9_scaling(scale_images):
    """The network gets pixels from 0 to 1; off: from 0 to 255. Nothing else is done to them."""
    agent, inputs = make_agent(scale_images=scale_images), []
    agent.network.convolutions[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    obs = images(2)
    agent(obs)
    torch.testing.assert_close(inputs[0], obs.float() / (255 if scale_images else 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("frame_stack", [4, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_atari_8_number_of_parameters(shared, frame_stack):
    """With a shared network each parameter counts once, also in Adam's vector and in the file."""
    agent = make_agent(shared_network=shared, frame_stack=frame_stack)
    convolutions = frame_stack * 8 * 8 * 32 + 32 + 32 * 4 * 4 * 64 + 64 + 64 * 3 * 3 * 64 + 64
    network, heads = convolutions + 64 * 7 * 7 * 512 + 512, 513 * ACTIONS + 513
    expected = network * (1 if shared else 2) + heads
    assert sum(p.numel() for p in agent.parameters()) == len(ppo.Adam(agent).parameters) == expected


@pytest.mark.parametrize("shared", [True, False])
def test_atari_8_saving_and_loading(shared, tmp_path):
    """What is saved gives another agent the same output, and moves the vector on which its Adam works."""
    agent, other = make_agent(shared_network=shared), make_agent(shared_network=shared, seed=2)
    adam, other_adam = ppo.Adam(agent), ppo.Adam(other)
    assert not torch.equal(adam.parameters, other_adam.parameters)
    torch.save(agent.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 4.1 * len(adam.parameters) + 10_000
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(adam.parameters, other_adam.parameters)
    assert all(map(torch.equal, agent(images(2)), other(images(2))))
    assert (other.critic_network is None) == shared


@pytest.mark.parametrize("shared", [True, False])
def test_atari_8_learning_values_changes_the_policys_features_if_they_are_shared(shared):
    agent = make_agent(shared_network=shared)
    adam, before = ppo.Adam(agent), copy.deepcopy(agent.state_dict())
    minibatch = images(4), torch.zeros(4, dtype=torch.int64), *torch.zeros(2, 4), torch.ones(4), torch.zeros(4)
    ppo.gradient_step(agent, adam, ppo.Batch(*minibatch), 0.1, 1e-3, 1e-5, ppo.Args(ent_coef=0, clip_vloss=False))
    moved = {name: not torch.equal(value, before[name]) for name, value in agent.state_dict().items()}
    assert len(moved) == (12 if shared else 20)
    for name, value in moved.items():
        assert value == (name.startswith("critic") or (shared and name.startswith("network"))), name


def test_core_2_initialization():
    """Convolutions are matrices [out, in * height * width], as in the official code."""
    agent = make_agent(orthogonal_init=True, shared_network=False)
    gains = []
    for network in (agent.network, agent.critic_network):
        gains += [(layer, math.sqrt(2)) for layer in [*network.convolutions, network.linear]]
    for layer, gain in [*gains, (agent.actor, 0.01), (agent.critic, 1.0)]:
        matrix = layer.weight.detach().flatten(1) / gain
        assert len(matrix) <= matrix.shape[1]
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)
        assert not layer.bias.any()
    assert not torch.equal(agent.network.linear.weight, agent.critic_network.linear.weight)


def test_core_2_off_is_pytorchs_default():
    agent = make_agent(orthogonal_init=False)
    for layer in [*agent.network.convolutions, agent.network.linear, agent.actor, agent.critic]:
        limit = 1 / math.sqrt(layer.weight[0].numel())
        assert 0.9 * limit < layer.weight.abs().max() <= limit
        assert 0 < layer.bias.abs().max() <= limit


def amp_pair(**changed) -> tuple[pool.Agent, pool.Agent]:
    """The same agent without and with --amp; its policy is not nearly uniform as at the start."""
    agents = tuple(make_agent(pool, orthogonal_init=True, amp=amp, **changed) for amp in (False, True))
    for agent in agents:
        agent.actor.weight.data *= 100
    return agents


@pytest.mark.parametrize("shared", [True, False])
def test_amp_gives_nearly_the_same_output(shared):
    """bfloat16 rounds to 2^-8 of a number; five layers one after the other may add that up."""
    agents, dtypes = amp_pair(shared_network=shared), []
    network, critic_network = agents[1].network, agents[1].critic_network or agents[1].network
    for layer in (network.convolutions[2], critic_network.linear, agents[1].actor):
        layer.register_forward_hook(lambda module, given, output: dtypes.append(output.dtype))
    with torch.no_grad():
        exact, rounded = (agent(images(8)) for agent in agents)
    assert dtypes == [torch.bfloat16] * 3
    for ours, expected in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == expected.shape
        assert 1e-4 < (ours - expected).norm() / expected.norm() < 5 * 2**-8


def test_amp_moves_the_parameters_nearly_the_same_way():
    """Forward and backward pass round ten times, and some ReLUs near zero switch.

    The gradients of four seeds differed by 4% to 9% of their length. Adam's first step is nearly the gradient's sign,
    which the smallest components may change. A cosine of 0.98 means a difference of 20%.
    """
    agents, moments, moves = amp_pair(), [], []
    minibatch = minibatch_of(agents[0], 16)
    for agent in agents:
        adam = pool.Adam(agent)
        before = adam.parameters.clone()
        terms, log_ratio = pool.gradient_step(agent, adam, minibatch, 0.1, 1e-3, 1e-5, agent.network.args)
        assert terms.dtype == log_ratio.dtype == adam.parameters.dtype == adam.moment1.dtype == torch.float32
        moments.append(adam.moment1), moves.append(adam.parameters - before)
    for exact, rounded in (moments, moves):
        assert torch.nn.functional.cosine_similarity(exact, rounded, 0) > 0.98
        assert not torch.equal(exact, rounded)


# One gradient step ----------------------------------------------------------------------------------------------------
def minibatch_of(agent, batch: int, spread=0.3) -> ppo.Batch:
    """Inputs of gradient_step; the old policy and the old values are about as far from the agent's as spread."""
    random = generator(0)
    noise = torch.randn(4, batch, generator=random)
    obs, actions = images(batch, agent.network.args.frame_stack), torch.randint(ACTIONS, (batch,), generator=random)
    with torch.no_grad():
        logits, values = agent(obs)
    log_probs = logits.log_softmax(-1)[range(batch), actions]
    rest = log_probs + spread * noise[0], noise[1], values + noise[2], values + spread * noise[3]
    return ppo.Batch(obs, actions, *rest)


def reference_steps(agent: ppo.Agent, minibatch: ppo.Batch, number: int, args: ppo.Args) -> None:
    """Gradient steps with a learning rate of 0.01 and a clip range of 0.1, parameter by parameter."""
    obs, actions, old_log_probs, advantages, returns, old_values = minibatch
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01, eps=args.adam_eps)
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in parameters]
    for step in range(1, number + 1):
        logits, values = agent(obs)
        policy = torch.distributions.Categorical(logits=logits)
        ratio = (policy.log_prob(actions) - old_log_probs).exp()
        gain = advantages * ratio
        if args.clip_policy:
            gain = torch.minimum(gain, advantages * ratio.clip(0.9, 1.1))
        error = (values - returns) ** 2
        if args.clip_vloss:
            error = torch.maximum(error, (old_values + (values - old_values).clip(-0.1, 0.1) - returns) ** 2)
        loss = -gain.mean() - args.ent_coef * policy.entropy().mean() + args.vf_coef * error.mean() / 2
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
        for p in parameters:
            p.grad *= min(1, args.max_grad_norm / norm)
        if not args.adam_eps_hat:
            optimizer.step()
            continue
        step_size = 0.01 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        for p, (first, second) in zip(parameters, moments, strict=True):
            first += 0.1 * (p.grad - first)
            second += 0.001 * (p.grad**2 - second)
            p.data -= step_size * first / (second.sqrt() + args.adam_eps)


STEP_SWITCHES = [
    {}, {"clip_policy": False}, {"clip_vloss": False}, {"ent_coef": 3.0}, {"vf_coef": 3.0}, {"max_grad_norm": 0.01},
    {"max_grad_norm": INF}, {"adam_eps": 1e-3}, {"adam_eps_hat": False}, {"shared_network": False},
]  # fmt: skip


def after_two_steps(improve, **changed) -> torch.Tensor:
    """The parameters of an agent after two steps by improve(agent, minibatch, args), less those before."""
    agent = make_agent(**changed)
    minibatch, before = minibatch_of(agent, 8), torch.cat([p.detach().flatten() for p in agent.parameters()])
    improve(agent, minibatch, agent.network.args)
    return torch.cat([p.detach().flatten() for p in agent.parameters()]) - before


def two_steps(agent, minibatch, args):
    adam = ppo.Adam(agent)
    for _ in range(2):
        ppo.gradient_step(agent, adam, minibatch, 0.1, *adam.coefficients(0.01, args), args)


@pytest.mark.parametrize("changed", STEP_SWITCHES, ids=str)
def test_core_3_and_8_to_11_gradient_steps(changed):
    """Loss, clipping by one norm and Adam as a plain program has them, with every switch, and the switch matters."""
    ours = after_two_steps(two_steps, **changed)
    expected = after_two_steps(lambda *inputs: reference_steps(*inputs[:2], 2, inputs[2]), **changed)
    assert expected.abs().max() > 1e-3
    # Where a gradient is almost 0 its rounding decides about the sign, and so Adam's steps are compared as a whole.
    # PyTorch's small epsilon shows more of that.
    assert (ours - expected).norm() < (1e-2 if "adam_eps_hat" in changed else 1e-3) * expected.norm()
    if changed and "shared_network" not in changed:
        other = after_two_steps(two_steps)
        assert (other - ours).norm() > 0.05 * ours.norm()


@pytest.mark.parametrize("limit", [0.01, 0.5, INF])
def test_core_11_global_norm(limit):
    """The first moment after one step is a tenth of the clipped gradient: same direction, norm at most the limit."""
    used = {}
    for number in (limit, INF):
        agent = make_agent()
        adam, minibatch = ppo.Adam(agent), minibatch_of(agent, 8)
        ppo.gradient_step(agent, adam, minibatch, 0.1, 0.0, 1e-5, ppo.Args(max_grad_norm=number))
        used[number] = adam.moment1 / 0.1
    free = used[INF]
    assert free.norm() > 0.5
    assert used[limit].norm().item() == pytest.approx(min(limit, free.norm().item()), rel=1e-4)
    torch.testing.assert_close(used[limit] / used[limit].norm(), free / free.norm(), rtol=1e-4, atol=1e-6)


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([(4,), (50,), (3, 7)]), st.sampled_from([0, 3, -1000]))
@settings(max_examples=40, deadline=None)
def test_core_7_and_extra_3_normalize(seed, population, shape, offset):
    """Along the last dimension, by the population's deviation or by the sample's."""
    advantages = offset + torch.randn(shape, generator=generator(seed))
    ours = ppo.normalize(advantages, ppo.Args(population_std=population)).double().numpy()
    numbers = advantages.double().numpy()
    mean, std = numbers.mean(-1, keepdims=True), numbers.std(-1, ddof=0 if population else 1, keepdims=True)
    np.testing.assert_allclose(ours, (numbers - mean) / (std + 1e-8), rtol=1e-3, atol=1e-3 if offset == -1000 else 1e-5)


def test_cuda_graph(monkeypatch):
    """With a graph that replays on the CPU: every call gives the outputs for its own inputs, and keeps them.

    The first three calls are ordinary ones, and the fourth records.
    """
    calls = []

    def double(table, minibatch, factor, args):
        calls.append((table, minibatch, factor, args))
        return 2 * table, factor * minibatch[0] + minibatch[1]

    class Graph:
        def replay(self):
            *_, (table, minibatch, factor, _) = calls
            graph.outputs[0].copy_(2 * table), graph.outputs[1].copy_(factor * minibatch[0] + minibatch[1])

    class Recording:
        def __init__(self, graph):
            assert isinstance(graph, Graph)

        def __enter__(self):
            assert len(calls) == 3

        def __exit__(self, *error):
            """Recording computes nothing."""
            for output in calls[-1][0], *calls[-1][1]:
                output.fill_(math.nan)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph, raising=False)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    graph, kept = pool.CudaGraph(double), []
    for number in range(7):
        table, *minibatch = torch.randn(3, 4, generator=generator(number)).unbind()
        factor = torch.tensor(float(number))
        outputs = graph(table, tuple(minibatch), factor, ppo.Args())
        kept.append((outputs, (2 * table, number * minibatch[0] + minibatch[1])))
    for outputs, expected in kept:
        torch.testing.assert_close(outputs, expected)
    assert len(calls) == 4 and graph.calls == 7


@pytest.mark.parametrize("module", ["ppo_atari"])  # the others have it in the same words (test_same_lines.py)
def test_freed_memory_is_kept(module):
    """What a tensor has freed a later one gets without page faults; the system would fault on each of 10,000 pages.

    It takes some rounds until the heap has holes of the right size.
    """
    program = f"""
import resource, torch, {module}
{module}.keep_freed_memory()
faults = [(torch.ones(10_000_000), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)[1] for _ in range(40)]
print(faults[-1] - faults[-11])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        assert int(done.stdout) < 1000, done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_memory_under_another_c_library(monkeypatch):
    """Where there is no glibc nothing is done, and nothing fails."""
    asked = []

    def refuse(name):
        asked.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ppo.ctypes, "CDLL", refuse)
    ppo.keep_freed_memory()
    assert asked == ["libc.so.6"]


# The rollout ----------------------------------------------------------------------------------------------------------
def watch(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A policy and a value function to which every image of the stack matters, in its place."""
    assert obs.dtype == torch.uint8
    brightness = obs.float().mean((2, 3)) / 64  # [B, frame_stack]
    weights = torch.arange(brightness.shape[1] * (ACTIONS + 1)).reshape(-1, ACTIONS + 1).cos()
    outputs = brightness @ weights
    return outputs[:, :ACTIONS], outputs[:, ACTIONS]


def play(rollouts: int, script=ppo, **changed) -> tuple[list[ppo.Rollout], Tape, ppo.Args]:
    """Rollouts in a row by watch()."""
    args = script.Args(**({"num_envs": 3, "num_steps": 12} | changed))
    envs, found = Tape(args), []
    obs = torch.from_numpy(envs.reset(seed=5)).clone()
    torch.manual_seed(1)
    for _ in range(rollouts):
        found.append(script.collect_rollout(watch, envs, obs, args))
        obs = found[-1].obs[-1]
    return found, envs, args


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("frame_stack", [4, 1])
def test_core_1_every_row_is_what_happened(script, frame_stack):
    """Observations, outputs, actions, rewards and ends of two rollouts, the second going on where the first stopped."""
    rollouts, envs, args = play(2, script, frame_stack=frame_stack)
    seen, all_logits = envs.seen(), []
    assert len(seen) == 25
    for number, rollout in enumerate(rollouts):
        start = 12 * number
        assert rollout.obs.shape == (13, 3, args.frame_stack, 84, 84) and rollout.obs.dtype == torch.uint8
        np.testing.assert_array_equal(rollout.obs.numpy(), seen[start : start + 13])
        ends = []
        for step, happened in enumerate(envs.steps[start : start + 12]):
            logits, values = watch(torch.from_numpy(seen[start + step]))
            log_probs = logits.log_softmax(-1).gather(1, rollout.actions[step][:, None])[:, 0]
            torch.testing.assert_close((rollout.log_probs[step], rollout.values[step]), (log_probs, values))
            np.testing.assert_array_equal(rollout.actions[step].numpy(), happened["actions"])
            np.testing.assert_array_equal(rollout.rewards[step], happened["rewards"])
            np.testing.assert_array_equal(rollout.dones[step], happened["dones"])
            ends += [(step, end) for end in happened["ends"]]
            all_logits.append(logits)
        assert [(step, id(end)) for step, end in rollout.ends] == [(step, id(end)) for step, end in ends]
        assert rollout.values.shape == (13, 3) and rollout.log_probs.shape == (12, 3)
        torch.testing.assert_close(rollout.values[12], watch(torch.from_numpy(seen[start + 12]))[1])
        dtypes = [rollout.actions.dtype, rollout.log_probs.dtype, rollout.values.dtype]
        assert dtypes == [torch.int64, torch.float32, torch.float32]
        assert (rollout.rewards.dtype, rollout.dones.dtype) == (np.float32, bool)
        assert rollout.dones.any(0).all() and not rollout.dones.all()
        assert 3 < len(rollout.ends) < rollout.dones.sum()  # the others were lost lives
    assert (torch.cat(all_logits).std(0) > 0.1).all()  # what the policy says depends on what it sees


@pytest.mark.parametrize("script", SCRIPTS)
def test_greedy_rollouts_take_the_most_probable_action(script):
    """Also where a sample would nearly always be another one."""
    args = script.Args(num_envs=2, num_steps=40)
    envs = Tape(args)
    obs = torch.from_numpy(envs.reset(1)).clone()
    logits = torch.tensor([[0.0, 0.01, 0.0], [0.02, 0.01, 0.0]])
    for greedy in (True, False):
        rollout = script.collect_rollout(lambda obs: (logits, torch.zeros(2)), envs, obs, args, greedy=greedy)
        assert torch.equal(rollout.actions, torch.tensor([1, 0]).expand(40, 2)) == greedy


def test_actions_follow_the_policy():
    """Frequencies of single actions, and of pairs one after the other, by chi-square tests; logits need no scale."""
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.4, 0.35, 0.25]])
    logits = probabilities.log() + torch.tensor([[50.0], [-50.0]])
    args = ppo.Args(num_envs=2, num_steps=1500, frame_stack=1)
    envs = Tape(args)
    envs.reset(seed=1)
    torch.manual_seed(1)
    obs = torch.zeros(2, 1, 84, 84, dtype=torch.uint8)
    rollout = ppo.collect_rollout(lambda obs: (logits, torch.zeros(2)), envs, obs, args)
    log_probs = probabilities.log().expand(1500, 2, 3).gather(2, rollout.actions[:, :, None])[:, :, 0]
    torch.testing.assert_close(rollout.log_probs, log_probs, rtol=1e-4, atol=1e-5)
    actions, (first, second) = rollout.actions.numpy(), probabilities.double().numpy()
    # In one of 10,000 seeds a chi-square value of 2 (or 8) degrees of freedom is above 18.4 (or 31.8).
    for env, single in enumerate((first, second)):
        assert chi_square(actions[:, env], single) < 18.4
        assert chi_square(3 * actions[:-1, env] + actions[1:, env], np.outer(single, single).ravel()) < 31.8
    assert chi_square(3 * actions[:, 0] + actions[:, 1], np.outer(first, second).ravel()) < 31.8
    assert chi_square(actions[:, 0], second) > 100  # the bound means something


def chi_square(samples: np.ndarray, probabilities: np.ndarray) -> float:
    """Distance of the frequencies of 0, 1, 2, ... from their expectations."""
    expected = len(samples) * probabilities
    counts = np.bincount(samples, minlength=len(probabilities))
    return float(((counts - expected) ** 2 / expected).sum())


# The update -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_those_of_the_article(script):
    args = script.Args()
    expected = {"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4,
                "anneal_lr": True, "clip_coef": 0.1, "ent_coef": 0.01, "vf_coef": 0.5, "gamma": 0.99,
                "gae_lambda": 0.95, "max_grad_norm": 0.5, "adam_eps": 1e-5, "frame_stack": 4, "frame_skip": 4,
                "noop_max": 30, "total_timesteps": 10_000_000}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.num_updates == 9765  # [extra-11]
    assert script.Args(total_timesteps=2047).num_updates == 1


def returns_by_definition(rewards, values, dones, gamma, gae_lambda) -> np.ndarray:
    """Value targets [T, N]: V(s_t) and the sum of (gamma lambda)^k delta_t+k up to the episode's or rollout's end."""
    found = np.zeros(rewards.shape)
    for start, env in np.ndindex(*rewards.shape):
        found[start, env], weight = values[start, env], 1.0
        for t in range(start, len(rewards)):
            following = 0.0 if dones[t, env] else values[t + 1, env]
            found[start, env] += weight * (rewards[t, env] + gamma * following - values[t, env])
            weight *= gamma * gae_lambda
            if dones[t, env]:
                break
    return found


UPDATE_SWITCHES = [{}, {"clip_reward": False}, {"gae_lambda": 0.5, "gamma": 0.9}, {"bootstrap_truncated": True},
                   {"frame_stack": 1, "shared_network": False}]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("changed", UPDATE_SWITCHES, ids=str)
def test_every_sample_is_learned_from_with_its_own_numbers(spy, script, changed):
    """[core-5] [atari-6] [extra-14] With a step's observation go its action, value and value target."""
    run = spy(script=script, **({"num_steps": 12, "gae_lambda": 0.8} | changed))
    args, (envs,) = run.args, run.envs
    seen = envs.seen()
    assert sum(map(len, run.last_values)) >= 3
    for number, rollout in enumerate(run.rollouts):
        np.testing.assert_array_equal(rollout.obs.numpy(), seen[12 * number :][:13])
        rewards = rollout.rewards.astype(float)
        rewards = np.sign(rewards) if args.clip_reward else rewards
        if args.bootstrap_truncated:
            truncated = [(step, end.env) for step, end in rollout.ends if end.truncated]
            for (step, env), value in zip(truncated, run.last_values[number], strict=True):
                rewards[step, env] += args.gamma * value
        np.testing.assert_allclose(run.gae_rewards[number].numpy(), rewards, rtol=1e-5, atol=1e-6)
        values = rollout.values.double().numpy()
        targets = returns_by_definition(rewards, values, rollout.dones, args.gamma, args.gae_lambda)
        place = {rollout.obs[t, env].numpy().tobytes(): (t, env) for t in range(12) for env in range(2)}
        assert len(place) == 24
        for step in run.update(number):
            for row in range(12):
                t, env = place[step["obs"][row].numpy().tobytes()]
                assert step["actions"][row] == rollout.actions[t, env]
                ours = [step[name][row].item() for name in ("log_probs", "values", "returns")]
                expected = [rollout.log_probs[t, env].item(), values[t, env], targets[t, env]]
                assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_extra_14_a_small_limit_cuts_games(spy, script):
    """Games of at most 20 frames, five steps, by the emulator: where they are cut, the reward gains the last value."""
    switches = {"env_id": "Pong", "max_game_frames": 20, "noop_max": 1, "updates": 2}
    for bootstrap in (False, True):
        run = spy(script=script, emulator=True, bootstrap_truncated=bootstrap, **switches)
        for rollout, rewards, values in zip(run.rollouts, run.gae_rewards, run.last_values, strict=True):
            expected = rollout.rewards.astype(float)
            assert len(rollout.ends) >= 2 and not expected.any()
            for (step, end), value in zip(rollout.ends, values, strict=True):
                expected[step, end.env] += 0.99 * value if bootstrap else 0
            np.testing.assert_allclose(rewards.numpy(), expected, rtol=1e-5, atol=1e-7)
            assert bool(rewards.any()) == bootstrap
            assert rollout.dones.sum() == len(rollout.ends)


@pytest.mark.parametrize("replacement", [False, True])
def test_core_6_an_epoch_uses_every_sample_once(spy, replacement):
    run = spy(minibatch_replacement=replacement, updates=2)
    for number in range(2):
        samples = {row.numpy().tobytes() for row in run.rollouts[number].obs[:-1].flatten(0, 1)}
        steps = run.update(number)
        epochs = [torch.cat([step["obs"] for step in steps[i : i + 2]]) for i in (0, 2)]
        for epoch in epochs:
            drawn = [row.numpy().tobytes() for row in epoch]
            assert len(drawn) == len(samples) == 16 and set(drawn) <= samples
            assert (len(set(drawn)) == 16) != replacement
        assert not torch.equal(epochs[0], epochs[1])  # a fresh permutation
    assert all(len(step["obs"]) == 8 for step in run.steps)


@pytest.mark.parametrize(
    ("changed", "level"), [({}, "minibatch"), ({"norm_adv_per_batch": True}, "batch"), ({"norm_adv": False}, "none")]
)
@pytest.mark.parametrize("population", [True, False])
def test_core_7_normalization(spy, changed, level, population):
    """For each minibatch, once for the whole rollout, or not at all."""
    run = spy(population_std=population, updates=2, **changed)
    for number in range(2):
        epoch = run.update(number)[:2]
        raw = [(step["returns"] - step["values"]).double().numpy() for step in epoch]
        ddof = 0 if population else 1
        for step, numbers in zip(epoch, raw, strict=True):
            sample = {"minibatch": numbers, "batch": np.concatenate(raw)}.get(level)
            if sample is not None:
                numbers = (numbers - sample.mean()) / sample.std(ddof=ddof)
            np.testing.assert_allclose(step["advantages"].numpy(), numbers, rtol=1e-4, atol=1e-5)


def test_core_4_and_aux_1_annealing(spy):
    """The last update has 1 / num_updates of the first one's rate, and of its clip range if that is asked for."""
    fractions = [1, 0.75, 0.5, 0.25]
    run = spy(updates=4, update_epochs=1)
    assert run.learning_rates[::2] == run.learning_rates[1::2] == pytest.approx([2.5e-4 * f for f in fractions])
    assert [row["charts/learning_rate"] for row in run.updates] == run.learning_rates[::2]
    assert {step["clip_coef"] for step in run.steps} == {0.1}
    assert [step["adam_steps"] for step in run.steps] == list(range(1, 9))
    run = spy(updates=4, update_epochs=1, anneal_lr=False, anneal_clip=True)
    assert set(run.learning_rates) == {2.5e-4}
    assert [step["clip_coef"] for step in run.steps[::2]] == pytest.approx([0.1 * f for f in fractions])


@pytest.mark.parametrize("eps_hat", [True, False])
def test_core_3_and_extra_1_epsilon(spy, eps_hat):
    run = spy(updates=2, adam_eps=1e-4, adam_eps_hat=eps_hat)
    expected = [1e-4 * (1 if eps_hat else math.sqrt(1 - 0.999**step)) for step in range(1, 9)]
    assert [step["epsilon"] for step in run.steps] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_aux_3_early_stopping(spy, script, monkeypatch):
    """After an epoch whose mean KL divergence (k3) is above the limit, here the third: 0, 0 and 0.022.

    The mean over all three is below the limit, and so is that of the third epoch's first half.
    """
    usual, done = ORIGINALS[script]["gradient_step"], []

    def gradient_step(*inputs):
        terms, log_ratio = usual(*inputs)
        done.append(torch.full_like(log_ratio, 0.28 if len(done) == 5 else 0.0))
        return terms, done[-1]

    monkeypatch.setitem(ORIGINALS[script], "gradient_step", gradient_step)
    for limit, epochs in ((0.015, 3), (0.03, 5)):
        done.clear()
        run = spy(script=script, updates=1, update_epochs=5, target_kl=limit)
        assert len(done) == 2 * epochs
        expected = np.mean([step["terms"].numpy() for step in run.steps], axis=0)
        assert run.updates[0]["losses/value_loss"] == pytest.approx(expected[1], rel=1e-5)


# Sanity rules of the article, and what is logged ----------------------------------------------------------------------
RATIO_SWITCHES = {
    "default": {},
    "separate": {"shared_network": False},
    "amp": {"script": pool, "amp": True, "updates": 1},
}


@pytest.mark.parametrize("changed", RATIO_SWITCHES.values(), ids=RATIO_SWITCHES)
def test_ratio_is_1_in_the_first_minibatch_of_every_update(spy, changed):
    """But for rounding, as batches have other shapes in rollout and training; with --amp the logits are rounded more.

    They are of the order of 0.1 here, and so 2^-8 of that.
    """
    run = spy(learning_rate=1e-3, **changed)
    for number in range(len(run.rollouts)):
        first, second, *_ = run.update(number)
        assert first["log_ratio"].abs().max() < (1e-3 if "amp" in changed else 1e-5)
        assert second["log_ratio"].abs().max() > 2e-3


def test_core_12_metrics_are_means_over_all_minibatches(spy):
    run = spy(clip_coef=0.002, learning_rate=1e-3)
    for number, row in enumerate(run.updates):
        steps = run.update(number)
        means = np.mean([step["terms"].numpy() for step in steps], axis=0)
        ours = [row[f"losses/{name}"] for name in ("policy_loss", "value_loss", "entropy")]
        assert ours == pytest.approx(means.tolist(), rel=1e-5, abs=1e-7)
        x = torch.cat([step["log_ratio"] for step in steps]).double().numpy()
        assert row["losses/old_approx_kl"] == pytest.approx(np.mean(-x), rel=1e-3, abs=1e-6)
        assert row["losses/approx_kl"] == pytest.approx(np.mean(np.exp(x) - 1 - x), rel=1e-3, abs=1e-6)
        assert row["losses/official_approx_kl"] == pytest.approx(np.mean(x**2) / 2, rel=1e-3, abs=1e-6)
        assert row["losses/clipfrac"] == pytest.approx(np.mean(np.abs(np.exp(x) - 1) > 0.002), abs=1e-6)
        returns, values = (torch.cat([step[key] for step in steps[:2]]) for key in ("returns", "values"))
        explained = (1 - (returns - values).var() / returns.var()).item()
        assert row["losses/explained_variance"] == pytest.approx(explained, abs=1e-4)
    assert 0 < run.updates[-1]["losses/clipfrac"] < 1
    assert [row["global_step"] for row in run.updates] == [16, 32, 48]


def test_games_are_logged_at_the_steps_where_they_ended(spy):
    """global_step counts the steps of all environments; returned is the mean of the last games."""
    run = spy(num_envs=3, num_steps=10, num_minibatches=2, updates=3)
    expected = []
    for step, happened in enumerate(run.envs[0].steps):
        expected += [(3 * (step + 1), end.episodic_return, end.length) for end in happened["ends"]]
    keys = "global_step", "charts/episodic_return", "charts/episodic_length"
    assert [tuple(row[key] for key in keys) for row in run.metrics if keys[1] in row] == expected
    assert len(expected) > 5
    assert run.result["episodic_return"] == pytest.approx(np.mean([game[1] for game in expected]))
    assert run.result["global_step"] == 90


def test_a_constant_return_has_no_explained_variance(spy, monkeypatch):
    """It is logged as null and does not end the training."""
    ones = lambda rewards, values, *rest: (1 - values[:-1], torch.ones_like(rewards))  # noqa: E731
    monkeypatch.setitem(ORIGINALS[ppo], "compute_gae", ones)
    run = spy(updates=2)
    assert [row["losses/explained_variance"] for row in run.updates] == [None, None]


# Seeds ----------------------------------------------------------------------------------------------------------------
def without_clock(rows: list[dict]) -> list[dict]:
    """Metrics without what depends on the machine's speed."""
    return [{key: row[key] for key in row if key not in ("wall_time", "charts/SPS")} for row in rows]


def test_seeds(spy):
    """The same seed gives the same run to the last bit, another one another run; the environments get it too."""
    first, again, other = spy(), spy(), spy(seed=7)
    assert without_clock(first.metrics) == without_clock(again.metrics)
    assert without_clock(first.metrics) != without_clock(other.metrics)
    assert [run.envs[0].starts for run in (first, again, other)] == [[(1, 0)], [(1, 0)], [(7, 0)]]
    states = [torch.load(run.path / "checkpoint.pt", weights_only=True) for run in (first, again, other)]
    assert torch.equal(states[0]["moments"], states[1]["moments"])
    assert not torch.equal(states[0]["moments"], states[2]["moments"])


def test_cudagraphs_without_a_gpu_changes_nothing(spy):
    """Nor does cuda, where there is none."""
    runs = spy(script=pool, cuda=False), spy(script=pool, cuda=False, cudagraphs=True)
    assert runs[0].updates[-1]["losses/value_loss"] == pytest.approx(runs[1].updates[-1]["losses/value_loss"], rel=1e-5)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_all_atari_scripts_compute_the_same(spy, script):
    """In the same environments, from the same seed: but for rounding, as the ranks' normalization is another sum."""
    one, other = spy(), spy(script=script)
    for row, expected in zip(other.updates, one.updates, strict=True):
        for name, value in expected.items():
            if name.startswith("losses/"):
                assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


# Training as a whole --------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", [math.nan, INF])
def test_diverged_training_keeps_the_last_checkpoint(monkeypatch, tmp_path, script, value):
    """The rewards of update 4 are no numbers: said is where that was, and what was saved after update 2 stays."""
    monkeypatch.setattr(script, "make_envs", lambda args: Tape(args, lambda step: value if step == 8 * 3 + 5 else 1.0))
    args = script.Args(num_envs=2, num_steps=8, num_minibatches=2, update_epochs=1, total_timesteps=6 * 16,
                    checkpoint_interval=2, runs_dir=str(tmp_path))  # fmt: skip
    with pytest.raises(
        FloatingPointError, match=r"^in update 4, a reward \[step, env\] is not finite at \[5, 0\]"
    ) as error:
        script.train(args)
    (path,) = tmp_path.iterdir()
    assert str(path) in str(error.value)
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    assert state["counts"][:2].tolist() == [2, 4]
    for tensor in [*state["agent"].values(), state["moments"]]:
        assert tensor.isfinite().all()
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert max(row["global_step"] for row in rows) == 3 * 16


class Signs:
    """One quarter of the image is white; the next step is the time to name it, for a reward of 1. Games of 16 steps.

    What must be known is thus in the last image but one.
    """

    def __init__(self, args):
        self.num_envs, self.observation_space, self.action_space = args.num_envs, spaces(4)[0], Discrete(4)
        self.obs = np.zeros((args.num_envs, 4, 84, 84), np.uint8)

    def show(self):
        """Another quarter."""
        self.shown = self.shown[1:] + [self.random.integers(4, size=self.num_envs)]
        frames = np.zeros((self.num_envs, 2, 42, 2, 42), np.uint8)
        frames[range(self.num_envs), self.shown[1] // 2, :, self.shown[1] % 2] = 255
        self.obs = np.concatenate([self.obs[:, 1:], frames.reshape(self.num_envs, 1, 84, 84)], 1)
        return self.obs

    def reset(self, seed, first_step=0):
        """Begins."""
        self.random, self.shown = np.random.default_rng(seed), [None, np.zeros(self.num_envs, int)]
        self.steps, self.returns = 0, np.zeros(self.num_envs)
        return self.show()

    def step(self, actions):
        """Compares."""
        rewards = (actions == self.shown[0]).astype(float)
        self.steps, self.returns = self.steps + 1, self.returns + rewards
        over, ends = np.full(self.num_envs, self.steps % 16 == 0), []
        if over[0]:
            ends = [ppo.EpisodeEnd(i, total, 16, self.obs[i], False) for i, total in enumerate(self.returns)]
            self.returns = np.zeros(self.num_envs)
        return self.show(), rewards, over, ends

    def close(self):
        """Nothing is open."""


def test_learns_to_see(monkeypatch, tmp_path):
    """At least 14.5 of 16 points in a game on average, within 20 updates of 128 steps; guessing gives 4.

    Only the learning rate, gamma and the sizes are not the usual ones. KL divergences are larger than in an Atari game,
    as all that is to be learned is learned in a few updates.
    """
    args = ppo.Args(num_envs=16, num_steps=8, update_epochs=2, total_timesteps=20 * 128, learning_rate=1e-3,
                    gamma=0.0, runs_dir=str(tmp_path))  # fmt: skip
    means, divergences, end_update = [], [], ppo.Run.end_update

    def spy(run, ends, values):
        end_update(run, ends, values)
        divergences.append(values["losses/approx_kl"])
        if ends:
            means.append(np.mean(run.returns[-16:]))
            ppo.SIGNALS[:] = ["success"] if means[-1] >= 14.5 else []

    monkeypatch.setattr(ppo, "make_envs", Signs)
    monkeypatch.setattr(ppo, "SIGNALS", [])
    monkeypatch.setattr(ppo.Run, "end_update", spy)
    ppo.train(args)
    assert means[0] < 8 and max(means) >= 14.5
    assert max(divergences) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, {"amp": True}], ids=str)
def test_compiled_training_is_the_same_training(monkeypatch, tmp_path, changed):
    """Two updates with --compile end at the parameters of eager mode, but for rounding: sums in another order.

    Also the ratio of the first minibatch is 1. With --amp compiled code keeps numbers in float32 that eager mode rounds
    to bfloat16, and so the bounds are those of test_amp_moves_the_parameters_nearly_the_same_way.
    """
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 32}
    args = pool.Args(learning_rate=1e-3, anneal_clip=True, runs_dir=str(tmp_path), **sizes, **changed)
    log_ratios, states = {False: [], True: []}, []

    def recorded(improve, found):
        def improve_and_record(*inputs):
            terms, log_ratio = improve(*inputs)
            found.append(log_ratio.clone())
            return terms, log_ratio

        return improve_and_record

    torch_compile = torch.compile
    monkeypatch.setattr(pool, "make_envs", Tape)
    for compiled in (False, True):
        found = log_ratios[compiled]
        with monkeypatch.context() as patch:
            if compiled:
                patch.setattr(torch, "compile", lambda step, f=found, **how: recorded(torch_compile(step, **how), f))
            else:
                patch.setattr(pool, "gradient_step", recorded(pool.gradient_step, found))
            result = pool.train(replace(args, compile=compiled))
        states.append(torch.load(result["run_dir"] + "/checkpoint.pt", weights_only=True))
        assert len(found) == 8
        for first in (found[0], found[4]):
            assert first.abs().max() < (1e-3 if changed else 1e-5)
    torch.manual_seed(1)
    start = pool.Agent(*spaces(4), args).state_dict()
    eager, compiled = (
        torch.cat([(state["agent"][name] - start[name]).flatten() for name in start]) for state in states
    )
    difference = 0.2 if changed else 1e-2
    assert eager.abs().max() > 2e-3
    assert (compiled - eager).norm() < difference * eager.norm()
    assert (states[0]["moments"] - states[1]["moments"])[0].norm() < difference * states[0]["moments"][0].norm()
    if not changed:
        for ours, theirs in zip(log_ratios[True], log_ratios[False], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
