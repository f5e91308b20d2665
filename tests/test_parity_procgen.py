"""Agreement of ppo_procgen.py's network and update with numbers recorded from the official implementation.

The fixtures' README says how they were recorded. The tolerances are those of test_parity_atari.py.
"""

import hashlib

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from test_parity_atari import torch_layout

import ppo_procgen


def official_layers(agent: ppo_procgen.Agent) -> list[torch.nn.Module]:
    """The agent's layers in the order of the recorded variables, each with a weight and a bias."""
    layers = []
    for convolution, blocks in zip(agent.network.convolutions, agent.network.blocks, strict=True):
        layers += [convolution, *(part for block in blocks for part in (block.convolution1, block.convolution2))]
    return [*layers, agent.network.linear, agent.actor, agent.critic]


class Setup:
    """An agent with the official initial variables, and the recorded minibatches."""

    def __init__(self, load_fixture, **settings):
        self.data = data = load_fixture("update_impala")
        limits = {name: float(data[name]) for name in ("ent_coef", "vf_coef", "max_grad_norm")}
        self.args = ppo_procgen.Args(**limits, **settings)
        self.agent = ppo_procgen.Agent(Box(0, 255, (3, 64, 64), np.uint8), Discrete(15), self.args)
        self.adam = ppo_procgen.Adam(self.agent)
        self.names = [str(name) for name in data["var_names"]]
        parameters = [part for layer in official_layers(self.agent) for part in (layer.weight, layer.bias)]
        places = {id(tensor): place for place, tensor in enumerate(self.adam.tensors)}
        self.places = [places[id(parameter)] for parameter in parameters]
        random = np.random.RandomState(int(data["init_seed"]))
        for name, row, parameter in zip(self.names, data["var_shapes"], parameters, strict=True):
            shape = [int(size) for size in row if size]
            is_bias = name.endswith(("/b", "/bias"))
            scale = 0.05 if is_bias else np.sqrt(0.8 / np.prod(shape[:-1]))
            variable = (random.randn(*shape) * scale).astype(np.float32)
            parameter.data.copy_(torch.from_numpy(torch_layout("/b" if is_bias else "", variable).copy()))

    def minibatch(self, update: int) -> ppo_procgen.Batch:
        """Inputs of gradient_step for update 0 or 1, advantages normalized by the script."""
        obs = self.data["obs_blocks"][update].repeat(4, 1).repeat(4, 2)
        assert hashlib.sha256(obs.tobytes()).hexdigest() == str(self.data["obs_sha256"][update])
        keys = ("actions", "returns", "values", "neglogpacs")
        rows = {key: torch.from_numpy(self.data[key][update]) for key in keys}
        advantages = ppo_procgen.normalize(rows["returns"] - rows["values"], self.args)
        obs = torch.from_numpy(obs.transpose(0, 3, 1, 2).copy())
        rest = rows["actions"], -rows["neglogpacs"], advantages, rows["returns"], rows["values"]
        return ppo_procgen.Batch(obs, *rest)

    def coefficients(self, update: int) -> tuple[float, float, float]:
        """Clip range, step size and epsilon of an update."""
        step_size, epsilon = self.adam.coefficients(float(self.data["lr"][update]), self.args)
        return float(self.data["cliprange"][update]), step_size, epsilon

    def check(self, stage: str, vector: torch.Tensor, rtol: float, atol: float) -> None:
        """Asserts that a vector of all parameters is the official one: sums, norms and recorded entries."""
        parts = vector.split([tensor.numel() for tensor in self.adam.tensors])
        for name, place in zip(self.names, self.places, strict=True):
            ours = parts[place].view_as(self.adam.tensors[place]).numpy()
            ours = ours.transpose(2, 3, 1, 0) if ours.ndim == 4 else ours.T  # as TensorFlow has it
            official = {key: self.data[f"{stage}/{name}/{key}"] for key in ("sum", "l2", "idx", "val")}
            close = dict(rtol=rtol, err_msg=f"{stage}/{name}")
            np.testing.assert_allclose(ours.reshape(-1)[official["idx"]], official["val"], atol=atol, **close)
            norm = np.sqrt(np.square(ours, dtype=np.float64).sum())
            np.testing.assert_allclose(norm, official["l2"], atol=10 * atol, **close)
            np.testing.assert_allclose(ours.sum(dtype=np.float64), official["sum"], atol=atol * ours.size, **close)


def test_initial_variables(load_fixture):
    setup = Setup(load_fixture)
    setup.check("vars0", setup.adam.parameters, 1e-7, 0)


def test_forward_pass(load_fixture):
    """[procgen-1] [extra-38] [extra-39] Logits, values, log-probabilities and entropies of the official network."""
    setup = Setup(load_fixture)
    obs, actions = setup.minibatch(0)[:2]
    with torch.no_grad():
        logits, values = setup.agent(obs)
    log_probs, entropy = ppo_procgen.log_probabilities(logits, actions)
    for ours, key in ((logits, "out_pi"), (values, "out_vf"), (-log_probs, "out_neglogp"), (entropy, "out_entropy")):
        torch.testing.assert_close(ours, torch.from_numpy(setup.data[key][0]), rtol=1e-5, atol=1e-5)


def test_two_updates(load_fixture):
    """Loss terms, gradients, their norm and parameters through two updates."""
    setup = Setup(load_fixture)
    data = setup.data
    for update in range(2):
        minibatch = setup.minibatch(update)
        expected = torch.from_numpy(data["advs_normalized"][update])
        torch.testing.assert_close(minibatch.advantages, expected, rtol=1e-5, atol=1e-6)
        coefficients = setup.coefficients(update)
        logits, values = setup.agent(minibatch.obs)
        log_probs, entropy = ppo_procgen.log_probabilities(logits, minibatch.actions)
        loss, _, _ = ppo_procgen.ppo_loss(log_probs, entropy, values, minibatch, coefficients[0], setup.args)
        np.testing.assert_allclose(loss.item(), data["loss"][update], rtol=1e-5, atol=1e-6)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, setup.adam.tensors)])
        np.testing.assert_allclose(gradient.square().sum().sqrt().item(), data["grad_norm"][update], rtol=1e-5)
        setup.check(f"grads{update + 1}", gradient, 2e-4, 5e-5)
        terms, log_ratio = ppo_procgen.gradient_step(setup.agent, setup.adam, minibatch, *coefficients, setup.args)
        change = ppo_procgen.policy_change(log_ratio, coefficients[0])
        ours = [*terms.tolist(), change["losses/official_approx_kl"], change["losses/clipfrac"]]
        np.testing.assert_allclose(ours, data["stats"][update], rtol=1e-5, atol=2e-6)
        setup.check(f"vars{update + 1}", setup.adam.parameters, 1e-6, 3e-7)


@pytest.mark.parametrize("setting", ["same_pooling", "channels_last", "adam_eps_hat", "population_std", "clip_vloss"])
def test_other_settings_leave_parity(load_fixture, setting):
    """The comparison above is sharp enough to notice every one of these."""
    setup = Setup(load_fixture, **{setting: False})
    ppo_procgen.gradient_step(setup.agent, setup.adam, setup.minibatch(0), *setup.coefficients(0), setup.args)
    with pytest.raises(AssertionError):
        setup.check("vars1", setup.adam.parameters, 1e-6, 3e-7)
