"""What ppo_procgen.py adds: network, reward scaling, EnvPool's Procgen, and a run of it as its user sees it."""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import refusal
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
    problems,
    train,
    without_clock,
)

import ppo_procgen as ppo

pytest.importorskip("envpool")  # which has the games, and exists for Linux only
SPACES = Box(0, 255, (3, 64, 64), np.uint8), Discrete(15)
BATCH = 64  # samples in one rollout of a small run


def small(updates: int, **changed) -> ppo.Args:
    """Settings of a short run, with updates of 64 samples, of a game whose first episodes are short."""
    sizes = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "env_id": "BigfishEasy-v0"}
    sizes |= {"total_timesteps": updates * BATCH}
    return ppo.Args(**(sizes | changed))


def images(batch: int, seed=0) -> torch.Tensor:
    """Random images [batch, 3, 64, 64]."""
    return torch.randint(256, (batch, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# The network ----------------------------------------------------------------------------------------------------------
def pooled(x: np.ndarray, before: int) -> np.ndarray:
    """Maxima over windows of 3 x 3 pixels, two apart, the first of which begins that many pixels before the image."""
    size = x.shape[-1] // 2
    result = np.empty((*x.shape[:-2], size, size), x.dtype)
    for i in range(size):
        for j in range(size):
            rows, columns = (slice(max(0, 2 * k - before), 2 * k - before + 3) for k in (i, j))
            result[..., i, j] = x[..., rows, columns].max((-2, -1))
    return result


@pytest.mark.parametrize("same_pooling", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_procgen_1_network(same_pooling, channels_last):
    """[extra-38] [extra-39] By definition: three sequences, each of a convolution, pooling and two residual blocks."""
    torch.manual_seed(1)
    args = ppo.Args(same_pooling=same_pooling, channels_last=channels_last, glorot_init=False, orthogonal_init=False)
    agent, obs = ppo.Agent(*SPACES, args), images(3)
    assert sum(p.numel() for p in agent.parameters()) == 626_256  # as the recorded network has
    with torch.no_grad():
        logits, values = agent(obs)
        x = obs.double() / 255
        layers = agent.double().network
        for convolution, blocks in zip(layers.convolutions, layers.blocks, strict=True):
            x = torch.from_numpy(pooled(convolution(x).numpy(), 0 if same_pooling else 1))
            for block in blocks:
                x = x + block.convolution2(F.relu(block.convolution1(F.relu(x))))
        assert x.shape == (3, 32, 8, 8)
        order = [(c, i, j) for i in range(8) for j in range(8) for c in range(32)]
        x = torch.stack([x[:, c, i, j] for c, i, j in order], 1) if channels_last else x.flatten(1)
        features = F.relu(layers.linear(F.relu(x)))
        expected = agent.actor(features), agent.critic(features)[:, 0]
    assert (logits.shape, values.shape) == ((3, 15), (3,))
    torch.testing.assert_close((logits.double(), values.double()), expected, rtol=1e-4, atol=1e-5)


def inner_layers(agent: ppo.Agent) -> list[torch.nn.Module]:
    """All layers but the two heads."""
    kinds = torch.nn.Conv2d, torch.nn.Linear
    return [layer for layer in agent.network.modules() if isinstance(layer, kinds)]


@pytest.mark.parametrize("glorot_init", [True, False])
def test_extra_37_initialization(glorot_init):
    """Uniform within sqrt(6 / (inputs + outputs)) and biases 0; off, within sqrt(1 / inputs), and biases as well."""
    agent = ppo.Agent(*SPACES, ppo.Args(glorot_init=glorot_init))
    layers = inner_layers(agent)
    assert len(layers) == 16
    for layer in layers:
        window = layer.weight[0, 0].numel() if layer.weight.dim() == 4 else 1
        inputs, outputs = layer.weight.shape[1] * window, layer.weight.shape[0] * window
        limit = math.sqrt(6 / (inputs + outputs)) if glorot_init else math.sqrt(1 / inputs)
        assert 0.95 * limit < layer.weight.abs().max() <= limit
        assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
        assert bool(layer.bias.any()) != glorot_init
    for head, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):  # [core-2]
        matrix = head.weight.detach() / gain
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)


def test_amp_gives_nearly_the_same_output():
    """bfloat16 rounds to 2^-8 of a number; sixteen layers with skips add some of that up."""
    agents = []
    for amp in (False, True):
        torch.manual_seed(1)
        agents.append(ppo.Agent(*SPACES, ppo.Args(amp=amp)))
        agents[-1].actor.weight.data *= 100
    with torch.no_grad():
        exact, rounded = (agent(images(8)) for agent in agents)
    for ours, expected in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == expected.shape
        assert 1e-4 < (ours - expected).norm() / expected.norm() < 0.05


# Reward scaling -------------------------------------------------------------------------------------------------------
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12), st.sampled_from([0.0, 0.9, 0.99, 1.0]))
@settings(max_examples=50, deadline=None)
def test_procgen_2_rewards_by_definition(seed, num_envs, num_steps, reward_gamma):
    """[extra-40] Divided by the deviation of all discounted returns so far, with a discount factor of their own."""
    random = np.random.default_rng(seed)
    rewards = random.exponential(5, (num_steps, num_envs)).astype(np.float32)
    dones = random.random((num_steps, num_envs)) < 0.3
    args, stats, returns = ppo.Args(reward_gamma=reward_gamma, gamma=0.5), ppo.RunningMeanStd(()), np.zeros(num_envs)
    half = num_steps // 2  # the state goes on from one rollout to the next
    parts = [(rewards[:half], dones[:half]), (rewards[half:], dones[half:])]
    ours = np.concatenate([ppo.normalize_rewards(*part, returns, stats, args) for part in parts])

    seen, current = [np.zeros(num_envs)], np.zeros(num_envs)
    expected = np.empty(rewards.shape)
    for step in range(num_steps):
        current = reward_gamma * current + rewards[step]
        seen.append(current)
        # The first entry stands for the statistics before anything was seen: mean 0, variance 1 and a weight of 1e-4.
        values, count = np.concatenate(seen[1:]), num_envs * (step + 1)
        mean = values.sum() / (count + 1e-4)
        variance = (1e-4 * (1 + mean**2) + np.square(values - mean).sum()) / (count + 1e-4)
        expected[step] = np.clip(rewards[step] / np.sqrt(variance + 1e-8), -10, 10)
        current = np.where(dones[step], 0, current)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(returns, current, rtol=1e-5)
    off = ppo.Args(norm_reward=False)
    assert ppo.normalize_rewards(rewards, dones, returns, stats, off) is rewards


