"""Every detail's switch changes exactly what it should, and the defaults do what the official code does."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo

ORIGINALS = ppo.gradient_step, ppo.collect_rollout, ppo.Adam.coefficients
SPACES = Box(-1, 1, (4,)), Discrete(3)


class Spy:
    """Trains a little and keeps all that goes in and out of the gradient steps."""

    def __init__(self, monkeypatch, tmp_path, updates=3, **settings):
        self.args = ppo.Args(**{"num_steps": 16, "runs_dir": str(tmp_path)} | settings)
        self.args.total_timesteps = updates * self.args.batch_size
        self.steps, self.rollouts, self.learning_rates = [], [], []
        gradient_step, collect, coefficients = ORIGINALS

        def spy_step(agent, adam, minibatch, clip_coef, step_size, epsilon, args):
            before = adam.parameters.clone()
            terms, log_ratio = gradient_step(agent, adam, minibatch, clip_coef, step_size, epsilon, args)
            self.steps.append(minibatch._asdict() | {"terms": terms, "log_ratio": log_ratio, "clip_coef": clip_coef,
                                                     "moved": adam.parameters - before})  # fmt: skip
            return terms, log_ratio

        def spy_collect(*inputs):
            self.rollouts.append(collect(*inputs))
            return self.rollouts[-1]

        def spy_coefficients(adam, learning_rate, args):
            self.learning_rates.append(learning_rate)
            return coefficients(adam, learning_rate, args)

        monkeypatch.setattr(ppo, "gradient_step", spy_step)
        monkeypatch.setattr(ppo, "collect_rollout", spy_collect)
        monkeypatch.setattr(ppo.Adam, "coefficients", spy_coefficients)
        self.result = ppo.train(self.args)
        lines = (Path(self.result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        self.updates = [row for row in map(json.loads, lines) if "losses/policy_loss" in row]

    def update(self, number):
        """The gradient steps of one update."""
        size = self.args.update_epochs * self.args.num_minibatches
        return self.steps[number * size : (number + 1) * size]


@pytest.fixture
def spy(monkeypatch, tmp_path):
    return lambda **settings: Spy(monkeypatch, tmp_path, **settings)


# Sanity rule of the article, and what is logged -----------------------------------------------------------------------
@pytest.mark.parametrize("shared", [False, True])
def test_ratio_is_1_in_the_first_minibatch_of_every_update(spy, shared):
    run = spy(shared_network=shared, learning_rate=3e-3, updates=5)
    for number in range(5):
        first, second, *_ = run.update(number)
        assert first["log_ratio"].abs().max() < 1e-5  # float32 rounding: other batch shapes in rollout and training
        assert second["log_ratio"].abs().max() > 1e-4


def test_core_12_metrics_are_means_over_all_minibatches(spy):
    run = spy(clip_coef=0.05, learning_rate=1e-2)
    for number, row in enumerate(run.updates):
        steps = run.update(number)
        means = np.mean([step["terms"].numpy() for step in steps], axis=0)
        ours = [row[f"losses/{name}"] for name in ("policy_loss", "value_loss", "entropy")]
        assert ours == pytest.approx(means.tolist(), rel=1e-5, abs=1e-7)
        x = torch.cat([step["log_ratio"] for step in steps]).double().numpy()
        assert row["losses/old_approx_kl"] == pytest.approx(np.mean(-x), rel=1e-3, abs=1e-6)
        assert row["losses/approx_kl"] == pytest.approx(np.mean(np.exp(x) - 1 - x), rel=1e-3, abs=1e-6)
        assert row["losses/official_approx_kl"] == pytest.approx(np.mean(x**2) / 2, rel=1e-3, abs=1e-6)
        assert row["losses/clipfrac"] == pytest.approx(np.mean(np.abs(np.exp(x) - 1) > 0.05), abs=1e-6)
    assert 0 < run.updates[-1]["losses/clipfrac"] < 1


def test_core_12_explained_variance(spy):
    run = spy(updates=2, update_epochs=1)
    for number, row in enumerate(run.updates):
        returns, values = (torch.cat([step[key] for step in run.update(number)]) for key in ("returns", "values"))
        assert row["losses/explained_variance"] == pytest.approx((1 - (returns - values).var() / returns.var()).item())


# Rollout and minibatches ----------------------------------------------------------------------------------------------
def test_core_1_rollouts_have_a_fixed_shape_and_continue(spy):
    run = spy(num_envs=3, num_steps=8, num_minibatches=2)
    for earlier, later in zip(run.rollouts, run.rollouts[1:]):
        assert earlier.obs.shape == (9, 3, 4) and earlier.rewards.shape == (8, 3)
        np.testing.assert_array_equal(earlier.obs[-1], later.obs[0])


@pytest.mark.parametrize("replacement", [False, True])
def test_core_6_an_epoch_uses_every_sample_once(spy, replacement):
    run = spy(minibatch_replacement=replacement, updates=2)
    for number in range(2):
        samples = {row.tobytes() for row in run.rollouts[number].obs[:-1].reshape(-1, 4)}
        steps = run.update(number)
        epochs = [torch.cat([step["obs"] for step in steps[i : i + 4]]) for i in range(0, 16, 4)]
        for epoch in epochs:
            drawn = [row.numpy().tobytes() for row in epoch]
            assert len(drawn) == len(samples) == 64 and set(drawn) <= samples
            assert (len(set(drawn)) == 64) != replacement
        assert not torch.equal(epochs[0], epochs[1])  # a fresh permutation
    assert all(len(step["obs"]) == 16 for step in run.steps)


def test_core_7_normalization(spy):
    cases = ({}, True, False), ({"norm_adv_per_batch": True}, False, True), ({"norm_adv": False}, False, False)
    for switch, per_minibatch, per_batch in cases:
        run = spy(updates=1, update_epochs=1, **switch)
        minibatches = [step["advantages"] for step in run.steps]
        raw = [step["returns"] - step["values"] for step in run.steps]

        def normal(advantages):
            return abs(advantages.mean()) < 1e-6 and abs(advantages.std(correction=0) - 1) < 1e-5

        assert all(map(normal, minibatches)) == per_minibatch
        assert bool(normal(torch.cat(minibatches))) == (per_batch or per_minibatch)
        assert all(torch.equal(*pair) for pair in zip(minibatches, raw)) == (not per_minibatch and not per_batch)


def test_extra_3_population_deviation():
    advantages = torch.randn(5, 8)
    ours, sample = (ppo.normalize(advantages, ppo.Args(population_std=on)) for on in (True, False))
    torch.testing.assert_close(ours.std(-1, correction=0), torch.ones(5))
    torch.testing.assert_close(sample.std(-1), torch.ones(5))
    torch.testing.assert_close(sample, ours * math.sqrt(7 / 8))


# Schedules ------------------------------------------------------------------------------------------------------------
def test_core_4_and_aux_1_annealing(spy):
    fractions = [1, 0.75, 0.5, 0.25]
    run = spy(updates=4)
    assert run.learning_rates[::16] == pytest.approx([2.5e-4 * f for f in fractions])
    assert [row["charts/learning_rate"] for row in run.updates] == run.learning_rates[::16]
    assert {step["clip_coef"] for step in run.steps} == {0.2}
    run = spy(updates=4, anneal_lr=False, anneal_clip=True)
    assert set(run.learning_rates) == {2.5e-4}
    assert [step["clip_coef"] for step in run.steps[::16]] == pytest.approx([0.2 * f for f in fractions])


def test_extra_11_only_whole_rollouts(spy):
    assert ppo.Args().num_updates == 976
    assert ppo.Args(total_timesteps=1023).num_updates == 1


def test_aux_3_early_stopping(spy):
    """An update stops after the first epoch whose own mean KL divergence, not that of all, is above the limit."""
    run = spy(updates=3, learning_rate=3e-3, anneal_lr=False)

    def epoch_kls(number):
        log_ratios = [step["log_ratio"] for step in run.update(number)]
        return [ppo.policy_change(torch.stack(log_ratios[i : i + 4]), 0.2)["losses/approx_kl"] for i in range(0, 16, 4)]

    kls = epoch_kls(0)
    running = [np.mean(kls[: i + 1]) for i in range(4)]
    assert kls[0] < running[1] < kls[1]  # the divergence grows: the mean of all epochs lags behind
    between = (max(kls[0], running[1]) + kls[1]) / 2
    stopped = spy(updates=1, learning_rate=3e-3, anneal_lr=False, target_kl=between)
    assert len(stopped.steps) == 2 * 4
    assert len(spy(updates=2, target_kl=1e-9).steps) == 2 * 4  # one epoch each
    assert len(spy(updates=2, target_kl=1e9).steps) == len(spy(updates=2).steps) == 2 * 16


def test_core_5_lambda(spy):
    lambda_1, usual = spy(gae_lambda=1.0), spy()
    for a, b in zip(lambda_1.steps[:16], usual.steps):
        assert torch.equal(a["obs"], b["obs"]) and not torch.allclose(a["returns"], b["returns"])


# Network and optimizer ------------------------------------------------------------------------------------------------
def test_core_2_initialization():
    agent = ppo.Agent(*SPACES, ppo.Args())
    for network, head_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, gain in zip(network[::2], (2**0.5, 2**0.5, head_gain)):
            weight = layer.weight.detach() / gain
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
            assert not layer.bias.any()
    default = ppo.Agent(*SPACES, ppo.Args(orthogonal_init=False)).actor[2]
    assert default.bias.abs().max() > 0 and default.weight.abs().max() <= 1 / math.sqrt(64)


def test_core_13_separate_or_shared_networks():
    separate, shared = (ppo.Agent(*SPACES, ppo.Args(shared_network=on)) for on in (False, True))
    assert not torch.equal(separate.actor[0].weight, separate.critic[0].weight)
    assert all(shared.actor[i] is shared.critic[i] for i in (0, 2))
    count = [sum(p.numel() for p in agent.parameters()) for agent in (separate, shared)]
    assert count[0] - count[1] == 4 * 64 + 64 + 64 * 64 + 64


def test_core_3_epsilon_and_extra_1_its_place():
    for step in (1, 10, 1000):
        root = math.sqrt(1 - 0.999**step)
        results = {}
        for name, switch in {"official": {}, "torch": {"adam_eps_hat": False}, "tiny": {"adam_eps": 1e-8}}.items():
            adam = ppo.Adam(ppo.Agent(*SPACES, ppo.Args()))
            adam.steps = step - 1
            results[name] = adam.coefficients(1e-3, ppo.Args(**switch))
            assert adam.steps == step
        assert results["official"] == pytest.approx((1e-3 * root / (1 - 0.9**step), 1e-5))
        assert results["torch"] == pytest.approx((results["official"][0], 1e-5 * root))
        assert results["tiny"] == pytest.approx((results["official"][0], 1e-8))


def loss_inputs(batch=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    actions = torch.randint(3, (batch,), generator=generator)
    return [normal(batch, 3).requires_grad_(), normal(batch).requires_grad_(), actions,
            normal(batch) * 0.3 - 1.1, normal(batch), normal(batch), normal(batch)]  # fmt: skip


def ppo_loss(inputs, clip, args):
    """The script's loss of the inputs that reference_loss takes."""
    logits, values, actions, *others = inputs
    batch = ppo.Batch(None, actions, *others)
    return ppo.ppo_loss(*ppo.log_probabilities(logits, actions), values, batch, clip, args)


