"""Agreement of ppo_continuous.py with numbers recorded from the official implementation.

See test_parity.py for the tolerances; what both scripts have in the same lines is tested there (GAE, schedules).
"""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import ppo_continuous as ppo

# The official variables in the order of agent.parameters(); TensorFlow's weights are [in, out], PyTorch's [out, in].
LAYERS = ["pi/mlp_fc0", "pi/mlp_fc1", "pi", "vf/mlp_fc0", "vf/mlp_fc1", "vf"]


def official_vector(data, stage: str) -> torch.Tensor:
    """All variables of a stage ("vars0", "grads1", ...) as one vector in the order of the agent's parameters."""
    parts = [data[f"{stage}/pi/logstd"].reshape(-1)]
    for layer in LAYERS:
        parts += [data[f"{stage}/{layer}/w"].T.reshape(-1), data[f"{stage}/{layer}/b"].reshape(-1)]
    return torch.from_numpy(np.concatenate(parts))


class Setup:
    """An agent with the official initial variables, and the recorded minibatches."""

    def __init__(self, load_fixture, **settings):
        self.data = load_fixture("update_gaussian")
        self.args = ppo.Args(
            ent_coef=float(self.data["ent_coef"]),
            vf_coef=float(self.data["vf_coef"]),
            max_grad_norm=float(self.data["max_grad_norm"]),
            adam_eps=float(self.data["adam_epsilon"]),
            **settings,
        )
        self.agent = ppo.Agent(Box(-1, 1, (11,)), Box(-1, 1, (3,)), self.args)
        self.adam = ppo.Adam(self.agent)
        self.adam.parameters.copy_(official_vector(self.data, "vars0"))

    def minibatch(self, update: int) -> ppo.Batch:
        """Inputs of gradient_step for update 0..4, advantages normalized by the script."""
        keys = ("obs", "actions", "returns", "values", "neglogpacs")
        rows = {key: torch.from_numpy(self.data[key][update]) for key in keys}
        advantages = ppo.normalize(rows["returns"] - rows["values"], self.args)
        return ppo.Batch(rows["obs"], rows["actions"], -rows["neglogpacs"], advantages, rows["returns"], rows["values"])

    def step(self, update: int):
        """One official `Model.train` call: returns the loss terms and the log-ratios before it."""
        coefficients = self.adam.coefficients(float(self.data["lr"][update]), self.args)
        clip_coef = float(self.data["cliprange"][update])
        return ppo.gradient_step(self.agent, self.adam, self.minibatch(update), clip_coef, *coefficients, self.args)


def test_forward_pass(load_fixture):
    """Means, values, log-densities and entropies of the official network, in PyTorch and in NumPy."""
    setup = Setup(load_fixture)
    data, minibatch = setup.data, setup.minibatch(0)
    mean, log_std, values = setup.agent(minibatch.obs)
    neglogp = -ppo.log_probabilities(mean, log_std, minibatch.actions)[0]
    for ours, key in ((mean, "out_pi"), (values, "out_vf"), (neglogp, "out_neglogp")):
        torch.testing.assert_close(ours, torch.from_numpy(data[key][0]), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(ppo.as_numpy(setup.agent.actor)(data["obs"][0]), data["out_pi"][0], rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(log_std.detach(), data["vars0/pi/logstd"][0])


def test_normalized_advantages(load_fixture):
    setup = Setup(load_fixture)
    for update in range(5):
        official = torch.from_numpy(setup.data["advs_normalized"][update])
        torch.testing.assert_close(setup.minibatch(update).advantages, official, rtol=1e-5, atol=1e-6)


def test_statistics_gradients_and_parameters_over_five_updates(load_fixture):
    """Stage by stage: loss, statistics, gradient before the clip and its norm, parameters and moments after."""
    setup = Setup(load_fixture)
    data, args = setup.data, setup.args
    assert (data["grad_norm"] > args.max_grad_norm).any() and (data["grad_norm"] < args.max_grad_norm).any()
    for update in range(5):
        minibatch, clip_coef = setup.minibatch(update), float(data["cliprange"][update])
        mean, log_std, values = setup.agent(minibatch.obs)
        log_probs, entropy = ppo.log_probabilities(mean, log_std, minibatch.actions)
        loss, _, _ = ppo.ppo_loss(log_probs, entropy, values, minibatch, clip_coef, args)
        assert loss.item() == pytest.approx(float(data["loss"][update]), rel=1e-5, abs=1e-6)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, setup.adam.tensors)])
        expected = official_vector(data, f"grads{update + 1}")
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()
        assert gradient.square().sum().sqrt().item() == pytest.approx(float(data["grad_norm"][update]), rel=1e-5)

        terms, log_ratio = setup.step(update)
        change = ppo.policy_change(log_ratio, clip_coef)
        ours = [*terms.tolist(), change["losses/official_approx_kl"], change["losses/clipfrac"]]
        assert list(data["stat_names"]) == ["policy_loss", "value_loss", "policy_entropy", "approxkl", "clipfrac"]
        assert ours == pytest.approx(data["stats"][update].tolist(), rel=1e-5, abs=1e-6)

        start, expected = official_vector(data, "vars0"), official_vector(data, f"vars{update + 1}")
        torch.testing.assert_close(setup.adam.parameters, expected, rtol=0, atol=2e-7)
        # The parameters move by less than 1e-3, so that the bound above would be weak alone.
        assert (setup.adam.parameters - expected).norm() <= 1e-4 * (expected - start).norm()
    for moment, name in ((setup.adam.moment1, "m"), (setup.adam.moment2, "v")):
        torch.testing.assert_close(moment, official_vector(data, f"adam5/{name}"), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("switch", "at_least"), [("adam_eps_hat", 0.2), ("population_std", 5e-5)])