def test_procgen_2_clipping():
    """Without it, the very first reward is much too large."""
    for clip_reward in (True, False):
        args, returns = ppo.Args(clip_reward=clip_reward), np.zeros(1)
        scaled = ppo.normalize_rewards(np.ones((1, 1)), np.zeros((1, 1), bool), returns, ppo.RunningMeanStd(()), args)
        assert scaled[0, 0] == (10 if clip_reward else pytest.approx(1 / np.sqrt(2e-4), rel=0.01))


# The environments -----------------------------------------------------------------------------------------------------
def test_every_row_is_a_transition_that_happened():
    """[core-1] Beside it, the same games are played with EnvPool's own autoreset, and its reset steps are left out."""
    import envpool

    args = ppo.Args(env_id="BigfishEasy-v0", num_envs=6, num_steps=200)
    envs = ppo.make_envs(args)
    obs = torch.from_numpy(envs.reset(5).copy())
    assert obs.shape == (6, 3, 64, 64) and obs.dtype == torch.uint8
    torch.manual_seed(1)
    rollout = ppo.collect_rollout(lambda x: (torch.zeros(len(x), 15), torch.zeros(len(x))), envs, obs, args)
    pool = envpool.make_gymnasium(args.env_id, num_envs=6, seed=5)
    seen, ends = [[frame] for frame in pool.reset()[0]], []
    taken, dones = np.zeros(6, int), np.zeros(6, bool)
    total, length = np.zeros(6), np.zeros(6, int)
    while taken.min() < 200:
        resetting = dones
        actions = rollout.actions.numpy()[np.minimum(taken, 199), range(6)]
        frames, rewards, terminated, truncated, _ = pool.step(actions)
        dones = terminated | truncated
        for env in range(6):
            if taken[env] == 200:
                continue
            if resetting[env]:
                seen[env][-1] = frames[env]  # what is shown after a done is the next episode's start
                continue
            step = taken[env]
            assert rollout.rewards[step, env] == rewards[env] and rollout.dones[step, env] == dones[env]
            seen[env].append(frames[env])
            total[env], length[env] = total[env] + rewards[env], length[env] + 1
            if dones[env]:
                ends.append((step, env, total[env], length[env], bool(truncated[env] and not terminated[env])))
                total[env], length[env] = 0, 0
            taken[env] += 1
    for env in range(6):
        until = 201 - rollout.dones[-1, env]  # whose reset step comes later
        np.testing.assert_array_equal(rollout.obs[:until, env].numpy(), np.stack(seen[env][:until]))
    found = [(step, end.env, end.episodic_return, end.length, end.truncated) for step, end in rollout.ends]
    assert found == sorted(ends) and len(ends) >= 5
    assert sum(end.episodic_return for _, end in rollout.ends) > 0