def reference_loss(inputs, clip, args):
    """The definition, sample by sample in float64."""
    inputs = [x.detach().double().numpy() for x in inputs]
    logits, values, actions, old_log_probs, advantages, returns, old_values = inputs
    policy, value, entropy = [], [], []
    for i in range(len(actions)):
        probs = np.exp(logits[i]) / np.exp(logits[i]).sum()
        ratio = probs[int(actions[i])] / np.exp(old_log_probs[i])
        gain = ratio * advantages[i]
        if args.clip_policy:
            gain = min(gain, min(max(ratio, 1 - clip), 1 + clip) * advantages[i])
        error = (values[i] - returns[i]) ** 2
        if args.clip_vloss:
            clipped = old_values[i] + min(max(values[i] - old_values[i], -clip), clip)
            error = max(error, (clipped - returns[i]) ** 2)
        policy.append(-gain), value.append(0.5 * error), entropy.append(-(probs * np.log(probs)).sum())
    terms = np.mean(policy), np.mean(value), np.mean(entropy)
    return terms[0] - args.ent_coef * terms[2] + args.vf_coef * terms[1], terms


@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_core_8_9_10_loss_equals_its_definition(seed, clip_policy, clip_vloss, ent_coef, vf_coef, clip):
    args = ppo.Args(clip_policy=clip_policy, clip_vloss=clip_vloss, ent_coef=ent_coef, vf_coef=vf_coef)
    inputs = loss_inputs(8, seed)
    loss, terms, log_ratio = ppo_loss(inputs, clip, args)
    expected, expected_terms = reference_loss(inputs, clip, args)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert terms.tolist() == pytest.approx(expected_terms, rel=1e-4, abs=1e-5)
    log_probs, _ = ppo.log_probabilities(inputs[0], inputs[2])
    torch.testing.assert_close(log_ratio, (log_probs - inputs[3]).detach())