def test_pytorch_habits_do_not_match(load_fixture, switch, at_least):
    """With PyTorch's epsilon or deviation the parameters end elsewhere: the parity above is no accident."""
    setup = Setup(load_fixture, **{switch: False})
    for update in range(5):
        setup.step(update)
    start, expected = (official_vector(setup.data, stage) for stage in ("vars0", "vars5"))
    assert (setup.adam.parameters - expected).norm() > at_least * (expected - start).norm()


@pytest.mark.parametrize("case", [0, 1])
def test_running_statistics(load_fixture, case):
    """Observations and rewards of the official VecNormalize at every step, then its final statistics."""
    data = load_fixture("vecnormalize")
    recorded = {key.split("/")[1]: data[key] for key in data.files if key.startswith(f"case{case}/")}
    assert (float(recorded["clipob"]), float(recorded["cliprew"])) == (10, 10)
    args = ppo.Args(gamma=float(recorded["gamma"]))
    obs_stats, return_stats = ppo.RunningMeanStd(recorded["raw_obs"].shape[2:]), ppo.RunningMeanStd(())
    for raw, official in zip(recorded["raw_obs"], recorded["obs"], strict=True):
        np.testing.assert_allclose(ppo.normalize_obs(raw, obs_stats, args, update=True), official, rtol=1e-6, atol=1e-9)
    for name in ("mean", "var", "count"):
        np.testing.assert_allclose(getattr(obs_stats, name), recorded[f"ob_{name}"], rtol=1e-9)

    # In rollouts of unequal lengths, so that what goes on from one to the next is covered too.
    returns, variances, rewards = np.zeros(recorded["dones"].shape[1]), [], []
    for start, end in ((0, 1), (1, 2), (2, 40), (40, len(recorded["dones"]))):
        raw, dones = recorded["raw_rewards"][start:end], recorded["dones"][start:end].astype(bool)
        rewards.append(ppo.normalize_rewards(raw, dones, returns, return_stats, args))
        np.testing.assert_allclose(returns, recorded["ret_after_step"][end - 1], rtol=1e-6, atol=1e-9)
        variances.append((end - 1, float(return_stats.var)))
    np.testing.assert_allclose(np.concatenate(rewards), recorded["rewards"], rtol=1e-6, atol=1e-9)
    for step, variance in variances:
        assert variance == pytest.approx(recorded["ret_var_after_step"][step], rel=1e-6)
    for name in ("mean", "var", "count"):
        np.testing.assert_allclose(getattr(return_stats, name), recorded[f"ret_{name}"], rtol=1e-6)
    if case == 1:  # one environment: the very first reward is divided by about 0.01 and clipped [extra-31]
        assert rewards[0] == 10