def test_levels():
    """One level looks the same at every start; of all there are, hardly two starts are alike."""
    for num_levels, start_level, most in ((1, 0, 1), (1, 7, 1), (0, 0, 99)):
        envs = ppo.make_envs(ppo.Args(num_envs=6, num_levels=num_levels, start_level=start_level))
        starts = {frame.tobytes() for seed in (1, 2) for frame in envs.reset(seed)}
        assert len(starts) <= most and (most == 1 or len(starts) > 8)
    one, other = (ppo.make_envs(ppo.Args(num_envs=1, num_levels=1, start_level=level)).reset(1) for level in (0, 7))
    assert not np.array_equal(one, other)


def test_a_resumed_run_begins_other_episodes():
    envs = ppo.make_envs(ppo.Args(num_envs=4))
    starts = [envs.reset(1, first_step).copy() for first_step in (0, 0, 4096)]
    assert np.array_equal(starts[0], starts[1]) and not np.array_equal(starts[0], starts[2])


def test_without_qt(monkeypatch):
    """Neither as a package of Python's nor in the system: what is missing is said in one line."""

    def refuse(name, mode):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ppo.ctypes, "CDLL", refuse)
    with pytest.raises(ppo.InputError, match=r"^the games need Qt 5 \(pip install pyqt5-qt5\): OSError"):
        ppo.make_envs(ppo.Args(num_envs=1))


# A run ----------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_run(capfd):
    """Files, seeds, a kill before the first checkpoint, resuming, and playing."""
    first, again, other = (train(small(4, seed=seed, runs_dir=name)) for seed, name in ((1, "a"), (1, "b"), (2, "c")))
    assert files(first).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert json.loads((first / "config.json").read_text()).items() >= asdict(small(4, runs_dir="a")).items()
    rows = metrics(first)
    assert {frozenset(row) for row in rows} == {frozenset(EPISODE), frozenset(UPDATE)}
    assert {row["charts/learning_rate"] for row in rows if row.keys() == UPDATE} == {5e-4}
    assert without_clock(first) == without_clock(again) != without_clock(other)
    assert_same_agent(checkpoint(first)["agent"], checkpoint(again)["agent"])
    assert problems(capfd.readouterr().err) == []

    original = ppo.Run.end_update
    with pytest.MonkeyPatch.context() as patch:

        def end_update(run, *given):
            original(run, *given)
            if run.update == 2:
                raise Killed

        patch.setattr(ppo.Run, "end_update", end_update)
        with pytest.raises(Killed):
            ppo.train(small(4, runs_dir="killed"))
    (killed,) = Path("killed").iterdir()
    assert checkpoint(killed)["update"] == 0
    assert ppo.main(["--resume", str(killed)]) == 0
    assert without_clock(killed) == without_clock(first)
    capfd.readouterr()

    stats = checkpoint(first)["agent"]["_extra_state"]
    assert stats["count"].item() == pytest.approx(4 * BATCH, rel=1e-3)
    assert ppo.main(["--resume", str(first), "--total-timesteps", str(6 * BATCH)]) == 0
    assert checkpoint(first)["agent"]["_extra_state"]["count"].item() == pytest.approx(6 * BATCH, rel=1e-3)
    capfd.readouterr()
    line = ["--evaluate", str(first), "--eval-episodes", "3", "--num-levels", "1", "--start-level", "500"]
    assert ppo.main(line) == 0
    output = capfd.readouterr()
    assert output.out.startswith("BigfishEasy-v0: return ") and "over 3 episodes" in output.out
    assert problems(output.err) == []