def gradients(args, clip=0.1):
    """Gradients of the policy loss by log-probability and of the value loss by value."""
    inputs = loss_inputs()
    loss, _, log_ratio = ppo_loss(inputs, clip, args)
    by_logits, by_values = torch.autograd.grad(loss, inputs[:2])
    return inputs, log_ratio.exp(), by_logits.abs().sum(-1), by_values


def test_core_8_no_gradient_where_the_ratio_left_the_range_for_gain():
    inputs, ratio, clipped, _ = gradients(ppo.Args(ent_coef=0))
    _, _, free, _ = gradients(ppo.Args(ent_coef=0, clip_policy=False))
    advantages = inputs[4]
    left = ((ratio > 1.1) & (advantages > 0)) | ((ratio < 0.9) & (advantages < 0))
    assert left.any() and not left.all()
    assert not clipped[left].any() and (free[left] > 0).all()
    torch.testing.assert_close(clipped[~left], free[~left])


def test_core_9_value_gradient_stops_where_the_clipped_error_is_larger():
    inputs, _, _, clipped = gradients(ppo.Args())
    _, _, _, free = gradients(ppo.Args(clip_vloss=False))
    _, values, _, _, _, returns, old_values = inputs
    clipped_values = old_values + (values - old_values).clamp(-0.1, 0.1)
    stopped = ((values - old_values).abs() > 0.1) & ((clipped_values - returns) ** 2 > (values - returns) ** 2)
    assert stopped.any() and not stopped.all()
    assert not clipped[stopped].any() and (free[stopped] != 0).all()
    torch.testing.assert_close(clipped[~stopped], free[~stopped])