BAD_FLAGS = {
    "close game": ("--env-id StarpilotEsy-v0", "no Procgen game StarpilotEsy-v0; did you mean StarpilotEasy-v0"),
    "another kind of game": ("--env-id Pong-v5", "there is no Procgen game Pong-v5"),
    "negative levels": ("--num-levels=-1", "--num-levels must be from 0"),
    "discount above 1": ("--reward-gamma 1.5", "--reward-gamma must be from 0 to 1"),
    "unknown argument": ('--env-kwargs {"wind":3}', "wind"),
    "arguments that are no JSON": ("--env-kwargs {", "--env-kwargs {"),
    "videos": ("--capture-video", "EnvPool cannot record videos"),
    "unequal minibatches": ("--num-minibatches 7", "cannot be cut into 7 equal minibatches"),
    "resume of nothing": ("--resume nowhere", "nowhere is not a run directory of ppo_procgen.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, capfd):
    line, fragment = BAD_FLAGS[case]
    assert fragment in refusal(line.split(" "), capfd, ppo)


def test_without_envpool(capfd, monkeypatch):
    monkeypatch.setattr(ppo.importlib.util, "find_spec", lambda name: None)
    assert "EnvPool, which has the games, is not installed" in refusal(flags(small(2)), capfd, ppo)


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--help"])
    assert not stop.value.code
    output = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in output for field in fields(ppo.Args))


def test_defaults_are_those_of_train_procgen():
    args = ppo.Args()
    expected = {"num_envs": 64, "num_steps": 256, "num_minibatches": 8, "update_epochs": 3, "learning_rate": 5e-4,
                "anneal_lr": False, "gamma": 0.999, "gae_lambda": 0.95, "clip_coef": 0.2, "ent_coef": 0.01,
                "vf_coef": 0.5, "max_grad_norm": 0.5, "reward_gamma": 0.99, "adam_eps": 1e-5}  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


class Signs:
    """One quarter of the image is white, and the agent must name it, for a reward of 1. Episodes of 8 steps."""

    def __init__(self, args):
        self.num_envs, self.observation_space, self.action_space = args.num_envs, SPACES[0], Discrete(4)

    def show(self):
        """Another quarter."""
        self.shown = self.random.integers(4, size=self.num_envs)
        frames = np.zeros((self.num_envs, 3, 2, 32, 2, 32), np.uint8)
        frames[range(self.num_envs), :, self.shown // 2, :, self.shown % 2] = 255
        return frames.reshape(self.num_envs, 3, 64, 64)

    def reset(self, seed, first_step=0):
        """Begins."""
        self.random, self.steps, self.returns = np.random.default_rng(seed), 0, np.zeros(self.num_envs)
        return self.show()

    def step(self, actions):
        """Compares."""
        rewards = (actions == self.shown).astype(float)
        self.steps, self.returns = self.steps + 1, self.returns + rewards
        over, ends, obs = np.full(self.num_envs, self.steps % 8 == 0), [], self.show()
        if over[0]:
            ends = [ppo.EpisodeEnd(i, total, 8, obs[i], False) for i, total in enumerate(self.returns)]
            self.returns = np.zeros(self.num_envs)
        return obs, rewards, over, ends

    def close(self):
        """Nothing is open."""


@pytest.mark.slow
def test_learns_to_see(monkeypatch):
    """At least 7 of 8 points in an episode on average, within 24 updates of 128 steps; guessing gives 2.

    Seeds 1 to 12 take 4 or 5 updates, with the kernels "default", avx2 and avx512 of ATEN_CPU_CAPABILITY.
    """
    means, end_update = [], ppo.Run.end_update

    def spy(run, ends, values):
        end_update(run, ends, values)
        means.append(np.mean(run.returns[-16:]))
        ppo.SIGNALS[:] = ["success"] if means[-1] >= 7 else []

    monkeypatch.setattr(ppo, "make_envs", Signs)
    monkeypatch.setattr(ppo, "SIGNALS", [])
    monkeypatch.setattr(ppo.Run, "end_update", spy)
    ppo.train(ppo.Args(num_envs=16, num_steps=8, num_minibatches=4, total_timesteps=24 * 128, gamma=0.0))
    assert means[0] < 4 and max(means) >= 7