def test_core_10_coefficients_weigh_the_terms():
    inputs = loss_inputs()
    losses = {}
    for ent_coef, vf_coef in ((0, 0), (1, 0), (0, 1)):
        losses[ent_coef, vf_coef], terms, _ = ppo_loss(inputs, 0.2, ppo.Args(ent_coef=ent_coef, vf_coef=vf_coef))
    torch.testing.assert_close(losses[0, 0].detach(), terms[0])
    torch.testing.assert_close((losses[1, 0] - losses[0, 0]).detach(), -terms[2])
    torch.testing.assert_close((losses[0, 1] - losses[0, 0]).detach(), terms[1])


@pytest.mark.parametrize("limit", [0.01, 0.5, math.inf])
def test_core_11_global_norm(limit):
    """The first moment after one step is a tenth of the clipped gradient: same direction, norm at most the limit."""
    args = ppo.Args(max_grad_norm=limit)
    agent = ppo.Agent(*SPACES, args)
    adam = ppo.Adam(agent)
    obs, others = torch.randn(64, 4), loss_inputs()[2:]
    loss, _, _ = ppo_loss([*agent(obs), *others], 0.2, args)
    free = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adam.tensors)])
    ppo.gradient_step(agent, adam, ppo.Batch(obs, *others), 0.2, 0.0, 1e-5, args)
    used = adam.moment1 / 0.1
    assert used.norm().item() == pytest.approx(min(limit, free.norm().item()), rel=1e-4)
    torch.testing.assert_close(used / used.norm(), free / free.norm(), rtol=1e-4, atol=1e-6)


def test_parameters_are_views_of_one_vector():
    """A step on the vector moves the network, and loading weights moves the vector."""
    agent = ppo.Agent(*SPACES, ppo.Args())
    adam = ppo.Adam(agent)
    adam.step(torch.ones_like(adam.parameters), 0.1, 1e-5)
    flat = torch.cat([p.detach().flatten() for p in agent.parameters()])
    assert torch.equal(flat, adam.parameters)
    agent.load_state_dict({key: torch.zeros_like(value) for key, value in agent.state_dict().items()})
    assert not adam.parameters.any()


@pytest.mark.parametrize("script", ["ppo", "ppo_continuous", "ppo_multidiscrete"])
@pytest.mark.parametrize(
    "samples, cores, threads", [(128, 8, 1), (2047, 8, 1), (2048, 8, 2), (32768, 8, 8), (2048, 1, 1)]
)
def test_large_minibatches_take_more_threads(monkeypatch, script, samples, cores, threads):
    module = importlib.import_module(script)
    asked = []
    monkeypatch.setattr(module, "THREADS", cores)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    # That is said before anything is made.
    monkeypatch.setattr(module, "make_envs", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.train(module.Args(num_envs=4, num_steps=samples, num_minibatches=4, total_timesteps=4 * samples))
    assert asked == [threads]


def test_actions_follow_the_policy():
    """Gumbel argmax samples from the softmax of the logits."""
    args = ppo.Args(num_envs=2, num_steps=4000)
    envs = ppo.make_envs(args)
    agent = ppo.Agent(envs.observation_space, envs.action_space, args)
    torch.nn.init.zeros_(agent.actor[4].weight)
    agent.actor[4].bias.data = torch.tensor([0.3, 0.7]).log()
    obs = envs.reset(seed=0)
    torch.manual_seed(0)
    rollout = ppo.collect_rollout(agent, envs, obs, args)
    share = rollout.actions.mean(0)
    np.testing.assert_allclose(share, 0.7, atol=0.03)  # four standard errors of 4000 draws
    assert not np.array_equal(rollout.actions[:, 0], rollout.actions[:, 1])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("inputs", [(4,), (3, 4), (2, 3, 4)])
def test_acting_in_numpy_is_the_network(shared, inputs):
    """as_numpy gives the outputs of the network for the present weights, for one observation and for many."""
    agent = ppo.Agent(*SPACES, ppo.Args(shared_network=shared))
    adam = ppo.Adam(agent)
    for _ in range(2):
        adam.parameters += torch.randn(adam.parameters.shape)
        x = torch.randn(inputs)
        for network in (agent.actor, agent.critic):
            expected = network(x).detach().numpy()
            np.testing.assert_allclose(ppo.as_numpy(network)(x.numpy()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "network",
    [
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)),
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)),
        torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 3)),
        torch.nn.Linear(4, 3),
    ],
)
def test_other_networks_act_in_pytorch(network, capsys):
    """Otherwise actions would be drawn from another policy than the one that is trained, without a sign of it."""
    ppo.say.cache_clear()
    x = torch.randn(5, 4)
    with torch.no_grad():
        np.testing.assert_array_equal(ppo.as_numpy(network)(x.numpy()), network(x).numpy())
    assert capsys.readouterr().err.count("acts in PyTorch") == 1
